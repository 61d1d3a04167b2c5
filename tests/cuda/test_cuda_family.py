"""The family on the CUDA backend: every field and random combinations against the reference, on every way to call."""

from __future__ import annotations

import dataclasses

import cuda_row
import numpy as np
import pytest
from harness import DROPOUT_SEED, REFERENCE, Case, model_of, problem, solve
from host_cuda import FakeCupy
from tolerances import assert_close

from fastlstm import ArgumentError, dispatch
from fastlstm.backends.base import Dropout, Signature
from fastlstm.backends.cuda import plans
from fastlstm.backends.cuda.phased import is_phased
from fastlstm.cell import ACTIVATIONS, Cell
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.parameters import shapes

pytestmark = pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))

PAPER = {"forget_gate": False, "block_size": 2, "truncated": True, "activations": ("sigmoid", "1997", "1997")}
# Fields of the kernels' time step.
STEP = [
    {},
    {"forget_gate": False},
    {"coupled": True},
    {"block_size": 2},
    {"block_size": 3, "coupled": True},
    {"truncated": True},
    {"peephole": True, "forget_gate": False},
    {"peephole": True, "coupled": True, "truncated": True},
    *({"activations": (gate, "tanh", "tanh")} for gate in ACTIVATIONS if gate not in ("1997", "sigmoid")),
    *({"activations": ("sigmoid", candidate, "tanh")} for candidate in ACTIVATIONS if candidate != "tanh"),
    *({"activations": ("sigmoid", "tanh", output)} for output in ACTIVATIONS if output != "tanh"),
    {"clip": 0.4},
    {"clip": 0.4, "peephole": True},
    {"clip": 0.7, "coupled": True},
    {"clip": 1e300},
    {"clip": 3.0, "activations": ("hard_sigmoid", "relu", "tanh")},
    {"cell_clip": 0.3},
    {"cell_clip": 0.3, "peephole": True},
    PAPER,
]
ONE_WAY = [{"reverse": True}, {"reverse": True, "peephole": True, "truncated": True}]
MERGES = [{"merge": merge} for merge in ("sum", "mean", "product")]
# H is a multiple of neither dtype's wide loads, and of both, and divided by every size of blocks.
SMALL = {"steps": 4, "batch": 3, "inputs": 2, "hidden": 6}
WIDE = {"steps": 5, "batch": 5, "inputs": 3, "hidden": 12}
RAGGED = {"steps": 6, "batch": 5, "inputs": 3, "hidden": 12, "layers": 2, "lengths": "zeros", "resets": True}


def case_of(fields, sizes, **more):
    return Case(**sizes | more, fields=tuple(fields.items()))


def random_case(number):
    """Draw a combination of fields that means something."""
    rng = np.random.default_rng([2026, number])
    choices = {
        "peephole": [True], "forget_gate": [False], "coupled": [True], "block_size": [2, 3], "truncated": [True],
        "activations": [tuple(map(str, rng.choice([a for a in ACTIVATIONS if a != "1997"], 3)))],
        "clip": [0.5, 2.0], "cell_clip": [0.4], "reverse": [True], "merge": ["sum", "mean", "product"],
    }  # fmt: skip
    while True:
        chosen = {name: rng.choice(np.array(values, object)) for name, values in choices.items() if rng.random() < 0.4}
        fields = {name: tuple(v) if isinstance(v, np.ndarray | tuple | list) else v for name, v in chosen.items()}
        bidirectional = bool(rng.random() < 0.4)
        try:
            Cell(2, 6, bidirectional=bidirectional, **fields)
        except ArgumentError:
            continue
        return case_of(
            fields, [SMALL, WIDE][int(rng.integers(2))], layers=int(rng.integers(1, 3)), bidirectional=bidirectional,
            bias=bool(rng.random() < 0.7), lengths="zeros" if rng.random() < 0.4 else None,
            resets=bool(rng.random() < 0.5), batch_first=bool(rng.random() < 0.3), state=bool(rng.random() < 0.7),
            seed=number,
        )  # fmt: skip


def library():
    """CuPy, or a stand-in whose kernels are compiled quickly: each variant is compiled for itself."""
    return cuda_row.library() if cuda_row.on_gpu() else FakeCupy(options=("-O0",))


def solve_on(xp, p):
    """Run forward and backward on a library; all results on the host, by name."""
    params = {name: xp.array(value) for name, value in p.params.items()}
    resets = None if p.resets is None else xp.array(p.resets)
    with cuda_row.installed(xp):
        y, (h_n, c_n), tape = lstm_forward(
            params, xp.array(p.x), p.state and tuple(map(xp.array, p.state)), p.lengths, batch_first=p.batch_first,
            **model_of(p), dropout_seed=DROPOUT_SEED, resets=resets,
        )  # fmt: skip
        grads = lstm_backward(params, tape, xp.array(p.dy), tuple(map(xp.array, p.dstate)))
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    return {name: value.get() for name, value in found.items()}


CASES = [
    *(case_of(fields, SMALL) for fields in [PAPER, *STEP[:8], *STEP[-8:], *ONE_WAY]),
    *(case_of(fields, RAGGED, bidirectional=True) for fields in STEP + MERGES),
    *(case_of(fields, WIDE | {"resets": True}) for fields in [{}, PAPER, *ONE_WAY]),
    *(case_of(fields, RAGGED) for fields in ONE_WAY),
    *(case_of(fields, WIDE, bidirectional=True, layers=2) for fields in MERGES),
    *map(random_case, range(24)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_results_and_gradients_are_those_of_the_reference(case, dtype):
    p = problem(case)
    assert_close("agreement", solve_on(library(), p.astype(dtype)), solve(p, REFERENCE), backend="cuda", dtype=dtype)


# Fields that make a phase of their own, and what goes with them.
PHASED = [
    {"proj_size": 3},
    {"layer_norm": True},
    {"layer_norm": True, "block_size": 2, "proj_size": 2},
    {"peephole": True, "block_size": 2},
    {"peephole": True, "block_size": 3, "coupled": True, "layer_norm": True, "truncated": True},
    {"layer_norm": True, "coupled": True, "peephole": True, "cell_clip": 0.3},
    {"recurrent_dropout": 0.4},
    {"zoneout": (0.3, 0.0)},
    {"zoneout": (0.0, 0.4)},
    {"zoneout": (0.3, 0.4), "proj_size": 3, "peephole": True, "clip": 0.5},
    {"zoneout": (0.2, 0.3), "recurrent_dropout": 0.2, "truncated": True},
    {"proj_size": 2, "truncated": True, "forget_gate": False, "block_size": 3},
    *({"proj_size": 3, "activations": (gate, "1997", "1997")} for gate in ACTIVATIONS if gate != "1997"),
    *({"proj_size": 3, "activations": ("sigmoid", other, other)} for other in ACTIVATIONS),
    {"proj_size": 3, "reverse": True},
    {"nonlinearity": "tanh"},
    {"nonlinearity": "relu"},
    {"nonlinearity": "tanh", "reverse": True},
]


def random_phased_case(number):
    """Draw a combination of fields of which one makes a phase of its own."""
    rng = np.random.default_rng([2027, number])
    choices = {
        "peephole": [True], "forget_gate": [False], "coupled": [True], "block_size": [2, 3], "clip": [0.5],
        "activations": [tuple(map(str, rng.choice([a for a in ACTIVATIONS if a != "1997"], 3)))], "cell_clip": [0.4],
        "proj_size": [2, 3], "layer_norm": [True], "recurrent_dropout": [0.3], "zoneout": [(0.2, 0.3), (0.0, 0.5)],
        "reverse": [True], "merge": ["sum", "mean", "product"], "nonlinearity": ["tanh", "relu"], "truncated": [True],
    }  # fmt: skip
    while True:
        chosen = {name: rng.choice(np.array(values, object)) for name, values in choices.items() if rng.random() < 0.3}
        fields = {name: tuple(v) if isinstance(v, np.ndarray | tuple | list) else v for name, v in chosen.items()}
        bidirectional = bool(rng.random() < 0.4)
        try:
            if not is_phased(Cell(2, 6, bidirectional=bidirectional, **fields)):
                continue
        except ArgumentError:
            continue
        return case_of(
            fields, SMALL, layers=int(rng.integers(1, 3)), bidirectional=bidirectional, bias=bool(rng.random() < 0.7),
            lengths="zeros" if rng.random() < 0.5 else None, resets=bool(rng.random() < 0.5),
            batch_first=bool(rng.random() < 0.3), state=bool(rng.random() < 0.7), seed=number,
        )  # fmt: skip


PHASED_CASES = [
    *(case_of(fields, SMALL) for fields in PHASED),
    *(case_of(fields, RAGGED, bidirectional=True) for fields in PHASED if "reverse" not in fields),
    *(case_of(fields, RAGGED) for fields in PHASED if "reverse" in fields),
    *(case_of({"proj_size": 3, **merge}, RAGGED, bidirectional=True) for merge in MERGES),
    *map(random_phased_case, range(80)),
]


@pytest.mark.parametrize("case", PHASED_CASES, ids=str)
def test_cells_of_several_phases_are_those_of_the_reference(case, dtype):
    p = problem(case)
    claim = "layer norm" if p.cell.layer_norm else "agreement"
    assert_close(claim, solve_on(library(), p.astype(dtype)), solve(p, REFERENCE), backend="cuda", dtype=dtype)


PADDED = [{"coupled": True}, {"merge": "product"}, {"layer_norm": True, "peephole": True}, {"zoneout": (0.2, 0.3)},
          {"nonlinearity": "relu"}]  # fmt: skip


@pytest.mark.parametrize("fields", PADDED, ids=str)
def test_what_stands_in_the_padding_does_not_matter(fields, dtype):
    p = problem(case_of(fields, RAGGED, bidirectional=True)).astype(dtype)
    expected = solve_on(library(), p)
    padding = np.arange(RAGGED["steps"])[:, None] >= p.lengths
    for array in (p.x, p.dy):
        array[padding] = np.nan
    found = solve_on(library(), dataclasses.replace(p, resets=p.resets | padding))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


STEPS = [{}, {"peephole": True}, PAPER, {"cell_clip": 0.3}, {"proj_size": 3}, {"zoneout": (0.3, 0.2)},
         {"layer_norm": True}, {"nonlinearity": "tanh"}]  # fmt: skip


@pytest.mark.parametrize("lengths", [None, "zeros"])
@pytest.mark.parametrize("fields", STEPS, ids=str)
def test_the_gradients_by_the_states_of_each_step(fields, lengths, dtype):
    p = problem(case_of(fields, WIDE, bidirectional=True, layers=2, resets=True, lengths=lengths))
    found = {}
    for xp in (library(), np):
        given = p.astype(dtype) if xp is not np else p
        of = (lambda value: value) if xp is np else (lambda value: value.get())
        params = {name: xp.array(value) for name, value in given.params.items()}
        active = REFERENCE.active() if xp is np else cuda_row.installed(xp)
        with active:
            call = dispatch.backend_for(params["weight_hh_l0"]).prepare(
                given.cell, Signature(WIDE["steps"], WIDE["batch"], True, False)
            )
            draws = Dropout(0.0, 5) if p.cell.draws else None
            state = tuple(map(xp.array, given.state))
            tape = call.forward(
                params, xp.array(given.x), *state, given.lengths, draws, False, xp.array(given.resets)
            ).tape
            for _ in range(2):  # the tape is only read
                grads = call.backward(params, tape, xp.array(given.dy), *map(xp.array, given.dstate), True)
            plain = call.backward(params, tape, xp.array(given.dy), *map(xp.array, given.dstate))
        found[xp is np] = {"dh": of(grads.steps.h), "dc": of(grads.steps.c), "dx": of(grads.x)}
        assert plain.steps is None
        np.testing.assert_array_equal(of(plain.x), found[xp is np]["dx"])
    claim = "layer norm" if p.cell.layer_norm else "agreement"
    assert_close(claim, found[False], found[True], backend="cuda", dtype=dtype)


@pytest.mark.parametrize("fields", [*STEPS, {"coupled": True, "clip": 0.4}, {"zoneout": (0.2, 0.0)}], ids=str)
def test_streaming_and_chunks_give_the_whole_sequence_s_result(fields, dtype):
    """The random masks of training have no part in it: in inference, zoneout is its expectation."""
    p = problem(case_of(fields, WIDE, layers=2, resets=True)).astype(dtype)
    xp = library()
    with cuda_row.installed(xp):
        params = {name: xp.array(value) for name, value in p.params.items()}
        x, resets, state = xp.array(p.x), xp.array(p.resets), tuple(map(xp.array, p.state))
        whole, last = lstm_inference(p.cell, params, x, state, resets)
        first, between = lstm_inference(p.cell, params, x[:2], state, resets[:2])
        second, end = lstm_inference(p.cell, params, x[2:], between, resets[2:])
        chunks = {"y": np.concatenate([first.get(), second.get()]), "h": end[0].get(), "c": end[1].get()}
        steps, now = [], state
        for x_t in x:
            call = dispatch.backend_for(x).prepare(p.cell, Signature(1, WIDE["batch"], False, False))
            y, *now = call.step(params, x_t, *now)
            steps.append(y.get())
        alone, now_whole = lstm_inference(p.cell, params, x, state, None)
    whole = {"y": whole.get(), "h": last[0].get(), "c": last[1].get()}
    assert_close("streaming", chunks, whole, backend="cuda", dtype=dtype)
    found = {"y": np.stack(steps), "h": now[0].get(), "c": now[1].get()}
    expected = {"y": alone.get(), "h": now_whole[0].get(), "c": now_whole[1].get()}
    claim = "layer norm" if p.cell.layer_norm else "agreement"
    assert_close(claim, found, expected, backend="cuda", dtype=dtype)


def lstm_inference(cell, params, x, state, resets):
    call = dispatch.backend_for(x).prepare(cell, Signature(len(x), x.shape[1], False, False))
    y, h, c, tape = call.forward(params, x, *state, None, None, False, resets)
    assert tape is None
    return y, (h, c)


PERSISTENT = [
    {"coupled": True, "clip": 0.4}, {"reverse": True, "peephole": True}, PAPER,
    {"cell_clip": 0.3, "activations": ("hard_sigmoid", "softsign", "tanh")},
]  # fmt: skip


@pytest.mark.parametrize("resets", [False, True], ids=["no resets", "resets"])
@pytest.mark.parametrize("fields", PERSISTENT, ids=str)
def test_persistent_kernels_run_the_step_s_variants(fields, resets, monkeypatch):
    monkeypatch.setattr(plans, "FORCED", "persistent")
    dtype = np.dtype(np.float32)
    case = case_of(fields, {"steps": 4, "batch": 5, "inputs": 3, "hidden": 100}, lengths="zeros", resets=resets)
    p, xp = problem(case), FakeCupy(architecture="80")
    assert_close("agreement", solve_on(xp, p.astype(dtype)), solve(p, REFERENCE), backend="cuda", dtype=dtype)
    assert {"persistent_forward", "persistent_backward"} <= set(xp.pool.launched)
    assert not any(name.startswith("step") for name in xp.pool.launched)


def test_a_plan_says_how_a_variant_runs():
    xp = library()
    with cuda_row.installed(xp):
        backend = dispatch.backend_named("cuda")
        said = backend.plan(Cell(3, 6, proj_size=2), 4, 12, 3, False)
        assert said == ["array operations step after step, for proj_size"]
        assert "each step" in backend.plan(Cell(3, 6, coupled=True, dtype=np.dtype(np.float64)), 4, 12, 3, False)[0]


@pytest.mark.parametrize("fields", [{"coupled": True}, {"proj_size": 2}, {"nonlinearity": "relu"}], ids=str)
@pytest.mark.parametrize("steps", [0, 2])
def test_nothing_to_do_gives_zeros(fields, steps):
    """No time step, or no sequence."""
    cell, xp = Cell(3, 6, 2, dtype=np.dtype(np.float64), **fields), library()
    batch = 0 if steps else 2
    with cuda_row.installed(xp):
        params = {name: xp.array(np.ones(shape)) for name, shape in shapes(cell).items()}
        call = dispatch.backend_named("cuda").prepare(cell, Signature(steps, batch, True, False))
        x = xp.array(np.ones((steps, batch, 3)))
        y, h, c, tape = call.forward(params, x, None, None, None, None, False)
        grads = call.backward(params, tape, None, None, None, True)
        assert y.shape == (steps, batch, cell.output_size) and not grads.x.get().any()
        assert h.shape == (2, batch, cell.h_size) and c.shape == (2, batch, cell.c_size)
        assert {name: value.shape for name, value in grads.params.items()} == shapes(cell)
        assert not any(value.get().any() for value in grads.params.values())


def test_nothing_waits_for_the_device_and_the_gradients_are_one_array():
    for fields in ({"coupled": True, "block_size": 2}, {"layer_norm": True}, {"zoneout": (0.2, 0.3)}):
        p, xp = problem(case_of(fields, WIDE, lengths="zeros", resets=True)), FakeCupy(options=("-O0",))
        params = {name: xp.array(value) for name, value in p.params.items()}
        x, dy, resets, state = xp.array(p.x), xp.array(p.dy), xp.array(p.resets), tuple(map(xp.array, p.state))
        with cuda_row.installed(xp):
            xp.pool.waits.clear()
            _, _, tape = lstm_forward(params, x, state, p.lengths, **model_of(p), dropout_seed=1, resets=resets)
            grads = lstm_backward(params, tape, dy, None)
            assert xp.pool.waits == []
            flat = grads.params.flat.get()
        np.testing.assert_array_equal(flat, np.concatenate([v.get().reshape(-1) for v in grads.params.values()]))
