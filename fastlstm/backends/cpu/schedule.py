"""How one layer's work is divided among threads: one small function, which can say what it chose."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from fastlstm.kernels.cpu.vector import REGISTERS

__all__ = ["FEW_ROWS", "LEAST_TO_SHARE", "Schedule", "are_few", "choose", "is_short", "most_threads"]

# Waking a worker takes some 20 microseconds, in which one core does about this many operations; or, where weights are
# used for few rows, reads about so many.
_OPERATIONS_WORTH_A_THREAD, _WEIGHTS_WORTH_A_THREAD = 2_000_000, 300_000
# From so many on, a team needs no measurement to be better than one thread.
_OPERATIONS_SURELY_WORTH_A_TEAM = 100_000_000
# Both directions at once: each has its arguments prepared in turn, for the interpreter runs one thread at a time.
_OPERATIONS_WORTH_A_DIRECTION = 8_000_000
# Meeting after a step takes up to half a microsecond; less work per thread and step is not worth it. But reading so
# many recurrent weights takes one thread longer than two take to meet, however few the operations are: with half of
# them, each has little more than its first-level cache holds.
_OPERATIONS_WORTH_A_MEETING, _WEIGHTS_WORTH_A_MEETING = 100_000, 16_000
# With fewer sequences, a thread that has all units gets all weights through its caches for few rows of the tile.
_ROWS_WORTH_ALL_WEIGHTS = 32
# With fewer, forward: threads that divide the units help each other, which is worth more than meeting costs.
_ROWS_WORTH_NO_HELP = 64
# Rows of input products that are computed together: some tiles, and still in the caches. More, where there are so many
# weights that each step has to read them from memory: those of the inputs then come less often. With several threads,
# which share a cache, that pays from fewer weights on.
_ROWS_AHEAD, _ROWS_AHEAD_OF_MANY_WEIGHTS, _MANY_WEIGHTS, _MANY_WEIGHTS_OF_A_TEAM = 48, 128, 4_000_000, 1_000_000
# Rows, in tiles, up to which the weights are used as they lie: packing them would read and write them all. There may be
# more, the longer the rows of the weights, at whose end the sums of a vector's lanes have to be added up.
_FEW_TILES, _NUMBERS_WORTH_A_ROW = 5.5, 8
# A call of so few rows and operations takes hardly longer than to find out how it could be divided. Going back, up to
# this number of rows always do: a team would pack the weights, and unpack their gradients. A single step on packed
# weights may have more rows, as many as the tile's weights serve at a time.
FEW_ROWS, _OPERATIONS_OF_A_SHORT_CALL, _ROWS_SHORT_BACKWARD = 16, 8_000_000, 8
# H (I + H) from which on a short call may have a team: a quarter of the weights. Steps of smaller models take a few
# microseconds, and are not kept waiting for the question.
LEAST_TO_SHARE = _OPERATIONS_WORTH_A_THREAD // (8 * FEW_ROWS)


class Schedule(NamedTuple):
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
    unpacked : bool
        Whether the weights are used without being packed.
    """

    kind: str
    threads: int
    ahead: int
    unpacked: bool = False

    def __str__(self) -> str:
        """Say it in words."""
        how = {
            "serial": "on one thread",
            "rows": f"on {self.threads} threads, each with its own sequences",
            "units": f"on {self.threads} threads, each with its own hidden units, meeting after each step",
            "directions": "both directions at once, each on one thread",
        }[self.kind]
        ahead = f"; input products {self.ahead} steps ahead" if self.ahead else ""
        return how + ahead + ("; the weights as they lie" if self.unpacked else "")


@functools.lru_cache(maxsize=256)
def are_few(rows: int, inputs: int, hidden: int, tile_rows: int) -> bool:
    """Say whether so many rows are too few for packing the weights, on whatever number of threads."""
    return rows <= max(_FEW_TILES * tile_rows, (inputs + hidden) // _NUMBERS_WORTH_A_ROW)


def is_short(rows: int, inputs: int, hidden: int, backward: bool = False, most: int = FEW_ROWS) -> bool:
    """Say whether there is so little work, in one direction without padding, that it is done without preparations.

    In training it is then done by this thread alone.
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
    """Choose how to run one layer, in one direction after the other or in both at once.

    Where several schedules are returned, it is not clear which is the fastest: see
    :mod:`fastlstm.backends.cpu.autotune`. The first is the most promising.

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
    few : bool
        Whether the rows are too few for packing the weights: see :func:`are_few`.
    directions : int
        Of the layer; 1 for the schedule of one direction by itself.
    backward : bool
        Whether it is the backward pass.
    packed : bool
        Whether the weights are packed already.
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
            # With 16 registers (AVX2), threads that divide the units help each other instead: 0.91 to 0.93 of the time.
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
