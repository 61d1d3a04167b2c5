"""The demos, end to end: what the reports claim, that nothing leaks from held-out data, and clear errors.

Tests over all of TASKS train for two batches; a task's own claims have tests of their own.
"""

from __future__ import annotations

import importlib
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlstm import LSTM, ArgumentError, BackendError
from fastlstm.demo import TASKS, co2, lorenz, run_demo, tools, vowels
from fastlstm.demo.tools import array_library
from fastlstm.training import Linear

SEEDS = [0, 1, 2]
each_task = pytest.mark.parametrize("task", TASKS)
on_each_device = pytest.mark.parametrize("device", tools.DEVICES)


@pytest.fixture(autouse=True)
def matplotlib():
    """Every demo draws a picture."""
    return pytest.importorskip("matplotlib", reason="Matplotlib is not installed")


@pytest.fixture
def small(monkeypatch):
    """A short Lorenz series, for what does not depend on how well it is forecast."""
    monkeypatch.setattr(lorenz, "TRAINING", 2000)
    monkeypatch.setattr(lorenz, "HELD_OUT", 600)


def weights(files):
    """Every parameter in the files that a demo wrote."""
    params = {}
    for file in files:
        if file.suffix == ".safetensors":
            params |= LSTM.load(file).params
        if file.suffix == ".npz":
            with np.load(file) as saved:
                params |= dict(saved)
    assert len(params) in (
        5,
        6,
        8,
    )  # three for each direction, two of the linear layer, and the fixed weights of `separation`
    return params


def device_or_skip(device):
    try:
        array_library(device, ())
    except BackendError as error:
        pytest.skip(str(error))
    return device


# What they claim


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("seed", SEEDS)
def test_the_lorenz_forecast_beats_every_naive_baseline(seed, device, tmp_path, capsys):
    result = run_demo("lorenz", device_or_skip(device), seed, tmp_path / "new" / "folder")
    scores = result.scores
    assert list(scores) == ["LSTM", "analogues", "linear autoregression", "persistence", "mean"]
    assert scores["LSTM"] < 0.65 * min(scores["linear autoregression"], scores["persistence"], scores["mean"])
    assert scores["LSTM"] < 1.1 * scores["analogues"]
    for name, score in scores.items():
        assert re.search(rf"{name} .* {score:.2f}$", result.report, re.MULTILINE)
    progress = capsys.readouterr().err
    assert "training" in progress and re.search(r"loss=\d\.\d+", progress)


@pytest.mark.usefixtures("small")
def test_lorenz_scores_are_those_of_the_noise_free_future(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(lorenz, "plot", lambda path, *arrays: seen.update(zip(NAMES, arrays, strict=True)))
    scores = run_demo("lorenz", out=tmp_path, batches=2).scores
    truth, measured, forecast = seen["truth"], seen["measured"], seen["forecast"]
    assert forecast.shape == (lorenz.HELD_OUT, lorenz.AHEAD)
    squares, persistence = [], []
    for k in range(lorenz.HELD_OUT):
        origin = lorenz.TRAINING + k
        future = truth[origin + 1 : origin + 1 + lorenz.AHEAD]
        squares.append((forecast[k] - future) ** 2)
        persistence.append((measured[origin] - future) ** 2)
    assert scores["LSTM"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-12)
    assert scores["persistence"] == pytest.approx(np.sqrt(np.mean(persistence)), rel=1e-12)
    # Of 2,600 independent errors, the standard deviation is known to 1.4 %: 6 % is four standard errors.
    assert np.std(measured - truth) == pytest.approx(lorenz.NOISE, rel=0.06)


NAMES = ("truth", "measured", "forecast", "curves")


def test_the_simulation_solves_the_lorenz_equations():
    coarse = lorenz.simulate(np.random.default_rng(0), 10)
    fine = fine_lorenz(np.random.default_rng(0), 210)[200:]
    # Errors grow as exp(0.9 t) over the 10.5 time units: to 0.04 here, and to the size of x if an equation is wrong.
    np.testing.assert_allclose(coarse, fine, atol=0.05)


def fine_lorenz(rng, count, shorter=10):
    """The same trajectory, with Heun's method."""
    state = np.array([0, 0, 25]) + rng.normal(size=3)
    step, values = lorenz.INTERVAL / lorenz.SUBSTEPS / shorter, []
    for _ in range(count):
        for _ in range(lorenz.SUBSTEPS * shorter):
            slopes = lorenz_slope(state)
            state = state + step / 2 * (slopes + lorenz_slope(state + step * slopes))
        values.append(state[0])
    return np.array(values)


def lorenz_slope(state):
    x, y, z = state
    return np.array([10 * (y - x), 28 * x - x * z - y, x * y - z * 8 / 3])


def test_an_analogue_forecast_averages_what_followed_similar_stretches(monkeypatch):
    monkeypatch.setattr(lorenz, "TRAINING", 400)
    monkeypatch.setattr(lorenz, "NEIGHBOURS", 3)
    rng = np.random.default_rng(0)
    measured = rng.normal(size=500)
    origins = np.arange(400, 470)
    found = lorenz.baselines(measured, origins)["analogues"]
    for origin, forecast in zip(origins, found, strict=True):
        stretch = measured[origin - lorenz.STRETCH + 1 : origin + 1]
        past = range(lorenz.LAGS, 400 - lorenz.AHEAD)
        distances = [np.sum((measured[t - lorenz.STRETCH + 1 : t + 1] - stretch) ** 2) for t in past]
        nearest = np.array(past)[np.argsort(distances)[:3]]
        expected = np.mean([measured[t + 1 : t + 1 + lorenz.AHEAD] for t in nearest], axis=0)
        np.testing.assert_allclose(forecast, expected, rtol=0, atol=1e-12)  # sums of three numbers of order one


@pytest.mark.slow
@on_each_device
@pytest.mark.parametrize("seed", SEEDS)
def test_the_co2_forecast_beats_the_seasonal_naive_one(seed, device, tmp_path):
    result = run_demo("co2", device_or_skip(device), seed, tmp_path)
    forecast, naive, drift, last_drift = result.scores.values()
    assert list(result.scores)[:3] == ["LSTM", "seasonal-naive", "seasonal-naive with drift"]
    assert forecast < naive
    # Not promised, but an untrained model comes near to the drift: this is what shows that something was learned.
    assert forecast < drift
    weeks, record = co2.load_record()
    assert len(record) == 2284 and str(weeks[0]) == "1958-03-29" and str(weeks[-1]) == "2001-12-29"
    years = record[-6 * 52 :].reshape(6, 52)  # the held-out years, and the one before them
    assert naive == pytest.approx(np.sqrt(np.mean((years[1:] - years[:-1]) ** 2)), rel=1e-12)
    changes = record[52:] - record[:-52]
    for score, rise in ((drift, lambda known: known.mean()), (last_drift, lambda known: known[-1])):
        squares = [(years[k] + rise(changes[: len(changes) - (5 - k) * 52]) - years[k + 1]) ** 2 for k in range(5)]
        assert score == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-12)
    for name, score in result.scores.items():
        assert re.search(rf"{name} +{score:.3f}", result.report)


@on_each_device
@pytest.mark.parametrize("seed", [pytest.param(seed, marks=[pytest.mark.slow] * (seed > 0)) for seed in SEEDS])
def test_the_speakers_are_told_apart(seed, device, tmp_path, capsys):
    result = run_demo("vowels", device_or_skip(device), seed, tmp_path)
    assert result.scores["accuracy"] >= 0.95
    assert f"{result.scores['accuracy']:.1%} of 370 test utterances" in result.report
    assert re.search(r"loss=\d\.\d+", capsys.readouterr().err)


def test_the_vowels_accuracy_is_that_of_the_files(tmp_path):
    result = run_demo("vowels", seed=3, out=tmp_path)
    params = weights(result.files)
    lstm = LSTM.load(tmp_path / "vowels-lstm.safetensors")
    _, utterances = vowels.load_utterances()
    assert sorted(set(utterances.speakers)) == list(range(9)) and len(set(utterances.lengths)) > 10
    right = 0
    for b, (length, speaker) in enumerate(zip(utterances.lengths, utterances.speakers, strict=True)):
        y, _ = lstm(utterances.frames[:length, b])  # alone and without padding, so `lengths` is tested too
        right += (params["weight"] @ y.mean(axis=0) + params["bias"]).argmax() == speaker
    # Two utterances may be so near to a boundary that rounding decides.
    assert right / 370 == pytest.approx(result.scores["accuracy"], abs=2.5 / 370)


# The data


def test_the_co2_record_is_the_published_one():
    tenths = tools.load_data("co2.npz")["tenths_of_ppm"]
    measured = tenths[tenths >= 0]
    # The first and last values and the mean of the record as statsmodels 0.15 has it.
    assert len(tenths) == 2284 and len(measured) == 2225
    assert measured[[0, 1, -1]].tolist() == [3161, 3173, 3715] and measured.sum() == 7568165
    gaps = tenths < 0
    assert gaps.any() and not gaps[-co2.HELD_OUT - co2.YEAR :].any()
    np.testing.assert_array_equal(co2.load_record()[1][~gaps], measured / 10)


def test_the_utterances_are_the_published_ones():
    data = tools.load_data("japanese-vowels.npz")
    assert np.bincount(data["train_speakers"])[1:].tolist() == [30] * 9
    # As the UCI repository's description of the test file says.
    assert np.bincount(data["test_speakers"])[1:].tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    for split, frames in (("train", 4274), ("test", 5687)):
        lengths = data[f"{split}_lengths"]
        assert lengths.min() == 7 and lengths.max() <= 29 and lengths.sum() == frames
        assert data[f"{split}_millionths"].shape == (frames, 12)
    assert data["train_millionths"][0, :2].tolist() == [1860936, -207383]


def test_every_data_file_has_its_source_and_licence():
    folder = Path(tools.__file__).parent / "data"
    text = (folder / "SOURCES.txt").read_text()
    for file in folder.glob("*.npz"):
        assert file.name in text and file.stat().st_size < 500_000
    assert text.count("Licence: Creative Commons Attribution 4.0") == len(list(folder.glob("*.npz")))


# What they write


@each_task
@pytest.mark.usefixtures("small")
def test_every_task_writes_a_picture_and_reports_its_scores(task, tmp_path):
    pyplot = "matplotlib.pyplot" in sys.modules
    result = run_demo(task, out=tmp_path, batches=2)
    assert result.scores and all(np.isfinite(list(result.scores.values())))
    assert set(tmp_path.iterdir()) == set(result.files)
    pictures = [file for file in result.files if file.suffix == ".png"]
    assert pictures
    for picture in pictures:
        image = picture.read_bytes()
        assert image[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", image[16:24])
        assert 800 < width < 2400 and height > 300
    assert pyplot or "matplotlib.pyplot" not in sys.modules


@each_task
@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_a_seed_determines_everything(task, tmp_path):
    runs = [run_demo(task, seed=seed, out=tmp_path / str(i), batches=2) for i, seed in enumerate([5, 5, 6])]
    assert runs[0].scores == runs[1].scores and runs[0].report == runs[1].report
    if task != "temporal-order":  # which counts sequences: two, whatever the seed
        assert runs[0].scores != runs[2].scores
    for first, again, other in zip(*(run.files for run in runs), strict=True):
        if first.suffix == ".safetensors":
            for name, value in LSTM.load(first).params.items():
                np.testing.assert_array_equal(LSTM.load(again).params[name], value)
                assert (LSTM.load(other).params[name] != value).any()


@pytest.mark.parametrize("task", ["lorenz", "co2", "vowels"])
@pytest.mark.usefixtures("small")
def test_the_scores_are_those_of_the_model_that_was_loaded_again(task, tmp_path, monkeypatch):
    expected = run_demo(task, out=tmp_path, batches=20).scores
    load = LSTM.load

    def another(path):
        lstm = load(path)
        for name in lstm.params:
            lstm.params[name] *= -3
        return lstm

    monkeypatch.setattr(LSTM, "load", another)
    scores = run_demo(task, out=tmp_path, batches=20).scores
    (model, value), *others = scores.items()
    assert value != expected[model]
    assert all(value == expected[name] for name, value in others if name != "training accuracy")


# No leakage


@pytest.mark.parametrize(("task", "load", "first_unknown"), [
    ("lorenz", "simulate", 2000 + 100), ("co2", "load_record", 2284 - co2.HELD_OUT + 2 * co2.YEAR),
])  # fmt: skip
@pytest.mark.usefixtures("small")
def test_the_future_changes_no_forecast(task, load, first_unknown, tmp_path, monkeypatch):
    demo = importlib.import_module(f"fastlstm.demo.{task}")
    original, seen = getattr(demo, load), []

    def changed(*arguments):
        found = original(*arguments)
        series = found if task == "lorenz" else found[1]
        series[first_unknown:] += 5
        return found

    monkeypatch.setattr(demo, "plot", lambda path, *arrays: seen.append(arrays))
    params = [weights(run_demo(task, out=tmp_path, batches=2).files[1:])]
    monkeypatch.setattr(demo, load, changed)
    params.append(weights(run_demo(task, out=tmp_path, batches=2).files[1:]))
    for name, value in params[0].items():
        np.testing.assert_array_equal(params[1][name], value)
    before, after = ((arrays[2] if task == "lorenz" else arrays[3]) for arrays in seen)
    # The CO2 forecast at the first unknown week is made a year ahead, from weeks that are all known.
    known = 100 if task == "lorenz" else 3 * co2.YEAR
    np.testing.assert_array_equal(after[:known], before[:known])
    assert (after[known:] != before[known:]).all()


def test_a_carried_state_forecasts_what_a_second_run_over_everything_does():
    rng = np.random.default_rng(0)
    lstm, head = LSTM(2, 8, seed=rng), Linear(8, co2.YEAR, seed=rng)
    lstm.params["bias_l0"][8:16] = 8.0  # forget gates of 0.9997, so that the state remembers more than a year
    features = rng.normal(size=(6 * co2.YEAR, 2)).astype(np.float32)
    carried = co2.forecast_years(np, lstm, head, features, cut=3 * co2.YEAR)
    assert len(carried) == 3
    for year, forecast in enumerate(carried, start=3):
        y, _ = lstm(features[co2.YEAR : year * co2.YEAR])
        # Sums of some ten float32 terms in another order, carried through the steps of a contracting state.
        np.testing.assert_allclose(forecast, head(y[-1]), rtol=0, atol=1e-6)


def test_the_test_utterances_change_no_weight(tmp_path, monkeypatch):
    learned, tested = vowels.load_utterances()
    expected = weights(run_demo("vowels", out=tmp_path, batches=2).files)
    monkeypatch.setattr(vowels, "load_utterances", lambda: (learned, tested.select(np.arange(7))))
    for name, value in weights(run_demo("vowels", out=tmp_path, batches=2).files).items():
        np.testing.assert_array_equal(value, expected[name])
    # The scale is the training frames' own.
    inside = np.arange(len(learned.frames))[:, None] < learned.lengths
    frames = learned.frames[inside].astype(float)
    # Float32 frames of order one: their mean and deviation are off by at most a rounding each.
    np.testing.assert_allclose(frames.mean(axis=0), 0, atol=1e-6)
    np.testing.assert_allclose(frames.std(axis=0), 1, atol=1e-6)
    assert not learned.frames[~inside].any()


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"task": "weather"}, ArgumentError, "lorenz, vowels, separation, gradients, temporal-order, adding, co2"),
        ({"device": "tpu"}, ArgumentError, "cpu, cuda"),
        ({"seed": -1}, ArgumentError, "seed"),
        ({"seed": 0.5}, ArgumentError, "seed"),
        ({"batches": 0}, ArgumentError, "batches"),
        ({"batches": "many"}, ArgumentError, "batches"),
    ],
)
def test_a_bad_argument_is_refused_before_any_work(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        run_demo(**arguments, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ArgumentError, match="cannot create the folder"):
        run_demo(out=tmp_path / "out")


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


def test_demos_import_their_packages_only_when_they_run():
    packages = {"matplotlib", "pandas", "tqdm", "numba", "cupy"}
    # The loop of `separation` is compiled: that module is written with Numba.
    tasks = [task.replace("-", "_") for task in TASKS if task != "separation"]
    modules = ", ".join(f"fastlstm.demo.{task}" for task in tasks)
    subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; assert not {packages} & sys.modules.keys()"], check=True
    )
