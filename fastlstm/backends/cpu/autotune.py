"""Autotuning: measures, call by call, which of several candidate schedules is the fastest."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

__all__ = ["TRIALS", "Trials"]


class Trials:
    """Times calls with each candidate schedule, and picks the fastest. Results do not depend on the schedule.

    Which candidate is the fastest depends on the machine and its load. Waking a worker takes a few microseconds, or a
    hundred on a virtual machine; on busy cores a thread may wait in the scheduler's queue for milliseconds, with
    barriers at every step.

    For each kind of call, every candidate is tried, and the fastest is kept. Another candidate is tried again after
    FIRST_REST calls. Each time that it loses, the number of calls before the next trial doubles, or grows further until
    the time lost in trials is below SHARE.

    - A trial has CALLS calls, and their median counts, so that neither a compilation nor one disturbed call decides.
    - It must win by a margin (BETTER), or noise would change the choice again and again.
    - One long call that loses ends its trial.
    - Short calls are preceded by WARMING calls that do not count: the first wakes a worker, which takes longer than the
      call, and the weights are in another core's caches for a few more.
    - Old times only decide when to try again, never which candidate wins: the whole machine may be slower now.

    Without trials, on two threads of a Zen 5 virtual machine, (T, B, I, H) = (100, 1, 32, 64) takes 2.1 times as long
    and (100, 32, 64, 32) 1.5 times.
    """

    FIRST_REST, LONGEST_REST = 8, 1024  # calls
    CALLS = 3  # of a trial
    WARMING, SHORT = 6, 1e-3  # uncounted calls before a trial, if calls take less than SHORT seconds
    NOTED = 16  # between trials, one of so many short calls is timed: timing each would slow them down
    BETTER = 0.95  # a trial wins with at most this share of the time
    SUSPECT = 1.5  # the fastest takes so many times what another once took: try the other at once
    HOPELESS = 4.0  # a trial ends with a call that takes so many times as long,
    LONG = 0.02  # or that loses at all, if it takes so many seconds: its noise is small, and three calls cost much
    SHARE = 0.02  # of the time, which trials may lose at most; it sets the calls before the next trial
    KINDS = 256  # kinds of calls that are remembered

    def __init__(self) -> None:
        self._rivals: dict[Hashable, _Rivals] = {}

    def pick(self, kind: Hashable, ways: int) -> int:
        """Return the number of the candidate, of `ways` candidates, for a call of this kind; 0 for the first call."""
        if len(self._rivals) > self.KINDS:
            self._rivals.clear()
        rivals = self._rivals.get(kind)
        if rivals is None:
            rivals = self._rivals[kind] = _Rivals(ways, self.FIRST_REST)
        if not rivals.tries and rivals.calls >= rivals.rest and rivals.is_known():
            rivals.trying, rivals.tries, rivals.warming = rivals.next_to_try(), self.CALLS, self.WARMING
        return rivals.trying if rivals.tries else rivals.fastest

    def report(self, kind: Hashable, way: int, seconds: float, rows: int = 1) -> None:
        """Record the time of a call with `rows` rows."""
        rivals = self._rivals.get(kind)
        if rivals is None:  # cleared by another thread
            return
        is_short, is_long = seconds < self.SHORT, seconds >= self.LONG
        seconds /= rows  # calls of one kind differ in their number of rows
        if is_short and rivals.warming > 0 and rivals.tries and way == rivals.trying:
            rivals.warming -= 1
            return
        # Not the first call after a trial, because a worker may have fallen asleep in it.
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
                # The loss in calls of the fastest, whose time may be 0 on a coarse clock.
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
    """Times of the last calls of one kind, for each candidate, and the state of the trials."""

    def __init__(self, ways: int, rest: int) -> None:
        self.seconds: list[deque[float]] = [deque(maxlen=Trials.CALLS) for _ in range(ways)]
        self.medians = [math.inf] * ways
        self.fastest = 0
        self.rest, self.calls, self.lost = rest, 0, 0
        self.trying, self.tries, self.warming = 0, 0, 0

    def note(self, way: int, seconds: float) -> None:
        """Record a call."""
        self.seconds[way].append(seconds)
        known = sorted(self.seconds[way])  # once: another thread's call may change them meanwhile
        self.medians[way] = known[(len(known) - 1) // 2]

    def forget_all_but(self, way: int, seconds: float) -> None:
        """Replace the times of a candidate by one call."""
        self.seconds[way] = deque([seconds], maxlen=Trials.CALLS)
        self.medians[way] = seconds

    def is_known(self) -> bool:
        """Say whether the fastest has been timed for CALLS calls."""
        return len(self.seconds[self.fastest]) == Trials.CALLS

    def next_to_try(self) -> int:
        """Choose the next trial: an untried candidate, one that seems faster than the fastest, or each in turn."""
        others = [way for way in range(len(self.medians)) if way != self.fastest]
        unknown = [way for way in others if not self.seconds[way]]
        best = min(others, key=self.medians.__getitem__)
        if unknown or self.medians[best] < self.medians[self.fastest] / Trials.SUSPECT:
            return unknown[0] if unknown else best
        return others[self.lost % len(others)]


TRIALS = Trials()
