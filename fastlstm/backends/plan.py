"""How one layer's work is divided among threads: one small function, which can say what it chose."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.packing import Packing

__all__ = ["MEETINGS", "Meetings", "Plan", "choose"]

# Waking a worker takes some 20 microseconds, in which one core does about this many operations.
_OPERATIONS_WORTH_A_THREAD = 2_000_000
# Meeting after a step takes up to half a microsecond; less work per thread and step is not worth it.
_OPERATIONS_WORTH_A_MEETING = 100_000
# Rows of input products that are computed together: some tiles, and still in the caches.
_ROWS_AHEAD = 48


class Plan(NamedTuple):
    """How a layer is run in one direction.

    Attributes
    ----------
    kind : {"serial", "rows", "units"}
        On one thread; each thread its own sequences; or each thread its own hidden units, the threads
        meeting after each step.
    threads : int
        Size of the team.
    ahead : int
        Steps whose input products are computed together; 0 if each step computes its own.
    """

    kind: str
    threads: int
    ahead: int

    def parts(self, packing: Packing, blocks: int) -> Array:
        """First row, last row, first block and last block of each thread: (threads, 4)."""
        parts: Array = np.empty((self.threads, 4), np.int64)
        parts[:] = (0, packing.order.size, 0, blocks)
        if self.kind == "rows":
            bounds = packing.bounds(self.threads)
            parts[:, 0], parts[:, 1] = bounds[:-1], bounds[1:]
        elif self.kind == "units":
            bounds = blocks * np.arange(self.threads + 1) // self.threads
            parts[:, 2], parts[:, 3] = bounds[:-1], bounds[1:]
        return parts

    def __str__(self) -> str:
        """Say it in words."""
        how = {
            "serial": "on one thread",
            "rows": f"on {self.threads} threads, each with its own sequences",
            "units": f"on {self.threads} threads, each with its own hidden units, meeting after each step",
        }[self.kind]
        return how + (f"; input products {self.ahead} steps ahead" if self.ahead else "")


class Meetings:
    """Whether it is worth it now that threads meet after each step.

    Where other work keeps the cores busy, a thread that is waited for may stand in the system's queue for
    milliseconds, at every step. That shows in how often the others give up spinning; then the next calls do
    without meetings, and more of them each time that the next attempt is no better. Results do not depend on it.
    """

    FIRST_REST, LONGEST_REST = 8, 1024  # calls

    def __init__(self) -> None:
        self._resting, self._next_rest = 0, self.FIRST_REST

    def worth_it(self) -> bool:
        """Say whether this call may meet, and count it."""
        self._resting = max(0, self._resting - 1)
        return self._resting == 0

    def report(self, yields: int, meetings: int) -> None:
        """Take note of how often the threads of a call gave their cores away in so many meetings."""
        if 16 * yields <= meetings:
            self._next_rest = self.FIRST_REST
        else:
            self._resting, self._next_rest = self._next_rest, min(2 * self._next_rest, self.LONGEST_REST)


MEETINGS = Meetings()


@functools.lru_cache(maxsize=256)
def choose(
    rows: int, batch: int, inputs: int, hidden: int, blocks: int, tile_rows: int, threads: int, meet: bool = True
) -> Plan:
    """Choose how to run one layer in one direction.

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
    meet : bool
        Whether threads may meet after each step.
    """
    row_operations: Any = 8 * hidden * (inputs + hidden)
    threads = int(min(threads, 1 + rows * row_operations // _OPERATIONS_WORTH_A_THREAD))
    steps = rows / max(1, batch)
    few = batch < 2 * tile_rows * threads
    if threads > 1 and not few:
        return Plan("rows", threads, 0)
    ahead = int(min(steps, -(-_ROWS_AHEAD // batch))) if batch < 2 * tile_rows and steps > 1 else 0
    threads = threads if meet else 1
    while threads > 1 and batch * 8 * hidden * hidden < threads * _OPERATIONS_WORTH_A_MEETING:
        threads -= 1
    threads = min(threads, blocks)
    return Plan("units" if threads > 1 else "serial", threads, ahead)
