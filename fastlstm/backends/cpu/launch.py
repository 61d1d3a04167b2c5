"""How a kernel is launched: with a schedule, workers, and scratch memory.

Where several schedules may be the fastest, calls are run in all of them, and their times are noted (``autotune.py``).
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
    """One way to launch a kernel: a schedule, and what follows from it."""

    schedule: Schedule
    workspaces: tuple[Workspace | None, ...]  # one for each scratch argument of the kernel; None for none
    settings: Array  # the kernel's numbers, int64, the last argument before the team


class Candidates(NamedTuple):
    """The candidates of which one may be the fastest, the most promising first."""

    candidates: tuple[Candidate, ...]
    kind: object  # of calls, under which the trials note their times; None if there is but one


def settings_of(size: int, numbers: dict[int, int], addresses: Sequence[int]) -> Array:
    """Return a kernel's settings: numbers by their places, and the addresses of a variant's routines at the end."""
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
    candidates_for: Any,  # of a number of threads
    rows: int,
    threads: int,
    numbers: dict[int, int] | None = None,
) -> Any:
    """Run a kernel over so many rows, on at most so many threads; return its result, False if it did nothing.

    Parameters
    ----------
    kernel : callable
    arguments : tuple
        Those before its scratch arguments.
    candidates_for : callable
        Returns the candidates for a number of threads.
    rows : int
        The trials compare times per row.
    threads : int
        The limit.
    numbers : dict of int to int, optional
        What this call has in its settings in place of the candidate's.
    """
    candidates, kind = candidates_for(threads)
    number = TRIALS.pick(kind, len(candidates)) if kind else 0
    chosen = candidates[number]
    if not kind and chosen.schedule.threads == 1:
        return _launch_alone(kernel, arguments, chosen, numbers)
    start = time.perf_counter()  # waking workers is a part of what a team costs
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
    """Run a kernel on one thread, where that is the only way."""
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
        candidates_for: Any,  # of a number of threads
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
