"""Every array that does not fit raises a typed error that names it, before any work is done."""

from __future__ import annotations

import fractions

import numpy as np
import pytest
from bad_calls import INPUTS, ArrayLike, Calls, matrix
from hypothesis import given
from hypothesis import strategies as st

import fastlstm
from fastlstm import LSTM
from fastlstm.functional import lstm_forward

ARGUMENTS = [
    *(("general", name) for name in ("x", "h0", "c0", "dy", "dh_n", "dc_n")),
    *(("general", name) for name in ("weight_ih_l0", "weight_hh_l1_reverse", "bias_l1")),
    *(("small", name) for name in ("x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_l0")),
]
each_argument = pytest.mark.parametrize(("case", "argument"), ARGUMENTS)
OPTIONAL = ("dy", "dh_n", "dc_n")  # None stands for zero
# fmt: off
NO_ARRAYS = [1, 1.5, "text", b"bytes", [], [[0.0]], (), {}, set(), object(), np.float32(1), np.float64(1), range(3),
             Ellipsis, int, fractions.Fraction(1, 2)]
# fmt: on
DTYPES = ["?", "i1", "u2", "i4", "i8", "f2", "g", "c8", "c16", "O", "U3", "S3", "M8[s]", "m8[s]", "V4", "i4,f4"]
DTYPES_OF_CUPY = ["?", "i1", "u2", "i4", "i8", "f2", "c8", "c16"]


@each_argument
def test_values_that_are_not_arrays_are_refused(backend, dtype, case, argument):
    calls = Calls(backend, dtype, case)
    good = backend.host(calls.valid(argument))
    others = [good.tolist(), memoryview(good), ArrayLike(good)]
    for value in [*NO_ARRAYS, *others, *([] if argument in OPTIONAL else [None])]:
        with pytest.raises(fastlstm.FastLSTMError) as caught:
            calls.put(argument, value)
        assert isinstance(caught.value, TypeError | ValueError)
        assert argument in str(caught.value)
    calls.check()


@each_argument
def test_subclasses_that_would_lose_their_meaning_are_refused(backend, dtype, case, argument):
    calls = Calls(backend, dtype, case)
    good = backend.host(calls.valid(argument))
    masked = [np.ma.array(good), np.ma.array(good, mask=np.ones(good.shape, bool)), np.ma.masked]
    for value in [*masked, *([matrix(good)] if good.ndim == 2 else [])]:
        with pytest.raises(fastlstm.ArrayTypeError, match=rf"{argument}.*(mask|matrix)"):
            calls.put(argument, value)
    calls.check()


@each_argument
def test_arrays_of_other_libraries_are_refused(backend, dtype, case, argument):
    calls = Calls(backend, dtype, case)
    good = backend.host(calls.valid(argument))
    others = [] if backend.is_numpy else [good]
    if good.ndim <= 2:
        pandas = pytest.importorskip("pandas", reason="pandas is not installed")
        others = [pandas.DataFrame(good)] if good.ndim == 2 else [pandas.Series(good), pandas.Index(good)]
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for value in [*others, torch.from_numpy(good.copy())]:
        with pytest.raises((fastlstm.ArrayTypeError, fastlstm.DTypeError, fastlstm.ShapeError), match=argument):
            calls.put(argument, value)
    calls.check()


@each_argument
def test_other_dtypes_are_refused(backend, dtype, case, argument):
    calls = Calls(backend, dtype, case)
    good = backend.host(calls.valid(argument))
    other = np.float32 if dtype == np.float64 else np.float64
    swapped = [np.dtype(other).newbyteorder()] if backend.is_numpy else []
    for name in [*(DTYPES if backend.is_numpy else DTYPES_OF_CUPY), other, *swapped]:
        value = backend.array(np.zeros(good.shape, name))
        with pytest.raises(fastlstm.DTypeError) as caught:
            calls.put(argument, value)
        assert "dtype" in str(caught.value)
    calls.check()


@each_argument
@given(data=st.data())
@pytest.mark.sampled
def test_other_shapes_are_refused(backend, dtype, case, argument, data):
    calls = Calls(backend, dtype, case)
    right = list(calls.valid(argument).shape)
    change = data.draw(st.sampled_from(["grow", "shrink", "empty", "swap", "add axis", "drop axis", "transpose"]))
    axis = data.draw(st.integers(0, len(right) - 1))
    shape = list(right)
    match change:
        case "grow":
            shape[axis] += data.draw(st.integers(1, 9))
        case "shrink":
            shape[axis] = data.draw(st.integers(1, shape[axis])) - 1
        case "empty":
            shape[axis] = 0
        case "swap" | "transpose":
            shape = shape[::-1] if change == "transpose" else [*shape[1:], shape[0]]
        case "add axis":
            shape.insert(axis, 1)
        case "drop axis":
            del shape[axis]
    value = backend.array(np.zeros(shape, dtype))
    steps_fit = calls.lengths is None or shape[:1] >= right[:1]
    if shape == right or (argument == "x" and shape[1:] == right[1:] and steps_fit):
        calls.put(argument, value)
        return
    with pytest.raises(fastlstm.ArgumentError) as caught:
        calls.put(argument, value)
    if argument == "x" and len(shape) == 3 and shape[2] == INPUTS:
        return  # a good x for another batch or fewer steps: it is the states or the lengths that do not fit it
    assert isinstance(caught.value, fastlstm.ShapeError)
    assert argument in str(caught.value) or argument == "x"  # x of two axes is one sequence, and then h0 does not fit
    calls.check()


@pytest.mark.parametrize("case", ["stack", "small"])
@pytest.mark.parametrize("argument", ["x_t", "h0", "c0"])
def test_step_checks_as_a_call_does(backend, dtype, case, argument):
    calls = Calls(backend, dtype, case)
    good = {"x_t": calls.arrays["x"][0], "h0": calls.state[0], "c0": calls.state[1]}
    one = good[argument]
    bad = [*NO_ARRAYS, None, one.astype(np.float16), one[None], one[..., :1], np.ma.array(backend.host(one))]
    for value in bad:
        with pytest.raises(fastlstm.FastLSTMError, match=argument):
            x, h, c = (good | {argument: value}).values()
            calls.lstm.step(x, (h, c))
    calls.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda params: params.pop("bias_l1"),
        lambda params: params.pop("weight_ih_l0"),
        lambda params: params.pop("weight_hh_l0"),
        lambda params: params.update(weight_ih_l2=params["weight_ih_l1"]),
        lambda params: params.update(weight=params["weight_ih_l1"]),
        lambda params: params.update({3: params["weight_ih_l1"]}),
        lambda params: params.update({None: params["weight_ih_l1"]}),
        lambda params: params.update({"weight_ih_l999999999": params["weight_ih_l1"]}),
        lambda params: params.update({"weight_ih_l" + "9" * 5000: params["weight_ih_l1"]}),
        lambda params: params.clear(),
    ],
)
def test_parameters_with_other_names_are_refused(backend, dtype, change):
    calls = Calls(backend, dtype)
    kept = dict(calls.lstm.params)
    change(calls.lstm.params)
    for call in (
        lambda: calls.lstm(calls.arrays["x"]),
        lambda: calls.lstm.backward(calls.tape, calls.arrays["dy"]),
        lambda: lstm_forward(calls.lstm.params, calls.arrays["x"]),
    ):
        with pytest.raises(fastlstm.ArgumentError, match="parameter"):
            call()
    calls.lstm.params.clear()
    calls.lstm.params.update(kept)
    calls.check()


@pytest.mark.parametrize("params", [None, 1, "weight_ih_l0", [], {}, [("weight_ih_l0", np.zeros((8, 2)))], object()])
def test_arguments_that_are_not_parameters_are_refused(params):
    with pytest.raises(fastlstm.FastLSTMError, match="param"):
        lstm_forward(params, np.zeros((3, 2, 2), np.float32))


def test_messages_say_what_to_do():
    lstm = LSTM(2, 3)
    with pytest.raises(
        fastlstm.DTypeError, match=r"x has dtype float64, but the model is float32.*astype\('float32'\)"
    ):
        lstm(np.zeros((4, 1, 2)))
    with pytest.raises(fastlstm.ShapeError, match=r"x must have shape \(T, B, I\) = \(any, any, 2\), got \(4, 1, 3\)"):
        lstm(np.zeros((4, 1, 3), np.float32))
    with pytest.raises(fastlstm.ShapeError, match=r"h0 must have shape \(L\*D, B, H\) = \(1, 1, 3\), got \(1, 3\)"):
        lstm(np.zeros((4, 1, 2), np.float32), (np.zeros((1, 3), np.float32),) * 2)
    with pytest.raises(fastlstm.ArrayTypeError, match=r"x must be a NumPy or CuPy array, got builtins.list"):
        lstm([[[0.0, 0.0]]])
