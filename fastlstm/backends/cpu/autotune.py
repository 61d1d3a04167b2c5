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
    TOO_SLOW = 4.0  # a trial ends with a call that takes so many times as long,
    LONG = 0.02  # or that loses at all, if it takes so many seconds: its noise is small, and three calls cost much
    SHARE = 0.02  # of the time, which trials may lose at most; it sets the calls before the next trial
    KINDS = 256  # kinds of calls that are remembered

    def __init__(self) -> None:
        self._records: dict[Hashable, _Record] = {}

    def pick(self, kind: Hashable, candidates: int) -> int:
        """Return the number of one of so many candidates for a call of this kind; 0 for the first call."""
        if len(self._records) > self.KINDS:
            self._records.clear()
        record = self._records.get(kind)
        if record is None:
            record = self._records[kind] = _Record(candidates, self.FIRST_REST)
        if not record.tries and record.calls >= record.rest and record.is_known():
            record.trying, record.tries, record.warming = record.next_to_try(), self.CALLS, self.WARMING
        return record.trying if record.tries else record.fastest

    def report(self, kind: Hashable, candidate: int, seconds: float, rows: int = 1) -> None:
        """Record the time of a call with `rows` rows."""
        record = self._records.get(kind)
        if record is None:  # cleared by another thread
            return
        is_short, is_long = seconds < self.SHORT, seconds >= self.LONG
        seconds /= rows  # calls of one kind differ in their number of rows
        if is_short and record.warming > 0 and record.tries and candidate == record.trying:
            record.warming -= 1
            return
        # Not the first call after a trial, because a worker may have fallen asleep in it.
        if is_short and not record.tries and (record.calls + 1) % self.NOTED:
            record.calls += 1
            return
        record.note(candidate, seconds)
        if record.tries and candidate == record.trying:
            record.tries = max(0, record.tries - 1)  # another thread's call may have been the last
            best = min(record.medians[:candidate] + record.medians[candidate + 1 :])
            too_slow = seconds > (1.0 / self.BETTER if is_long else self.TOO_SLOW) * best
            if too_slow:
                record.tries = 0
                record.forget_all_but(candidate, seconds)
            if not record.tries:
                won = record.medians[candidate] < self.BETTER * record.medians[record.fastest]
                calls = (1 if too_slow else self.CALLS) + (self.WARMING if is_short else 0)
                # The loss in calls of the fastest, whose time may be 0 on a coarse clock.
                lost = calls * (record.medians[candidate] / best - 1.0) if best else 0.0
                record.fastest = candidate if won else record.fastest
                record.calls, record.lost = 0, 0 if won else record.lost + 1
                rest = max(min(2 * record.rest, self.LONGEST_REST), int(lost / self.SHARE))
                record.rest = self.FIRST_REST if won else rest
        else:
            record.calls += 1
        if math.inf in record.medians or record.medians[record.fastest] > self.SUSPECT * min(record.medians):
            record.calls = record.rest


class _Record:
    """Times of the last calls of one kind, for each candidate, and the state of the trials."""

    def __init__(self, candidates: int, rest: int) -> None:
        self.seconds: list[deque[float]] = [deque(maxlen=Trials.CALLS) for _ in range(candidates)]
        self.medians = [math.inf] * candidates
        self.fastest = 0
        self.rest, self.calls, self.lost = rest, 0, 0
        self.trying, self.tries, self.warming = 0, 0, 0

    def note(self, candidate: int, seconds: float) -> None:
        """Record a call."""
        self.seconds[candidate].append(seconds)
        known = sorted(self.seconds[candidate])  # once: another thread's call may change them meanwhile
        self.medians[candidate] = known[(len(known) - 1) // 2]

    def forget_all_but(self, candidate: int, seconds: float) -> None:
        """Replace the times of a candidate by one call."""
        self.seconds[candidate] = deque([seconds], maxlen=Trials.CALLS)
        self.medians[candidate] = seconds

    def is_known(self) -> bool:
        """Say whether the fastest has been timed for CALLS calls."""
        return len(self.seconds[self.fastest]) == Trials.CALLS

    def next_to_try(self) -> int:
        """Choose the next trial: an untried candidate, one that seems faster than the fastest, or each in turn."""
        others = [candidate for candidate in range(len(self.medians)) if candidate != self.fastest]
        unknown = [candidate for candidate in others if not self.seconds[candidate]]
        best = min(others, key=self.medians.__getitem__)
        if unknown or self.medians[best] < self.medians[self.fastest] / Trials.SUSPECT:
            return unknown[0] if unknown else best
        return others[self.lost % len(others)]


TRIALS = Trials()
