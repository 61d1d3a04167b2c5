"""A frozen model gives the results of the model, cannot change, and keeps its packed weights."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, results, solve
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM, calls
from fastlstm.backends.cpu import weights
from fastlstm.frozen import FrozenParams

CASES = [
    *(Case(1, batch, 5, hidden, 2) for batch in (1, 3, 17, 70) for hidden in (1, 16, 33)),
    *(Case(steps, batch, 9, 20) for steps, batch in ((4, 1), (3, 5), (30, 1), (8, 13), (2, 130))),
    Case(6, 7, 4, 18, 2, True, lengths="zeros"),
    Case(5, 4, 3, 7, bias=False, batch_first=True, state=False),
    Case(3, 2, 140, 130),  # several slices of the weights
]


def model_of(p):
    """The model of a problem, its parameters copies."""
    cell = p.cell
    lstm = LSTM(
        cell.input_size, cell.hidden_size, cell.num_layers, cell.bias, p.batch_first, cell.dropout, cell.bidirectional,
        dtype=cell.dtype,
    )  # fmt: skip
    lstm.params.update({name: value.copy() for name, value in p.params.items()})
    return lstm


def outputs(y, state):
    return {"y": y, "h_n": state[0], "c_n": state[1]}


@pytest.fixture
def threads():
    """Sets the number of threads; the default is back after the test."""
    yield fastlstm.set_num_threads
    fastlstm.set_num_threads(None)


@pytest.fixture
def backend(request):
    """A backend by name, forced for the length of the test: only NumPy arrays can be frozen."""
    under_test = BackendUnderTest(request.param)
    if under_test.missing:
        pytest.skip(under_test.missing)
    with under_test.active():
        yield under_test


@pytest.mark.parametrize("backend", ["reference", "cpu"], indirect=True)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_frozen_model_gives_the_reference_s_results_and_gradients(backend, dtype, case):
    expected = solve(problem(case), REFERENCE)
    p = problem(case).astype(dtype)
    frozen = model_of(p).freeze()
    for _ in range(2):  # what has run once may take a shorter way
        found = outputs(*frozen(p.x, p.state, p.lengths))
        assert_close("agreement", found, {k: expected[k] for k in found}, backend=backend.name, dtype=dtype)
    y, state, tape = frozen.forward(p.x, p.state, p.lengths)
    found = results(backend, y, *state, frozen.backward(tape, p.dy, p.dstate))
    assert_close("agreement", found, expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_a_model_on_the_gpu_is_not_frozen(backend):
    lstm = LSTM(3, 4, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    with pytest.raises(fastlstm.ArrayTypeError, match="NumPy arrays"):
        lstm.freeze()


@pytest.mark.parametrize("case", [case for case in CASES if not (case.bidirectional or case.batch_first)], ids=str)
def test_steps_give_the_bits_of_the_whole_sequence_and_of_training(dtype, case, threads):
    p = problem(case).astype(dtype)
    with fastlstm.use_backend("cpu"):
        found = []
        for count in (1, 2, 3):
            threads(count)
            frozen = model_of(p).freeze()
            for _ in range(2):
                found.append(outputs(*frozen(p.x, p.state)))
                state, y = p.state, []
                for x_t in p.x:
                    h, state = frozen.step(x_t, state)
                    y.append(h)
                found.append(outputs(np.stack(y), state))
            found.append(outputs(*frozen.forward(p.x, p.state)[:2]))
            found.append(outputs(*frozen.forward(p.x, p.state, recompute=True)[:2]))
    for other in found[1:]:
        assert_identical(other, found[0])


@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 7), (1, 32), (6, 1), (30, 9)])
def test_an_input_that_is_a_part_of_another_array_finds_the_prepared_call(dtype, frozen, steps, batch, monkeypatch):
    rng = np.random.default_rng(0)
    # In a closed loop it is such a part.
    lstm = LSTM(5, 33, dtype=dtype, seed=0)
    lstm = lstm.freeze() if frozen else lstm
    whole = rng.normal(size=(2 * steps, batch, 11)).astype(dtype)
    with fastlstm.use_backend("cpu"):
        to_read = whole[::2, :, :5].copy()
        to_read.flags.writeable = False
        for x in (whole[::2, :, 3:8], whole[::-2, :, 10:5:-1], to_read):
            y, state = lstm(x.copy())
            h, first = lstm.step(x[0].copy())
            with monkeypatch.context() as patch:
                patch.setattr(calls, "checked", None)
                for _ in range(2):
                    assert_identical(outputs(*lstm(x)), outputs(y, state))
                    assert_identical(outputs(*lstm.step(x[0])), outputs(h, first))


@pytest.mark.parametrize("hidden", [5, 64, 100])
def test_a_sequence_gives_the_same_bits_in_any_batch(dtype, hidden):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 70, 9)).astype(dtype)
    frozen = LSTM(9, hidden, dtype=dtype, seed=0).freeze()
    with fastlstm.use_backend("cpu"):
        whole, _ = frozen(x)
        for first, last in ((0, 1), (3, 5), (0, 13), (20, 70)):
            assert_identical({"y": frozen(x[:, first:last])[0]}, {"y": whole[:, first:last]})


def test_gradients_with_and_without_recomputing_are_the_same_bits(dtype):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(size=(40, 9, 5)).astype(dtype), rng.normal(size=(40, 9, 21)).astype(dtype)
    frozen = LSTM(5, 21, dtype=dtype, seed=0).freeze()
    with fastlstm.use_backend("cpu"):
        one, other = (frozen.backward(frozen.forward(x, recompute=again)[2], dy) for again in (False, True))
    assert_identical(one.params | {"x": one.x}, other.params | {"x": other.x})


def test_a_first_step_finds_a_nonzero_state_anywhere(dtype):
    rng = np.random.default_rng(0)
    # Only a first step from zeros leaves the recurrent weights out: a state, or a weight that is not finite, is found.
    lstm, x = LSTM(5, 21, dtype=dtype, seed=0), rng.normal(size=(8, 5)).astype(dtype)
    with fastlstm.use_backend("cpu"):
        frozen, zeros = lstm.freeze(), np.zeros((1, 8, 21), dtype)
        h, _ = frozen.step(x, (zeros, zeros))
        for place in range(zeros.size):
            h0 = zeros.copy()
            h0.flat[place] = 0.5
            found, _ = frozen.step(x, (h0, zeros))
            assert ((found != h).any(axis=1) == (np.arange(8) == place // 21)).all(), place
        for row in range(4 * 21):
            weight = lstm.params["weight_hh_l0"]
            kept, weight[row, 3] = weight[row, 3], np.inf
            found, _ = lstm.freeze().step(x, (zeros, zeros))
            weight[row, 3] = kept
            assert (np.isnan(found).all(axis=0) == (np.arange(21) == row % 21)).all(), row


CHANGES = {
    "an entry": lambda params: params.__setitem__("bias_l0", np.zeros(16, np.float32)),
    "a new entry": lambda params: params.setdefault("other", 1),
    "several": lambda params: params.update(bias_l0=1),
    "in place": lambda params: params.__ior__({"bias_l0": 1}),
    "no entry": lambda params: params.__delitem__("bias_l0"),
    "none at all": lambda params: params.clear(),
    "one taken": lambda params: params.pop("bias_l0"),
    "any taken": lambda params: params.popitem(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_the_parameters_of_a_frozen_model_cannot_be_replaced(change):
    lstm = LSTM(3, 4, seed=0)
    frozen = lstm.freeze()
    with pytest.raises(fastlstm.FrozenError, match="cannot change"):
        change(frozen.params)
    assert_identical(frozen.params, lstm.params)


WRITES = {
    "an element": lambda array: array.__setitem__(0, 1.0),
    "a view": lambda array: array.reshape(-1)[:2].fill(0.0),
    "a result": lambda array: np.add(array, 1.0, out=array),
    "the flag": lambda array: array.setflags(write=True),
    "the flag of a view": lambda array: array.view().setflags(write=True),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_l0"])
def test_the_parameters_of_a_frozen_model_cannot_be_written(name, write):
    lstm = LSTM(3, 4, seed=0)
    frozen = lstm.freeze()
    with pytest.raises(ValueError, match=r"read-only|WRITEABLE"):
        write(frozen.params[name])
    assert_identical(frozen.params, lstm.params)


def test_an_optimiser_refuses_frozen_parameters_before_any_work():
    frozen = LSTM(3, 4, seed=0).freeze()
    optimiser = fastlstm.training.Adam(frozen.params)
    with pytest.raises(fastlstm.ArrayTypeError, match="read-only"):
        optimiser.step({name: np.ones_like(value) for name, value in frozen.params.items()})
    assert optimiser.state_dict()["steps"] == 0


@pytest.mark.parametrize("steps", [1, 30])
def test_a_frozen_model_and_its_copies_share_no_memory(dtype, steps):
    rng = np.random.default_rng(0)
    lstm, x = LSTM(3, 20, 2, dtype=dtype, seed=0), rng.normal(size=(steps, 2, 3)).astype(dtype)
    frozen = lstm.freeze()
    y, _ = frozen(x)
    lstm.params["weight_ih_l1"] *= 2.0
    assert_identical({"y": frozen(x)[0]}, {"y": y})
    assert np.abs(lstm(x)[0] - y).max() > 1e-3
    thawed = frozen.to(np)
    assert type(thawed.params) is dict
    thawed.params["weight_ih_l1"] *= 2.0
    assert_identical({"y": frozen(x)[0]}, {"y": y})
    assert_identical({"y": thawed(x)[0]}, {"y": lstm(x)[0]})


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), LSTM.freeze])
def test_a_copy_of_a_frozen_model_is_frozen(dtype, again):
    rng = np.random.default_rng(0)
    frozen, x = LSTM(3, 20, dtype=dtype, seed=0).freeze(), rng.normal(size=(9, 2, 3)).astype(dtype)
    y, _ = frozen(x)
    other = again(frozen)
    assert type(other.params) is FrozenParams and repr(other) == repr(frozen) and ".freeze()" in repr(other)
    for _ in range(2):
        assert_identical({"y": other(x)[0]}, {"y": y})
    call = other.cell.calls[x.shape, calls.mode(batch_first=False, keep_tape=False), True]
    assert call is not None and call.frozen and call.takes_all(other.params, x, None)
    with pytest.raises(ValueError, match="read-only"):
        other.params["bias_l0"][0] = 1.0


def test_a_frozen_model_is_saved_and_shown_as_any_other(tmp_path):
    lstm = LSTM(3, 20, 2, bidirectional=True, seed=0)
    frozen = lstm.freeze()
    frozen.save(tmp_path / "model.safetensors")
    again = LSTM.load(tmp_path / "model.safetensors")
    assert type(again.params) is dict
    assert_identical(again.params, lstm.params)
    assert_identical(frozen.to_torch_state_dict(), lstm.to_torch_state_dict())
    assert frozen.num_parameters == lstm.num_parameters


def test_the_plan_of_a_frozen_model_is_its_own():
    lstm, x = LSTM(32, 64, seed=0), np.zeros((1, 4, 32), np.float32)
    with fastlstm.use_backend("cpu"):
        assert "unpacked weights" in lstm.plan(x)
        assert "unpacked weights" not in lstm.freeze().plan(x)


def test_the_weights_are_packed_at_the_first_call_and_never_again(monkeypatch, threads):
    packings, pack = [], weights.pack_weights
    monkeypatch.setattr(weights, "pack_weights", lambda *arguments: packings.append(pack(*arguments)))
    frozen = LSTM(5, 33, 2, bidirectional=True, seed=0).freeze()
    single = LSTM(5, 33, seed=0).freeze()
    with fastlstm.use_backend("cpu"):
        assert not packings
        for count in (1, 2):
            threads(count)
            for steps, batch in ((1, 1), (1, 40), (7, 9), (200, 30)):
                x = np.ones((steps, batch, 5), np.float32)
                frozen(x)
                frozen.forward(x)
                single(x)
                single.step(x[0])
    assert len(packings) == 4 + 1, "once for each layer and direction"


def test_several_threads_may_make_the_first_call(dtype):
    rng = np.random.default_rng(0)
    lstm, x = LSTM(5, 33, 2, dtype=dtype, seed=0), rng.normal(size=(6, 3, 5)).astype(dtype)
    expected = lstm.freeze()(x)[0]
    for _ in range(5):
        frozen = lstm.freeze()
        with ThreadPoolExecutor(4) as pool:
            for y, _ in pool.map(lambda _, frozen=frozen: frozen(x), range(8)):
                assert_identical({"y": y}, {"y": expected})


@pytest.mark.parametrize("steps", [1, 20])
def test_bad_input_is_refused_as_by_any_model(dtype, steps):
    rng = np.random.default_rng(0)
    frozen = LSTM(5, 33, dtype=dtype, seed=0).freeze()
    x = rng.normal(size=(steps, 3, 5)).astype(dtype)
    y, state = frozen(x)
    for _ in range(2):
        with pytest.raises(fastlstm.ShapeError):
            frozen(x[:, :, :4])
        with pytest.raises(fastlstm.ShapeError):
            frozen(x, (state[0][:, :2], state[1]))
        with pytest.raises(fastlstm.DTypeError):
            frozen(x.astype(np.int32))
        with pytest.raises(fastlstm.ArrayTypeError):
            frozen(np.ma.masked_array(x))
        assert_identical({"y": frozen(x[::-1][::-1])[0]}, {"y": y})
    assert frozen(x[:0])[0].shape == (0, 3, 33) and frozen(x[:, :0])[0].shape == (steps, 0, 33)


def test_parameters_of_another_model_are_checked():
    rng = np.random.default_rng(0)
    lstm, other = LSTM(30, 34, seed=0).freeze(), LSTM(32, 32, seed=0).freeze()  # as many blocks, and rows of weights
    lstm(np.zeros((1, 1, 30), np.float32))
    other(np.zeros((1, 1, 32), np.float32))
    lstm.params = other.params
    for x in (np.zeros((1, 1, 30), np.float32), np.zeros((1, 1, 32), np.float32)):
        with pytest.raises(fastlstm.ShapeError):
            lstm(x)
    # What a model is called with is no part of what it is.
    same = LSTM(32, 32, dropout=0.5, seed=1)
    same.params = other.params
    x = rng.normal(size=(2, 1, 32)).astype(np.float32)
    found, expected = ({"y": model(x)[0]} for model in (same, other))
    assert_close("streaming", found, expected, backend="cpu", dtype=np.dtype(np.float32))
    assert dataclasses.replace(same.cell, dropout=0.0) == other.cell
