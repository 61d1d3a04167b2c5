"""How the time of a training pass grows with T, B and H: with T it has to be linear, however long the sequence."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fastlstm.bench.work import Work

from . import rows
from .record import OURS, Case

ABOUT = (
    "A training pass, float32, one size varied at a time. The exponent p is that of the line time = constant * size^p"
    " through the medians, by least squares of the logarithms: 1 is linear growth."
)
SIDES = (OURS, "torch")
CENTRE = {"T": (None, 4, 8, 16), "B": (50, None, 64, 64), "H": (50, 16, 64, None)}  # T, B, I, H; None is varied
SIZES = {
    "T": (512, 2048, 8192, 32768, 65536, 131072),
    "B": (1, 4, 16, 64, 256, 1024),
    "H": (16, 32, 64, 128, 256, 512, 1024),
}


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure the three sweeps."""
    for axis, centre in CENTRE.items():
        fixed = ", ".join(f"{letter}={value}" for letter, value in zip("TBIH", centre, strict=True) if value)
        for size, shape in zip(SIZES[axis], shapes(axis), strict=True):
            name = f"{axis}={size:,} ({fixed})"
            yield rows.measured(Work(*shape, kind="train"), SIDES, threads, seconds, name, **{axis: size})


def shapes(axis: str) -> list[tuple[int, ...]]:
    """T, B, I, H of each size of a sweep."""
    return [tuple(size if fixed is None else fixed for fixed in CENTRE[axis]) for size in SIZES[axis]]


def sweep(cases: Sequence[Case], axis: str, side: str = OURS) -> dict[int, float]:
    """Median seconds by size, of the cases that vary `axis`."""
    return {
        int(case.facts[axis]): case.spread(side).middle
        for case in cases
        if axis in case.facts and case.values.get(side)
    }


def exponent(seconds: dict[int, float]) -> float:
    """Exponent of the power of the size that the seconds follow best; NaN of fewer than two sizes.

    >>> round(exponent({10: 3.0, 100: 30.0, 1000: 300.0}), 6)
    1.0
    """
    if len(seconds) < 2:
        return math.nan
    slope, _ = np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)
    return float(slope)
