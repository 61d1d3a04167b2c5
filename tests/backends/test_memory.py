"""The compiled kernels stay inside their arrays, read nothing that was not written, and need no more than is promised.

Every array that the backend allocates, and every one it is given, lies here between two margins of NaN, and
fresh memory is NaN too: a write outside shows in a margin, a read outside or too early in the results.
"""

from __future__ import annotations

import sys
import tracemalloc
import types
from dataclasses import dataclass

import numpy as np
import pytest
from harness import DROPOUT_SEED, REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close

from fastlstm import LSTM, RNN, calls, dispatch, use_backend
from fastlstm.backends.base import Dropout, Signature
from fastlstm.backends.cpu import rows
from fastlstm.backends.cpu.autotune import Trials
from fastlstm.backends.cpu.workspace import POOL, Scratch
from fastlstm.frozen import FrozenParams

MARGIN = 64  # elements on each side: more than a vector, a tile's row or a cache line of either dtype
CASES = [
    *(Case(4, batch, 5, 7, 2, True, lengths="zeros", dropout=0.3) for batch in (1, 2, 6, 7, 13)),
    *(Case(3, 7, inputs, hidden) for inputs in (1, 8, 17) for hidden in (1, 8, 15, 16, 17, 33)),
    Case(5, 12, 16, 32, lengths="zeros"),
    Case(9, 20, 64, 96, bidirectional=True, lengths="zeros"),  # enough work for several threads
    Case(2, 67, 130, 137),  # several slices of the weights, and more rows than go over one at a time
    Case(1, 1, 3, 5, 2, bias=False),
    *(Case(*rows, 9, 33, 2) for rows in ((1, 4), (4, 1), (2, 2), (1, 8))),  # unpacked weights
    Case(4, 3, 2, 5, 2, True, lengths=(0, 0, 0)),
    *(Case(*rows, 9, 33, 2, peephole=True) for rows in ((1, 1), (2, 7), (6, 13))),
    Case(9, 20, 64, 97, bidirectional=True, lengths="zeros", peephole=True),
    # Cells with phases; blocks of units that begin and end inside a vector.
    *(
        Case(*sizes, bidirectional=True, lengths="zeros", fields=fields)
        for sizes in ((4, 3, 5, 9, 2), (3, 31, 17, 33))
        for fields in (
            (("peephole", True), ("block_size", 3)),
            (("peephole", True), ("block_size", 3), ("layer_norm", True), ("coupled", True)),
            (("proj_size", 3), ("zoneout", (0.2, 0.1))),
            (("recurrent_dropout", 0.3), ("layer_norm", True), ("proj_size", 5)),
        )
    ),
]


class Guarded:
    """Makes arrays between margins, and remembers them."""

    def __init__(self):
        self.buffers = []
        self.gaps = []  # between arrays that are parts of one

    def margins(self):
        """Every margin, and what it is full of."""
        for buffer, count, fill in self.buffers:
            yield buffer[:MARGIN], fill
            yield buffer[MARGIN + count :], fill
        for gap in self.gaps:
            yield gap, np.nan

    def empty(self, shape, dtype=np.float64, order="C"):
        assert order == "C"
        dtype, count = np.dtype(dtype), int(np.prod(shape))
        fill = np.nan if dtype.kind == "f" else np.iinfo(dtype).min // 3
        buffer = np.full(count + 2 * MARGIN, fill, dtype)
        self.buffers.append((buffer, count, fill))
        return buffer[MARGIN : MARGIN + count].reshape(shape)

    def zeros(self, shape, dtype=np.float64):
        array = self.empty(shape, dtype)
        array[...] = 0
        return array

    def full(self, shape, value, dtype):
        array = self.empty(shape, dtype)
        array[...] = value
        return array

    def empty_like(self, like, order="C", subok=False):
        assert not subok
        return self.empty(like.shape, like.dtype, order)

    def array(self, value, dtype=None, order="C", subok=False):
        assert order == "C" and not subok
        array = self.empty(np.shape(value), dtype or value.dtype)
        array[...] = value
        return array

    def check(self):
        for margin, fill in self.margins():
            untouched = np.isnan(margin) if np.isnan(fill) else margin == fill
            assert untouched.all(), f"a kernel wrote outside an array of {margin.dtype}"


class GuardedScratch(Scratch):
    """Scratch memory whose arrays, parts of one block, have margins between them; fresh for each call."""

    def __init__(self, guard):
        super().__init__()
        self.guard = guard

    @staticmethod
    def layout(itemsize, shapes):
        """Place arrays in a block as the library does, but for the margins; the last one, for none, has no end."""
        starts, end = [], 0
        for shape in shapes:
            starts.append(end)
            end += (int(np.prod(shape)) + MARGIN) * itemsize
        return starts, end

    def borrow(self, workspace):
        memory = self.guard.empty((workspace.size,), workspace.dtype)
        ends = [start - MARGIN for start in (*workspace.starts[1:], workspace.size)]
        self.guard.gaps += [memory[end : end + MARGIN] for end in ends]
        return memory

    def give_back(self, workspace, memory):
        """Keep nothing."""


@dataclass(frozen=True)
class GuardedBackend(BackendUnderTest):
    """The CPU backend, with margins around what it is given."""

    guard: Guarded

    def array(self, value):
        return self.guard.array(value)


@pytest.fixture
def guarded(monkeypatch):
    """Replace NumPy's allocating functions in the CPU backend and what it calls, and check the margins at the end."""
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    dispatch.backend_named("cpu")
    guard = Guarded()
    names = ("empty", "zeros", "full", "empty_like", "array")
    guarded_numpy = types.SimpleNamespace(**(vars(np) | {name: getattr(guard, name) for name in names}))

    def one_block(dtype, *shapes, lasting=False):
        return [guard.empty(shape, dtype) for shape in shapes]

    for name, module in list(sys.modules.items()):
        if name.startswith("fastlstm.backends.cpu.") or name == "fastlstm.backends.plain_arrays":
            if hasattr(module, "np"):
                monkeypatch.setattr(module, "np", guarded_numpy)
            if hasattr(module, "one_block"):
                monkeypatch.setattr(module, "one_block", one_block)
            if hasattr(module, "_nothing"):
                module._nothing.cache_clear()
    monkeypatch.setattr(sys.modules["fastlstm.backends.cpu.workspace"], "_layout", GuardedScratch.layout)
    monkeypatch.setattr(sys.modules["fastlstm.backends.cpu.launch"], "SCRATCH", GuardedScratch(guard))
    forget()
    yield guard
    guard.check()
    forget()


def forget():
    """Forget what calls before have prepared: workspaces without margins, or with them."""
    calls._cells.clear()
    rows._kept_index.cache_clear()


def inferred(p):
    """Return what the reference infers; no mask is drawn."""
    call = dispatch.backend_named("reference").prepare(p.cell, Signature(*p.x.shape[:2], False, False))
    result = call.forward(p.params, p.x, *p.state, p.lengths, None, False)
    return {"y": result.y, "h_n": result.h_n, "c_n": result.c_n}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_stays_inside_its_arrays(guarded, dtype, case):
    p = problem(case)
    found = solve(p.astype(dtype), GuardedBackend("cpu", guarded))
    assert len(guarded.buffers) > 20
    assert_close("agreement", found, solve(p, REFERENCE), backend="cpu", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_without_the_gradient_by_the_input_stays_inside_its_arrays(guarded, dtype, case):
    p, to = problem(case).astype(dtype), guarded.array
    params, state, dstate = {name: to(value) for name, value in p.params.items()}, map(to, p.state), map(to, p.dstate)
    call = dispatch.backend_named("cpu").prepare(p.cell, Signature(case.steps, case.batch, True, False))
    draws = Dropout(p.cell.dropout, DROPOUT_SEED) if p.cell.draws else None
    tape = call.forward(params, to(p.x), *state, p.lengths, draws, False).tape
    found = call.backward(params, tape, to(p.dy), *dstate, input_gradient=False)
    expected = solve(problem(case), REFERENCE)
    found = {"dh0": found.h0, "dc0": found.c0} | {f"d{name}": value for name, value in found.params.items()}
    expected = {name: expected[name] for name in found}
    assert_close("agreement", found, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_stays_inside_its_arrays(guarded, dtype, case):
    p = problem(case)
    expected = inferred(p)
    p = p.astype(dtype)
    params, (h0, c0) = {name: guarded.array(value) for name, value in p.params.items()}, map(guarded.array, p.state)
    call = dispatch.backend_named("cpu").prepare(p.cell, Signature(case.steps, case.batch, False, False))
    result = call.forward(params, guarded.array(p.x), h0, c0, p.lengths, None, False)
    found = {"y": result.y, "h_n": result.h_n, "c_n": result.c_n}
    assert_close("agreement", found, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_frozen_model_stays_inside_its_arrays(guarded, dtype, case):
    p = problem(case)
    expected = inferred(p)
    p = p.astype(dtype)
    params, signature = FrozenParams(p.cell, p.params), Signature(case.steps, case.batch, False, True)
    call = dispatch.backend_named("cpu").prepare(p.cell, signature)
    x, (h0, c0) = guarded.array(p.x), map(guarded.array, p.state)
    for _ in range(2):  # the first call packs the weights
        result = call.forward(params, x, h0, c0, p.lengths, None, False)
        found = {"y": result.y, "h_n": result.h_n, "c_n": result.c_n}
        assert_close("agreement", found, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("peephole", [False, True], ids=["", "peephole"])
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("batch", [1, 2, 6, 7, 13, 40])
@pytest.mark.parametrize(("inputs", "hidden"), [(1, 1), (5, 7), (16, 16), (17, 33), (3, 100)])
def test_a_step_stays_inside_its_arrays(guarded, dtype, batch, inputs, hidden, frozen, peephole):
    p = problem(Case(1, batch, inputs, hidden, 2, peephole=peephole))
    expected = solve(p, REFERENCE)
    p = p.astype(dtype)
    params = {name: guarded.array(value) for name, value in p.params.items()}
    params = FrozenParams(p.cell, params) if frozen else params
    state = map(guarded.array, p.state)
    call = dispatch.backend_named("cpu").prepare(p.cell, Signature(1, batch, False, frozen))
    y, h, c = call.step(params, guarded.array(p.x[0]), *state)
    expected = {name: expected[name].reshape(value.shape) for name, value in (("y", y), ("h_n", h), ("c_n", c))}
    assert_close("agreement", {"y": y, "h_n": h, "c_n": c}, expected, backend="cpu", dtype=dtype)


def most_bytes(model, steps, batch, lengths):
    """Most bytes that a training pass holds at once beyond its inputs and outputs, as NumPy allocates them."""
    x = np.ones((steps, batch, model.cell.input_size), model.cell.dtype)
    dy = np.ones((steps, batch, model.cell.output_size), model.cell.dtype)

    def train():
        y, state, tape = model.forward(x, lengths=lengths)
        grads = model.backward(tape, dy)
        return y, *state, grads.x, *grads.state, *grads.params.values()

    train()  # compiles
    scratch = Scratch()
    with pytest.MonkeyPatch.context() as kept:  # from earlier calls, it would not be counted
        kept.setattr(sys.modules["fastlstm.backends.cpu.launch"], "SCRATCH", scratch)
        POOL.clear()
        return traced(train)


def traced(train):
    """Most bytes that a training pass holds at once beyond its outputs."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        outputs = train()
        return tracemalloc.get_traced_memory()[1] - before - sum(array.nbytes for array in outputs)
    finally:
        tracemalloc.stop()


PROMISED = 7  # numbers for each hidden unit, step, sequence, layer and direction: the docstring of LSTM.backward


@pytest.mark.parametrize("way", [0, -1], ids=["first plan", "last plan"])  # that may be the fastest
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize(("layers", "bidirectional"), [(1, False), (1, True), (3, False), (2, True)])
def test_a_training_pass_allocates_no_more_than_is_promised(dtype, layers, bidirectional, ragged, way, monkeypatch):
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    # A plan that has its try between two calls would bring working memory of its own.
    monkeypatch.setattr(Trials, "pick", lambda self, kind, ways: way % ways)
    steps, batch, inputs, hidden = 200, 8, 64, 64  # 64 units are whole vectors on every processor
    model = LSTM(inputs, hidden, layers, bidirectional=bidirectional, dtype=dtype, seed=0)
    directions = model.cell.num_directions
    promised = PROMISED * layers * directions + 2 * (layers - 1) * directions
    if ragged:  # a copy of a layer's input, and for each row of it its place and that in reverse, in 8 bytes each
        promised += max(inputs, directions * hidden * (layers > 1)) / hidden + 16 / model.cell.dtype.itemsize / hidden
    with use_backend("cpu"):
        once, twice = (
            most_bytes(model, count, batch, [count - 1] + [count] * (batch - 1) if ragged else None)
            for count in (steps, 2 * steps)
        )
    assert (twice - once) / (steps * batch * hidden * model.cell.dtype.itemsize) <= promised + 0.01


PHASED = [
    (8, {"peephole": True, "block_size": 2}),
    (8, {"zoneout": (0.1, 0.1), "recurrent_dropout": 0.3}),
    (9, {"proj_size": 32}),
    (19, {"layer_norm": True}),
    (11, {"proj_size": 32, "bidirectional": True, "merge": "product"}),
    (3, {"nonlinearity": "tanh"}),
]


@pytest.mark.parametrize(("promised", "fields"), PHASED, ids=str)
def test_a_cell_with_phases_allocates_no_more_than_is_promised(promised, fields, monkeypatch):
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    monkeypatch.setattr(Trials, "pick", lambda self, kind, ways: 0)
    model = (RNN if "nonlinearity" in fields else LSTM)(64, 64, seed=0, **fields)
    with use_backend("cpu"):
        once, twice = (most_bytes(model, count, 8, None) for count in (200, 400))
    used = (twice - once) / (200 * 8 * 64 * 4 * model.cell.num_directions)
    assert promised / 2 < used <= promised + 0.01  # less than half would mean that this measures something else
