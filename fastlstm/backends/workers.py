"""Workers, and the team of threads for one kernel call.

Numba's own threading layers are not used: its OpenMP layer kills a forked child at its first parallel
kernel, and its default layer does not bear two user threads calling at once. Here the threads are
Python's, but spend their time in compiled code, without the GIL: there they wait for a kernel, and there
they are called (``kernels/cpu/team.py`` says how).

A call takes the workers that are idle, at most as many as it asked for, and runs with those: two calls at
once share the workers, and none ever waits for another. Results do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.memory import one_block
from fastlstm.backends.threads import get_num_threads
from fastlstm.kernels.cpu.team import COMMAND, LEAVE, MAILBOX, serve

__all__ = ["NO_TEAM", "release", "reserve", "run_each", "run_team"]

# How often a worker looks for another call before it sleeps: about a millisecond, for most of which it lets any other
# thread run first; and where there are fewer cores than threads, some microseconds.
_PATIENCE, _LITTLE_PATIENCE = 4000, 1000
_CALLS_WHERE_IT_IS = 15  # of a worker who is awake, before he follows a caller who may run elsewhere now


class _Worker(threading.Thread):
    """A thread that runs its share of a kernel whenever it is called.

    What it is called for it finds in its mailbox, for which it waits awake for a while after each call: waking it
    takes longer than some kernels do. Then it sleeps, until something comes into its queue.
    """

    def __init__(self) -> None:
        super().__init__(name="fastlstm-worker", daemon=True)
        self.mailbox = np.zeros(8, np.int64)
        self.address = self.mailbox.ctypes.data
        self.queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()  # None: look into the mailbox
        self.reserved, self.asleep = False, True  # changed by who has the lock, or has reserved the worker
        self.patience = _PATIENCE
        self.calls = 0  # of kernels, until it is looked again where the caller may run
        self.cores: set[int] = set()  # it may be woken on, as far as this was set,
        self.allowed: set[int] = set()  # which was for a caller who may run on these
        serve(self.mailbox, 0)  # compiled here: a worker that could not serve would be waited for without end
        self.start()

    def run(self) -> None:
        while True:
            job = self.queue.get()
            if job is not None:
                job()
            del job  # an idle worker must not keep a caller's arrays alive
            while not serve(self.mailbox, self.patience):
                with _lock:
                    asleep = self.asleep = not self.reserved
                if asleep:
                    break

    def take(self, job: Callable[[], None]) -> None:
        """Run a job of Python's, this worker being reserved."""
        if not self.asleep:
            self.mailbox[COMMAND] = LEAVE
        self.asleep = False
        self.queue.put(job)

    def wake(self) -> None:
        """Look into the mailbox, this worker being reserved."""
        if self.asleep:
            self.asleep = False
            self.queue.put(None)


_core_of_this_thread = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


def _place(workers: Sequence[_Worker]) -> None:
    """Have workers run where this thread may, but woken on other cores than its own, if there are others.

    Linux often wakes a worker on the very core from which it is handed its job, and moves it milliseconds later.
    Until then the two take turns on one core, which is worst where they meet after each step.
    """
    if _core_of_this_thread is None:
        return
    allowed = os.sched_getaffinity(0)
    for worker in workers:
        if not worker.asleep and worker.allowed == allowed:
            continue
        worker.patience = _PATIENCE if len(allowed) >= get_num_threads() else _LITTLE_PATIENCE
        worker.allowed = allowed
        others = allowed - {_core_of_this_thread()} or allowed
        if worker.cores != others:  # it takes longer to set than all else here
            assert worker.native_id
            with contextlib.suppress(OSError):  # somebody changes at this moment what is allowed
                os.sched_setaffinity(worker.native_id, others)
                worker.cores = others


# A kernel's team for one thread, number 0, that meets no one. All such calls have the same: nothing is written there.
NO_TEAM = np.zeros((2, 8), np.int64)

_lock = threading.Lock()
_idle: list[_Worker] = []
_busy = 0
# What the same workers meet in, call after call; nobody else has them meanwhile.
_teams: dict[tuple[_Worker, ...], Array] = {}
_MOST_TEAMS = 64


def _forget_workers() -> None:
    """Start anew in a forked child, which has none of its parent's threads."""
    global _lock, _busy  # noqa: PLW0603
    _lock = threading.Lock()
    _idle.clear()
    _teams.clear()
    _busy = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def reserve(wanted: int) -> list[_Worker]:
    """Take at most `wanted` workers, so that all calls together have no more than the limit."""
    global _busy  # noqa: PLW0603
    with _lock:
        count = max(0, min(wanted, get_num_threads() - 1 - _busy))
        while len(_idle) < count:
            _idle.append(_Worker())
        taken = _idle[:count]
        del _idle[:count]
        _busy += count
        for worker in taken:
            worker.reserved = True
    return taken


def release(workers: list[_Worker]) -> None:
    """Put workers back among the idle ones."""
    global _busy  # noqa: PLW0603
    with _lock:
        for worker in workers:
            worker.reserved = False
        _idle.extend(workers)
        _busy -= len(workers)


def _team_of(workers: Sequence[_Worker]) -> Array:
    """Return the team of this thread and workers that are reserved; each call leaves it as it found it."""
    key = tuple(workers)
    team = _teams.get(key)
    if team is None:
        if len(_teams) >= _MOST_TEAMS:
            _teams.clear()
        (team,) = one_block(np.dtype(np.int64), (2 + len(workers), 8), lasting=True)
        team.fill(0)
        for thread, worker in enumerate(workers, 1):
            team[1 + thread, MAILBOX] = worker.address
        _teams[key] = team
    return team


def run_team(kernel: Callable[..., Any], arguments: tuple[Any, ...], workers: Sequence[_Worker]) -> Any:
    """Run a kernel with a team of threads: this one, and workers that the caller has reserved.

    Parameters
    ----------
    kernel : callable
        The kernel; calls the others itself (see ``kernels/cpu/team.py``).
    arguments : tuple
        Its arguments; all but the last two, which are the team and the thread's number.
    workers : sequence
        From :func:`reserve`; to be released when this returns.

    Returns
    -------
    object
        What the kernel returns here; one that says that it did nothing has called no one.
    """
    if not workers:  # no one to wait for
        return kernel(*arguments, NO_TEAM, 0)
    team = _team_of(workers)
    # To ask where this thread may run takes some of a short call's time: if all workers are awake, not each call does.
    first = workers[0]
    first.calls -= 1
    if first.calls < 0 or any(worker.asleep for worker in workers):
        first.calls = _CALLS_WHERE_IT_IS
        _place(workers)
    for worker in workers:
        worker.wake()
    return kernel(*arguments, team, 0)


def run_each(work: Callable[[int], Any], count: int) -> list[Any]:
    """Return [work(0), work(1), ...], each run by a thread of its own as far as there are idle ones."""
    workers = reserve(count - 1)
    found: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(first: int) -> None:
        try:
            for number in range(first, count, 1 + len(workers)):
                found[number] = work(number)
        except BaseException as error:
            errors.append(error)

    done: SimpleQueue[None] = SimpleQueue()
    try:
        _place(workers)
        for number, worker in enumerate(workers):

            def job(first: int = 1 + number) -> None:
                run(first)
                done.put(None)

            worker.take(job)
        run(0)
        for _ in workers:
            done.get()
    finally:
        release(workers)
    if errors:
        raise errors[0]
    return [found[number] for number in range(count)]
