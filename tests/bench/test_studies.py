"""The programs in benchmarks/ on works so small that they take no time: what they compare, check and keep."""

from __future__ import annotations

import inspect
import json
import sys

import bench_data
import numpy as np
import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")
import closed_loop
import first_calls
import studies
import versions
from studies import OURS, STUDIES

from fastlstm.bench import clock, grid, results
from fastlstm.bench.work import Problem, Work


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="the oracle PyTorch is not installed")


@pytest.fixture
def tiny(monkeypatch):
    """Every work of the studies with small sizes, and no pauses."""

    def small(steps, batch, inputs, hidden, *more, **options):
        return Work(min(steps, 3), min(batch, 2), 4, 16, *more, **options)

    small.ragged = lambda *shape, kind="train": Work(3, 2, 4, 16, kind=kind, lengths=(3, 2))
    monkeypatch.setattr(studies, "Work", small)
    monkeypatch.setattr(closed_loop, "STEPS", 3)
    for name in ("INFER", "SMALL", "TRAIN"):
        work = getattr(closed_loop, name)
        monkeypatch.setattr(closed_loop, name, small(work.steps, work.batch, 0, 0, kind=work.kind))
    monkeypatch.setattr(studies, "extra_bytes", lambda model, steps, *_, recompute=False: 900 - 100 * recompute + steps)
    bench_data.without_pauses(monkeypatch)


OTHERS = {"recompute": studies.RECOMPUTED, "family": studies.TRUNCATED, "freeze": studies.LIVE,
          "closed_loop": closed_loop.NJIT, "memory": OURS}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "start"])
def test_a_study_measures_all_sides_in_the_same_rounds(torch, tiny, name):
    before = torch.get_num_threads()
    cases = list(STUDIES[name](1, 0.0))
    assert cases and len(inspect.getdoc(STUDIES[name])) > 50
    for case in cases:
        assert OURS in case.values and not case.refused, case
        assert (studies.PADDED if "padded" in case.name else OTHERS.get(name, "torch")) in case.values
        assert case.facts.get("share of the padded steps", 0.0) < 1, "what is called padded is ragged, too"
    assert torch.get_num_threads() == before


def test_a_study_ends_where_our_own_side_fails(tiny, monkeypatch):
    monkeypatch.setattr(studies.sides, "cpu", lambda *given, **options: 1 / 0)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        next(studies.freeze(1, 0.0))


def test_the_loop_feeds_the_output_back(torch, tiny):
    problem = Problem.of(closed_loop.INFER)
    noise = np.random.default_rng(2).standard_normal((3, 2, 4), np.float32)
    x, state = noise[0], None
    for n in range(3):
        y, state = problem.model(x[None], state)
        x = y[0, :, :4] + noise[n + 1] if n < 2 else None
    sides = closed_loop.inference(problem, 1, ["torch", "onnxruntime"])
    assert {closed_loop.NJIT, closed_loop.CELL, "torch"} < set(sides)
    for side in sides.values():
        np.testing.assert_allclose(side.outputs()[0], y[0], atol=1e-5)


def test_the_loop_that_is_trained_differs_from_the_open_one(torch, tiny):
    sides = closed_loop.training(Problem.of(closed_loop.TRAIN), 1, ["torch"])
    found = {name: side.outputs()[0] for name, side in sides.items()}
    largest = np.abs(found[OURS]).max()
    for name in (closed_loop.NJIT, "torch"):
        np.testing.assert_allclose(found[name], found[OURS], atol=1e-5 * largest)
    assert np.abs(found[closed_loop.OPEN] - found[OURS]).max() > 1e-2 * largest


def test_memory_that_grows_is_seen():
    model = studies.LSTM(4, 16, dtype=np.float32, seed=0)
    once, twice = (studies.extra_bytes(model, steps, 2) for steps in (64, 128))
    assert 0 < twice - once <= 7 * 64 * 2 * 16 * 4  # the promise, in bytes of float32


FAKE = """
import os, pathlib
left = pathlib.Path(os.environ["NUMBA_CACHE_DIR"]) / "left"
compiled = 0 if left.exists() else 3
left.touch()
times = [0.0, 1.0, 2.0 + compiled, 2.5 + compiled, 2.75 + compiled]
"""


def test_a_start_is_cold_once_and_then_warm(monkeypatch):
    fakes = {OURS: FAKE, "torch": FAKE, first_calls.NUMBA: "times = [0.0, 0.125]"}
    monkeypatch.setattr(first_calls, "SCRIPTS", fakes)
    cases = {case.name: case for case in first_calls.start(1, 0.0, rounds=2)}
    assert cases["warm: all three calls"].values[first_calls.NUMBA] == (0.125, 0.125)
    found = {name: case.values[OURS] for name, case in cases.items()}
    assert found["cold: training pass"] == (4.0, 4.0) and found["warm: training pass"] == (1.0, 1.0)
    assert found["cold: all three calls"] == (4.75, 4.75) and found["warm: import and calls"] == (2.75, 2.75)
    always = FAKE.replace("0 if left.exists() else 3", "3")
    for script, message in ((always, "warm process compiled 3"), ("1 / 0", "division")):
        monkeypatch.setattr(first_calls, "SCRIPTS", fakes | {OURS: script})
        with pytest.raises(RuntimeError, match=message):
            list(first_calls.start(1, 0.0, rounds=1))


def test_a_process_that_starts_prints_the_seconds_of_each_part(torch, monkeypatch, capsys):
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(sys, "argv", ["-c", "1"])
    for side, script in first_calls.SCRIPTS.items():
        exec(first_calls._CLOCK + script + first_calls._PRINT, {})
        seconds = json.loads(capsys.readouterr().out)["seconds"]
        assert len(seconds) == (1 if side == first_calls.NUMBA else len(first_calls.PARTS)) and min(seconds) >= 0


def test_the_command_keeps_what_it_prints(tiny, tmp_path, capsys):
    assert studies.main(["memory", "--out", str(tmp_path), "--threads", "1"]) == 0
    found = results.load(tmp_path / "memory.json")
    assert found.name == "memory" and found.threads == 1 and found.machine["processor"] and found.made
    printed = capsys.readouterr().out
    assert all(case.name in printed for case in found.cases) and found.about in printed


def test_all_studies_are_run_in_a_process_each(monkeypatch):
    ran = []

    def run(given, check):
        ran.append(given[2])
        return type("Done", (), {"returncode": 3 if given[2] == "memory" else 0})

    monkeypatch.setattr(studies.subprocess, "run", run)
    assert studies.main(["all"]) == 3 and ran == list(STUDIES)


def test_two_versions_take_turns_and_every_round_is_kept(tmp_path, monkeypatch):
    """The same version twice, on one small shape."""
    bench_data.without_pauses(monkeypatch)
    monkeypatch.setattr(grid, "SMALL", dict.fromkeys(("infer", "train"), ((2, 1, 3, 4),)))
    old, out = tmp_path / "old", tmp_path / "versions.json"
    old.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    old.chmod(0o755)
    monkeypatch.setattr(versions, "first_call", lambda python, what: 2.0 if python == str(old) else 1.0)
    given = [str(old), sys.executable, "--out", str(out), "--threads", "1", "--processes", "2", "--seconds", "0"]
    assert versions.main(given) == 0
    first, calls = {}, {}
    for case in results.load(out).cases:
        (first if case.group.startswith("first") else calls)[case.name] = case.values
    assert {"frozen step (I,)", "batch_first", "inference 2,1,3,4", "training 2,1,3,4"} <= set(calls)
    assert {len(values[name]) for values in calls.values() for name in (OURS, "old")} == {2 * clock.FEWEST_ROUNDS}
    assert first["frozen step"] == {OURS: (1.0, 1.0), "old": (2.0, 2.0)}
