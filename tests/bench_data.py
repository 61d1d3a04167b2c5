"""Made-up results of ``fastlstm bench``, for tests of what shows them: no figure here was ever measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastlstm.bench.clock import Timing
from fastlstm.bench.results import Ceiling, Results, Row
from fastlstm.bench.work import Work

NOISE = (0.98, 1.0, 1.02, 0.99, 1.01)  # of five rounds


def timing(seconds: float, noise: Sequence[float] = NOISE) -> Timing:
    return Timing(tuple(seconds * factor for factor in noise), calls=3, build=0.25, first=0.5)


def row(work: Work, sides: Mapping[str, float | Timing], refused: Mapping[str, str] | None = None) -> Row:
    """A row whose sides took so many seconds."""
    made = {name: value if isinstance(value, Timing) else timing(value) for name, value in sides.items()}
    return Row(work, 2, "on one thread", made, refused or {})


def results(*rows: Row, **changes: object) -> Results:
    given = {
        "machine": {"processor": "made up, 2 of 2 cores usable", "fastlstm": "0"},
        "ceilings": {"cpu": Ceiling({"float32": 1e11, "float64": 5e10}, 2e10)},
        "made": "2000-01-01T00:00:00+00:00",
        "method": {"figures": "made up"},
    } | changes
    return Results(threads=2, rows=rows, **given)


CENTRE = (100, 32, 64, 128)


def cpu_results() -> Results:
    """Sweeps of T, B and H, wins, a loss and a tie."""
    rows = []
    for axis in range(3):
        for size in (1, 10, 100):
            shape = list(CENTRE)
            shape[(0, 1, 3)[axis]] = size
            seconds = size * 1e-3
            rows.append(row(Work(*shape), {"fastlstm": seconds, "torch": 2 * seconds, "onnxruntime": 0.8 * seconds}))
    rows.append(row(Work(1, 1, 32, 64, kind="stream"), {"fastlstm": 1e-5, "onnxruntime": timing(1e-5, NOISE[::-1])}))
    return results(*rows, absent={"jax": "pip install jax"}, denormals={"fastlstm": "kept"})


def gpu_results() -> Results:
    """A map in which the GPU pays from B * H = 4096 on, with copies from four times that."""
    rows = []
    for batch in (1, 16, 64):
        for hidden in (32, 128, 512):
            size = batch * hidden
            sides = {"fastlstm": size * 1e-6, "fastlstm cuda": 4096e-6, "fastlstm cuda with copies": 16384e-6}
            rows.append(row(Work(50, batch, hidden, hidden), sides | {"torch cuda": 5000e-6}))
    ceilings = {"cpu": Ceiling({"float32": 1e11}, 2e10), "cuda": Ceiling({"float32": 1e13}, 1e12)}
    return results(*rows, ceilings=ceilings, machine={"processor": "made up", "GPU": "made up too"})
