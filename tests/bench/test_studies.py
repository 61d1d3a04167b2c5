"""The studies of benchmarks/study.py, on works so small that they take no time: what they compare, check and keep."""

from __future__ import annotations

import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the scripts there are no package

import study as command
from studies import (
    NAMES,
    freeze,
    growth,
    hydrology,
    loop,
    memory,
    ragged,
    recompute,
    record,
    roofs,
    show,
    start,
    threads,
    vowels,
)  # fmt: skip
from studies.record import OURS, Case, Study

from fastlstm.bench import clock
from fastlstm.errors import ResultsFileError


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the oracle PyTorch is not installed")


def test_every_study_says_what_it_is():
    for name in NAMES:
        module = sys.modules[f"studies.{name}"]
        assert next(iter(module.SIDES)) == OURS and len(module.ABOUT) > 50 and module.__doc__


@pytest.mark.parametrize(
    ("module", "small", "count"),
    [
        (hydrology, {"SHAPE": (3, 2, 4, 8)}, 2),
        (ragged, {"SHAPES": ((4, 3, 2, 8),)}, 3),
        (growth, {"SIZES": {"T": (2, 3), "B": (1,), "H": (8,)}}, 4),
        (threads, {"SHAPES": ((3, 2, 4, 8),)}, 4),
        (loop, {"STEPS": 3}, 1),
        (memory, {"SHAPES": ((30, 2, 4, 16),)}, 2),
        (recompute, {"SHAPES": ((30, 2, 4, 16),)}, 2),
        (freeze, {"STREAMS": ((1, 2, 4, 16),), "SEQUENCES": ((3, 1, 4, 8),)}, 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_study_measures_all_sides_in_the_same_rounds(torch, monkeypatch, module, small, count):
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    before = torch.get_num_threads()
    cases = list(module.measure(2, 0.0))
    assert len(cases) == count
    for case in cases:
        assert not case.refused
        assert case.spread(OURS).middle > 0
        if module is recompute:
            assert case.ratio(recompute.RECOMPUTED) is not None
            assert 0 < case.facts[recompute.SAVED] < 1
        elif module is freeze:
            assert case.ratio(freeze.LIVE) is not None
        elif module is not memory and "padded" not in case.name:
            assert case.ratio("torch") is not None
    assert torch.get_num_threads() == before


def test_roofs_are_measured_in_the_rounds_of_the_calls(monkeypatch):
    monkeypatch.setattr(roofs, "SHAPES", ((1, 1, 8, 16), (3, 9, 8, 16)))
    cases = {case.name: case for case in roofs.measure(2, 0.0)}
    assert len(cases) == 2 * (2 * 2 + 2)
    for name, case in cases.items():
        assert case.facts["threads"] == (1 if name.endswith("1 thread") else 2)
        assert {OURS, roofs.TILE, roofs.PARTS} <= set(case.values)
        assert set(case.values) == {OURS, *case.yardsticks}
        assert (roofs.WEIGHTS in case.values) == name.startswith("1,1,")
        assert (roofs.NOTHING in case.values) == (name.startswith("1,1,") and "train" not in name)
        assert (roofs.BLAS in case.values) != (roofs.BLAS in case.refused)


@pytest.mark.parametrize(
    ("steps", "batch", "forward", "all_of_them"),
    [(3, 99, (1, 1), (3, 3)), (99, 1, (1, 0), (3, 1)), (1, 1, (0, 0), (1, 1))],
)
def test_what_many_rows_share_is_counted_with_the_products_of_the_tile(steps, batch, forward, all_of_them):
    # How many products with the inputs, and with the states: of few rows, only the gradients of the weights.
    infer, train = (roofs.Work(steps, batch, 10, 30, kind=kind) for kind in ("infer", "train"))
    inputs, states = 8 * 30 * 10 * steps * batch, 8 * 30 * 30 * (steps - 1) * batch
    assert infer.operations == inputs + states
    assert roofs.shared_operations(infer) == forward[0] * inputs + forward[1] * states
    assert roofs.shared_operations(train) == all_of_them[0] * inputs + all_of_them[1] * states


def test_the_loop_over_gates_computes_as_many_as_it_says():
    width = roofs.import_module("fastlstm.kernels.cpu.vector").lanes(np.dtype("f4"))
    a, c, h = (np.full(vectors * width, 0.5, np.float32) for vectors in (20, 4, 4))
    da = np.empty(4 * width, np.float32)
    for count in (3, 5):  # over the four vectors once, and once and a quarter
        c[:] = 0.0
        roofs._gates()(count, False, a, c, h, da)
        np.testing.assert_array_equal(c == 0.0, np.arange(4 * width) >= count * width)
        first = np.float32(np.tanh(0.5) / (1 + np.exp(-0.5)))
        np.testing.assert_allclose(c[width : 3 * width], first, rtol=1e-6)
        assert (c[:width] > 1.1 * first).all() == (count == 5)
        a[:] = 0.5


def test_the_reading_loop_reads_everything_as_often_as_it_says():
    array, total = np.arange(1024, dtype=np.float32), np.zeros(16, np.float32)
    roofs._reader()(3, array, total)
    assert total.sum() == 3 * array.sum()  # integers below 2**24: exact in any order


def test_the_tile_makes_the_operations_that_it_says():
    job, operations = roofs.ceilings.tile_job("float32", 1e6)
    assert operations == pytest.approx(1e6, rel=0.02)
    c = inspect.getclosurevars(job).nonlocals["c"]
    before = c.sum()
    job()
    assert c.sum() - before == operations / 2  # ones times ones: each multiply-add adds one


def test_the_loop_feeds_the_output_back(torch, monkeypatch):
    monkeypatch.setattr(loop, "STEPS", 7)
    problem = loop.Problem.of(loop.WORK)
    expected = problem.x[0], None
    x, state = expected
    for _ in range(7):
        y, state = problem.model(x[None], state)
        x = y[0, :, : loop.INPUTS]
    for build in (loop.ours, loop.torch_lstm, loop.torch_cell):
        np.testing.assert_allclose(build(problem, 1)(), y[0], atol=1e-5)


def test_a_side_that_computes_something_else_is_not_timed_in_the_loop(torch, monkeypatch):
    monkeypatch.setattr(loop, "STEPS", 3)
    wrong = loop.SIDES | {"torch": ("torch", lambda problem, threads: lambda: problem.x[0] @ np.ones((10, 100), "f4"))}
    monkeypatch.setattr(loop, "SIDES", wrong)
    (case,) = loop.measure(1, 0.0)
    assert "something else" in case.refused["torch"] and "torch" not in case.values


def test_other_bits_on_more_threads_stop_the_study(torch, monkeypatch):
    monkeypatch.setattr(threads, "SHAPES", ((3, 2, 4, 8),))
    one, two = np.array([0.0]), np.array([-0.0])
    assert threads.same_bits((one,), (one.copy(),)) and not threads.same_bits((one,), (two,))
    monkeypatch.setattr(threads, "same_bits", lambda first, second: False)
    with pytest.raises(RuntimeError, match="other bits"):
        list(threads.measure(2, 0.0))


def test_the_exponent_is_that_of_the_power():
    sizes = (1, 10, 100)
    cases = [Case(f"{size}", {OURS: (3.0 * size**1.5,)}, facts={"B": size}) for size in sizes]
    assert growth.exponent(growth.sweep(cases, "B")) == pytest.approx(1.5)
    assert growth.sweep(cases, "T") == {} and np.isnan(growth.exponent({}))


@pytest.fixture(scope="module")
def utterances():
    """Some of the utterances."""
    pytest.importorskip("sktime")
    learned, tested = vowels.load_utterances()
    return learned.select(np.arange(0, 270, 3)), tested.select(np.arange(0, 370, 5))


@pytest.fixture
def speakers(monkeypatch, utterances):
    """The study of vowels, much shortened."""
    monkeypatch.setattr(vowels, "load_utterances", lambda: utterances)
    monkeypatch.setattr(vowels.vowels, "EPOCHS", 3)
    monkeypatch.setattr(vowels, "SEEDS", (0, 1))
    monkeypatch.setattr(vowels, "GOAL", 0.2)
    monkeypatch.setattr(clock, "LONGEST_PAUSE", 0.0)
    return vowels


def test_vowels_are_the_same_training_on_both_sides(torch, speakers):
    (case,) = speakers.measure(1, 0.0)
    facts = case.facts
    assert set(case.values) == {OURS, "torch"} and len(case.values[OURS]) == 2
    assert facts["seeds that a side did not get there with"] == 0
    assert facts[f"final accuracy, {OURS}"] == pytest.approx(facts["final accuracy, torch"], abs=0.01)
    assert facts[f"epochs, {OURS}"] == facts["epochs, torch"]


def test_another_recipe_in_torch_is_found_before_anything_is_timed(torch, speakers, monkeypatch):
    learn = speakers.Torch.learn
    monkeypatch.setattr(speakers.Torch, "learn", lambda self, rate, batch: learn(self, 1.1 * rate, batch))
    with pytest.raises(RuntimeError, match="torch computes something else after an epoch"):
        list(speakers.measure(1, 0.0))


def test_a_goal_that_is_never_reached_is_said(speakers, monkeypatch):
    monkeypatch.setattr(speakers, "GOAL", 1.1)
    monkeypatch.setattr(speakers, "SIDES", (OURS,))
    with pytest.raises(RuntimeError, match="not reached"):
        list(speakers.measure(1, 0.0))


def test_importing_numba_is_all_that_its_process_does(capsys):
    exec(start.SCRIPTS[start.NUMBA], {})
    assert len(json.loads(capsys.readouterr().out)["seconds"]) == 1
    assert "fastlstm" not in start.SCRIPTS[start.NUMBA]


@pytest.mark.parametrize("side", start.SIDES)
def test_a_process_that_starts_prints_the_seconds_of_each_part(side, capsys, monkeypatch):
    if side != OURS:
        pytest.importorskip(side)
        monkeypatch.setattr(sys.modules[side], "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["-c", "1"])
    exec(start.SCRIPTS[side], {})
    found = json.loads(capsys.readouterr().out)
    assert len(found["seconds"]) == len(start.PARTS) and min(found["seconds"]) > 0


FAKE = """
import json, os, pathlib, sys
left = pathlib.Path(os.environ["NUMBA_CACHE_DIR"]) / "left"
compiled = 0 if left.exists() else 3
left.touch()
print(json.dumps({"seconds": [1.0, 1.0 + compiled, 0.5, 0.25], "compiled": compiled}))
"""


def test_a_start_is_cold_once_and_then_warm(monkeypatch):
    monkeypatch.setattr(start, "SIDES", (OURS,))
    monkeypatch.setattr(start, "SCRIPTS", {OURS: FAKE, start.NUMBA: FAKE.replace("[1.0", "[0.125")})
    monkeypatch.setattr(start, "ROUNDS", 2)
    cases = {case.name: case for case in start.measure(1, 0.0)}
    assert cases["warm: all three calls"].values[start.NUMBA] == (0.125, 0.125)
    assert all(start.NUMBA in case.yardsticks for case in cases.values() if start.NUMBA in case.values)
    found = {name: case.values[OURS] for name, case in cases.items()}
    assert found["cold: training pass"] == (4.0, 4.0) and found["warm: training pass"] == (1.0, 1.0)
    assert found["cold: all three calls"] == (4.75, 4.75) and found["warm: import and calls"] == (2.75, 2.75)
    monkeypatch.setattr(start, "SCRIPTS", {OURS: FAKE.replace("0 if left.exists() else 3", "3"), start.NUMBA: FAKE})
    with pytest.raises(RuntimeError, match="warm process compiled 3"):
        list(start.measure(1, 0.0))
    monkeypatch.setattr(start, "SCRIPTS", {OURS: "raise SystemExit('no such thing')", start.NUMBA: FAKE})
    with pytest.raises(RuntimeError, match="no such thing"):
        list(start.measure(1, 0.0))


def test_the_command_keeps_what_it_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(memory, "SHAPES", ((30, 2, 4, 16),))
    assert command.main(["memory", "--out", str(tmp_path / "new"), "--threads", "1"]) == 0
    found = record.load(tmp_path / "new" / "memory.json")
    assert found.study == "memory" and found.threads == 1 and found.machine["processor"] and found.made
    out = capsys.readouterr().out
    for case in found.cases:
        assert show.amount(case.spread(OURS).middle, "bytes") in out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["memory.json"]


def test_all_studies_are_run_in_a_process_each(monkeypatch):
    ran = []

    def run(given, check):
        ran.append(given[2])
        return type("Done", (), {"returncode": 3 if given[2] == "loop" else 0})

    monkeypatch.setattr(command.subprocess, "run", run)
    assert command.main(["all"]) == 3
    assert ran == list(NAMES)


def test_a_study_is_read_as_it_was_written(tmp_path):
    case = Case("a", {OURS: (1.0, 2.0), "torch": (3.0, 4.0)}, facts={"T": 3}, refused={"jax": "failed"})
    study = Study(
        "loop", "about", {"processor": "some"}, 2, (case,), {"openvino": "pip install openvino"}, "2000-01-01"
    )
    record.save(tmp_path / "loop.json", study)
    assert record.load(tmp_path / "loop.json") == study


@pytest.mark.parametrize(
    "change",
    [
        {"format": "another"},
        {"version": 2},
        {"cases": [{"name": "a", "values": {OURS: [1.0], "torch": [1.0, 2.0]}}]},
        {"cases": [{"name": "a", "values": {OURS: [0.0]}}]},
        {"cases": [{"name": "a", "values": {OURS: ["much"]}}]},
        {"cases": [{"name": "a", "values": {OURS: [1.0]}, "unit": "miles"}]},
        {"cases": 3},
        {"unknown": 1},
    ],
)
def test_a_broken_file_is_refused(tmp_path, change):
    path = tmp_path / "loop.json"
    record.save(path, Study("loop", "about", {}, 1))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ResultsFileError, match=r"loop\.json"):
        record.load(path)
