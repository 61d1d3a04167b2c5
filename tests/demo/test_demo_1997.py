"""The demonstrations of the cell of 1997: what they report, on short runs, and what they draw from."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import numpy as np
import pytest

from fastlstm import LSTM, RNN, ArgumentError, FrozenError
from fastlstm.demo import Options, run_demo
from fastlstm.parameters import gate_rows
from fastlstm.training import initialise_1997

TASKS = ["gradients", "temporal-order", "adding"]


@pytest.fixture
def demo(request):
    """The module of a task, if its packages are there."""
    module = importlib.import_module(f"fastlstm.demo.{request.param.replace('-', '_')}")
    for package in module.PACKAGES:
        pytest.importorskip(package)
    return module


def of(task):
    return pytest.mark.parametrize("demo", [task], indirect=True)


@of("temporal-order")
@pytest.mark.slow
def test_the_order_of_symbols_is_learned(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RUNS", 1)
    result = run_demo("temporal-order", seed=1, out=tmp_path)
    # 14,000 to 46,000 sequences, by the seed; the paper has 31,390.
    assert 5_000 < result.scores["sequences"] < demo.LIMIT
    assert result.scores["wrong"] < 0.01 * 2560
    assert f"{int(result.scores['sequences']):,} sequences" in result.report and "31,390" in result.report
    picture, model = result.files
    assert picture.read_bytes()[:4] == b"\x89PNG"
    lstm = LSTM.load(model)
    assert lstm.cell.truncated and not lstm.cell.forget_gate and lstm.cell.block_size == 2


@of("adding")
def test_a_short_training_says_that_the_goal_is_not_met(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "LIMIT", 3000)
    result = run_demo("adding", out=tmp_path)
    assert "not within 3,000 sequences" in result.report and "74,000" in result.report
    assert 0 <= result.scores["within"] < 0.9
    assert {file.name for file in result.files} == {"adding.png", "adding-lstm.safetensors"}


@of("temporal-order")
def test_a_mean_over_failures_is_no_mean_to_success(demo, tmp_path):
    report = run_demo("temporal-order", out=tmp_path, batches=5).report
    assert report.count("not within 5 sequences") == demo.RUNS and "to success" not in report


@of("adding")
def test_a_limit_of_any_size_takes_no_memory(demo):
    _, learned, _ = demo.learn(0, 2001)
    assert len(learned.errors) == 2  # of each whole thousand
    calls = iter(range(20))

    def interrupt():
        next(calls)
        return demo.sequence(np.random.default_rng(0))

    with pytest.raises(StopIteration):
        demo.train(demo.Net(2, 1, demo.INPUT_GATES, np.random.default_rng(0)), interrupt, demo.is_met, 10**15, "")


@of("adding")
@pytest.mark.slow
def test_the_error_of_the_sum_falls(demo, monkeypatch):
    monkeypatch.setattr(demo, "LIMIT", 45_000)  # the criterion is met after some 75,000
    _, learned, _ = demo.learn(0, demo.LIMIT)
    assert learned.sequences == 45_000 or learned.met
    assert learned.errors[-1] < 0.25 * learned.errors[0]


@of("gradients")
def test_gradients_vanish_explode_or_stay_as_they_are(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "UPDATES", 60)
    scores = run_demo("gradients", out=tmp_path).scores
    assert scores["RNN tanh, spectral radius 0.9, dh"] < 1e-10
    assert scores["RNN tanh, spectral radius 3, dh"] > 1e10
    assert scores["RNN relu, spectral radius 3, dh"] > 1e30
    assert scores["LSTM, forget bias 0, dc"] < scores["LSTM, forget bias 1, dc"] < 1e-6
    assert scores["LSTM, forget bias 3, dc"] > 1e-2
    assert scores["1997 cell, truncated, dc"] == pytest.approx(1.0, abs=1e-12)
    assert scores["1997 cell, truncated, dh"] == 0
    assert scores["clipped to a norm of 1"] > 0.9 > scores["not clipped"]
    assert (tmp_path / "gradients.png").read_bytes()[:4] == b"\x89PNG"


@of("temporal-order")
def test_a_sequence_has_two_symbols_in_their_places(demo):
    rng, seen = np.random.default_rng(0), set()
    for _ in range(300):
        x, target = demo.sequence(rng)
        assert x.shape[1:] == (1, 8) and 100 <= len(x) <= 110
        text = "".join(demo.SYMBOLS[symbol] for symbol in x[:, 0].argmax(axis=1))
        assert re.fullmatch("E[abcd]{9,19}[XY][abcd]{29,49}[XY][abcd]+B", text)
        assert "".join(c for c in text if c in "XY") == demo.CLASSES[target.argmax()]
        seen.add(target.argmax())
    assert len(seen) == 4


@of("adding")
def test_a_sum_is_that_of_the_marked_numbers(demo):
    rng = np.random.default_rng(0)
    for _ in range(300):
        x, target = demo.sequence(rng)
        numbers, marks = x[:, 0].T
        assert marks[0] == marks[-1] == -1 and set(marks) <= {-1, 0, 1}
        marked = np.flatnonzero(marks == 1)
        assert len(marked) in (1, 2) and marked[0] < 50
        assert target == pytest.approx(0.5 + numbers[marked].sum() / 4, rel=1e-6)


@of("temporal-order")
def test_a_seed_determines_everything(demo, monkeypatch):
    monkeypatch.setattr(demo, "LIMIT", 300)
    first, again, other = (demo.learn(seed, demo.LIMIT)[0].lstm.params for seed in (5, 5, 6))
    for name, value in first.items():
        np.testing.assert_array_equal(again[name], value)
        assert (other[name] != value).any()


@pytest.mark.parametrize("demo", TASKS, indirect=True)
def test_a_gpu_is_refused(demo, tmp_path):
    with pytest.raises(ArgumentError, match="device='cpu'"):
        demo.run(Options(object(), 0, tmp_path, None))
    assert not list(tmp_path.iterdir())


def test_the_packages_are_imported_only_when_a_demo_runs():
    packages = {"matplotlib", "tqdm", "numba", "cupy"}
    names = ", ".join(f"fastlstm.demo.{task.replace('-', '_')}" for task in TASKS)
    subprocess.run([sys.executable, "-c", f"import sys, {names}; assert not {packages} & sys.modules.keys()"],
                   check=True)  # fmt: skip


# initialise_1997


@pytest.mark.parametrize("bidirectional", [False, True])
def test_biases_of_gates_are_set_and_all_else_is_drawn(bidirectional, dtype):
    lstm = LSTM(3, 6, 2, block_size=3, forget_gate=False, bidirectional=bidirectional, dtype=dtype, seed=0)
    arrays = dict(lstm.params)
    initialise_1997(lstm, 1, scale=0.2, input_gates=(-3, -6), output_gates=(-1, -2))
    for name, value in lstm.params.items():
        assert value is arrays[name] and value.dtype == dtype
        drawn = value
        if name.startswith("bias"):
            assert value[gate_rows(lstm.cell, "i")].tolist() == [-3, -6]
            assert value[gate_rows(lstm.cell, "o")].tolist() == [-1, -2]
            drawn = value[gate_rows(lstm.cell, "g")]
        assert 0.05 < abs(drawn).max() <= 0.2 and len(np.unique(drawn)) == drawn.size
    same = LSTM(3, 6, 2, block_size=3, forget_gate=False, bidirectional=bidirectional, dtype=dtype, seed=7)
    initialise_1997(same, 1, scale=0.2, input_gates=(-3, -6), output_gates=(-1, -2))
    assert all((same.params[name] == value).all() for name, value in lstm.params.items())


def test_without_biases_given_all_are_drawn():
    lstm = LSTM(3, 4, seed=0)
    initialise_1997(lstm, 1)
    assert 0 < abs(lstm.params["bias_l0"]).max() <= 0.1


def test_gains_of_layer_norm_are_one():
    lstm = LSTM(3, 4, layer_norm=True, seed=0)
    initialise_1997(lstm, 1)
    for name, value in lstm.params.items():
        assert np.all(value == 1) if name.startswith("ln_gain") else 0 < abs(value).max() <= 0.1, name


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (RNN(3, 4), {}),
        (LSTM(3, 4, bias=False), {}),
        ({"weight_ih_l0": np.ones((8, 3))}, {}),
        (LSTM(3, 4, block_size=2), {"input_gates": (-1,)}),
        (LSTM(3, 4, block_size=2), {"output_gates": (-1, float("nan"))}),
        (LSTM(3, 4, block_size=2), {"input_gates": -3}),
        (LSTM(3, 4), {"scale": 0}),
        (LSTM(3, 4), {"scale": float("inf")}),
        (LSTM(3, 4), {"seed": "seed"}),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_and_nothing_is_changed(model, arguments):
    before = {name: value.copy() for name, value in getattr(model, "params", model).items()}
    with pytest.raises(ArgumentError):
        initialise_1997(model, **arguments)
    for name, value in getattr(model, "params", model).items():
        np.testing.assert_array_equal(value, before[name])


def test_a_frozen_model_is_refused():
    with pytest.raises(FrozenError, match="frozen"):
        initialise_1997(LSTM(3, 4, seed=0).freeze())
