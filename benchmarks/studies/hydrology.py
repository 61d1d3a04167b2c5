"""The shape of a rainfall-runoff model: a year of days, 256 catchments at once, one layer of 256 units."""

from __future__ import annotations

from collections.abc import Iterator

from fastlstm.bench.work import Work

from . import rows
from .record import Case

ABOUT = (
    "One layer, H=256, over a year of days (T=365) for B=256 catchments at once, with I=32 inputs, in float32:"
    " inference, and a training pass with every gradient."
)
SIDES = tuple(name for name in rows.CPU if name != "fastlstm reference")
SHAPE = (365, 256, 32, 256)
KINDS = {"infer": "inference", "train": "a training pass"}


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure inference and training."""
    for kind, words in KINDS.items():
        yield rows.measured(Work(*SHAPE, kind=kind), SIDES, threads, seconds, words)
