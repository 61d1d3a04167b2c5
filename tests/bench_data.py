"""Made-up results for tests of reports and pictures: no figure here was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastlstm.bench import clock
from fastlstm.bench.results import Case, Results
from fastlstm.bench.work import Work


def without_pauses(monkeypatch: Any) -> None:
    """Let the timing loop make a few short rounds: nothing depends on a measured time."""
    for name, value in {"PAUSE": 0.0, "LONGEST_PAUSE": 0.0, "WARM": 0.0, "SAMPLE": 0.0, "MOST_ROUNDS": 3}.items():
        monkeypatch.setattr(clock, name, value)


NOISE = (0.98, 1.0, 1.02, 0.99, 1.01)  # of five rounds


def values(seconds: float, noise: Sequence[float] = NOISE) -> tuple[float, ...]:
    return tuple(seconds * factor for factor in noise)


def case(work: Work | str, sides: Mapping[str, float | tuple[float, ...]], **fields: object) -> Case:
    """A case whose sides took so many seconds."""
    made = {name: value if isinstance(value, tuple) else values(value) for name, value in sides.items()}
    if isinstance(work, str):
        return Case(work, made, **{"threads": 2} | fields)
    return Case(work.title, made, **{"threads": 2, "group": work.kind, "work": work} | fields)


def results(*cases: Case, name: str = "bench", **changes: object) -> Results:
    given = {
        "machine": {"processor": "made up, 2 of 2 cores usable", "fastlstm": "0"},
        "peaks": {"cpu": {"float32": 1e11, "float64": 5e10}},
        "made": "2000-01-01T00:00:00+00:00",
    } | changes
    return Results(name, threads=2, cases=cases, **given)


CENTRE = (100, 32, 64, 128)


def cpu_results() -> Results:
    """Sweeps of T, B and H, wins, a loss and a tie."""
    cases = []
    for axis in (0, 1, 3):
        for size in (1, 10, 100):
            work = Work(*(size if n == axis else other for n, other in enumerate(CENTRE)))
            seconds = size * 1e-3
            cases.append(case(work, {"fastlstm": seconds, "torch": 2 * seconds, "onnxruntime": 0.8 * seconds}))
    tie = {"fastlstm": 1e-5, "onnxruntime": values(1e-5, NOISE[::-1])}
    cases.append(case(Work(1, 1, 32, 64, kind="stream"), tie, facts={"first results, fastlstm": 0.75}))
    return results(*cases, absent={"openvino": "pip install openvino"})


def gpu_results() -> Results:
    """A map in which the GPU pays from B * H = 4096 on, with copies from four times that."""
    cases = []
    for batch in (1, 16, 64):
        for hidden in (32, 128, 512):
            size = batch * hidden
            sides = {"fastlstm": size * 1e-6, "fastlstm cuda": 4096e-6, "fastlstm cuda with copies": 16384e-6}
            cases.append(case(Work(50, batch, hidden, hidden), sides | {"torch cuda": 5000e-6}))
    peaks = {"cpu": {"float32": 1e11}, "cuda": {"float32": 1e13}}
    return results(*cases, peaks=peaks, machine={"processor": "made up", "GPU": "made up too"})
