"""The demos on real data, end to end: what the reports claim, that held-out data does not leak, and clear errors."""

from __future__ import annotations

import importlib
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from fastlstm import LSTM, ArgumentError, BackendError
from fastlstm.demo import TASKS, run_demo, tools
from fastlstm.demo.tools import array_library
from fastlstm.training import Linear

SEEDS = [0, 1, 2]


@pytest.fixture
def demo(request):
    """The module of the task that the test names, if its packages are there."""
    module = importlib.import_module(f"fastlstm.demo.{request.param}")
    for package in module.PACKAGES:
        pytest.importorskip(package)
    return module


@pytest.fixture
def short(demo, monkeypatch):
    """The same demo with next to no training, for what does not depend on how well it learns."""
    monkeypatch.setattr(demo, {"co2": "STEPS", "vowels": "EPOCHS"}[name_of(demo)], 2)
    return demo


co2 = pytest.mark.parametrize("demo", ["co2"], indirect=True)
vowels = pytest.mark.parametrize("demo", ["vowels"], indirect=True)
both = pytest.mark.parametrize("demo", ["co2", "vowels"], indirect=True)


def name_of(module):
    return module.__name__.rpartition(".")[2]


def weights(files):
    """Every parameter in the files that a demo wrote."""
    params = {}
    for file in files:
        if file.suffix == ".safetensors":
            params |= LSTM.load(file).params
        if file.suffix == ".npz":
            with np.load(file) as saved:
                params |= dict(saved)
    assert len(params) in (5, 8)  # one or two directions of three, and the linear layer's two
    return params


def device_or_skip(device):
    try:
        array_library(device, ())
    except BackendError as error:
        pytest.skip(str(error))
    return device


# What they claim


@pytest.mark.parametrize("device", tools.DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
@co2
def test_the_forecast_beats_the_seasonal_naive_one(demo, seed, device, tmp_path, capsys):
    result = run_demo("co2", device_or_skip(device), seed, tmp_path / "new" / "folder")
    forecast, naive, drift, last_drift = result.scores.values()
    assert list(result.scores)[:3] == ["LSTM", "seasonal-naive", "seasonal-naive with drift"]
    assert forecast < naive
    # Not promised, but an untrained model comes near to the drift: this is what shows that something was learned.
    assert forecast < drift
    weeks, record = demo.load_record()
    assert len(record) == 2284 and str(weeks[-1]) == "2001-12-29"
    years = record[-6 * 52 :].reshape(6, 52)  # the held-out years, and the one before them
    assert naive == pytest.approx(np.sqrt(np.mean((years[1:] - years[:-1]) ** 2)), rel=1e-12)
    changes = record[52:] - record[:-52]
    for score, rise in ((drift, lambda known: known.mean()), (last_drift, lambda known: known[-1])):
        squares = [(years[k] + rise(changes[: len(changes) - (5 - k) * 52]) - years[k + 1]) ** 2 for k in range(5)]
        assert score == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-12)
    for name, score in result.scores.items():
        assert re.search(rf"{name} +{score:.3f}", result.report)
    progress = capsys.readouterr().err
    assert "training" in progress and re.search(r"loss=\d\.\d+", progress)


@pytest.mark.parametrize("device", tools.DEVICES)
@pytest.mark.parametrize("seed", SEEDS)
@vowels
def test_the_speakers_are_told_apart(demo, seed, device, tmp_path, capsys):
    result = run_demo("vowels", device_or_skip(device), seed, tmp_path)
    assert result.scores["accuracy"] >= 0.95
    assert f"{result.scores['accuracy']:.1%} of 370 test utterances" in result.report
    assert re.search(r"loss=\d\.\d+", capsys.readouterr().err)


@vowels
def test_the_accuracy_is_that_of_the_files(demo, tmp_path):
    result = run_demo("vowels", seed=3, out=tmp_path)
    params = weights(result.files)
    lstm = LSTM.load(tmp_path / "vowels-lstm.safetensors")
    _, utterances = demo.load_utterances()
    assert sorted(set(utterances.speakers)) == list(range(9)) and len(set(utterances.lengths)) > 10
    right = 0
    for b, (length, speaker) in enumerate(zip(utterances.lengths, utterances.speakers, strict=True)):
        y, _ = lstm(utterances.frames[:length, b])  # alone and without padding, to see that `lengths` has done its work
        right += (params["weight"] @ y.mean(axis=0) + params["bias"]).argmax() == speaker
    # Two utterances may lie so near to a boundary that rounding decides.
    assert right / 370 == pytest.approx(result.scores["accuracy"], abs=2.5 / 370)


# What they write


@co2
def test_the_plot_and_the_weights_are_written(short, tmp_path):
    pyplot = "matplotlib.pyplot" in sys.modules
    result = run_demo("co2", out=tmp_path)
    assert {file.name for file in result.files} == {"co2.png", "co2-lstm.safetensors", "co2-head.npz"}
    assert set(tmp_path.iterdir()) == set(result.files)
    image = (tmp_path / "co2.png").read_bytes()
    assert image[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", image[16:24])
    assert width > 800 and height > 300
    assert pyplot or "matplotlib.pyplot" not in sys.modules
    assert all(np.isfinite(value).all() for value in weights(result.files).values())


@both
def test_the_scores_are_those_of_the_model_that_was_loaded_again(short, tmp_path, monkeypatch):
    expected = run_demo(name_of(short), out=tmp_path).scores
    load = LSTM.load

    def another(path):
        lstm = load(path)
        for name in lstm.params:
            lstm.params[name] *= -3
        return lstm

    monkeypatch.setattr(LSTM, "load", another)
    scores = run_demo(name_of(short), out=tmp_path).scores
    model = next(iter(scores))
    assert scores[model] != expected[model]
    assert {name: scores[name] for name in scores if "naive" in name} == {
        name: expected[name] for name in expected if "naive" in name
    }


@both
def test_a_seed_determines_everything(short, tmp_path):
    runs = [run_demo(name_of(short), seed=seed, out=tmp_path / str(i)) for i, seed in enumerate([5, 5, 6])]
    first, again, other = (weights(run.files) for run in runs)
    assert runs[0].scores == runs[1].scores and runs[0].report == runs[1].report
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
        assert (other[name] != value).any()


# No leakage


@co2
def test_the_future_changes_no_forecast(short, tmp_path, monkeypatch):
    weeks, record = short.load_record()
    forecasts = []

    def keep(path, weeks, record, cut, forecast):
        forecasts.append(forecast)

    monkeypatch.setattr(short, "plot", keep)
    params = [weights(run_demo("co2", out=tmp_path).files[1:])]
    first_unknown = len(record) - short.HELD_OUT + 2 * short.YEAR  # at the third forecast
    monkeypatch.setattr(short, "load_record", lambda: (weeks, record + 5 * (np.arange(len(record)) >= first_unknown)))
    params.append(weights(run_demo("co2", out=tmp_path).files[1:]))
    for name, value in params[0].items():
        np.testing.assert_array_equal(params[1][name], value)
    known = 3 * short.YEAR
    np.testing.assert_array_equal(forecasts[1][:known], forecasts[0][:known])
    assert (forecasts[1][known:] != forecasts[0][known:]).all()


@co2
def test_a_carried_state_forecasts_what_a_second_run_over_everything_does(demo):
    rng = np.random.default_rng(0)
    lstm, head = LSTM(2, 8, seed=rng), Linear(8, demo.YEAR, seed=rng)
    lstm.params["bias_l0"][8:16] = 8.0  # forget gates of 0.9997, so that the state remembers more than a year
    features = rng.normal(size=(6 * demo.YEAR, 2)).astype(np.float32)
    carried = demo.forecast_years(np, lstm, head, features, cut=3 * demo.YEAR)
    assert len(carried) == 3
    for year, forecast in enumerate(carried, start=3):
        y, _ = lstm(features[demo.YEAR : year * demo.YEAR])
        # Sums of some ten float32 terms in another order, carried through the steps of a contracting state.
        np.testing.assert_allclose(forecast, head(y[-1]), rtol=0, atol=1e-6)


@vowels
def test_the_test_utterances_change_no_weight(short, tmp_path, monkeypatch):
    learned, tested = short.load_utterances()
    expected = weights(run_demo("vowels", out=tmp_path).files)
    monkeypatch.setattr(short, "load_utterances", lambda: (learned, tested.select(np.arange(7))))
    for name, value in weights(run_demo("vowels", out=tmp_path).files).items():
        np.testing.assert_array_equal(value, expected[name])
    # The scale is the training frames' own.
    inside = np.arange(len(learned.frames))[:, None] < learned.lengths
    frames = learned.frames[inside].astype(float)
    # Float32 frames of order one: their mean and deviation are off by at most a rounding each.
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(axis=0), 1, atol=1e-6)
    assert not learned.frames[~inside].any()


@co2
def test_the_gaps_of_the_record_lie_before_the_held_out_years(demo):
    from statsmodels.datasets import co2 as source

    values = source.load_pandas().data["co2"].to_numpy()
    gaps = np.isnan(values)
    assert gaps.any() and not gaps[-demo.HELD_OUT - demo.YEAR :].any()
    np.testing.assert_array_equal(demo.load_record()[1][~gaps], values[~gaps])


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "weather"}, ArgumentError, "co2, vowels"),
        ({"device": "tpu"}, ArgumentError, "cpu, cuda"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"seed": 0.5}, ArgumentError, "seed"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run_demo(**arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tools, "find_spec", lambda name: None if name == "tqdm" else object())
    for task in TASKS:
        with pytest.raises(BackendError, match=r'needs tqdm: pip install "fastlstm\[demo\]"'):
            run_demo(task, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_cupy_is_named(tmp_path):
    # In a fresh interpreter, where no earlier test has loaded CuPy.
    code = """
import sys
sys.modules["cupy"] = None  # as if it were not installed
from fastlstm import BackendError
from fastlstm.demo import run_demo
try:
    run_demo(device="cuda", out=sys.argv[1])
except BackendError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("it ran")
"""
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], check=True)
    assert not (tmp_path / "out").exists()


def test_the_demo_imports_its_packages_only_when_it_runs():
    packages = {"matplotlib", "pandas", "sktime", "statsmodels", "tqdm", "numba", "cupy"}
    code = f"import sys, fastlstm.demo.co2, fastlstm.demo.vowels; assert not {packages} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
