"""The variants of the cell step on the CPU's kernels: against the reference, in both drivers, by every call."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, results, solve
from tolerances import assert_close

import fastlstm
from fastlstm import LSTM, ArgumentError
from fastlstm.cell import ACTIVATIONS, Cell

CPU = BackendUnderTest("cpu")
pytestmark = pytest.mark.skipif(CPU.missing is not None, reason=str(CPU.missing))

PAPER = {"forget_gate": False, "block_size": 2, "truncated": True, "activations": ("sigmoid", "1997", "1997")}
FIELDS = [
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
    {"clip": 3.0, "activations": ("hard_sigmoid", "relu", "tanh")},
    {"cell_clip": 0.3},
    {"cell_clip": 0.3, "peephole": True},
    PAPER,
]
ONE_WAY = [{"reverse": True}, {"reverse": True, "peephole": True, "truncated": True}]
MERGES = [{"merge": merge} for merge in ("sum", "mean", "product")]
# H is no multiple of a vector, and divided by every size of blocks.
SMALL = {"steps": 4, "batch": 3, "inputs": 2, "hidden": 6}
LARGE = {"steps": 9, "batch": 21, "inputs": 5, "hidden": 18}
RAGGED = {"steps": 12, "batch": 7, "inputs": 3, "hidden": 12, "layers": 2, "lengths": "zeros", "resets": True}


def case_of(fields, sizes, **more):
    return Case(**sizes | more, fields=tuple(fields.items()))


def random_case(number):
    """Draw a combination of fields that means something."""
    rng = np.random.default_rng([25, number])
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
        sizes = [SMALL, LARGE][int(rng.integers(2))]
        return case_of(
            fields, sizes, layers=int(rng.integers(1, 3)), bidirectional=bidirectional, bias=bool(rng.random() < 0.7),
            lengths="zeros" if rng.random() < 0.4 else None, resets=bool(rng.random() < 0.5),
            batch_first=bool(rng.random() < 0.3), state=bool(rng.random() < 0.7), seed=number,
        )  # fmt: skip


CASES = [
    *(case_of(fields, sizes) for fields in FIELDS + ONE_WAY for sizes in (SMALL, LARGE)),
    *(case_of(fields, RAGGED, bidirectional=True) for fields in FIELDS + MERGES),
    *(case_of(fields, RAGGED) for fields in ONE_WAY),
    *(case_of(fields, LARGE, bidirectional=True, layers=2) for fields in MERGES),
    *(case_of({}, sizes, resets=True) for sizes in (SMALL, LARGE)),
    *map(random_case, range(60)),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.sampled
def test_results_and_gradients_are_those_of_the_reference(case, dtype):
    p = problem(case)
    assert_close("agreement", solve(p.astype(dtype), CPU), solve(p, REFERENCE), backend="cpu", dtype=dtype)


def model_of(case, dtype):
    p = problem(case).astype(dtype)
    sizes = case.inputs, case.hidden, case.layers
    fields = {"bidirectional": case.bidirectional, "bias": case.bias, "batch_first": case.batch_first}
    lstm = LSTM(*sizes, **fields, **dict(case.fields), dtype=dtype)
    lstm.params.update(p.params)
    return lstm, p


@pytest.mark.parametrize("fields", FIELDS + ONE_WAY, ids=str)
def test_the_kernels_run_it(fields):
    """No variant of the step is left to the reference."""
    assert "step after step" not in LSTM(2, 6, seed=0, **fields).plan(np.ones((9, 3, 2), np.float32))


@pytest.mark.parametrize("sizes", [SMALL, RAGGED], ids=["small", "ragged"])
@pytest.mark.parametrize("fields", FIELDS + ONE_WAY, ids=str)
def test_gates_computed_again_give_the_same_bits(fields, sizes, dtype):
    lstm, p = model_of(case_of(fields, sizes), dtype)
    found = []
    for recompute in (False, True):
        y, state, tape = lstm.forward(p.x, p.state, p.lengths, p.resets, recompute=recompute)
        found.append(results(CPU, y, *state, lstm.backward(tape, p.dy, p.dstate)))
    for name, value in found[0].items():
        np.testing.assert_array_equal(found[1][name], value, err_msg=name)


@pytest.mark.parametrize("fields", [{}, *FIELDS], ids=str)
def test_a_frozen_model_streams_to_the_same_bits(fields, dtype):
    case = case_of(fields, SMALL, layers=2)
    lstm, p = model_of(case, dtype)
    frozen = lstm.freeze()
    y, last = frozen(p.x, p.state)
    state = p.state
    for t in range(case.steps):
        h, state = frozen.step(p.x[t], state)
        np.testing.assert_array_equal(h, y[t])
    for found, expected in zip(state, last, strict=True):
        np.testing.assert_array_equal(found, expected)
    trained, _, tape = frozen.forward(p.x, p.state)
    np.testing.assert_array_equal(trained, y)
    expected = solve(problem(case), REFERENCE)
    given = results(CPU, y, *last, frozen.backward(tape, p.dy, p.dstate))
    assert_close("agreement", given, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_any_chunking_gives_the_whole_sequence_s_result(fields, dtype):
    case = case_of(fields, RAGGED, lengths=None)
    lstm, p = model_of(case, dtype)
    y, last = lstm(p.x, p.state, resets=p.resets)
    first, between = lstm(p.x[:5], p.state, resets=p.resets[:5])
    second, end = lstm(p.x[5:], between, resets=p.resets[5:])
    found = {"y": np.concatenate([first, second]), "h_n": end[0], "c_n": end[1]}
    expected = {"y": y, "h_n": last[0], "c_n": last[1]}
    assert_close("agreement", found, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("backend", [REFERENCE, CPU], ids=lambda backend: backend.name)
@pytest.mark.parametrize("fields", [{}, {"peephole": True}, {"reverse": True}, PAPER], ids=str)
def test_a_reset_is_the_start_of_another_sequence(backend, fields, dtype):
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((9, 4, size)).astype(dtype) for size in (3, 6))
    lstm = LSTM(3, 6, seed=0, dtype=dtype, **fields)
    resets = np.zeros((9, 4), bool)
    resets[4 if fields.get("reverse") else 5] = True  # before x[4], seen from the end, or before x[5]
    with backend.active():
        y, _, tape = lstm.forward(x, resets=resets)
        grads = lstm.backward(tape, dy)
        parts = [lstm.forward(part) for part in (x[:5], x[5:])]
        backs = [lstm.backward(part[2], d) for part, d in zip(parts, (dy[:5], dy[5:]), strict=True)]
    found = {"y": y, "dx": grads.x} | dict(grads.params)
    expected = {"y": np.concatenate([part[0] for part in parts]), "dx": np.concatenate([back.x for back in backs])}
    expected |= {name: sum(back.params[name] for back in backs) for name in grads.params}
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("batch", [4, 40], ids=["units divided", "rows divided"])
def test_threads_give_the_same_bits(batch, resets):
    case = case_of({"truncated": True}, {"steps": 12, "batch": batch, "inputs": 8, "hidden": 128}, resets=resets)
    for fields in ((), case.fields):
        p = problem(dataclasses.replace(case, fields=fields)).astype(np.float32)
        before, found = fastlstm.get_num_threads(), []
        try:
            for threads in (1, 2):
                fastlstm.set_num_threads(threads)
                # Which schedule runs is measured: some calls, so that each has its turn.
                found.append([solve(p, CPU) for _ in range(12 if threads == 2 else 1)])
        finally:
            fastlstm.set_num_threads(before)
        for again in found[1]:
            for name, value in found[0][0].items():
                np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.parametrize("fields", [{}, {"peephole": True, "coupled": True, "clip": 0.5}, {"reverse": True}, PAPER],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [SMALL, RAGGED], ids=["small", "ragged"])
def test_gradients_by_the_states_are_those_of_the_reference(fields, sizes, dtype):
    case = case_of(fields, sizes, bidirectional=sizes is RAGGED and not fields.get("reverse"))
    expected = None
    for backend, of in ((REFERENCE, np.float64), (CPU, dtype)):
        lstm, p = model_of(case, of)
        with backend.active():
            y, state, tape = lstm.forward(p.x, p.state, p.lengths, p.resets)
            grads = lstm.backward(tape, p.dy, p.dstate, keep_state_gradients=True)
        found = results(CPU, y, *state, grads) | {"dh": grads.steps.h, "dc": grads.steps.c}
        expected = expected or found
    assert_close("agreement", found, expected, backend="cpu", dtype=dtype)


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "1997"])
@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.sampled
def test_a_clip_stops_the_gradient_from_the_bound_on_and_no_sooner(name, side, dtype):
    """Close below the bound, where the activated value may round to that of the bound."""
    bound = 2.0
    below = float(np.nextafter(dtype.type(bound), dtype.type(0)))
    a = side * np.array([below, bound, 2 * bound], dtype)
    lstm = LSTM(1, 1, bias=False, clip=bound, activations=(name, name, "tanh"), dtype=dtype)
    for array in lstm.params.values():
        array[:] = 0
    lstm.params["weight_ih_l0"][:] = 1  # the pre-activations of all gates are x
    found = {}
    for backend in (REFERENCE, CPU):
        with backend.active():
            _, _, tape = lstm.forward(a.reshape(1, 3, 1))
            found[backend.name] = lstm.backward(tape, np.ones((1, 3, 1), dtype)).x.ravel()
    assert not found["cpu"][1:].any()
    assert_close("agreement", {"dx": found["cpu"]}, {"dx": found["reference"]}, backend="cpu", dtype=dtype)
    # A relu is flat on its negative side, and so is, from -2.5 on, a hard sigmoid.
    assert found["cpu"][0] or (name == "relu" and side < 0)


def test_without_a_forget_gate_the_cell_state_stays_as_it_is(dtype):
    lstm = LSTM(3, 5, forget_gate=False, seed=0, dtype=dtype)
    lstm.params["weight_ih_l0"][5:10] = lstm.params["weight_hh_l0"][5:10] = 0  # of the candidate
    rng = np.random.default_rng(0)
    state = tuple(rng.standard_normal((1, 2, 5)).astype(dtype) for _ in range(2))
    _, (_, c) = lstm(rng.standard_normal((1000, 2, 3)).astype(dtype), state)
    np.testing.assert_array_equal(c, state[1])


def test_a_variant_compiles_none_of_the_drivers_again():
    from fastlstm.kernels.cpu.jit import KERNELS

    def signatures():
        return {
            id(kernel): len(kernel.overloads) for kernel in KERNELS if kernel.__name__.startswith(("sequ", "small"))
        }

    def run(model):
        for steps in (3, 40):
            y, _, tape = model.forward(x := np.ones((steps, 3, 2), np.float32))
            model.backward(tape, y)
            model(x)

    run(LSTM(2, 6, seed=0))
    before = signatures()
    run(LSTM(2, 6, clip=1.25, cell_clip=0.75, coupled=True, seed=0))
    assert signatures() == before
