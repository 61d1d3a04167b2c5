"""How one layer's work is divided among threads: one small function, which can say what it chose."""

from __future__ import annotations

import functools
import statistics
from collections import deque
from collections.abc import Hashable
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.packing import Packing

__all__ = ["TEAMS", "Plan", "Teams", "choose"]

# Waking a worker takes some 20 microseconds, in which one core does about this many operations.
_OPERATIONS_WORTH_A_THREAD = 2_000_000
# From so many on, threads with sequences of their own need no measurement.
_OPERATIONS_SURELY_WORTH_A_TEAM = 100_000_000
# Both directions at once: each has its arguments prepared in turn, for the interpreter runs one thread at a time.
_OPERATIONS_WORTH_A_DIRECTION = 8_000_000
# Meeting after a step takes up to half a microsecond; less work per thread and step is not worth it.
_OPERATIONS_WORTH_A_MEETING = 100_000
# Rows of input products that are computed together: some tiles, and still in the caches.
_ROWS_AHEAD = 48


class Plan(NamedTuple):
    """How a layer is run, in one direction or both.

    Attributes
    ----------
    kind : {"serial", "rows", "units", "directions"}
        On one thread; each thread its own sequences; each thread its own hidden units, the threads
        meeting after each step; or each thread its own direction (forward only, where dx is not shared).
    threads : int
        Size of the team.
    ahead : int
        Steps whose input products are computed together; 0 if each step computes its own.
    doubtful : bool
        Whether the team may turn out slower than one thread, so that both have to be tried: see :class:`Teams`.
    """

    kind: str
    threads: int
    ahead: int
    doubtful: bool = False

    def parts(self, packing: Packing, blocks: int) -> Array:
        """First row, last row, first block and last block of each thread: (threads, 4)."""
        if self.kind != "rows":
            return _parts_of_units(self.threads, packing.order.size, blocks)
        parts: Array = np.empty((self.threads, 4), np.int64)
        parts[:] = (0, packing.order.size, 0, blocks)
        bounds = packing.bounds(self.threads)
        parts[:, 0], parts[:, 1] = bounds[:-1], bounds[1:]
        return parts

    def __str__(self) -> str:
        """Say it in words."""
        how = {
            "serial": "on one thread",
            "rows": f"on {self.threads} threads, each with its own sequences",
            "units": f"on {self.threads} threads, each with its own hidden units, meeting after each step",
            "directions": "both directions at once, each on one thread",
        }[self.kind]
        return how + (f"; input products {self.ahead} steps ahead" if self.ahead else "")


@functools.lru_cache(maxsize=16)  # as for the arrays of equal lengths in `packing`
def _parts_of_units(threads: int, batch: int, blocks: int) -> Array:
    parts: Array = np.empty((threads, 4), np.int64)
    bounds = blocks * np.arange(threads + 1) // threads
    parts[:] = (0, batch, 0, blocks)
    parts[:, 2], parts[:, 3] = bounds[:-1], bounds[1:]
    return parts


class Teams:
    """Whether a team of threads pays where that is in doubt: a matter of measurement, call by call.

    It depends on the machine, and on what else runs there. Waking a worker takes some microseconds, or a hundred on
    a virtual machine; and on busy cores a thread that is waited for may stand in the system's queue for milliseconds,
    where threads meet after each step at every step. So calls are run both ways, by a team and by one thread, and the
    faster is kept for each kind of call; the other has another try after some calls, and after twice as many each
    time that it loses again. A try is of several calls, whose median counts: neither a compilation nor a disturbed
    call decides. Results do not depend on it.
    """

    FIRST_REST, LONGEST_REST = 8, 1024  # calls
    CALLS = 3  # of a try
    HOPELESS = 4.0  # a try ends with a call that takes so many times as long
    KINDS = 256  # of calls that are remembered

    def __init__(self) -> None:
        self._rivals: dict[Hashable, _Rivals] = {}

    def worth_it(self, kind: Hashable) -> bool:
        """Say whether a call of this kind is to be run by a team."""
        if len(self._rivals) > self.KINDS:
            self._rivals.clear()
        rivals = self._rivals.setdefault(kind, _Rivals(self.FIRST_REST))
        faster = rivals.faster()
        untried = rivals.seconds[faster] and not rivals.seconds[not faster]
        if not rivals.tries and (untried or rivals.calls >= rivals.rest):
            rivals.tries, rivals.trying = self.CALLS, not faster
        return rivals.trying if rivals.tries else faster

    def report(self, kind: Hashable, team: bool, seconds: float) -> None:
        """Take note of how long a call took, for each of its rows."""
        rivals = self._rivals.setdefault(kind, _Rivals(self.FIRST_REST))
        before = rivals.faster()
        rivals.seconds[team].append(seconds)
        flipped = rivals.faster() != before
        if rivals.tries and team == rivals.trying:
            rivals.tries -= 1
            others = rivals.seconds[not team]
            if others and seconds > self.HOPELESS * statistics.median_low(others):
                rivals.tries = 0
            if not rivals.tries:
                won = rivals.faster() == team
                rivals.calls, rivals.rest = 0, self.FIRST_REST if won else min(2 * rivals.rest, self.LONGEST_REST)
        elif flipped:
            rivals.calls, rivals.rest = 0, self.FIRST_REST
        else:
            rivals.calls += 1


class _Rivals:
    """What the last calls of one kind took, by whether a team ran them; and when the slower way is tried again."""

    def __init__(self, rest: int) -> None:
        self.seconds: dict[bool, deque[float]] = {team: deque(maxlen=Teams.CALLS) for team in (True, False)}
        self.rest, self.calls = rest, 0
        self.trying, self.tries = False, 0

    def faster(self) -> bool:
        """Say whether calls by a team are the faster ones, as far as it is known."""
        team, alone = (statistics.median_low(times) if times else None for times in self.seconds.values())
        return alone is None or (team is not None and team <= alone)


TEAMS = Teams()


@functools.lru_cache(maxsize=256)
def choose(
    rows: int,
    batch: int,
    inputs: int,
    hidden: int,
    blocks: int,
    tile_rows: int,
    threads: int,
    directions: int = 1,
) -> Plan:
    """Choose how to run one layer, in one direction after the other or in both at once.

    Parameters
    ----------
    rows : int
        N, the number of steps of all sequences.
    batch, inputs, hidden : int
        B, I and H.
    blocks : int
        Number of vectors that H takes.
    tile_rows : int
        Rows of the matrix tile.
    threads : int
        The most threads to use.
    directions : int
        Of the layer; 1 for the plan of one direction by itself.
    """
    row_operations: Any = 8 * hidden * (inputs + hidden)
    threads = int(min(threads, 1 + rows * row_operations // _OPERATIONS_WORTH_A_THREAD))
    steps = rows / max(1, batch)
    few = batch < 2 * tile_rows * threads
    if threads > 1 and not few:
        return Plan("rows", threads, 0, rows * row_operations < _OPERATIONS_SURELY_WORTH_A_TEAM)
    ahead = int(min(steps, -(-_ROWS_AHEAD // batch))) if batch < 2 * tile_rows and steps > 1 else 0
    spare = threads > 1
    while threads > 1 and batch * 8 * hidden * hidden < threads * _OPERATIONS_WORTH_A_MEETING:
        threads -= 1
    threads = min(threads, blocks)
    if spare and threads <= directions > 1 and rows * row_operations >= _OPERATIONS_WORTH_A_DIRECTION:
        return Plan("directions", directions, ahead)
    return Plan("units", threads, ahead, True) if threads > 1 else Plan("serial", 1, ahead)
