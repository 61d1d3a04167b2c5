"""Which of several candidate schedules is the fastest, where that is in doubt: measured, call by call."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

__all__ = ["TRIALS", "Trials"]


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

    Without trials, on two threads of a Zen 5 virtual machine, (T, B, I, H) = (100, 1, 32, 64) takes 2.1 times as long
    and (100, 32, 64, 32) 1.5 times.
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
