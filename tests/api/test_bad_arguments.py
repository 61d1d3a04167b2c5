"""Lengths, states, tapes and options that do not fit raise a typed error, before any work is done."""

from __future__ import annotations

import numpy as np
import pytest
from bad_calls import HIDDEN, INPUTS, STEPS, ArrayLike, Calls, matrix

import fastlstm
from fastlstm import LSTM
from fastlstm.cell import Cell
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.parameters import initialise

TYPE, VALUE = (fastlstm.FastLSTMError, TypeError), (fastlstm.FastLSTMError, ValueError)


class Refusing:
    """What an array on a GPU, or one that requires gradients, does if NumPy asks for its numbers."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach() first")


EITHER = (fastlstm.FastLSTMError,)
BAD_LENGTHS = {
    "negative": ([1, -1, 2], VALUE),
    "beyond T": ([1, 2, STEPS + 1], VALUE),
    "huge": ([1, 2, 2**62], VALUE),
    "beyond int64": (np.array([1, 2, 2**64 - 1], np.uint64), VALUE),
    "beyond all": ([1, 2, 2**70], TYPE),
    "too few": ([1, 2], VALUE),
    "too many": ([1, 2, 3, 4], VALUE),
    "none at all": ([], VALUE),
    "a column": (np.array([[1], [2], [3]]), VALUE),
    "ragged": ([[1], [2, 3], 1], VALUE),
    "a 0-d array": (np.array(3), VALUE),
    "floats": ([1.0, 2.0, 3.0], TYPE),
    "nan": ([1, np.nan, 2], TYPE),
    "bools": ([True, False, True], TYPE),
    "strings": (["1", "2", "3"], TYPE),
    "a string": ("123", TYPE),
    "bytes": (b"\x01\x02\x03", TYPE),
    "objects": (np.array([1, 2, 3], object), TYPE),
    "with None": ([1, None, 2], TYPE),
    "complex": ([1j, 2, 3], TYPE),
    "times": (np.array([1, 2, 3], "m8[s]"), TYPE),
    "a number": (3, TYPE),
    "a float": (3.0, TYPE),
    "a set": ({1, 2, 3}, TYPE),
    "a dict": ({0: 1, 1: 2, 2: 3}, TYPE),
    "a generator": ((k for k in range(3)), TYPE),
    "an object": (object(), TYPE),
    "a float array": (np.array([1.0, 2.0, 3.0]), TYPE),
    "no floats": (np.zeros(0), EITHER),
    "masked": (np.ma.array([1, 2, 3], mask=[0, 1, 0]), TYPE),
    "a matrix": (matrix([1, 2, 3]), EITHER),
    "an array-like of floats": (ArrayLike(np.array([1.0, 2.0, 3.0])), TYPE),
    "an array-like, too long": (ArrayLike(np.array([1, 2, 3, 4])), VALUE),
    "an array-like that refuses": (Refusing(), TYPE),
}


@pytest.mark.parametrize("name", BAD_LENGTHS)
def test_bad_lengths_are_refused(backend, dtype, name):
    calls = Calls(backend, dtype)
    value, kinds = BAD_LENGTHS[name]
    with pytest.raises(fastlstm.FastLSTMError, match="lengths") as caught:
        calls.put("lengths", value)
    assert all(isinstance(caught.value, kind) for kind in kinds)
    calls.check()


def test_lengths_need_a_batch(backend, dtype):
    calls = Calls(backend, dtype)
    with pytest.raises(fastlstm.ArgumentError, match="lengths need a batch"):
        calls.lstm(calls.arrays["x"][:, 0], None, [3])


@pytest.mark.parametrize(("case", "argument"), [("general", "state"), ("general", "dstate"), ("small", "state")])
def test_states_must_be_pairs(backend, dtype, case, argument):
    calls = Calls(backend, dtype, case)
    good = calls.state[0]
    stacked = backend.array(np.stack([backend.host(good)] * 2))
    bad = [good, stacked, (good,), (good, good, good), [], (), "hc", {"h": good, "c": good}, {0, 1}, 1,
           iter((good, good)), object()]  # fmt: skip
    for value in bad:
        with pytest.raises(fastlstm.ArgumentError, match=argument):
            calls.put(argument, value)
    if argument == "state":
        with pytest.raises(fastlstm.ArrayTypeError, match="h0"):
            calls.put(argument, (None, None))
    calls.put(argument, [good, good])  # a list of two is a pair
    calls.check()


def test_states_follow_the_batch_axis(backend, dtype):
    calls = Calls(backend, dtype)
    x, batched = calls.arrays["x"], calls.state
    single = tuple(value[:, 0] for value in batched)
    calls.lstm(x, batched), calls.lstm(x[:, 0], single)
    for sequence, state in ((x, single), (x[:, 0], batched), (x, tuple(value[:, :1] for value in batched))):
        with pytest.raises(fastlstm.ShapeError, match="h0"):
            calls.lstm(sequence, state)


def test_foreign_tapes_are_refused(backend, dtype):
    calls = Calls(backend, dtype)
    dy = calls.arrays["dy"]
    for value in (None, 1, "tape", object(), calls.tape.record, dy, calls.lstm, fastlstm.functional.Tape):
        with pytest.raises(fastlstm.ArgumentError, match="tape"):
            calls.put("tape", value)
    other_dtype = np.float32 if dtype == np.float64 else np.float64
    others = [
        LSTM(INPUTS, HIDDEN, 2, bidirectional=True, dtype=other_dtype),
        LSTM(INPUTS, HIDDEN, 1, bidirectional=True, dtype=dtype),
        LSTM(INPUTS, HIDDEN, 2, dtype=dtype),
        LSTM(INPUTS, HIDDEN, 2, False, bidirectional=True, dtype=dtype),
        LSTM(INPUTS, HIDDEN + 1, 2, bidirectional=True, dtype=dtype),
    ]
    for other in others:
        other.params.update({name: backend.array(value) for name, value in other.params.items()})
        with pytest.raises(fastlstm.ArgumentError, match="tape"):
            other.backward(calls.tape, dy)
        with pytest.raises(fastlstm.FastLSTMError, match=r"parameter|weight|bias"):
            lstm_backward(other.params, calls.tape, dy)
    calls.check()


def test_backward_needs_something_to_go_by(backend, dtype):
    calls = Calls(backend, dtype)
    with pytest.raises(fastlstm.ArgumentError, match="dy or dstate"):
        calls.lstm.backward(calls.tape, None)


def test_backward_asks_for_the_layout_of_the_forward_pass(backend, dtype):
    calls = Calls(backend, dtype)
    dy, dstate = calls.arrays["dy"], (calls.arrays["dh_n"], calls.arrays["dc_n"])
    _, _, tape = calls.lstm.forward(calls.arrays["x"][:, 0])
    with pytest.raises(fastlstm.ShapeError, match="dy"):
        calls.lstm.backward(tape, dy)
    with pytest.raises(fastlstm.ShapeError, match="dh_n"):
        calls.lstm.backward(tape, dy[:, 0], dstate)
    with pytest.raises(fastlstm.ShapeError, match="dy"):
        calls.lstm.backward(calls.tape, dy.swapaxes(0, 1))


BAD_CONSTRUCTIONS = {
    **{f"{name}={value!r}": {name: value} for name in ("input_size", "hidden_size", "num_layers")
       for value in (0, -1, 1.0, 2.5, "3", None, True, np.True_, [3], np.float32(3), 1j)},
    **{f"{name}={value!r}": {name: value} for name in ("bias", "bidirectional", "batch_first")
       for value in (0, 1, None, "yes", 1.0, [])},
    **{f"dropout={value!r}": {"dropout": value}
       for value in (-0.1, 1, 1.0, 2, 10**400, np.nan, np.inf, None, "half", "0.5", [0.5], 1j, True)},
    **{f"proj_size={value!r}": {"proj_size": value} for value in (-1, 5, None, "2")},
    **{f"seed={value!r}": {"seed": value} for value in (-1, 1.5, "seed", object, [-1])},
}  # fmt: skip
BAD_DTYPES = [None, "float16", "int32", "complex64", "g", "O", "no dtype", 3, object(), "U3", "i4,f4", [("a", "f4")]]


@pytest.mark.parametrize("name", BAD_CONSTRUCTIONS)
def test_bad_constructor_arguments_are_refused(name):
    with pytest.raises(fastlstm.ArgumentError, match=name.partition("=")[0]):
        LSTM(**({"input_size": 2, "hidden_size": 3} | BAD_CONSTRUCTIONS[name]))


@pytest.mark.parametrize("value", BAD_DTYPES, ids=lambda value: str(value).partition(" at ")[0])
def test_bad_dtypes_of_a_model_are_refused(value):
    with pytest.raises(fastlstm.DTypeError, match="float32 or float64"):
        LSTM(2, 3, dtype=value)


@pytest.mark.parametrize("seed", [-1, 1.5, "seed", [0]])
def test_bad_dropout_seeds_are_refused(backend, seed):
    params = {name: backend.array(value) for name, value in initialise(Cell(2, 3, 2), 0).items()}
    with pytest.raises(fastlstm.ArgumentError, match="seed"):
        lstm_forward(params, backend.array(np.zeros((4, 2, 2), np.float32)), dropout=0.5, dropout_seed=seed)


@pytest.mark.parametrize("library", [None, "numpy", np.ndarray, np.random, object(), 3])
def test_to_takes_two_modules_only(library):
    with pytest.raises(fastlstm.ArrayTypeError, match="numpy or cupy"):
        LSTM(2, 3).to(library)
