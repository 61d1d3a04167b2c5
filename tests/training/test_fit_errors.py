"""Arguments of the training loop that do not fit raise a typed error, before a parameter or the scaler has changed."""

from __future__ import annotations

import functools
import re
import warnings

import numpy as np
import pytest
from fit_problems import build, params_of, problem

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import Adam, Model, fit, mean_squared_error, nash_sutcliffe_loss, softmax_cross_entropy


@pytest.fixture
def rng():
    return np.random.default_rng(41)


X, Y = np.zeros((4, 6, 3)), np.zeros((6, 1))
NAN = np.where(np.arange(6)[:, None] == 2, np.nan, 0.0)
LAST = np.where(np.arange(6) == 5, -1.0, 0.0)[:, None]  # each is in the last batch, which is not shuffled
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
    "unknown array of the loss": ({"loss_arrays": {"sigma": Y[:, 0]}}, ArgumentError),
    "missing array of the loss": ({"loss": nash_sutcliffe_loss}, ArgumentError),
    "missing array of the loss for validation": (
        {"loss": nash_sutcliffe_loss, "loss_arrays": {"deviation": Y}, "validation": (X, Y)},
        ArgumentError,
    ),
    "bad deviation in the last batch": (
        {"loss": nash_sutcliffe_loss, "loss_arrays": {"deviation": LAST}},
        ArgumentError,
    ),
    "bad deviation for validation": (
        {
            "loss": nash_sutcliffe_loss,
            "loss_arrays": {"deviation": Y},
            "validation": {"x": X, "y": Y, "loss_arrays": {"deviation": LAST}},
        },
        ArgumentError,
    ),
    "integers for a regression": ({"y": Y.astype(int)}, DTypeError),
    "classes for a regression": ({"y": Y[:, 0].astype(int)}, DTypeError),
    "integers for validation of a regression": ({"validation": (X, Y.astype(int))}, DTypeError),
    "nothing counts": ({"mask": np.zeros(6, bool)}, ArgumentError),
    "nothing counts, of weights": ({"mask": np.zeros(6)}, ArgumentError),
    "nothing counts for validation": ({"validation": {"x": X, "y": Y, "mask": np.zeros(6, bool)}}, ArgumentError),
    "nothing counts in a share, 0": ({"mask": np.arange(6) == 0, "validation": 0.5, "seed": 0}, ArgumentError),
    "nothing counts in a share, 1": ({"mask": np.arange(6) == 1, "validation": 0.5, "seed": 0}, ArgumentError),
    "nothing counts in a share, 2": ({"mask": np.arange(6) == 2, "validation": 0.5, "seed": 0}, ArgumentError),
    "nothing counts in a share, 3": ({"mask": np.arange(6) == 3, "validation": 0.5, "seed": 0}, ArgumentError),
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
    arguments = {"model": model, "x": X, "y": Y, "epochs": 1, "batch_size": 2, "shuffle": False} | changes
    with pytest.raises(error) as caught:
        fit(**arguments)
    assert type(caught.value) is error and re.search(r"\w{3}", str(caught.value))
    assert model.scaler is None
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])


CLASSES = np.array([0, 2, 1, 0, 2, 1])


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize("output", ["last", "sequence"])
@pytest.mark.parametrize("kind", ["array", "list", "option"])
@pytest.mark.parametrize("where", ["training", "validation"])
def test_a_class_out_of_range_is_found_before_the_first_step(where, kind, output, wrong):
    right = np.broadcast_to(CLASSES, (4, 6)).copy() if output == "sequence" else CLASSES
    bad = right.copy()
    bad[..., -1] = wrong
    x, pair = X, (right, bad)
    if kind == "list":
        x = list(X.swapaxes(0, 1))
        pair = [list(y.T) for y in pair] if output == "sequence" else pair
    model = build(output, outputs=3, scale=True)
    before = params_of(model)
    loss = functools.partial(softmax_cross_entropy) if kind == "option" else softmax_cross_entropy
    y, validation = (pair[1], None) if where == "training" else (pair[0], (x, pair[1]))
    with pytest.raises(ArgumentError, match=r"y must be in 0\.\.K-1 = 0\.\.2"):
        fit(model, x, y, loss=loss, epochs=1, batch_size=4, shuffle=False, validation=validation)
    assert model.scaler is None
    for name, value in model.params.items():
        np.testing.assert_array_equal(value, before[name])
    fit(model, x, pair[0], loss=loss, epochs=1, validation=(x, pair[0]))


def test_integers_with_an_axis_of_classes_are_weights_of_these():
    weights = np.eye(3, dtype=int)[CLASSES] * 5
    fit(build(outputs=3), X, weights, loss=softmax_cross_entropy, epochs=1, validation=(X, weights))


def test_a_class_that_does_not_count_may_be_out_of_range():
    y = np.where(np.arange(6) == 5, -1, CLASSES)
    mask = y >= 0
    fit(
        build(outputs=3),
        X,
        y,
        loss=softmax_cross_entropy,
        epochs=1,
        mask=mask,
        validation={"x": X, "y": y, "mask": mask},
    )


def test_the_data_set_is_named():
    loss, wrong = softmax_cross_entropy, np.full(6, 5)
    with pytest.raises(ArgumentError, match=r"^validation's y must"):
        fit(build(outputs=3), X, CLASSES, loss=loss, validation=(X, wrong))
    with pytest.raises(DTypeError) as caught:
        fit(build(), X, Y, validation=(X, Y.astype(int)))
    assert "validation data" in caught.value.__notes__[0]


def test_a_model_that_cannot_be_trained_is_refused_before_any_work(monkeypatch):
    frozen, lost = build().freeze(), build()
    optimiser = Adam(lost)
    lost.heads["head"].params = {"weight": lost.heads["head"].params["weight"]}
    monkeypatch.setattr(Model, "forward", lambda *args, **options: pytest.fail("runs"))
    with pytest.raises(ArrayTypeError, match="read-only"):
        fit(frozen, X, Y)
    with pytest.raises(ArgumentError, match="optimiser"):
        fit(lost, X, Y, optimiser=optimiser)


def test_the_dtype_in_the_message_is_the_one_that_was_given():
    model = build(scale=True)
    fit(model, X, Y, epochs=1)  # with a scaler, which does not make floats of integers
    for validation in (None, (X, Y.astype(int))):
        with pytest.raises(DTypeError, match="int64"):
            fit(model, X, Y if validation else Y.astype(int), epochs=1, validation=validation)


@pytest.mark.parametrize("where", ["training", "validation"])
@pytest.mark.parametrize("left", ["lengths", "steps"])
def test_sequences_without_steps_are_nothing_to_train_on(left, where):
    x, y = (X[:0], np.zeros((0, 6, 1))) if left == "steps" else (X, np.zeros((4, 6, 1)))
    given = {"x": x, "y": y} | ({"lengths": np.zeros(6, int)} if left == "lengths" else {})
    other = {"x": X, "y": np.zeros((4, 6, 1))}
    options = given if where == "training" else other | {"validation": given}
    with pytest.raises(ArgumentError, match=f"no position of the {where} data counts"):
        fit(build("sequence", scale=True), **options)
    assert fit(build("sequence"), **other, lengths=[0, 0, 0, 0, 0, 1], epochs=1).loss[0] >= 0


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_before_its_first_step_leaves_no_scaler(rng, error):
    x, y = problem(rng)
    model, calls = build(scale=True), []

    def loss(prediction, target, mask=None):
        calls.append(1)
        if len(calls) == 2:  # after the trial
            raise error
        return mean_squared_error(prediction, target, mask)

    with pytest.raises(error):
        fit(model, x, y, loss=loss)
    assert model.scaler is None
    shifted = 1000 + y
    assert fit(model, x, shifted, epochs=1, seed=0).loss == fit(build(scale=True), x, shifted, epochs=1, seed=0).loss


def test_a_run_that_fails_later_keeps_the_scaler_of_its_parameters(rng):
    x, y = problem(rng)
    model = build(scale=True)

    def callback(model, history):
        raise ValueError

    with pytest.raises(ValueError):
        fit(model, x, y, callback=callback)
    kept = model.scaler
    with pytest.raises(DTypeError):
        fit(model, x, y.astype(int))
    assert kept is not None and model.scaler is kept


def test_large_targets_are_tried_without_a_warning(rng):
    x, y = problem(rng, dtype=np.float32)
    model = build(dtype=np.float32, scale=True)
    with warnings.catch_warnings(action="error"):
        history = fit(model, x, 1e30 * y, epochs=1)
    assert np.isfinite(history.loss[0])


def test_bad_schedules_are_found_when_they_are_asked(rng):
    x, y = problem(rng)
    for wrong in (None, -1.0, np.nan, "a"):
        with pytest.raises(ArgumentError, match="schedule"):
            fit(build(), x, y, epochs=1, schedule=lambda epoch, wrong=wrong: wrong)
