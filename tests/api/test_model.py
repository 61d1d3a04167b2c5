"""The LSTM object: its parameters, and results that do not depend on how it is called, copied, pickled and moved."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from harness import Case, problem, results, solve
from tolerances import assert_close, assert_identical

import fastlstm
from fastlstm import LSTM, parameters
from fastlstm.cell import Cell
from fastlstm.functional import lstm_backward, lstm_forward

OPTIONS = [
    {},
    {"num_layers": 3, "bias": False},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.25, "batch_first": True, "dtype": np.float64},
]


def model(backend, *args, **options):
    """Make a model whose parameters are the backend's arrays."""
    lstm = LSTM(*args, **({"seed": 0} | options))
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    return lstm


def train(backend, lstm, x, dy, dstate=None):
    """Return all results of one forward and backward pass of an object."""
    y, (h_n, c_n), tape = lstm.forward(backend.array(x))
    dstate = dstate and tuple(map(backend.array, dstate))
    return results(backend, y, h_n, c_n, lstm.backward(tape, backend.array(dy), dstate))


def draw(*shape, dtype=np.float32):
    return np.random.default_rng(5).uniform(-1, 1, shape).astype(dtype)


# What a model is made of.


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_parameters_have_their_names_and_shapes(options):
    lstm = LSTM(5, 7, **options)
    layers, directions = options.get("num_layers", 1), 2 if options.get("bidirectional") else 1
    expected = {}
    for layer in range(layers):
        for suffix in ("", "_reverse")[:directions]:
            expected[f"weight_ih_l{layer}{suffix}"] = (28, 5 if layer == 0 else 7 * directions)
            expected[f"weight_hh_l{layer}{suffix}"] = (28, 7)
            if options.get("bias", True):
                expected[f"bias_l{layer}{suffix}"] = (28,)
    assert {name: value.shape for name, value in lstm.params.items()} == expected
    assert list(lstm.params) == list(parameters.shapes(lstm.cell))
    assert {value.dtype for value in lstm.params.values()} == {np.dtype(options.get("dtype", np.float32))}
    assert lstm.num_parameters == sum(value.size for value in lstm.params.values())
    assert parameters.cell_of(lstm.params, dropout=lstm.cell.dropout) == lstm.cell


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_repr_makes_the_model_again(options):
    lstm = LSTM(5, 7, **options)
    again = eval(repr(lstm), {"LSTM": LSTM, "float32": np.float32, "float64": np.float64})
    assert (again.cell, again.batch_first) == (lstm.cell, lstm.batch_first)
    assert f"{lstm.num_parameters:,} parameters" in repr(lstm)


def test_repr_leaves_defaults_out():
    assert repr(LSTM(3, 8)) == "LSTM(3, 8, dtype=float32)  # 384 parameters"
    assert repr(LSTM(30, 80, dropout=0.1, num_layers=2, dtype="f8")) == (
        "LSTM(30, 80, num_layers=2, dropout=0.1, dtype=float64)  # 87,040 parameters"
    )


def test_arguments_stand_in_torchs_order():
    lstm = LSTM(3, 4, 2, False, True, 0.5, True, 0)
    assert lstm.cell == Cell(3, 4, num_layers=2, bias=False, dropout=0.5, bidirectional=True, dtype=np.float32)
    assert lstm.batch_first


@pytest.mark.parametrize("given", [np.float64, "float64", "f8", ">f8", float, np.dtype("f8")])
def test_dtype_is_a_native_float(given):
    lstm = LSTM(3, 4, dtype=given)
    assert lstm.cell.dtype == np.float64 and lstm.cell.dtype.isnative
    assert all(value.dtype == np.float64 for value in lstm.params.values())


def test_sizes_may_be_numpys_integers():
    lstm = LSTM(np.int64(3), np.uint8(4), np.int32(2), np.True_, bidirectional=np.False_)
    assert lstm.cell == Cell(3, 4, 2)
    assert all(type(value) in (int, bool, float, str) for value in lstm.cell.describe().values())


def test_a_cell_is_a_value():
    cell = Cell(3, 4, 2, dtype=np.float64)
    assert Cell(**cell.describe()) == cell and hash(Cell(**cell.describe())) == hash(cell)
    assert cell != dataclasses.replace(cell, dtype=np.float32)
    with pytest.raises(dataclasses.FrozenInstanceError):
        cell.hidden_size = 5


# Initialisation.


def test_initial_weights_are_uniform_and_the_forget_gate_is_open():
    lstm = LSTM(40, 50, 2, bidirectional=True, seed=1)
    bound = np.float32(1 / np.sqrt(50))
    for name, value in lstm.params.items():
        if name.startswith("bias"):
            np.testing.assert_array_equal(value, np.repeat(np.float32([0, 1, 0, 0]), 50))
            continue
        for gate in np.split(value, 4):  # each gate has its own draws over the whole range
            assert np.abs(gate).max() <= bound
            assert gate.max() > 0.99 * bound and gate.min() < -0.99 * bound
            assert abs(gate.mean()) < 5 * bound / np.sqrt(3 * gate.size)  # five standard deviations
            assert abs(gate.std() * np.sqrt(3) / bound - 1) < 5 / np.sqrt(gate.size)
    drawn = [value for name, value in lstm.params.items() if not name.startswith("bias")]
    assert len({value.flat[0] for value in drawn}) == len(drawn)


def test_seeds_determine_the_parameters():
    one, same, other = LSTM(3, 4, seed=1), LSTM(3, 4, seed=1), LSTM(3, 4, seed=2)
    assert_identical(one.params, same.params)
    assert (one.params["weight_ih_l0"] != other.params["weight_ih_l0"]).all()
    assert (LSTM(3, 4).params["weight_ih_l0"] != LSTM(3, 4).params["weight_ih_l0"]).all()
    assert_identical(LSTM(3, 4, seed=np.random.default_rng(1)).params, one.params)
    assert_identical(LSTM(3, 4, seed=np.random.SeedSequence(1)).params, one.params)
    rng = np.random.default_rng(1)
    first, second = LSTM(3, 4, seed=rng), LSTM(3, 4, seed=rng)
    assert (first.params["weight_ih_l0"] != second.params["weight_ih_l0"]).all()


def test_draws_do_not_depend_on_the_dtype():
    single, double = LSTM(3, 4, 2, seed=1), LSTM(3, 4, 2, seed=1, dtype=np.float64)
    assert_identical(single.params, {name: value.astype(np.float32) for name, value in double.params.items()})
    assert (double.params["weight_ih_l0"] != double.params["weight_ih_l0"].astype(np.float32)).any()


# What stays the same however it is called.


def test_one_sequence_is_a_batch_of_one(backend, dtype):
    for options in ({}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}):
        lstm = model(backend, 3, 5, dtype=dtype, **options)
        rows = lstm.cell.num_layers * lstm.cell.num_directions
        x, dy = draw(6, 3, dtype=dtype), draw(6, lstm.cell.output_size, dtype=dtype)
        dstate = [draw(rows, 5, dtype=dtype) for _ in range(2)]
        alone = train(backend, lstm, x, dy, dstate)
        axis = 0 if lstm.batch_first else 1
        batched = train(
            backend, lstm, np.expand_dims(x, axis), np.expand_dims(dy, axis), [value[:, None] for value in dstate]
        )
        for name in ("y", "dx"):
            batched[name] = batched[name].squeeze(axis)
        for name in ("h_n", "c_n", "dh0", "dc0"):
            batched[name] = batched[name].squeeze(1)
        assert_identical(alone, batched)


def test_batch_first_is_the_transpose(backend, dtype):
    case = Case(5, 3, 4, 6, 2, True, lengths="zeros")
    time_first = problem(case).astype(dtype)
    turn = lambda value: np.ascontiguousarray(value.swapaxes(0, 1))  # noqa: E731
    batch_first = dataclasses.replace(time_first, x=turn(time_first.x), dy=turn(time_first.dy), batch_first=True)
    found = solve(batch_first, backend)
    assert found["y"].shape == (3, 5, 12) and found["h_n"].shape == (4, 3, 6)
    found |= {name: turn(found[name]) for name in ("y", "dx")}
    expected = solve(time_first, backend)
    # The same arrays reach the kernels with other strides, which BLAS may sum in another order.
    if backend.bitwise:
        assert_identical(found, expected)
    else:
        assert_close("alone", found, expected, backend=backend.name, dtype=dtype)


@pytest.mark.parametrize("batch_first", [False, True])
def test_nothing_in_gives_nothing_out(backend, dtype, batch_first):
    lstm = model(backend, 3, 5, 2, bidirectional=True, batch_first=batch_first, dtype=dtype)
    for steps, batch in ((0, 4), (4, 0), (0, 0)):
        outer = (batch, steps) if batch_first else (steps, batch)
        found = train(backend, lstm, np.zeros((*outer, 3), dtype), np.zeros((*outer, 10), dtype))
        assert found["y"].shape == (*outer, 10) and found["dx"].shape == (*outer, 3)
        assert {found[name].shape for name in ("h_n", "c_n", "dh0", "dc0")} == {(4, batch, 5)}
        for name, value in lstm.params.items():
            assert found[f"d{name}"].shape == value.shape
        assert all(value.dtype == dtype and not value.any() for value in found.values())
    y, (h_n, _) = lstm(backend.array(np.zeros((0, 3), dtype)))
    assert y.shape == (0, 10) and h_n.shape == (4, 5)
    h, _ = model(backend, 3, 5, dtype=dtype).step(backend.array(np.zeros((0, 3), dtype)))
    assert h.shape == (0, 5)


def test_the_last_output_is_the_final_state(backend, dtype):
    lstm = model(backend, 3, 5, 2, bidirectional=True, dtype=dtype)
    for steps in (1, 6):
        y, (h_n, _) = lstm(backend.array(draw(steps, 4, 3, dtype=dtype)))
        y, h_n = backend.host(y), backend.host(h_n)
        np.testing.assert_array_equal(y[-1, :, :5], h_n[2])
        np.testing.assert_array_equal(y[0, :, 5:], h_n[3])


def test_functions_and_object_are_the_same(backend, dtype):
    p = problem(Case(5, 3, 4, 6, 2, True, lengths="zeros")).astype(dtype)
    lstm = model(backend, 4, 6, 2, bidirectional=True, dtype=dtype)
    x, dy, state = backend.array(p.x), backend.array(p.dy), tuple(map(backend.array, p.state))
    y, (h_n, c_n), tape = lstm.forward(x, state, p.lengths)
    found = results(backend, y, h_n, c_n, lstm.backward(tape, dy))
    y, (h_n, c_n), tape = lstm_forward(lstm.params, x, state, p.lengths)
    assert_identical(found, results(backend, y, h_n, c_n, lstm_backward(lstm.params, tape, dy)))


def test_training_and_inference_agree(backend, dtype):
    for case in (Case(5, 3, 4, 6, 2, True, lengths="zeros"), Case(20, 13, 8, 33), Case(1, 1, 3, 5)):
        p = problem(case).astype(dtype)
        lstm = LSTM(case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, dtype=dtype)
        lstm.params.update({name: backend.array(value) for name, value in p.params.items()})
        arguments = backend.array(p.x), tuple(map(backend.array, p.state)), p.lengths
        (y, (h_n, c_n)), (train_y, (train_h, train_c), _) = lstm(*arguments), lstm.forward(*arguments)
        found = {"y": backend.host(y), "h_n": backend.host(h_n), "c_n": backend.host(c_n)}
        expected = {"y": backend.host(train_y), "h_n": backend.host(train_h), "c_n": backend.host(train_c)}
        assert_close("streaming", found, expected, backend=backend.name, dtype=dtype)


# The parameters are live, and the caller's.


def test_changes_of_parameters_count_from_the_next_call(backend, dtype):
    x, dy = draw(4, 3, 3, dtype=dtype), draw(4, 3, 5, dtype=dtype)
    lstm, other = (model(backend, 3, 5, dtype=dtype, seed=seed) for seed in (0, 1))
    before = train(backend, lstm, x, dy)
    lstm.step(backend.array(x[0]))
    for name, value in lstm.params.items():  # in place, which no cache of the weights may miss
        value[...] = other.params[name]
    expected = train(backend, other, x, dy)
    assert_identical(train(backend, lstm, x, dy), expected)
    steps = [backend.host(each.step(backend.array(x[0]))[0]) for each in (lstm, other)]
    np.testing.assert_array_equal(*steps)
    lstm.params.update({name: value.copy() for name, value in model(backend, 3, 5, dtype=dtype).params.items()})
    assert_identical(train(backend, lstm, x, dy), before)


def test_copies_are_equal_and_independent(backend, dtype):
    lstm = model(backend, 3, 5, 2, dropout=0.5, batch_first=True, dtype=dtype)
    x, dy = draw(4, 3, 3, dtype=dtype), draw(4, 3, 5, dtype=dtype)
    lstm.forward(backend.array(x))  # the copies go on from here with the same masks
    copies = [copy.deepcopy(lstm), *(pickle.loads(pickle.dumps(lstm, protocol)) for protocol in range(2, 6))]
    expected = train(backend, lstm, x, dy)
    for one in copies:
        assert repr(one) == repr(lstm) and one.cell == lstm.cell and one.batch_first
        for name, value in lstm.params.items():
            assert not backend.shares_memory(one.params[name], value)
        assert_identical(train(backend, one, x, dy), expected)
        for value in one.params.values():
            value[...] = 0
    fresh = copy.deepcopy(lstm)
    assert_identical(train(backend, lstm, x, dy), train(backend, fresh, x, dy))
    assert all(backend.host(value).any() for value in lstm.params.values())


def test_errors_and_gradients_pickle(backend):
    lstm = model(backend, 3, 5)
    y, _, tape = lstm.forward(backend.array(draw(4, 2, 3)))
    grads = lstm.backward(tape, y)
    again = pickle.loads(pickle.dumps(grads))
    np.testing.assert_array_equal(backend.host(again.x), backend.host(grads.x))
    with pytest.raises(fastlstm.ShapeError) as caught:
        lstm(backend.array(draw(4, 2, 2)))
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is fastlstm.ShapeError and str(error) == str(caught.value)


def test_to_numpy_copies(backend, dtype):
    lstm = model(backend, 3, 5, 2, dropout=0.5, batch_first=True, dtype=dtype)
    moved = lstm.to(np)
    assert (moved.cell, moved.batch_first) == (lstm.cell, lstm.batch_first)
    for name, value in lstm.params.items():
        assert type(moved.params[name]) is np.ndarray
        np.testing.assert_array_equal(moved.params[name], backend.host(value))
        if backend.is_numpy:
            assert not np.shares_memory(moved.params[name], value)
    moved.params["bias_l0"][...] = 9
    assert (backend.host(lstm.params["bias_l0"]) != 9).all()


# Dropout belongs to training.


def test_dropout_is_drawn_anew_in_training_and_absent_in_inference(backend):
    lstm = model(backend, 3, 5, 2, dropout=0.5)
    plain = model(backend, 3, 5, 2)
    x = backend.array(draw(6, 4, 3))
    first, second = (backend.host(lstm.forward(x)[0]) for _ in range(2))
    assert (first != second).any()
    np.testing.assert_array_equal(backend.host(lstm(x)[0]), backend.host(plain(x)[0]))
    again = model(backend, 3, 5, 2, dropout=0.5)
    np.testing.assert_array_equal(backend.host(again.forward(x)[0]), first)
    np.testing.assert_array_equal(backend.host(again.forward(x)[0]), second)


def test_seeds_determine_the_masks(backend):
    first, second = model(backend, 3, 5, 2, dropout=0.5), model(backend, 3, 5, 2, dropout=0.5, seed=1)
    second.params.update(first.params)
    x = backend.array(draw(6, 4, 3))
    assert (backend.host(first.forward(x)[0]) != backend.host(second.forward(x)[0])).any()


def test_a_failed_call_draws_no_mask(backend):
    one, other = (model(backend, 3, 5, 2, dropout=0.5) for _ in range(2))
    x = backend.array(draw(6, 4, 3))
    for bad in (None, backend.array(draw(6, 4, 2))):
        with pytest.raises(fastlstm.FastLSTMError):
            one.forward(bad)
    np.testing.assert_array_equal(backend.host(one.forward(x)[0]), backend.host(other.forward(x)[0]))


def test_a_single_layer_has_nothing_to_drop(backend):
    x = backend.array(draw(6, 4, 3))
    dropping, plain = model(backend, 3, 5, dropout=0.9), model(backend, 3, 5)
    np.testing.assert_array_equal(backend.host(dropping.forward(x)[0]), backend.host(plain.forward(x)[0]))
