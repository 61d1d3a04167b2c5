"""The timing loop of every benchmark, and the rule by which a difference counts.

1. All sides of a case run on the same model and data, with the same threads and precision. Results are compared before
   anything is timed (:func:`disagreement`); a side that computes something else is not timed.
2. Building a side and its first results, which compile, are timed separately and are part of no other figure.
3. The sides take turns, one sample each per round, and the order rotates from round to round: a change of the
   machine's speed affects all of them, and none always follows the same one.
4. Before each sample there is a pause of :data:`PAUSE`, repeated until no thread of the process works
   (:func:`wait_for_quiet`): idle threads of other libraries spin for up to 0.1 s after a call. Then the side runs
   untimed for :data:`WARM`, because caches are cold and cores asleep; calls longer than :data:`LONG` do without.
5. A sample is as many calls in a row as last :data:`SAMPLE`, by the host's clock, or by CUDA events on a GPU.
6. Figures are medians over rounds with their quartiles. A ratio is taken within each round; its median and quartiles
   are those of the rounds' ratios. Where 1 lies between its quartiles, there is no difference (:func:`verdict`).

>>> ratio([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0])
Spread(low=1.95, middle=2.0, high=2.05)
>>> verdict(ratio([1.1, 0.9, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]))
'no difference'
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fastlstm.bench.sides import Side
from fastlstm.bench.work import Array

__all__ = ["SideError", "Spread", "disagreement", "ratio", "spread", "take_turns", "verdict", "wait_for_quiet"]

PAUSE, LONGEST_PAUSE = 0.02, 1.0  # seconds
QUIET = 0.1  # share of a pause for which all threads of the process together may work
SAMPLE = 1e-3  # seconds
WARM = 3e-3  # seconds
LONG = 0.1  # seconds
LEAST_ROUNDS, MOST_ROUNDS = 5, 400
FEWEST_ROUNDS, PATIENCE = 3, 3.0  # once the rounds have taken so many times the budget
# Errors allowed, as a share of the largest true value of an array: above what float32 and float64 explain over sums of
# some ten thousand terms and a thousand steps, below what a narrower format (TF32, bfloat16) causes.
TOLERANCE = {"float32": 1e-4, "float64": 1e-11}


class SideError(Exception):
    """The side of this name failed while it was timed; its error is this one's cause."""


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    middle: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated linearly."""
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(low), float(middle), float(high))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Return the spread of theirs / ours, taken in each round: above 1 where ours is faster."""
    return spread([their / our for their, our in zip(theirs, ours, strict=True)])


def verdict(found: Spread) -> str:
    """Return 'faster' or 'slower' if both quartiles of theirs / ours are on one side of 1, else 'no difference'."""
    if found.low > 1:
        return "faster"
    return "slower" if found.high < 1 else "no difference"


def disagreement(
    truth: Sequence[Array], found: Sequence[Array], dtype: str, tolerance: float | None = None
) -> str | None:
    """Compare results; return what is wrong with them, or None if they are equal within :data:`TOLERANCE`."""
    allowed = TOLERANCE[dtype] if tolerance is None else tolerance
    if len(truth) != len(found):
        return f"computes {len(found)} arrays and not {len(truth)}"
    for true, value in zip(truth, found, strict=True):
        if true.shape != value.shape or value.dtype != np.dtype(dtype):
            return f"computes {value.dtype} {value.shape} and not {dtype} {true.shape}"
        error = float(np.abs(value - true).max()) / (float(np.abs(true).max()) or 1.0)
        if not error <= allowed:
            return f"computes something else: off by {error:.1e} of the largest value, allowed are {allowed:.0e}"
    return None


def calls_for(side: Side) -> tuple[int, float]:
    """Warm a side up; return how many calls make a sample, and the seconds of one of them."""
    count = 1
    seconds = side.time(count)
    while seconds * count < SAMPLE and count < 1_000_000:
        count = min(10 * count, max(2 * count, int(1.2 * SAMPLE / max(seconds, 1e-9))))
        seconds = side.time(count)
    return count, seconds


def wait_for_quiet() -> None:
    """Sleep until the threads of this process are idle, at most :data:`LONGEST_PAUSE`."""
    until = time.perf_counter() + LONGEST_PAUSE
    while True:
        start, work = time.perf_counter(), time.process_time()
        time.sleep(PAUSE)
        now = time.perf_counter()
        if time.process_time() - work <= QUIET * (now - start) or now >= until:
            return


def take_turns(sides: Mapping[str, Side], budget: float) -> dict[str, tuple[float, ...]]:
    """Time sides in turn that are built and compared; give the seconds of one call for each side and round.

    `budget` seconds are spent on :data:`LEAST_ROUNDS` to :data:`MOST_ROUNDS` rounds; if the rounds take more than
    :data:`PATIENCE` times that, :data:`FEWEST_ROUNDS` are enough. A side that fails raises SideError.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    calls, short, names, name = {}, {}, list(sides), ""
    begin = time.perf_counter()
    try:
        for name, side in sides.items():
            calls[name], one = calls_for(side)
            short[name] = one < LONG
        for turn in range(MOST_ROUNDS if names else 0):
            limit = budget if turn >= LEAST_ROUNDS else PATIENCE * budget
            if turn >= FEWEST_ROUNDS and time.perf_counter() >= begin + limit:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                wait_for_quiet()
                until = time.perf_counter() + WARM
                while short[name] and time.perf_counter() < until:
                    sides[name].time(calls[name])
                seconds[name].append(sides[name].time(calls[name]))
    except Exception as error:
        raise SideError(name) from error
    return {name: tuple(values) for name, values in seconds.items()}
