"""Launching a kernel: its schedule, workers and scratch memory.

Where several candidate schedules may be the fastest, they are autotuned (``autotune.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cpu.autotune import TRIALS
from fastlstm.backends.cpu.schedule import Schedule
from fastlstm.backends.cpu.thread_pool import NO_TEAM, available, new_records, run_at_once, run_team
from fastlstm.backends.cpu.workspace import SCRATCH, Workspace

__all__ = ["AtOnce", "Candidate", "Candidates", "launch", "settings_of"]


class Candidate(NamedTuple):
    """A candidate for launching a kernel: a schedule, its scratch memory and its settings."""

    schedule: Schedule
    workspaces: tuple[Workspace | None, ...]  # one for each scratch argument of the kernel; None for none
    settings: Array  # int64 numbers for the kernel, its last argument before the team


class Candidates(NamedTuple):
    """Candidates, the most promising first."""

    candidates: tuple[Candidate, ...]
    kind: object  # the kind of call, the key of its trials; None for a single candidate


def settings_of(size: int, numbers: dict[int, int], addresses: Sequence[int]) -> Array:
    """Return a kernel's settings: numbers by position, then the addresses of a variant's routines."""
    settings = np.zeros(size, np.int64)
    for place, number in numbers.items():
        settings[place] = number
    settings[size - len(addresses) :] = addresses
    return settings


def _with_numbers(settings: Array, numbers: dict[int, int] | None) -> Array:
    """Return a candidate's settings for one call."""
    if not numbers:
        return settings
    settings = settings.copy()
    for place, number in numbers.items():
        settings[place] = number
    return settings


def launch(
    kernel: Any,
    arguments: tuple[Any, ...],
    candidates_for: Any,  # maps a number of threads to candidates
    rows: int,
    threads: int,
    numbers: dict[int, int] | None = None,
) -> Any:
    """Run a kernel over `rows` rows on at most `threads` threads; return its result, False if it did nothing.

    Parameters
    ----------
    kernel : callable
    arguments : tuple
        Its arguments before the scratch arguments.
    candidates_for : callable
        Maps a number of threads to candidates.
    rows : int
        The trials compare times per row.
    threads : int
        The limit.
    numbers : dict of int to int, optional
        Settings of this call that replace those of the candidate, by position.
    """
    candidates, kind = candidates_for(threads)
    if not rows:  # all sequences are empty: there is no time per row
        kind = None
    number = TRIALS.pick(kind, len(candidates)) if kind else 0
    chosen = candidates[number]
    if not kind and chosen.schedule.threads == 1:
        return _launch_alone(kernel, arguments, chosen, numbers)
    start = time.perf_counter()  # waking workers counts as part of the time of a team
    planned = chosen.schedule.threads
    if planned > 1 and (found := available(planned - 1)) < planned - 1:  # other calls have the workers
        chosen = candidates_for(1 + found).candidates[0]
    scratch = [workspace and SCRATCH.borrow(workspace) for workspace in chosen.workspaces]
    given = (*arguments, *scratch, _with_numbers(chosen.settings, numbers))
    if chosen.schedule.threads > 1:
        result, had = run_team(kernel, given, chosen.schedule.threads - 1)
    else:
        result, had = kernel(*given, NO_TEAM, 0), 1
    if kind and had == planned and result is not False:
        TRIALS.report(kind, number, time.perf_counter() - start, rows)
    for workspace, memory in zip(chosen.workspaces, scratch, strict=True):
        if workspace:
            SCRATCH.give_back(workspace, memory)
    return result


def _launch_alone(kernel: Any, arguments: tuple[Any, ...], chosen: Candidate, numbers: dict[int, int] | None) -> Any:
    """Run a kernel whose only candidate has one thread."""
    scratch = [workspace and SCRATCH.borrow(workspace) for workspace in chosen.workspaces]
    result = kernel(*arguments, *scratch, _with_numbers(chosen.settings, numbers), NO_TEAM, 0)
    for workspace, memory in zip(chosen.workspaces, scratch, strict=True):
        if workspace:
            SCRATCH.give_back(workspace, memory)
    return result


class AtOnce:
    """Kernels that run at once, each on one thread: :meth:`launch` is used in place of the function of that name."""

    def __init__(self, calls: int) -> None:
        self._records = new_records(calls)
        self._given: list[tuple[Candidate, list[Any], tuple[Any, ...]]] = []  # what the calls work on

    def launch(
        self,
        kernel: Any,
        arguments: tuple[Any, ...],
        candidates_for: Any,  # maps a number of threads to candidates
        rows: int,
        threads: int,
        numbers: dict[int, int] | None = None,
    ) -> None:
        """Note a call, to be run on one thread whatever `threads` says."""
        chosen = candidates_for(1).candidates[0]
        scratch = [workspace and SCRATCH.borrow(workspace) for workspace in chosen.workspaces]
        given = (*arguments, *scratch, _with_numbers(chosen.settings, numbers))
        self._given.append((chosen, scratch, given))
        kernel(*given, self._records[len(self._given) - 1], -1)

    def run(self) -> None:
        """Run the calls that were noted."""
        run_at_once(self._records)
        for chosen, scratch, _ in self._given:
            for workspace, memory in zip(chosen.workspaces, scratch, strict=True):
                if workspace:
                    SCRATCH.give_back(workspace, memory)
        self._given.clear()
