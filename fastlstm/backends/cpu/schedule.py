"""How the work of one layer is divided among threads: a function that chooses schedules, and their description."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastlstm.kernels.cpu.vector import REGISTERS

__all__ = ["FEW_ROWS", "LEAST_TO_SHARE", "Schedule", "are_few", "choose", "is_short", "most_threads"]

# Waking a worker takes about 20 us. In that time one core does this many floating-point operations, or, in a small
# batch (M <= 16 rows), reads this many weights.
_OPERATIONS_WORTH_A_THREAD, _WEIGHTS_WORTH_A_THREAD = 2_000_000, 300_000
# Above this many operations, a team is faster than one thread without being measured.
_OPERATIONS_SURELY_WORTH_A_TEAM = 100_000_000
# Operations from which on both directions run at once. Their arguments are prepared one after the other, by one thread.
_OPERATIONS_WORTH_A_DIRECTION = 8_000_000
# A barrier after a step takes up to 0.5 us, so each thread needs at least 100,000 operations per step. With 16,000
# recurrent weights or more, two threads pay off for any number of operations: half of the weights nearly fits the L1
# cache of each thread, and one thread takes longer to read them all than two take for the barrier.
_OPERATIONS_WORTH_A_MEETING, _WEIGHTS_WORTH_A_MEETING = 100_000, 16_000
# With fewer sequences per thread, a thread that computes all units reads all weights for a few rows of the microkernel.
_ROWS_WORTH_ALL_WEIGHTS = 32
# Forward, with fewer sequences per thread: threads that divide the units take work from each other, which gains more
# than the barriers cost.
_ROWS_WORTH_NO_HELP = 64
# Input projections are batched over several steps: 48 rows, a few blocks of the microkernel, which fit the caches. Up
# to 128 rows when the weights exceed L2 (1 M parameters per team, whose threads share a cache; 4 M on one thread): the
# input weights are then read from memory less often.
_ROWS_AHEAD, _ROWS_AHEAD_OF_MANY_WEIGHTS, _MANY_WEIGHTS, _MANY_WEIGHTS_OF_A_TEAM = 48, 128, 4_000_000, 1_000_000
# Up to 5.5 times the microkernel's MR rows, weights are used unpacked: packing would read and write all of them. Long
# rows of weights allow more, one row per 8 numbers: the sum over the lanes of a vector, at the end of a row, then
# matters less.
_FEW_TILES, _NUMBERS_WORTH_A_ROW = 5.5, 8
# A call of up to 16 rows and 8 M operations takes hardly longer than choosing a schedule, so none is chosen. Backward,
# that holds for up to 8 rows with any number of operations: a team would have to pack the weights and unpack their
# gradients. A single step on packed weights may have more rows: MC, which the microkernel takes at a time.
FEW_ROWS, _OPERATIONS_OF_A_SHORT_CALL, _ROWS_SHORT_BACKWARD = 16, 8_000_000, 8
# H (I + H), a quarter of the weights, from which on a short call may have a team. Steps of smaller models take a few
# microseconds, so the choice itself would slow them down.
LEAST_TO_SHARE = _OPERATIONS_WORTH_A_THREAD // (8 * FEW_ROWS)


class Schedule(NamedTuple):
    """How a layer is run, in one direction or both.

    Attributes
    ----------
    kind : {"serial", "rows", "units", "directions"}
        On one thread; each thread its own sequences; each thread its own hidden units, with a barrier after each step;
        or each thread its own direction (forward only, because backward both add to dx).
    threads : int
        Size of the team.
    ahead : int
        Steps whose input projections are computed together; 0 if each step computes its own.
    unpacked : bool
        Whether the weights are used without being packed.
    """

    kind: str
    threads: int
    ahead: int
    unpacked: bool = False

    def __str__(self) -> str:
        """Describe the schedule."""
        how = {
            "serial": "on one thread",
            "rows": f"on {self.threads} threads, each with its own sequences",
            "units": f"on {self.threads} threads, each with its own hidden units, with a barrier after each step",
            "directions": "both directions at once, each on one thread",
        }[self.kind]
        ahead = f"; input products {self.ahead} steps ahead" if self.ahead else ""
        return how + ahead + ("; unpacked weights" if self.unpacked else "")


@functools.lru_cache(maxsize=256)
def are_few(rows: int, inputs: int, hidden: int, tile_rows: int) -> bool:
    """Say whether there are too few rows for packing the weights, for any number of threads."""
    return rows <= max(_FEW_TILES * tile_rows, (inputs + hidden) // _NUMBERS_WORTH_A_ROW)


def is_short(rows: int, inputs: int, hidden: int, backward: bool = False, most: int = FEW_ROWS) -> bool:
    """Say whether there is so little work, in one direction without padding, that no schedule is chosen.

    Training then runs on one thread.
    """
    if rows > most:
        return False
    return rows * 8 * hidden * (inputs + hidden) <= _OPERATIONS_OF_A_SHORT_CALL or (
        backward and rows <= _ROWS_SHORT_BACKWARD
    )


def most_threads(rows: int, inputs: int, hidden: int, few: bool) -> int:
    """Return the number of threads beyond which each would have too little to do; `few` is :func:`are_few`."""
    weights = hidden * (inputs + hidden)
    shares = 8 * rows * weights // _OPERATIONS_WORTH_A_THREAD
    return 1 + (max(shares, 4 * weights // _WEIGHTS_WORTH_A_THREAD) if few else shares)


def choose(
    rows: int,
    batch: int,
    inputs: int,
    hidden: int,
    blocks: int,
    tile_rows: int,
    threads: int,
    *,
    few: bool,
    directions: int = 1,
    backward: bool = False,
    packed: bool = False,
) -> tuple[Schedule, ...]:
    """Choose candidate schedules for one layer, for one direction after the other or both at once.

    More than one candidate is returned where the fastest is not known: they are autotuned
    (:mod:`fastlstm.backends.cpu.autotune`). The most promising one is first.

    Parameters
    ----------
    rows : int
        N, the sum of the lengths of all sequences.
    batch, inputs, hidden : int
        B, I and H.
    blocks : int
        Number of vectors that H takes.
    tile_rows : int
        MR, the rows of the microkernel.
    threads : int
        The largest number of threads.
    few : bool
        Whether the rows are too few for packing the weights: see :func:`are_few`.
    directions : int
        Of the layer; 1 for the schedule of one direction by itself.
    backward : bool
        Whether it is the backward pass.
    packed : bool
        Whether the weights are already packed.
    """
    weights = 4 * hidden * (inputs + hidden)
    row_operations: Any = 2 * weights
    steps = rows / max(1, batch)
    few = few and not backward
    threads = int(min(threads, most_threads(rows, inputs, hidden, few)))
    unpacked = few and not packed
    ahead = team_ahead = 0
    if steps > 1 and not unpacked:
        if batch < 2 * tile_rows:
            ahead = team_ahead = int(min(steps, -(-_ROWS_AHEAD // batch)))
        many = weights > (_MANY_WEIGHTS if threads == 1 else _MANY_WEIGHTS_OF_A_TEAM)
        if many and not backward and batch <= _ROWS_AHEAD_OF_MANY_WEIGHTS // 2:
            ahead = max(ahead, int(min(steps, _ROWS_AHEAD_OF_MANY_WEIGHTS // batch)))
            # With 16 registers (AVX2), threads that divide the units take work from each other: 0.91 to 0.93 of the
            # time.
            team_ahead = ahead if REGISTERS == 32 else team_ahead
    alone = Schedule("serial", 1, ahead, unpacked)
    if threads == 1:
        return (alone,)
    recurrent = 4 * hidden * hidden
    partners = 2 if recurrent >= _WEIGHTS_WORTH_A_MEETING else 1
    meeting = int(min(threads, blocks, max(partners, 2 * batch * recurrent // _OPERATIONS_WORTH_A_MEETING)))
    units = (Schedule("units", meeting, team_ahead, unpacked),) if meeting > 1 else ()
    if batch >= 2 * tile_rows * threads:
        own_rows = (Schedule("rows", threads, 0, unpacked),)
        teams = (*own_rows, *units) if backward else (*units, *own_rows)
        if batch >= (_ROWS_WORTH_ALL_WEIGHTS if backward else _ROWS_WORTH_NO_HELP) * threads:
            teams = own_rows
        doubt = rows * row_operations < _OPERATIONS_SURELY_WORTH_A_TEAM
        return (*teams, *((alone,) if doubt else ()))
    if meeting <= directions > 1 and rows * row_operations >= _OPERATIONS_WORTH_A_DIRECTION:
        return (Schedule("directions", directions, ahead, unpacked),)
    return (*units, alone)
