"""One problem, and all calls that take an argument: each has to refuse a bad one."""

from __future__ import annotations

import warnings

import numpy as np
from harness import Case, problem

import fastlstm
from fastlstm import LSTM
from fastlstm.functional import lstm_backward, lstm_forward

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 2, 5
CASES = {
    "general": Case(STEPS, BATCH, INPUTS, HIDDEN, 2, True, lengths=(2, 0, 4)),
    "stack": Case(STEPS, BATCH, INPUTS, HIDDEN, 2),
    "small": Case(2, BATCH, INPUTS, HIDDEN),  # which the CPU backend runs on a path that skips the checks in Python
}


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


class ArrayLike:
    """An object that has what pandas and torch objects have: it turns into an array, but is none."""

    def __init__(self, value):
        self.value, self.shape, self.dtype, self.ndim = value, value.shape, value.dtype, value.ndim
        self.device = "cpu"

    def __array__(self, dtype=None, copy=None):
        return np.array(self.value, dtype)
