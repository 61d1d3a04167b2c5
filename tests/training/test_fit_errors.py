"""Arguments of the training loop that do not fit raise a typed error, before a parameter has changed."""

from __future__ import annotations

import re

import numpy as np
import pytest
from fit_problems import build, params_of, problem

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import Adam, fit, mean_squared_error


@pytest.fixture
def rng():
    return np.random.default_rng(41)


X, Y = np.zeros((4, 6, 3)), np.zeros((6, 1))
NAN = np.where(np.arange(6)[:, None] == 2, np.nan, 0.0)
OTHER = build()
ERRORS = {
    "no model": ({"model": LSTM(3, 6)}, ArgumentError),
    "x of another dtype": ({"x": X.astype("f4")}, DTypeError),
    "x of another size": ({"x": X[..., :2]}, ShapeError),
    "x a list of numbers": ({"x": [1, 2]}, ArrayTypeError),
    "x empty": ({"x": X[:, :0], "y": Y[:0]}, ArgumentError),
    "x with NaN": ({"x": X + NAN[:4, :, None]}, ArgumentError),
    "y of another number": ({"y": Y[:5]}, ShapeError),
    "y of other columns": ({"y": np.zeros((6, 2))}, ShapeError),
    "y of another dtype": ({"y": Y.astype("f4")}, DTypeError),
    "y of objects": ({"y": Y.astype(object)}, DTypeError),
    "y a list": ({"y": [0.0] * 6}, ArrayTypeError),
    "y with NaN": ({"y": NAN}, ArgumentError),
    "y by head": ({"y": {"a": Y}}, ArrayTypeError),
    "mask of another shape": ({"mask": np.ones((6, 1), bool)}, ShapeError),
    "mask of integers": ({"mask": np.ones(6, int)}, DTypeError),
    "negative mask": ({"mask": -np.ones(6)}, ArgumentError),
    "NaN mask": ({"mask": np.full(6, np.nan)}, ArgumentError),
    "lengths too long": ({"lengths": [5] * 6}, ArgumentError),
    "loss is a name": ({"loss": "mse"}, ArgumentError),
    "loss by another head": ({"loss": {"a": mean_squared_error}}, ArgumentError),
    "loss that returns no pair": ({"loss": lambda p, t, m: 1.0}, ArgumentError),
    "arrays of another number": ({"loss_arrays": {"deviation": Y[:5]}}, ShapeError),
    "arrays are a list": ({"loss_arrays": [Y]}, ArgumentError),
    "optimiser of another model": ({"optimiser": Adam(OTHER)}, ArgumentError),
    "optimiser class": ({"optimiser": Adam}, ArgumentError),
    "no epochs": ({"epochs": 0}, ArgumentError),
    "epochs not whole": ({"epochs": 1.5}, ArgumentError),
    "batch of none": ({"batch_size": 0}, ArgumentError),
    "shuffle is a number": ({"shuffle": 1}, ArgumentError),
    "validation on nothing": ({"validation": 0.0}, ArgumentError),
    "validation on all": ({"validation": 1.0}, ArgumentError),
    "validation without targets": ({"validation": {"x": X}}, ArgumentError),
    "validation with more": ({"validation": {"x": X, "y": Y, "z": Y}}, ArgumentError),
    "validation of three": ({"validation": (X, Y, Y)}, ArgumentError),
    "validation that does not fit": ({"validation": (X, Y[:5])}, ShapeError),
    "validation with NaN": ({"validation": (X, NAN)}, ArgumentError),
    "a share of one sequence": ({"x": X[:, :1], "y": Y[:1], "validation": 0.5}, ArgumentError),
    "patience without validation": ({"patience": 3}, ArgumentError),
    "patience of none": ({"patience": 0, "validation": 0.5}, ArgumentError),
    "unknown schedule": ({"schedule": "step"}, ArgumentError),
    "schedule is a number": ({"schedule": 0.1}, ArgumentError),
    "clip to zero": ({"clip_norm": 0.0}, ArgumentError),
    "seed is text": ({"seed": "seed"}, ArgumentError),
    "recompute is a number": ({"recompute": 1}, ArgumentError),
    "progress is a number": ({"progress": 1}, ArgumentError),
    "callback is a number": ({"callback": 1}, ArgumentError),
    "comm is a number": ({"comm": 1}, ArgumentError),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error_and_changes_nothing(case):
    changes, error = ERRORS[case]
    model = build(scale=True)
    before = params_of(model)
    arguments = {"model": model, "x": X, "y": Y, "epochs": 1} | changes
    with pytest.raises(error) as caught:
        fit(**arguments)
    assert type(caught.value) is error and re.search(r"\w{3}", str(caught.value))
    if "returns no pair" not in case:  # it is called after the data were measured
        assert model.scaler is None
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])


def test_bad_schedules_are_found_when_they_are_asked(rng):
    x, y = problem(rng)
    for wrong in (None, -1.0, np.nan, "a"):
        with pytest.raises(ArgumentError, match="schedule"):
            fit(build(), x, y, epochs=1, schedule=lambda epoch, wrong=wrong: wrong)
