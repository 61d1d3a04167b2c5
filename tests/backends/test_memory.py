"""The compiled kernels stay inside their arrays, read nothing that was not written, and need no more than is promised.

Every array that the backend allocates, and every one it is given, lies here between two margins of NaN, and
fresh memory is NaN too: a write outside shows in a margin, a read outside or too early in the results.
"""

from __future__ import annotations

import dataclasses
import sys
import tracemalloc
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close

from fastlstm import LSTM, calls, dispatch, use_backend
from fastlstm.backends.base import Signature
from fastlstm.backends.cpu import rows
from fastlstm.backends.cpu.autotune import Trials
from fastlstm.backends.cpu.workspace import POOL, Pool, Scratch, Workspace, is_to_be_cleared, new_array, one_block
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.vector import CACHE_LINE

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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_stays_inside_its_arrays(guarded, dtype, case):
    p = problem(case)
    found = solve(p.astype(dtype), GuardedBackend("cpu", guarded))
    assert len(guarded.buffers) > 20
    assert_close("agreement", found, solve(p, REFERENCE), backend="cpu", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_inference_stays_inside_its_arrays(guarded, dtype, case):
    p = problem(dataclasses.replace(case, dropout=0.0))
    expected = solve(p, REFERENCE)
    p = p.astype(dtype)
    params, (h0, c0) = {name: guarded.array(value) for name, value in p.params.items()}, map(guarded.array, p.state)
    call = dispatch.backend_named("cpu").prepare(p.cell, Signature(case.steps, case.batch, False, False))
    result = call.forward(params, guarded.array(p.x), h0, c0, p.lengths, None, False)
    found = {"y": result.y, "h_n": result.h_n, "c_n": result.c_n}
    expected = {name: expected[name] for name in found}
    assert_close("agreement", found, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_frozen_model_stays_inside_its_arrays(guarded, dtype, case):
    p = problem(dataclasses.replace(case, dropout=0.0))
    expected = solve(p, REFERENCE)
    p = p.astype(dtype)
    params, signature = FrozenParams(p.cell, p.params), Signature(case.steps, case.batch, False, True)
    call = dispatch.backend_named("cpu").prepare(p.cell, signature)
    x, (h0, c0) = guarded.array(p.x), map(guarded.array, p.state)
    for _ in range(2):  # the first call packs the weights
        result = call.forward(params, x, h0, c0, p.lengths, None, False)
        found = {"y": result.y, "h_n": result.h_n, "c_n": result.c_n}
        assert_close("agreement", found, {name: expected[name] for name in found}, backend="cpu", dtype=dtype)


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


def test_the_arrays_of_a_block_are_apart_and_each_starts_a_cache_line(dtype):
    shapes = [(3, 5), (0, 7), (16,), (1, 1, 1), (2, 16)]
    for _ in range(8):  # blocks lie at different places
        arrays = one_block(dtype, *shapes)
        assert [(a.shape, a.dtype) for a in arrays] == [(shape, dtype) for shape in shapes]
        assert all(a.flags.carray and a.ctypes.data % CACHE_LINE == 0 for a in arrays)
        for number, array in enumerate(arrays):
            array[...] = number
        assert all((array == number).all() for number, array in enumerate(arrays))


@pytest.fixture
def pool(monkeypatch):
    """An empty pool in the place of the library's."""
    pool = Pool()
    monkeypatch.setattr(sys.modules["fastlstm.backends.cpu.workspace"], "POOL", pool)
    return pool


def large(elements=Pool.LEAST):
    (array,) = one_block(np.dtype("float64"), (elements,))
    return array


def test_a_block_is_kept_when_its_last_array_is_gone_and_used_again(pool):
    one, other = one_block(np.dtype("float64"), (Pool.LEAST,), (3,))
    address = one.ctypes.data
    view = one.reshape(2, -1)[1:, ::2]
    del one
    assert pool.size == 0
    del view
    assert pool.size == 0, "of its two arrays one is in use"
    del other
    assert pool.size >= Pool.LEAST * 8
    much_smaller = large(Pool.LEAST // 3)
    assert much_smaller.ctypes.data != address, "most of the block would lie idle"
    smaller = large(Pool.LEAST * 2 // 3)
    assert smaller.ctypes.data == address
    assert pool.size == 0


def test_the_smallest_block_that_fits_is_taken(pool):
    """Else calls that need several sizes would have to make a new one each time."""
    sizes = [2, 1, 3, 1]
    blocks = [large(size * Pool.LEAST) for size in sizes]
    addresses = {block.ctypes.data for block in blocks}
    for order in (sizes, sizes[::-1], sorted(sizes)):
        del blocks
        blocks = [large(size * Pool.LEAST) for size in order]
        assert {block.ctypes.data for block in blocks} == addresses


def test_the_pool_keeps_no_more_than_it_may_and_nothing_that_is_too_small(pool, monkeypatch):
    monkeypatch.setattr(Pool, "MOST", 5 * 8 * Pool.LEAST)
    several = [large(factor * Pool.LEAST) for factor in (1, 2, 1, 2)]
    while several:
        several.pop()
    assert 0 < pool.size <= Pool.MOST
    larger = large(3 * Pool.LEAST)
    assert pool.size == 0, "what is kept never comes on top of a new block"
    del larger
    too_large = large(6 * Pool.LEAST)
    del too_large
    assert pool.size == 0
    small = one_block(np.dtype("float32"), (8,))
    del small
    assert pool.size == 0


@pytest.mark.parametrize("elements", [5, Pool.LEAST, 2 * Pool.LEAST])
def test_padding_that_no_kernel_clears_is_zero(pool, dtype, elements, monkeypatch):
    monkeypatch.setattr(Pool, "MOST", 8 * Pool.LEAST)
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 7, dtype))  # memory used before
    array = new_array((elements, 5), dtype, padded=True)
    assert is_to_be_cleared(array) == (array.nbytes <= Pool.MOST)
    assert is_to_be_cleared(array) or not array.any()


@pytest.mark.parametrize("elements", [5, Pool.LEAST])
def test_an_array_for_the_caller_is_his_until_he_drops_it(pool, dtype, elements):
    addresses = set()
    for _ in range(3):
        array = new_array((elements, 2), dtype)
        assert (array.shape, array.dtype) == ((elements, 2), dtype) and array.flags.carray
        array[...] = 1.0
        part = array[1:2]
        addresses.add(array.ctypes.data)
        del array
        other = new_array((elements, 2), dtype)
        other[...] = 0.0
        assert (part == 1.0).all(), "a view keeps the memory"
        addresses.add(other.ctypes.data)
        del other, part
    assert elements < Pool.LEAST or len(addresses) == 2


def test_scratch_is_lent_to_one_call_at_a_time_and_kept_for_a_few_kinds_of_calls_only(dtype):
    scratch, workspace = Scratch(), Workspace(dtype, (3, 4), (5,))
    one, other = scratch.borrow(workspace), scratch.borrow(workspace)
    assert one.shape == (workspace.size,) and one.dtype == dtype and one.flags.carray
    assert not np.shares_memory(one, other)
    scratch.give_back(workspace, one)
    assert scratch.borrow(workspace) is one
    scratch.give_back(workspace, one)
    for size in range(Scratch.KINDS):
        another = Workspace(dtype, (size,))
        scratch.give_back(another, scratch.borrow(another))
    assert scratch.borrow(workspace) is not one, "too many kinds: all were forgotten"
    large = Workspace(dtype, (Pool.LEAST,))
    lent = scratch.borrow(large)
    scratch.give_back(large, lent)
    assert scratch.borrow(large) is not lent, "the pool keeps large ones"


def test_the_arrays_of_a_workspace_are_apart_and_each_starts_a_cache_line(dtype):
    shapes = [(3, 5), (0, 7), (16,), (1, 1, 1), (2, 16)]
    workspace = Workspace(dtype, *shapes)
    memory = Scratch().borrow(workspace)
    assert memory.ctypes.data % CACHE_LINE == 0
    ends = [start + int(np.prod(shape)) for start, shape in zip(workspace.starts, shapes, strict=True)]
    assert all(end <= start for end, start in zip(ends, (*workspace.starts[1:], workspace.size), strict=True))
    assert all(start * dtype.itemsize % CACHE_LINE == 0 for start in workspace.starts)


def test_no_block_is_in_two_hands(pool):
    """Not even if garbage collection returns one while another is taken, in some threads at once."""

    def work(number):
        rng, held = np.random.default_rng(number), []
        for turn in range(150):
            array = large(int(rng.integers(1, 4)) * Pool.LEAST // 4)
            mark = 1000.0 * number + turn
            array[:: 1 << 12] = mark
            cycle = [array]
            cycle.append(cycle)  # only the collector frees it
            held.append((array, mark))
            if len(held) > 3:
                kept, expected = held.pop(int(rng.integers(len(held))))
                assert (kept[:: 1 << 12] == expected).all()
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_a_tape_keeps_its_values_while_other_calls_come_and_go(pool, dtype):
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16, 8)).astype(dtype)
    dy = rng.normal(size=(64, 16, 96)).astype(dtype)
    with use_backend("cpu"):
        lstm = LSTM(8, 96, dtype=dtype, seed=0)
        expected = lstm.backward(lstm.forward(x)[2], dy)
        tapes = [lstm.forward(x)[2] for _ in range(3)]
        assert tapes[0].record.layers[0].directions[0].gates.nbytes > Pool.LEAST
        lstm(-x)
        lstm.backward(lstm.forward(-x)[2], dy)
        for tape in tapes:
            np.testing.assert_array_equal(lstm.backward(tape, dy).x, expected.x)


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
