"""Peepholes on every backend: each kind of call against the NumPy reference, and the reference's own derivatives.

``test_against_onnxruntime.py`` compares the forward pass with ONNX Runtime's operator, ``test_gradients.py`` the
reference's gradients with the complex step.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle

import numpy as np
import pytest
from derivatives import complex_step
from harness import REFERENCE, BackendUnderTest, Case, problem, results, solve
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM
from fastlstm.training import SGD, Adam, Linear, clip_by_global_norm, join

CASES = [
    # H = 8 takes wide loads on a GPU and is a whole vector on most processors; H = 5 is neither.
    *(
        Case(6, 5, 3, hidden, layers, bidirectional, bias, lengths=lengths, peephole=True)
        for hidden, (layers, bidirectional), bias, lengths in itertools.product(
            (5, 8), ((1, False), (1, True), (2, True)), (False, True), (None, "zeros")
        )
    ),
    *(Case(*rows, 7, hidden, 2, peephole=True) for rows in ((1, 1), (1, 8), (3, 5), (16, 1)) for hidden in (1, 16, 33)),
    Case(3, 300, 2, 4, 1, True, lengths="positive", peephole=True),  # two slabs of a GPU's sum over the batch
    Case(3, 300, 2, 3, state=False, peephole=True),
    Case(4, 3, 2, 8, lengths=(0, 0, 0), peephole=True),
    Case(5, 4, 3, 8, 2, True, batch_first=True, dropout=0.4, peephole=True),
    Case(30, 20, 40, 70, 1, True, lengths="zeros", peephole=True),  # several threads
    Case(3, 2, 140, 130, peephole=True),  # several slices of the weights
    Case(7, 40, 150, 133, peephole=True),
]
NUMPY_ONLY = pytest.mark.skipif(bool(BackendUnderTest("cpu").missing), reason=str(BackendUnderTest("cpu").missing))


@functools.cache
def truth(case):
    return solve(problem(case), REFERENCE)


def model_of(p, backend):
    """The model of a problem, its parameters on the backend."""
    cell = p.cell
    lstm = LSTM(
        cell.input_size, cell.hidden_size, cell.num_layers, cell.bias, p.batch_first, cell.dropout, cell.bidirectional,
        peephole=cell.peephole, dtype=cell.dtype, seed=0,
    )  # fmt: skip
    lstm.params.update({name: backend.array(value.copy()) for name, value in p.params.items()})
    return lstm


def outputs(backend, y, state):
    return {"y": backend.host(y), "h_n": backend.host(state[0]), "c_n": backend.host(state[1])}


def given_to(p, backend):
    """x, the state or None, and dy on a backend."""
    return backend.array(p.x), p.state and tuple(map(backend.array, p.state)), backend.array(p.dy)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result_is_that_of_the_reference(backend, case, dtype):
    found = solve(problem(case).astype(dtype), backend)
    assert all(value.dtype == dtype for value in found.values())
    assert_close("agreement", found, truth(case), backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("case", [case for case in CASES if not case.dropout], ids=str)
def test_inference_gives_the_reference_s_outputs(backend, case, dtype):
    p = problem(case).astype(dtype)
    lstm, (x, state, _) = model_of(p, backend), given_to(p, backend)
    expected = {name: truth(case)[name] for name in ("y", "h_n", "c_n")}
    for _ in range(2):  # the second call is a prepared one
        found = outputs(backend, *lstm(x, state, p.lengths))
        assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(3, 2, 2, 5, lengths=None, peephole=True),
        Case(4, 3, 2, 3, 2, True, lengths="zeros", peephole=True),
        Case(9, 2, 2, 5, bias=False, lengths="zeros", peephole=True),
    ],
    ids=str,
)
def test_gradients_are_those_of_the_complex_step(backend, case):
    p = problem(case)
    expected = complex_step(REFERENCE.implementation, p)
    found = {name: value for name, value in solve(p, backend).items() if name in expected}
    assert "dweight_peephole_l0" in found
    assert_close("agreement", found, expected, backend=backend.name, dtype=np.float64)


@pytest.mark.parametrize("lengths", [None, "zeros"])
@pytest.mark.parametrize("steps", [2, 6])
def test_peepholes_of_zero_are_no_peepholes(backend, dtype, lengths, steps):
    with_peepholes = problem(Case(steps, 5, 3, 8, 2, steps > 2, lengths=lengths, peephole=True)).astype(dtype)
    for name, value in with_peepholes.params.items():
        if name.startswith("weight_peephole"):
            value[...] = 0
    plain = problem(Case(steps, 5, 3, 8, 2, steps > 2, lengths=lengths)).astype(dtype)
    plain.params.update({name: with_peepholes.params[name] for name in plain.params})
    plain = type(plain)(**(vars(with_peepholes) | {"params": plain.params, "cell": plain.cell}))
    found = solve(with_peepholes, backend)
    assert_identical({name: value for name, value in found.items() if "peephole" not in name}, solve(plain, backend))


@pytest.mark.parametrize("name", ["weight_peephole_l0", "weight_peephole_l1"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_each_peephole_of_each_layer_counts(backend, dtype, name, row):
    p = problem(Case(6, 4, 3, 8, 2, peephole=True)).astype(dtype)
    lstm, (x, state, _) = model_of(p, backend), given_to(p, backend)
    before = outputs(backend, *lstm(x, state))
    changed = p.params[name].copy()
    changed[row, 5] += 1
    lstm.params[name] = backend.array(changed)
    after = outputs(backend, *lstm(x, state))
    layer = int(name[-1])
    others = np.arange(8) != 5
    assert (before["c_n"][layer, :, 5] != after["c_n"][layer, :, 5]).all() or row == 2
    assert (before["h_n"][layer, :, 5] != after["h_n"][layer, :, 5]).all()
    first = lstm.step(x[0], state)[1]
    lstm.params[name] = backend.array(p.params[name])
    unchanged = lstm.step(x[0], state)[1]
    for one, other in zip(first, unchanged, strict=True):  # after one step, nothing else has seen that unit
        np.testing.assert_array_equal(backend.host(one)[layer][:, others], backend.host(other)[layer][:, others])


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("hidden", [5, 8])
def test_steps_give_the_whole_sequence(backend, dtype, hidden, state):
    p = problem(Case(6, 4, 3, hidden, 2, state=state, peephole=True)).astype(dtype)
    lstm, (x, given, _) = model_of(p, backend), given_to(p, backend)
    whole = outputs(backend, *lstm(x, given))
    now, steps = given, []
    for x_t in x:
        h, now = lstm.step(x_t, now)
        steps.append(backend.host(h))
    found = {"y": np.stack(steps), "h_n": backend.host(now[0]), "c_n": backend.host(now[1])}
    assert_close("streaming", found, whole, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("steps", "bidirectional", "lengths"), [(2, False, None), (6, True, "zeros"), (40, True, None)]
)
def test_a_second_backward_pass_and_computing_again_give_the_same_bits(
    backend, dtype, steps, bidirectional, lengths, recompute
):
    p = problem(Case(steps, 5, 3, 19, 1, bidirectional, lengths=lengths, peephole=True)).astype(dtype)
    lstm, (x, state, dy) = model_of(p, backend), given_to(p, backend)
    dstate = tuple(map(backend.array, p.dstate))
    found = []
    for again in (False, recompute):
        y, end, tape = lstm.forward(x, state, p.lengths, recompute=again)
        found += [results(backend, y, *end, lstm.backward(tape, dy, dstate)) for _ in range(2)]
    for other in found[1:]:
        assert_identical(other, found[0])


@NUMPY_ONLY
@pytest.mark.parametrize("case", [case for case in CASES if not case.dropout], ids=str)
def test_a_frozen_model_gives_the_reference_s_results(dtype, case):
    backend, p = BackendUnderTest("cpu"), problem(case).astype(dtype)
    with backend.active():
        frozen = model_of(p, backend).freeze()
        expected = {name: truth(case)[name] for name in ("y", "h_n", "c_n")}
        for _ in range(2):
            whole = outputs(backend, *frozen(p.x, p.state, p.lengths))
            assert_close("agreement", whole, expected, backend="cpu", dtype=dtype)
        y, state, tape = frozen.forward(p.x, p.state, p.lengths)
        assert_identical(outputs(backend, y, state), whole)
        found = results(backend, y, *state, frozen.backward(tape, p.dy, p.dstate))
        assert_close("agreement", found, truth(case), backend="cpu", dtype=dtype)
        if not (case.bidirectional or case.lengths):
            now, steps = p.state, []
            for x_t in p.x:
                h, now = frozen.step(x_t, now)
                steps.append(h)
            assert_identical(outputs(backend, np.stack(steps), now), whole)


def saved_and_loaded(lstm):
    file = io.BytesIO()
    lstm.save(file)
    file.seek(0)
    return LSTM.load(file)


@pytest.mark.parametrize(
    "again", [saved_and_loaded, copy.copy, copy.deepcopy, lambda lstm: pickle.loads(pickle.dumps(lstm))],
    ids=["saved", "copied", "copied deeply", "pickled"],
)  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@NUMPY_ONLY
def test_a_copy_or_a_loaded_model_has_the_same_peepholes(dtype, frozen, again):
    backend, p = BackendUnderTest("cpu"), problem(Case(6, 4, 3, 9, 2, True, peephole=True)).astype(dtype)
    lstm = model_of(p, backend)
    lstm = lstm.freeze() if frozen else lstm
    other = again(lstm)
    assert other.cell == lstm.cell and other.cell.peephole and "peephole=True" in repr(other)
    assert_identical(dict(other.params), dict(lstm.params))
    claim = "agreement" if frozen and again is saved_and_loaded else None
    with backend.active():
        for _ in range(2):
            found, expected = outputs(backend, *other(p.x, p.state)), outputs(backend, *lstm(p.x, p.state))
            if claim:  # what was saved is loaded as a model that can change
                assert_close(claim, found, expected, backend="cpu", dtype=dtype)
            else:
                assert_identical(found, expected)


def test_a_file_of_a_plain_model_says_nothing_of_peepholes(tmp_path):
    for name, peephole in (("plain", False), ("with", True)):
        LSTM(3, 4, peephole=peephole, seed=0).save(tmp_path / name)
        assert (b"peephole" in (tmp_path / name).read_bytes()) == peephole


@pytest.mark.parametrize("make", [lambda p: Adam(p, 0.05), lambda p: SGD(p, 0.3, momentum=0.5)], ids=["Adam", "SGD"])
def test_peepholes_are_trained_with_the_other_parameters_of_joined_models(backend, dtype, make):
    rng = np.random.default_rng(0)
    p = problem(Case(8, 6, 3, 7, peephole=True)).astype(dtype)
    lstm, head = model_of(p, backend), Linear(7, 1, dtype=dtype, seed=1)
    head.params.update({name: backend.array(value) for name, value in head.params.items()})
    x, target = backend.array(p.x), backend.array(rng.normal(size=(8, 6, 1)).astype(dtype))
    optimiser, losses = make(join(lstm=lstm, head=head)), []
    before = {name: backend.host(value).copy() for name, value in lstm.params.items()}
    for _ in range(15):
        y, _, tape = lstm.forward(x)
        off = head(y) - target
        losses.append(float((backend.host(off) ** 2).mean()))
        of_head = head.backward(y, 2 * off / off.size)
        grads = join(lstm=lstm.backward(tape, of_head.x), head=of_head)
        clip_by_global_norm(grads, 1.0)
        optimiser.step(grads)
    assert losses[-1] < 0.95 * losses[0]
    for name, value in lstm.params.items():
        assert (backend.host(value) != before[name]).mean() > 0.9, name


def test_models_with_and_without_peepholes_do_not_take_each_others_parameters(backend):
    with_peepholes, plain = LSTM(3, 4, peephole=True, seed=0), LSTM(3, 4, seed=0)
    x = backend.array(np.ones((2, 1, 3), np.float32))
    models = {}
    for lstm in (with_peepholes, plain):
        models[lstm] = {name: backend.array(value) for name, value in lstm.params.items()}
        lstm.params = models[lstm]
        lstm(x)
    for lstm, other in ((with_peepholes, plain), (plain, with_peepholes)):
        lstm.params = models[other]
        with pytest.raises(fastlstm.ArgumentError, match="weight_peephole_l0"):
            lstm(x)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4), (15,), (1, 3, 5)], ids=str)
def test_peepholes_of_another_shape_are_refused(backend, shape):
    lstm = LSTM(3, 5, peephole=True, seed=0)
    params = {name: backend.array(value) for name, value in lstm.params.items()}
    x = backend.array(np.ones((2, 1, 3), np.float32))
    lstm.params = params
    for _ in range(2):
        lstm(x)
        lstm.params = params | {"weight_peephole_l0": backend.array(np.ones(shape, np.float32))}
        with pytest.raises(fastlstm.ShapeError, match=r"weight_peephole_l0 must have shape \(3, H\) = \(3, 5\)"):
            lstm(x)
        lstm.params = params


def test_pytorch_has_no_peepholes():
    with pytest.raises(fastlstm.ArgumentError, match="no counterpart of peephole"):
        LSTM(3, 4, peephole=True).to_torch_state_dict()
