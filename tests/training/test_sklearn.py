"""Estimators of scikit-learn: its own checks, sequences of all layouts, and what users combine them with."""

from __future__ import annotations

import copy
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="scikit-learn is not installed")

from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, LeaveOneOut, TimeSeriesSplit, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from fastlstm import ArgumentError, DTypeError, ShapeError
from fastlstm.sklearn import LSTMClassifier, LSTMForecaster, LSTMRegressor
from fastlstm.training import Model
from fastlstm.training.windows import split

SMALL = {"hidden_size": 8, "random_state": 0}
# float64 sums over six steps in another order.
SAME = {"rtol": 1e-9, "atol": 1e-12}


@pytest.fixture
def rng():
    return np.random.default_rng(51)


def sequences(rng, count=60, steps=6, channels=2):
    X = rng.normal(size=(count, steps, channels))
    return X, X[:, -2:, 0].sum(axis=1)


def ragged(rng, count=60):
    X = [rng.normal(size=(steps, 2)) for steps in rng.integers(3, 9, count)]
    return X, np.array([x[-2:, 0].sum() for x in X])


@pytest.mark.parametrize("kind", [LSTMRegressor, LSTMClassifier])
@pytest.mark.slow
def test_the_checks_of_scikit_learn_pass(kind):
    results = check_estimator(kind(hidden_size=16, epochs=80), on_skip=None)
    # Skipped by scikit-learn itself, for want of an environment variable that SciPy reads at its import.
    assert {result["check_name"] for result in results if result["status"] != "passed"} <= {"check_array_api_input"}
    assert len(results) > 50


@pytest.mark.parametrize("output", ["last", "mean"])
def test_all_layouts_of_the_same_sequences_give_the_same(rng, output):
    X, y = sequences(rng)
    expected = LSTMRegressor(**SMALL, output=output, epochs=3).fit(X, y)
    swapped = X.swapaxes(1, 2)
    objects = np.empty(60, object)
    objects[:] = list(X)
    others = {
        "float32": (X.astype("f4").astype("f8"), False),
        "list of arrays": (list(X), False),
        "nested lists": (X.tolist(), False),
        "array of arrays": (objects, False),
        "channels first": (swapped, True),
        "list, channels first": (list(swapped), True),
    }
    for name, (other, first) in others.items():
        found = LSTMRegressor(**SMALL, output=output, epochs=3, channels_first=first).fit(other, y)
        tolerance = {"atol": 1e-3} if name == "float32" else SAME
        np.testing.assert_allclose(found.predict(other), expected.predict(X), **tolerance, err_msg=name)
        assert found.n_features_in_ == 2
    table, y = sequences(rng, channels=1)
    one = LSTMRegressor(**SMALL, output=output, epochs=3)
    first, second = one.fit(table, y).predict(table), one.fit(table[..., 0], y).predict(table[..., 0])
    np.testing.assert_array_equal(first, second)


def test_sequences_of_different_lengths(rng):
    X, y = ragged(rng, 200)
    regressor = LSTMRegressor(**SMALL).fit(X[:150], y[:150])
    assert regressor.score(X[150:], y[150:]) > 0.9
    np.testing.assert_allclose(regressor.predict(X[:3]), [regressor.predict([x])[0] for x in X[:3]], **SAME)
    swapped = LSTMRegressor(**SMALL, channels_first=True).fit([x.T for x in X[:150]], y[:150])
    np.testing.assert_allclose(swapped.predict([x.T for x in X]), regressor.predict(X), **SAME)
    series = [x[:, 0] for x in X]  # 1-D: one channel
    assert LSTMRegressor(**SMALL).fit(series[:150], y[:150]).score(series[150:], y[150:]) > 0.9
    equal = LSTMRegressor(**SMALL, epochs=1).fit(X, y)
    assert equal.predict([x[:3] for x in X]).shape == (200,)  # all of one length, in a list


@pytest.mark.parametrize("kind", ["list", "objects", "series"])
def test_one_dimensional_sequences_have_one_channel_whatever_their_lengths(rng, kind):
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")

    def given(lengths):
        found = [rng.normal(size=length) for length in lengths]
        if kind == "series":
            return [pandas.Series(one) for one in found]
        objects = np.empty(len(found), object)
        objects[:] = found
        return objects if kind == "objects" else found

    for lengths in ((5, 6, 7), (5, 5, 5), (5,)):
        X, y = given(lengths), np.arange(float(len(lengths)))
        regressor = LSTMRegressor(hidden_size=2, epochs=1, random_state=0).fit(X, y)
        assert regressor.n_features_in_ == 1
        for others in ((5,), (6, 6), (4, 9, 9), (5, 5, 5)):
            Z = given(others)
            columns = [np.asarray(one)[:, None] for one in Z]
            np.testing.assert_allclose(regressor.predict(Z), regressor.predict(columns), **SAME)
            if len(set(others)) == 1:
                np.testing.assert_allclose(regressor.predict(np.stack(list(Z))), regressor.predict(columns), **SAME)
    X, y = given((5, 5, 6, 7)), np.arange(4.0)
    assert cross_val_predict(LSTMRegressor(hidden_size=2, epochs=1), X, y, cv=LeaveOneOut()).shape == (4,)


def test_a_model_of_a_table_reads_lists_of_rows_as_a_table(rng):
    table, y = rng.normal(size=(9, 6)), np.arange(9.0)
    regressor = LSTMRegressor(hidden_size=2, epochs=1, random_state=0).fit(table, y)
    assert regressor.n_features_in_ == 6
    np.testing.assert_array_equal(regressor.predict(list(table)), regressor.predict(table))
    for wrong in ([table[0, :5]], [table[0], table[0, :5]], table[:, :5]):
        with pytest.raises(ValueError, match="expecting 6"):
            regressor.predict(wrong)


def test_classes_are_the_users_labels(rng):
    X, y = ragged(rng, 200)
    labels = np.array(["down", "level", "up"])[np.digitize(y, [-0.7, 0.7])]
    classifier = LSTMClassifier(**SMALL).fit(X, labels)
    assert classifier.classes_.tolist() == ["down", "level", "up"]
    assert classifier.score(X, labels) > 0.85
    p = classifier.predict_proba(X)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-12)
    np.testing.assert_array_equal(classifier.classes_[p.argmax(axis=1)], classifier.predict(X))


def test_several_targets(rng):
    X, y = sequences(rng, 200)
    both = np.stack([y, 1000 + 50 * X[:, -1, 1]], axis=1)
    found = LSTMRegressor(**SMALL).fit(X, both)
    assert found.predict(X).shape == (200, 2)
    assert r2_score(both, found.predict(X), multioutput="raw_values").min() > 0.9
    assert LSTMRegressor(**SMALL, epochs=1).fit(X, both[:, :1]).predict(X).shape == (200, 1)


@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
def test_losses(rng, loss):
    X, y = sequences(rng, 200)
    assert LSTMRegressor(**SMALL, loss=loss, epochs=80).fit(X, y).score(X, y) > 0.9


def test_grid_search_over_ragged_sequences(rng):
    X, y = ragged(rng)
    search = GridSearchCV(LSTMRegressor(**SMALL, epochs=5), {"hidden_size": [2, 4], "output": ["last", "mean"]}, cv=2)
    search.fit(X, y)
    assert set(search.best_params_) == {"hidden_size", "output"}
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.model_.lstms["lstm"].cell.hidden_size == search.best_params_["hidden_size"]


def test_pipelines(rng):
    X, y = sequences(rng)
    difference = FunctionTransformer(lambda X: np.diff(X, axis=1))
    pipeline = make_pipeline(difference, LSTMRegressor(**SMALL, epochs=5)).fit(X, y)
    assert pipeline.predict(X).shape == (60,) and pipeline[-1].n_features_in_ == 2
    table = X[..., 0]
    scores = cross_val_score(make_pipeline(StandardScaler(), LSTMRegressor(**SMALL)), table, y, cv=3)
    assert scores.mean() > 0.5


def test_copies_and_pickles_predict_the_same(rng, tmp_path):
    X, y = ragged(rng)
    regressor = LSTMRegressor(**SMALL, epochs=3, dtype="float32").fit(X, y)
    for other in (pickle.loads(pickle.dumps(regressor)), copy.deepcopy(regressor)):
        np.testing.assert_array_equal(other.predict(X), regressor.predict(X))
    assert not hasattr(clone(regressor), "model_")
    assert clone(regressor).get_params() == regressor.get_params()
    regressor.model_.save(tmp_path / "model.safetensors")
    padded = Model.load(tmp_path / "model.safetensors").predict([x.astype("f4") for x in X])
    np.testing.assert_array_equal(padded[:, 0], regressor.predict(X))
    assert padded.dtype == np.float32 and regressor.predict(X).dtype == np.float64


def test_the_random_state_determines_the_result(rng):
    X, y = sequences(rng)
    options = {"hidden_size": 4, "num_layers": 2, "dropout": 0.3, "epochs": 2, "validation": 0.2, "patience": 2}
    first, second, other = (LSTMRegressor(**options, random_state=s).fit(X, y).predict(X) for s in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


def test_a_dtype_that_changes_after_fitting_waits_for_the_next_fit(rng):
    X, y = sequences(rng)
    regressor = LSTMRegressor(**SMALL, epochs=1).fit(X, y)
    expected = regressor.predict(X)
    np.testing.assert_array_equal(regressor.set_params(dtype="float32").predict(X), expected)


# Forecasts


def test_a_forecaster_continues_a_series(rng):
    t = np.arange(420)
    series = np.stack([np.sin(t / 6), 100 + 5 * np.cos(t / 9)], axis=1)
    forecaster = LSTMForecaster(24, 8, LSTMRegressor(hidden_size=16, random_state=0, epochs=60)).fit(series[:400])
    found = forecaster.predict()
    assert found.shape == (8, 2)
    assert (np.abs(found - series[400:408]) < 0.3 * series.std(axis=0)).all()
    np.testing.assert_array_equal(forecaster.predict(series[:400]), found)
    np.testing.assert_array_equal(forecaster.predict(series[376:400]), found)
    assert forecaster.score(series[300:]) > 0.95
    one = LSTMForecaster(24, 8, LSTMRegressor(**SMALL, epochs=5)).fit(series[:, 0])
    assert one.predict().shape == (8,)
    assert pickle.loads(pickle.dumps(one)).predict().tolist() == one.predict().tolist()


def test_windows_are_followed_by_their_targets():
    windows, targets = split(np.arange(14.0).reshape(7, 2), 3, 2)
    assert windows[:, :, 0].tolist() == [[0, 2, 4], [2, 4, 6], [4, 6, 8]]
    assert targets[:, :, 1].tolist() == [[7, 9], [9, 11], [11, 13]]


@pytest.mark.parametrize("changed", [{"horizon": 2}, {"window": 3}, {"window": 9, "horizon": 4}, {"horizon": 0}])
@pytest.mark.parametrize("channels", [1, 2])
def test_options_that_change_after_fitting_wait_for_the_next_fit(changed, channels):
    series = np.sin(np.arange(60.0))[:, None] + np.arange(channels) * 1000
    series = series[:, 0] if channels == 1 else series
    forecaster = LSTMForecaster(5, 3, LSTMRegressor(**SMALL, epochs=2)).fit(series)
    expected, of_others, score = forecaster.predict(), forecaster.predict(series[:20]), forecaster.score(series)
    forecaster.set_params(**changed)
    np.testing.assert_array_equal(forecaster.predict(), expected)
    np.testing.assert_array_equal(forecaster.predict(series[:20]), of_others)
    assert forecaster.score(series) == score
    if changed != {"horizon": 0}:
        assert len(forecaster.fit(series).predict()) == forecaster.horizon
        return
    with pytest.raises(ArgumentError):
        forecaster.fit(series[:30])
    np.testing.assert_array_equal(forecaster.predict(), expected)


def test_a_series_that_changes_after_fitting_has_no_influence():
    series = np.sin(np.arange(60.0))
    forecaster = LSTMForecaster(5, 3, LSTMRegressor(**SMALL, epochs=1)).fit(series)
    expected = forecaster.predict()
    series[:] = 9
    np.testing.assert_array_equal(forecaster.predict(), expected)


def test_a_series_of_other_channels_is_refused():
    series = np.sin(np.arange(120.0)).reshape(60, 2)
    forecaster = LSTMForecaster(5, 3, LSTMRegressor(**SMALL, epochs=1)).fit(series)
    for call in (forecaster.predict, forecaster.score):
        with pytest.raises(ShapeError, match="2 channels"):
            call(series[:, :1])


def test_grid_search_over_a_forecaster(rng):
    series = np.sin(np.arange(120) / 4)
    search = GridSearchCV(
        LSTMForecaster(regressor=LSTMRegressor(**SMALL, epochs=3)), {"window": [4, 8], "regressor__hidden_size": [4]},
        cv=TimeSeriesSplit(2),
    ).fit(series)  # fmt: skip
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


# Bad input

X3, Y3 = np.zeros((6, 4, 2)), np.zeros(6)
ERRORS = {
    "unknown output": (LSTMRegressor(output="sequence"), X3, Y3, ArgumentError),
    "unknown loss": (LSTMRegressor(loss="mse"), X3, Y3, ArgumentError),
    "unknown dtype": (LSTMRegressor(dtype="float16"), X3, Y3, DTypeError),
    "channels_first is a number": (LSTMRegressor(channels_first=1), X3, Y3, ArgumentError),
    "hidden size of zero": (LSTMClassifier(hidden_size=0), X3, Y3.astype(int), ArgumentError),
    "no epochs": (LSTMRegressor(epochs=0), X3, Y3, ArgumentError),
    "negative rate": (LSTMRegressor(learning_rate=-1), X3, Y3, ArgumentError),
    "patience without validation": (LSTMRegressor(patience=2), X3, Y3, ArgumentError),
    "four axes": (LSTMRegressor(), X3[None], Y3[:1], ValueError),
    "other channels": (LSTMRegressor(), [X3[0], X3[0][:, :1]], Y3[:2], ShapeError),
    "NaN in a list": (LSTMRegressor(), [X3[0], X3[0][:2] * np.nan], Y3[:2], ArgumentError),
    "text in a list": (LSTMRegressor(), [X3[0], np.array([["a", "b"]])], Y3[:2], DTypeError),
    "NaN in an array": (LSTMRegressor(), X3 * np.nan, Y3, ValueError),
    "too few targets": (LSTMRegressor(), X3, Y3[:5], ShapeError),
    "too few targets of a list": (LSTMRegressor(), [X3[0], X3[0][:2]], Y3, ShapeError),
    "NaN in the targets": (LSTMRegressor(), X3, Y3 * np.nan, ValueError),
    "targets with three axes": (LSTMRegressor(), X3, X3, ShapeError),
    "an empty list": (LSTMRegressor(), [], [], ValueError),
    "forecast of nothing": (LSTMForecaster(horizon=0), X3[:, 0], None, ArgumentError),
    "window of nothing": (LSTMForecaster(window=0), X3[:, 0], None, ArgumentError),
    "a series that is too short": (LSTMForecaster(window=6), X3[:, 0], None, ShapeError),
    "a series of three axes": (LSTMForecaster(window=2), X3, None, ShapeError),
    "a classifier that forecasts": (LSTMForecaster(2, 1, LSTMClassifier()), X3[:, 0], None, ArgumentError),
}


@pytest.mark.parametrize("verbose", [True, False, 0, 1, 10, np.bool_(True), np.int64(1)])
def test_verbose_is_a_bool_or_a_number(rng, verbose, capsys):
    X, y = sequences(rng)
    LSTMRegressor(hidden_size=2, epochs=1, verbose=verbose).fit(X, y)
    assert ("training" in capsys.readouterr().err) == bool(verbose)


@pytest.mark.parametrize("option", ["verbose", "learning_rate", "hidden_size", "num_layers", "dropout", "epochs",
                                    "batch_size", "weight_decay", "clip_norm", "validation", "patience", "schedule",
                                    "dtype", "output", "channels_first", "bidirectional", "loss"])  # fmt: skip
@pytest.mark.parametrize("wrong", ["wrong", -1, 1.5j])
def test_the_message_names_the_option_that_was_given(rng, option, wrong):
    X, y = sequences(rng)
    options = {"hidden_size": 2, "epochs": 1, "validation": 0.2, option: wrong}
    with pytest.raises((ArgumentError, DTypeError), match=option):
        LSTMRegressor(**options).fit(X, y)


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error(case):
    estimator, X, y, error = ERRORS[case]
    with pytest.raises(error) as caught:
        estimator.fit(X, y)
    assert error is ValueError or type(caught.value) is error
    assert re.search(r"\w{3}", str(caught.value))
    assert not hasattr(estimator, "model_")


def test_other_channels_than_in_training_are_refused(rng):
    X, y = sequences(rng)
    regressor = LSTMRegressor(**SMALL, epochs=1).fit(X, y)
    for other in (X[..., :1], list(X[..., :1])):
        with pytest.raises(ShapeError, match="expecting 2"):
            regressor.predict(other)
    assert regressor.predict(X[:, :3]).shape == (60,)  # fewer steps are welcome


def test_without_scikit_learn_the_message_says_what_to_install():
    code = "import sys; sys.modules['sklearn.base'] = None; import fastlstm.sklearn"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert 'pip install "fastlstm[sklearn]"' in result.stderr
