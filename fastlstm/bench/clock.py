"""The method: how the sides of a comparison are timed, and when a difference counts as one.

1. All sides of a row are in one process, on the same model and data, with equal threads and equal precision. What
   each computes is compared with the truth before anything is timed (:func:`disagreement`); a side that computes
   something else is not timed.
2. What it takes to build a side (which compiles, for some) and to have its first results (which compiles, for others)
   is measured and reported on its own (:class:`Timing`), and is part of no other figure.
3. The sides take turns, one sample of each a round, and the order rotates from round to round: a drift of the
   machine's speed meets all of them, and none always follows the same one.
4. Before each sample there is a pause, of :data:`PAUSE` and again until no thread of the process works meanwhile
   (:func:`wait_for_quiet`): the idle threads of other libraries spin on their cores for a while after they have worked,
   some for a tenth of a second, and would be measured with the next side. After the pause the caches are cold, and the
   cores asleep; some take milliseconds of dense vector arithmetic until it has its full speed. So the side runs
   untimed for :data:`WARM`, unless a call takes so long (:data:`LONG`) that this does not show.
5. A sample is several calls in a row, so many that it lasts :data:`SAMPLE`; how many is settled once for each side,
   after the warm-up. The clock is the host's; CUDA events for work that stays on a GPU.
6. The figures are medians over rounds, with their quartiles. A ratio is taken in each round, between samples that
   were taken within moments of each other; its median and quartiles are those of the rounds' ratios.
7. Where the quartiles of a ratio lie on both sides of one, or at one, there is no difference (:func:`verdict`).

>>> ratio([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0])
Spread(low=1.95, middle=2.0, high=2.05)
>>> verdict(ratio([2.0, 2.2, 1.8, 2.0], [1.0, 1.0, 1.0, 1.0]))
'faster'
>>> verdict(ratio([1.1, 0.9, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]))
'no difference'
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastlstm.bench.sides import Side
from fastlstm.bench.work import Array

__all__ = [
    "SideError",
    "Spread",
    "Timing",
    "calls_for",
    "disagreement",
    "ratio",
    "spread",
    "take_turns",
    "verdict",
    "wait_for_quiet",
]

PAUSE, LONGEST_PAUSE = 0.02, 1.0  # seconds
QUIET = 0.1  # share of a pause for which all threads of the process together may work
SAMPLE = 1e-3  # seconds
WARM = 3e-3  # seconds
LONG = 0.1  # seconds
LEAST_ROUNDS, MOST_ROUNDS = 5, 400
FEWEST_ROUNDS, PATIENCE = 3, 3.0  # where the rounds have taken so many times the budget; and of an interrupted row
# Errors allowed, as a share of the largest true value of an array. They are above what float32 and float64 explain,
# over sums of some ten thousand terms and a thousand steps, and below what any narrower format (TF32, bfloat16) does.
TOLERANCE = {"float32": 1e-4, "float64": 1e-11}


class SideError(Exception):
    """A side failed while it was timed; its error is this one's cause."""

    def __init__(self, side: str) -> None:
        super().__init__(side)
        self.side = side


class Spread(NamedTuple):
    """A median between its quartiles."""

    low: float
    middle: float
    high: float


@dataclass(frozen=True)
class Timing:
    """What was measured of one side.

    Attributes
    ----------
    seconds : tuple of float
        Of one call, one for each round.
    calls : int
        Number of calls in a row that each of them is the mean of.
    build : float
        Seconds that it took to build the side.
    first : float
        Seconds until its first results were on the host.
    """

    seconds: tuple[float, ...]
    calls: int
    build: float
    first: float

    @property
    def spread(self) -> Spread:
        """The median of the seconds, and their quartiles."""
        return spread(self.seconds)


def spread(values: Sequence[float]) -> Spread:
    """Return median and quartiles, interpolated linearly."""
    low, middle, high = np.quantile(np.asarray(values, np.float64), (0.25, 0.5, 0.75))
    return Spread(float(low), float(middle), float(high))


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> Spread:
    """Return the spread of theirs / ours, taken in each round: above one where ours is faster."""
    return spread([their / our for their, our in zip(theirs, ours, strict=True)])


def verdict(found: Spread) -> str:
    """Say of a ratio theirs / ours whether ours is 'faster', 'slower', or there is 'no difference'.

    There is none if one lies between the quartiles of the rounds' ratios: then it is not even in three rounds out of
    four that the same side won.
    """
    if found.low > 1:
        return "faster"
    return "slower" if found.high < 1 else "no difference"


def disagreement(truth: Sequence[Array], found: Sequence[Array], dtype: str) -> str | None:
    """Compare results; say in words what is wrong with them, or None if they are equal within :data:`TOLERANCE`."""
    if len(truth) != len(found):
        return f"computes {len(found)} arrays and not {len(truth)}"
    for true, value in zip(truth, found, strict=True):
        if true.shape != value.shape or value.dtype != np.dtype(dtype):
            return f"computes {value.dtype} {value.shape} and not {dtype} {true.shape}"
        scale = float(np.abs(true).max()) or 1.0
        error = float(np.abs(value - true).max()) / scale
        if not error <= TOLERANCE[dtype]:
            return (
                f"computes something else: off by {error:.1e} of the largest value, allowed are {TOLERANCE[dtype]:.0e}"
            )
    return None


def calls_for(side: Side) -> tuple[int, float]:
    """Warm a side up; return how many calls make a sample long enough, and the seconds of one of them."""
    count = 1
    seconds = side.time(count)
    while seconds * count < SAMPLE and count < 1_000_000:
        count = min(10 * count, max(2 * count, int(1.2 * SAMPLE / max(seconds, 1e-9))))
        seconds = side.time(count)
    return count, seconds


def wait_for_quiet(
    sleep: Callable[[float], None] = time.sleep,
    now: Callable[[], float] = time.perf_counter,
    worked: Callable[[], float] = time.process_time,
) -> None:
    """Sleep until the threads of this process are idle, or :data:`LONGEST_PAUSE` is over.

    Parameters
    ----------
    sleep, now, worked : callable
        For tests: the pause, the clock, and the seconds that all threads together have worked.
    """
    until = now() + LONGEST_PAUSE
    while True:
        start, work = now(), worked()
        sleep(PAUSE)
        if worked() - work <= QUIET * (now() - start) or now() >= until:
            return


def take_turns(
    sides: Mapping[str, Side],
    budget: float,
    *,
    pause: Callable[[], None] = wait_for_quiet,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, tuple[float, ...]], dict[str, int], bool]:
    """Time the sides in turn.

    Parameters
    ----------
    sides : mapping of str to Side
        The sides, built, compared, and called at least once.
    budget : float
        Seconds to spend; at least :data:`LEAST_ROUNDS` rounds are made, at most :data:`MOST_ROUNDS`. Only where they
        take more than :data:`PATIENCE` times the budget, :data:`FEWEST_ROUNDS` are enough.
    pause, now : callable
        For tests.

    Returns
    -------
    seconds : dict
        For each side the seconds of one call, one for each whole round.
    calls : dict
        For each side the number of calls in a sample.
    interrupted : bool
        Whether Ctrl-C ended it. What whole rounds there are is kept, nothing of fewer than :data:`FEWEST_ROUNDS`.

    Raises
    ------
    SideError
        If a side fails.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    calls, short = {}, {}
    names = list(sides)
    name, interrupted = "", False
    begin = now()
    end = begin + budget
    try:
        for name, side in sides.items():
            calls[name], one = calls_for(side)
            short[name] = one < LONG
        for turn in range(MOST_ROUNDS if names else 0):
            if now() >= (end if turn >= LEAST_ROUNDS else begin + PATIENCE * budget) and turn >= FEWEST_ROUNDS:
                break
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                pause()
                until = now() + WARM
                while short[name] and now() < until:
                    sides[name].time(calls[name])
                seconds[name].append(sides[name].time(calls[name]))
    except KeyboardInterrupt:
        interrupted = True
    except Exception as error:
        raise SideError(name) from error
    whole = min(map(len, seconds.values()), default=0)
    if interrupted and whole < FEWEST_ROUNDS:
        whole = 0
    return {name: tuple(values[:whole]) for name, values in seconds.items()}, calls, interrupted
