"""Every argument that does not fit raises a typed error that names it, before any work is done."""

from __future__ import annotations

import fractions
import warnings

import numpy as np
import pytest
from harness import Case, problem
from hypothesis import given
from hypothesis import strategies as st

import fastlstm
from fastlstm import LSTM
from fastlstm.cell import Cell
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.parameters import initialise

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
CASES = {
    "general": Case(STEPS, BATCH, INPUTS, HIDDEN, 2, True, lengths=(2, 0, 4)),
    "stack": Case(STEPS, BATCH, INPUTS, HIDDEN, 2),
    "small": Case(2, BATCH, INPUTS, HIDDEN),  # which the CPU backend runs on a path that skips the checks in Python
}
TYPE, VALUE = (fastlstm.FastLSTMError, TypeError), (fastlstm.FastLSTMError, ValueError)


def matrix(value):
    """Make an ``np.matrix``, which warns of its own deprecation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PendingDeprecationWarning)
        return np.asmatrix(value)


class Calls:
    """One problem on one backend, with a call per argument that puts another value in its place."""

    def __init__(self, backend, dtype, case="general"):
        case = CASES[case]
        p = problem(case).astype(dtype)
        self.backend, self.lengths = backend, p.lengths
        self.lstm = LSTM(INPUTS, HIDDEN, case.layers, bidirectional=case.bidirectional, dtype=dtype)
        self.lstm.params.update({name: backend.array(value) for name, value in p.params.items()})
        arrays = {"x": p.x, "h0": p.state[0], "c0": p.state[1], "dy": p.dy, "dh_n": p.dstate[0], "dc_n": p.dstate[1]}
        self.arrays = {name: backend.array(value) for name, value in arrays.items()}
        self.state = self.arrays["h0"], self.arrays["c0"]
        _, _, self.tape = self.lstm.forward(self.arrays["x"], self.state, self.lengths)
        self.before = self.run()

    def valid(self, argument):
        """Return the array that fits."""
        return (self.arrays | self.lstm.params)[argument]

    def run(self):
        """Run the forward pass with the arguments as they are now."""
        y, state = self.lstm(self.arrays["x"], self.state, self.lengths)
        if not self.lstm.cell.bidirectional:
            state = *state, self.lstm.step(self.arrays["x"][0], self.state)[0]
        return [self.backend.host(value) for value in (y, *state)]

    def put(self, argument, value):
        """Call all that takes this argument with `value` in its place: each must refuse it, or each take it."""
        lstm, lengths = self.lstm, self.lengths
        a = self.arrays | {"state": self.state, "lengths": lengths, "tape": self.tape} | {argument: value}
        if argument in ("h0", "c0"):
            a["state"] = a["h0"], a["c0"]
        a["dstate"] = value if argument == "dstate" else (a["dh_n"], a["dc_n"])
        kept = dict(lstm.params)
        if argument in kept:
            lstm.params[argument] = value
        calls = []
        if argument in ("x", "state", "h0", "c0", "lengths", *kept):
            calls += [
                lambda: lstm.forward(a["x"], a["state"], a["lengths"]),
                lambda: lstm(a["x"], a["state"], a["lengths"]),
                lambda: lstm_forward(lstm.params, a["x"], a["state"], a["lengths"]),
            ]
        if argument in ("state", "h0", "c0", *kept) and not lstm.cell.bidirectional:
            calls.append(lambda: lstm.step(self.arrays["x"][0], a["state"]))
        if argument in ("tape", "dy", "dstate", "dh_n", "dc_n", *kept):
            calls += [
                lambda: lstm.backward(a["tape"], a["dy"], a["dstate"]),
                lambda: lstm_backward(lstm.params, a["tape"], a["dy"], a["dstate"]),
            ]
        errors = []
        for call in calls:
            try:
                call()
            except fastlstm.FastLSTMError as error:
                errors.append(error)
        lstm.params.update(kept)
        assert len(errors) in (0, len(calls)), f"{len(errors)} of {len(calls)} calls refused {argument}: {value!r}"
        if errors:
            raise errors[0]

    def check(self):
        """Assert that everything is as it was: the failed calls left nothing behind."""
        for found, expected in zip(self.run(), self.before, strict=True):
            np.testing.assert_array_equal(found, expected)


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


class ArrayLike:
    """An object that has what pandas and torch objects have: it turns into an array, but is none."""

    def __init__(self, value):
        self.value, self.shape, self.dtype, self.ndim = value, value.shape, value.dtype, value.ndim
        self.device = "cpu"

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value, dtype)


class Refusing:
    """What an array on a GPU, or one that requires gradients, does if NumPy asks for its numbers."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach() first")


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


@pytest.mark.parametrize("seed", [-1, 1.5, "seed", None])
def test_bad_dropout_seeds_are_refused(backend, seed):
    params = {name: backend.array(value) for name, value in initialise(Cell(2, 3, 2), 0).items()}
    with pytest.raises(fastlstm.ArgumentError, match="seed"):
        lstm_forward(params, backend.array(np.zeros((4, 2, 2), np.float32)), dropout=0.5, dropout_seed=seed)


@pytest.mark.parametrize("library", [None, "numpy", np.ndarray, np.random, object(), 3])
def test_to_takes_two_modules_only(library):
    with pytest.raises(fastlstm.ArrayTypeError, match="numpy or cupy"):
        LSTM(2, 3).to(library)


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
