"""Prepared inference of cells with phases: it gives what the calls that are not prepared give, with less work."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness import BackendUnderTest
from tolerances import assert_identical

from fastlstm import LSTM, RNN

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

from fastlstm.backends.base import Signature
from fastlstm.backends.cpu.phased import PHASED, PhasedBackend
from fastlstm.backends.cpu.phased_call import PhasedCall
from fastlstm.backends.cpu.weights import again

FIELDS = [
    {"layer_norm": True},
    {"layer_norm": True, "peephole": True, "proj_size": 6, "bias": False},
    {"proj_size": 5, "reverse": True},
    {"zoneout": (0.3, 0.0)},
    {"zoneout": (0.3, 0.4), "proj_size": 7},
    {"recurrent_dropout": 0.4, "zoneout": (0.0, 0.4)},
    {"peephole": True, "block_size": 2},
    {"peephole": True, "block_size": 3, "coupled": True, "layer_norm": True, "clip": 0.8},
    {"nonlinearity": "tanh"},
    {"nonlinearity": "relu"},
]
each_cell = pytest.mark.parametrize("fields", FIELDS, ids=str)
each_stepping_cell = pytest.mark.parametrize("fields", [each for each in FIELDS if "reverse" not in each], ids=str)
each_kind = pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])


def model_of(fields, dtype, layers=2, hidden=18):
    if "nonlinearity" in fields:
        return RNN(5, hidden + 1, layers, dtype=dtype, seed=0, **fields)  # which four does not divide
    return LSTM(5, hidden, layers, dtype=dtype, seed=0, **fields)


def parameters_of(model, frozen):
    return model.freeze().params if frozen else model.params


def given_to(model, steps, batch, seed=0):
    """Draw an input, and both states as the backends take them."""
    rng, cell = np.random.default_rng([seed, steps, batch]), model.cell
    shapes = (steps, batch, 5), *((cell.num_layers, batch, features) for features in (cell.h_size, cell.c_size))
    x, h0, c0 = (rng.standard_normal(shape).astype(cell.dtype) for shape in shapes)
    resets, lengths = rng.random((steps, batch)) < 0.3, rng.integers(0, steps + 1, batch)
    return x, (h0, c0), lengths, resets


def named(result):
    return dict(zip(("y", "h_n", "c_n"), result, strict=False))


@each_kind
@each_cell
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 3), (1, 33), (10, 1), (10, 3), (10, 33)])
@pytest.mark.sampled
def test_each_prepared_call_is_bit_identical_to_one_that_is_not(fields, frozen, steps, batch, dtype):
    model = model_of(fields, dtype)
    params, plain = parameters_of(model, frozen), dict(model.params)
    x, state, lengths, resets = given_to(model, steps, batch)
    prepared = PHASED.prepare(model.cell, Signature(steps, batch, False, frozen))
    assert isinstance(prepared, PhasedCall) == (steps == 1 or not fields.get("reverse"))
    for h0, c0 in ((None, None), state, (state[0], None)):
        for more in ((None, None), (lengths, None), (None, resets), (lengths, resets)):
            expected = PHASED.forward(model.cell, plain, x, h0, c0, more[0], None, False, False, more[1])
            for _ in range(2):
                found = prepared.forward(params, x, h0, c0, more[0], None, False, more[1])
                assert_identical(named(found[:3]), named(expected[:3]))
        if steps == 1:
            expected = PHASED.step(model.cell, plain, x[0], h0, c0)
            for _ in range(2):
                assert_identical(named(prepared.step(params, x[0], h0, c0)), named(expected))


@each_kind
@each_stepping_cell
def test_a_second_short_call_is_one_launch_a_layer(fields, frozen, monkeypatch):
    model = model_of(fields, np.float32)
    model = model.freeze() if frozen else model
    x = given_to(model, 1, 3)[0]
    expected = model(x)[0], model.step(x[0])[0]
    for name in ("forward", "layer_forward"):  # what is not prepared
        monkeypatch.setattr(PhasedBackend, name, None)
    assert_identical(named((model(x)[0], model.step(x[0])[0])), named(expected))


@each_stepping_cell
def test_results_of_a_prepared_call_are_the_caller_s(fields, dtype):
    """No call returns memory of another one, of the model or of its arguments."""
    model = model_of(fields, dtype).freeze()
    x = given_to(model, 1, 2)[0]
    model.step(x[0])
    first, second = model.step(x[0]), model.step(x[0])
    arrays = [[y, *(state if isinstance(state, tuple) else (state,))] for y, state in (first, second)]
    kept = [array.copy() for array in arrays[1]]
    for array in arrays[0]:
        assert array.flags.carray
        array[...] = np.nan
    assert_identical(named(arrays[1]), named(kept))
    assert_identical({"y": model.step(x[0])[0]}, {"y": kept[0]})


@each_kind
def test_threads_step_one_model_at_once(frozen, dtype):
    model = model_of({"layer_norm": True, "proj_size": 6}, dtype)
    model = model.freeze() if frozen else model
    inputs = [given_to(model, 200, 2, seed)[0] for seed in range(4)]

    def stream(x):
        state = None
        for x_t in x:
            y, state = model.step(x_t, state)
        return y, *state

    expected = [stream(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for found, right in zip(pool.map(stream, inputs), expected, strict=True):
            assert_identical(named(found), named(right))


@pytest.mark.parametrize(
    ("steps", "batch", "fields"),
    [(0, 2, {}), (2, 0, {}), (513, 1, {}), (1, 2, {"bidirectional": True}), (2, 1, {"reverse": True})],
    ids=str,
)
def test_other_calls_are_not_prepared(steps, batch, fields):
    cell = LSTM(5, 18, layer_norm=True, seed=0, **fields).cell
    assert not isinstance(PHASED.prepare(cell, Signature(steps, batch, False, False)), PhasedCall)


def test_a_call_that_may_run_on_several_threads_is_not_prepared():
    cell = LSTM(64, 512, layer_norm=True, seed=0).cell
    assert not isinstance(PHASED.prepare(cell, Signature(1, 256, False, True)), PhasedCall)
    assert isinstance(PHASED.prepare(cell, Signature(1, 1, False, True)), PhasedCall)


@pytest.mark.parametrize("fields", [{"layer_norm": True}, {"peephole": True, "block_size": 2}], ids=str)
def test_weights_of_a_frozen_model_are_packed_once(fields):
    """With shared gates, they are kept with the parameters that have rows for all gates."""
    model = model_of(fields, np.float32, layers=1).freeze()
    x = given_to(model, 300, 2)[0]
    model(x)
    kept = next((kept for kept in model.params.kept.values() if hasattr(kept, "arrays")), model.params).kept
    ((_, packed),) = kept[0, 0].values()
    packed[:] = 0
    for steps in (300, 3, 1, 1):
        model(x[:steps])
        model.step(x[0])
    assert not packed.any() and len(kept[0, 0]) == 1


def test_a_prepared_call_is_pickled_without_addresses():
    model = model_of({"zoneout": (0.1, 0.2)}, np.float32)
    prepared = PHASED.prepare(model.cell, Signature(1, 2, False, False))
    assert prepared.__reduce__()[0] is again
    x, state, *_ = given_to(model, 1, 2)
    found = pickle.loads(pickle.dumps(prepared)).step(model.params, x[0], *state)
    assert_identical(named(found), named(prepared.step(model.params, x[0], *state)))
