"""How one layer's work is divided among threads: one small function, which can say what it chose."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Hashable
from typing import Any, NamedTuple

__all__ = ["FEW_ROWS", "LEAST_TO_SHARE", "TRIALS", "Plan", "Trials", "are_few", "choose", "is_short", "most_threads"]

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
    as_they_lie : bool
        Whether the weights are used without being packed.
    """

    kind: str
    threads: int
    ahead: int
    as_they_lie: bool = False

    def __str__(self) -> str:
        """Say it in words."""
        how = {
            "serial": "on one thread",
            "rows": f"on {self.threads} threads, each with its own sequences",
            "units": f"on {self.threads} threads, each with its own hidden units, meeting after each step",
            "directions": "both directions at once, each on one thread",
        }[self.kind]
        ahead = f"; input products {self.ahead} steps ahead" if self.ahead else ""
        return how + ahead + ("; the weights as they lie" if self.as_they_lie else "")


class Trials:
    """Which of several plans is the fastest, where that is in doubt: a matter of measurement, call by call.

    It depends on the machine, and on what else runs there. Waking a worker takes some microseconds, or a hundred on
    a virtual machine; and on busy cores a thread that is waited for may stand in the system's queue for
    milliseconds, where threads meet after each step at every step. So calls are run all ways, and the fastest is
    kept for each kind of call; another has a try after some calls, and after twice as many each time that one loses
    again, or after so many that what it loses is a small share of their time. A try is of several calls, whose median
    counts: neither a compilation nor a disturbed call decides; and it has to win clearly, or noise would decide again
    and again. A long call that loses ends its try. Before a try come some calls that do not count where calls are
    short: the first has to wake a worker, which takes longer than the call, and its weights are in another core's
    caches for some more. What was measured in the past counts for nothing but when to try: the whole machine may be
    slower now. Results do not depend on it.
    """

    FIRST_REST, LONGEST_REST = 8, 1024  # calls
    CALLS = 3  # of a try
    WARMING, SHORT = 6, 1e-3  # calls before them, if they are shorter than so many seconds
    NOTED = 16  # of so many short calls between tries, one: to note each would take a share of its time
    BETTER = 0.95  # of the time: enough to win
    SUSPECT = 1.5  # times what another took once: enough for another to have a try at once
    HOPELESS = 4.0  # a try ends with a call that takes so many times as long,
    LONG = 0.02  # or that loses at all, if it takes so many seconds: noise is a small share of it, and three are many
    SHARE = 0.02  # of the time: tries lose no more of it, so far away is the next
    KINDS = 256  # of calls that are remembered

    def __init__(self) -> None:
        self._rivals: dict[Hashable, _Rivals] = {}

    def pick(self, kind: Hashable, ways: int) -> int:
        """Say which of so many ways a call of this kind is to be run; the first call takes number 0."""
        if len(self._rivals) > self.KINDS:
            self._rivals.clear()
        rivals = self._rivals.get(kind)
        if rivals is None:
            rivals = self._rivals[kind] = _Rivals(ways, self.FIRST_REST)
        if not rivals.tries and rivals.calls >= rivals.rest and rivals.is_known():
            rivals.trying, rivals.tries, rivals.warming = rivals.next_to_try(), self.CALLS, self.WARMING
        return rivals.trying if rivals.tries else rivals.fastest

    def report(self, kind: Hashable, way: int, seconds: float, rows: int = 1) -> None:
        """Take note of how long a call of so many rows took."""
        rivals = self._rivals.get(kind)
        if rivals is None:  # forgotten meanwhile
            return
        is_short, is_long = seconds < self.SHORT, seconds >= self.LONG
        seconds /= rows  # calls of one kind differ in their number of rows
        if is_short and rivals.warming > 0 and rivals.tries and way == rivals.trying:
            rivals.warming -= 1
            return
        # Not the first after a try, in which a worker may have fallen asleep.
        if is_short and not rivals.tries and (rivals.calls + 1) % self.NOTED:
            rivals.calls += 1
            return
        rivals.note(way, seconds)
        if rivals.tries and way == rivals.trying:
            rivals.tries = max(0, rivals.tries - 1)  # another thread's call may have been the last
            best = min(rivals.medians[:way] + rivals.medians[way + 1 :])
            hopeless = seconds > (1.0 / self.BETTER if is_long else self.HOPELESS) * best
            if hopeless:
                rivals.tries = 0
                rivals.forget_all_but(way, seconds)
            if not rivals.tries:
                won = rivals.medians[way] < self.BETTER * rivals.medians[rivals.fastest]
                calls = (1 if hopeless else self.CALLS) + (self.WARMING if is_short else 0)
                # In calls of the fastest, which a coarse clock may have seen take no time.
                lost = calls * (rivals.medians[way] / best - 1.0) if best else 0.0
                rivals.fastest = way if won else rivals.fastest
                rivals.calls, rivals.lost = 0, 0 if won else rivals.lost + 1
                rest = max(min(2 * rivals.rest, self.LONGEST_REST), int(lost / self.SHARE))
                rivals.rest = self.FIRST_REST if won else rest
        else:
            rivals.calls += 1
        if math.inf in rivals.medians or rivals.medians[rivals.fastest] > self.SUSPECT * min(rivals.medians):
            rivals.calls = rivals.rest


class _Rivals:
    """What the last calls of one kind took, each way; and when one that is slower is tried again."""

    def __init__(self, ways: int, rest: int) -> None:
        self.seconds: list[deque[float]] = [deque(maxlen=Trials.CALLS) for _ in range(ways)]
        self.medians = [math.inf] * ways
        self.fastest = 0
        self.rest, self.calls, self.lost = rest, 0, 0
        self.trying, self.tries, self.warming = 0, 0, 0

    def note(self, way: int, seconds: float) -> None:
        """Take note of a call."""
        self.seconds[way].append(seconds)
        known = sorted(self.seconds[way])  # once: another thread's call may change them meanwhile
        self.medians[way] = known[(len(known) - 1) // 2]

    def forget_all_but(self, way: int, seconds: float) -> None:
        """Let one call of a way stand for all."""
        self.seconds[way] = deque([seconds], maxlen=Trials.CALLS)
        self.medians[way] = seconds

    def is_known(self) -> bool:
        """Say whether the fastest had as many calls as another's try has."""
        return len(self.seconds[self.fastest]) == Trials.CALLS

    def next_to_try(self) -> int:
        """Choose among the ways that are not the fastest: what was never tried, what seems faster, or each in turn."""
        others = [way for way in range(len(self.medians)) if way != self.fastest]
        unknown = [way for way in others if not self.seconds[way]]
        best = min(others, key=self.medians.__getitem__)
        if unknown or self.medians[best] < self.medians[self.fastest] / Trials.SUSPECT:
            return unknown[0] if unknown else best
        return others[self.lost % len(others)]


TRIALS = Trials()


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
    directions: int = 1,
    backward: bool = False,
    packed: bool = False,
) -> tuple[Plan, ...]:
    """Choose how to run one layer, in one direction after the other or in both at once.

    Where several plans are returned, it is not clear which is the fastest: see :class:`Trials`. The first is the most
    promising.

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
    backward : bool
        Whether it is the backward pass.
    packed : bool
        Whether the weights are packed already.
    """
    weights = 4 * hidden * (inputs + hidden)
    row_operations: Any = 2 * weights
    steps = rows / max(1, batch)
    few = not backward and are_few(rows, inputs, hidden, tile_rows)
    threads = int(min(threads, most_threads(rows, inputs, hidden, few)))
    as_they_lie = few and not packed
    ahead = 0
    if steps > 1 and not as_they_lie:
        if batch < 2 * tile_rows:
            ahead = int(min(steps, -(-_ROWS_AHEAD // batch)))
        many = weights > (_MANY_WEIGHTS if threads == 1 else _MANY_WEIGHTS_OF_A_TEAM)
        if many and not backward and batch <= _ROWS_AHEAD_OF_MANY_WEIGHTS // 2:
            ahead = max(ahead, int(min(steps, _ROWS_AHEAD_OF_MANY_WEIGHTS // batch)))
    alone = Plan("serial", 1, ahead, as_they_lie)
    if threads == 1:
        return (alone,)
    recurrent = 4 * hidden * hidden
    partners = 2 if recurrent >= _WEIGHTS_WORTH_A_MEETING else 1
    meeting = int(min(threads, blocks, max(partners, 2 * batch * recurrent // _OPERATIONS_WORTH_A_MEETING)))
    units = (Plan("units", meeting, ahead, as_they_lie),) if meeting > 1 else ()
    if batch >= 2 * tile_rows * threads:
        own_rows = (Plan("rows", threads, 0, as_they_lie),)
        teams = (*own_rows, *units) if backward else (*units, *own_rows)
        if batch >= (_ROWS_WORTH_ALL_WEIGHTS if backward else _ROWS_WORTH_NO_HELP) * threads:
            teams = own_rows
        doubt = rows * row_operations < _OPERATIONS_SURELY_WORTH_A_TEAM
        return (*teams, *((alone,) if doubt else ()))
    if meeting <= directions > 1 and rows * row_operations >= _OPERATIONS_WORTH_A_DIRECTION:
        return (Plan("directions", directions, ahead, as_they_lie),)
    return (*units, alone)
