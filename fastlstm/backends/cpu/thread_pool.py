"""Workers, and the team of threads for one kernel call.

Numba's threading layers are not used: its OpenMP layer kills a forked child at its first parallel kernel, and its
default layer fails when two user threads call at once. Python's threads are not used either: ``threading`` and
``_thread`` may be patched, and a thread that needs the interpreter may wait for it forever. Workers are
operating-system threads that never run Python; the interpreter's C API starts them. A kernel claims free workers
itself, and frees them before it returns (see ``kernels/cpu/worker.py`` and ``thread_team.py``). Concurrent calls share
the workers, and none waits for another. Results do not depend on the number of threads.

Python only does bookkeeping that no interrupt can break, because each step is one operation of the interpreter: a list
of workers that only grows, whose mailboxes show whether a thread serves them; and arrays for teams, popped from a list
for a call and put back after it. The array of an interrupted call is dropped. No lock is waited for, so that a signal
handler or a finaliser may make a call at any point of another call.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cpu.workspace import one_block
from fastlstm.backends.threads import get_num_threads
from fastlstm.kernels.cpu.private_numba import PLAIN, global_compiler_lock
from fastlstm.kernels.cpu.thread_team import MAILBOX, RECORD_ROWS, THREADS, WANTED, run_records
from fastlstm.kernels.cpu.vector import CACHE_LINE
from fastlstm.kernels.cpu.worker import (
    ABSENT,
    ASLEEP,
    AWAIT,
    END,
    FIND,
    IDLE,
    LOCK,
    MAILBOX_WORDS,
    PATIENCE,
    STATE,
    THREAD_ID,
    UNSTARTED,
    serve,
)

__all__ = ["NO_TEAM", "available", "can_run_at_once", "new_records", "own_team", "run_at_once", "run_team"]

# How often a worker looks for another call before it sleeps: about a millisecond, for most of which it lets any other
# thread run first; and where there are fewer cores than threads, some microseconds.
_PATIENCE, _LITTLE_PATIENCE = 4000, 1000
_CALLS_BETWEEN_PLACINGS = 15  # of workers that are awake; their caller may run elsewhere now
_SECONDS_BETWEEN_STARTS = 1.0  # after one that failed


def _function(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """Return a function of the interpreter's C API."""
    found: Callable[..., Any] = ctypes.PYFUNCTYPE(result, *arguments)((name, ctypes.pythonapi))
    return found


_start_thread = _function("PyThread_start_new_thread", ctypes.c_ulong, ctypes.c_void_p, ctypes.c_void_p)
_NO_THREAD = ctypes.c_ulong(-1).value
_allocate_lock = _function("PyThread_allocate_lock", ctypes.c_void_p)
_acquire_lock = _function("PyThread_acquire_lock", ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_keep_for_good = _function("Py_IncRef", None, ctypes.py_object)


class _Worker:
    """A worker's mailbox, and where its thread is to run."""

    def __init__(self) -> None:
        memory = (ctypes.c_int64 * (MAILBOX_WORDS + CACHE_LINE // 8))()
        _keep_for_good(memory)  # its thread reads there until the process ends
        start = -ctypes.addressof(memory) % CACHE_LINE
        self.address = ctypes.addressof(memory) + start
        self.words = memoryview(memory).cast("B").cast("q")[start // 8 :]
        lock = _allocate_lock()
        if not lock:
            raise MemoryError("a lock for a worker")
        _acquire_lock(lock, 1)
        self.words[LOCK], self.words[PATIENCE] = lock, _PATIENCE
        self.calls = 0  # of kernels, until it is looked again where the caller may run
        self.cores: set[int] = set()  # it may be woken on, as far as this was set,
        self.allowed: set[int] = set()  # the cores of the caller that it was last for


# A team of one thread, number 0. All such calls share it: nothing is written there.
NO_TEAM = np.zeros((2, 8), np.int64)
NO_TEAM[1, THREADS] = 1

_workers: list[_Worker] = []
# By the number of workers that a call wants, and of those it may choose from: teams that no call has.
_shelves: dict[tuple[int, int], list[Array]] = {}
_MOST_SHELVES = 64
_next_start = 0.0  # the time before which no thread is started
_ended = False


def _forget_workers() -> None:
    """Start anew in a forked child, which has none of its parent's threads."""
    global _shelves  # noqa: PLW0603
    for worker in _workers:
        worker.words[STATE] = ABSENT  # a call that the child continues may have them in its team
    _workers.clear()
    _shelves = {}  # another one: such a call puts its team back onto one of the old


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


@atexit.register
def _end() -> None:
    """Have no more teams: what they work with is about to go. Nor is any worker left awake."""
    global _ended  # noqa: PLW0603
    _ended = True
    for worker in _workers:
        if worker.words[STATE] == IDLE:
            serve(worker.address, END)


def available(wanted: int) -> int:
    """Return how many workers, of so many that a call wants, are free at this moment; start what is missing.

    All calls together have no more than the limit allows.
    """
    if _ended or sys.is_finalizing():
        return 0
    limit = get_num_threads() - 1
    found, seen, asleep = 0, 0, False
    while found < wanted and seen < limit:
        try:
            worker = _workers[seen]
        except IndexError:
            _workers.append(_Worker())
            continue  # a call in a signal handler may have been faster
        seen += 1
        state = worker.words[STATE]
        if state == UNSTARTED:
            if not _start(worker):
                break
            state = IDLE
        if state in (IDLE, ASLEEP):
            found += 1
            asleep |= state == ASLEEP
    workers = _workers[:seen]
    if workers:  # else this process is a child since the loop
        # To ask where this thread may run takes some of a short call's time: if all workers are awake, not each call
        # does.
        workers[0].calls -= 1
        if asleep or workers[0].calls < 0:
            workers[0].calls = _CALLS_BETWEEN_PLACINGS
            _place(workers)
    return found


def _can_call(kernel: Any) -> bool:
    """Say whether a kernel is compiled, or can be: not by a call that interrupts a compilation of this thread.

    To call the kernel and to catch its error would also catch one that a signal handler raises meanwhile.
    """
    return PLAIN is not None or bool(kernel.overloads) or not global_compiler_lock.is_locked()


def _start(worker: _Worker) -> bool:
    """Start a worker's thread, unless no thread could be had a moment ago; say whether it has answered.

    A thread that was started but not waited for, by a call that was broken off, may come as well: the later one ends.
    """
    global _next_start  # noqa: PLW0603
    if time.monotonic() < _next_start or not _can_call(serve):
        return False
    if _start_thread(serve(0, FIND), worker.address) != _NO_THREAD and serve(worker.address, AWAIT):
        return True
    _next_start = time.monotonic() + _SECONDS_BETWEEN_STARTS
    return False


_core_of_this_thread = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


def _place(workers: Sequence[_Worker]) -> None:
    """Have workers run where this thread may, but woken on other cores than its own, if there are others.

    Linux often wakes a worker on the very core from which it is handed its call, and moves it milliseconds later.
    Until then the two take turns on one core, which is worst where they meet after each step. Without placing, calls
    take 1.02 to 1.06 times as long on two threads of a Zen 5 virtual machine.
    """
    if _core_of_this_thread is None:
        return
    allowed = os.sched_getaffinity(0)
    for worker in workers:
        if worker.words[STATE] != ASLEEP and worker.allowed == allowed:
            continue
        worker.words[PATIENCE] = _PATIENCE if len(allowed) >= get_num_threads() else _LITTLE_PATIENCE
        others = allowed - {_core_of_this_thread()} or allowed
        if worker.cores != others:  # it takes longer to set than all else here
            try:
                os.sched_setaffinity(worker.words[THREAD_ID], others)
                worker.cores = others
            except OSError as error:
                if error.errno is None:  # of a signal handler, such as a TimeoutError
                    raise
                # Else what is allowed changes at this moment.
        worker.allowed = allowed


def run_team(kernel: Callable[..., Any], arguments: tuple[Any, ...], wanted: int) -> tuple[Any, int]:
    """Run a kernel with a team of threads: this one, and workers as far as they are free.

    Parameters
    ----------
    kernel : callable
        The kernel; claims the workers itself (see ``kernels/cpu/thread_team.py``).
    arguments : tuple
        Its arguments; all but the last two, which are the team and the thread's number.
    wanted : int
        The most workers to have; :func:`available` has found them.

    Returns
    -------
    result : object
        What the kernel returns here; a kernel that did nothing has called no worker.
    threads : int
        How many the kernel had.
    """
    shelves = _shelves  # first: it is older than the list of workers if this process is a child since
    workers = _workers[: get_num_threads() - 1]
    if wanted < 1 or not workers:
        return kernel(*arguments, NO_TEAM, 0), 1
    shelf = shelves.get((wanted, len(workers)))
    if shelf is None:
        if len(shelves) >= _MOST_SHELVES:
            shelves.clear()
        shelf = shelves.setdefault((wanted, len(workers)), [])
    try:
        team = shelf.pop()
    except IndexError:
        team = _new_team(wanted, workers)
    result = kernel(*arguments, team, 0)
    threads = int(team[1, THREADS])
    shelf.append(team)
    return result, threads


def _new_team(wanted: int, workers: Sequence[_Worker]) -> Array:
    """Return what some of these workers and a caller meet in; each call leaves it as it found it."""
    (team,) = one_block(np.dtype(np.int64), (2 + len(workers), 8), lasting=True)
    team.fill(0)
    team[0, WANTED], team[1, THREADS] = wanted, 1
    team[2:, MAILBOX] = [worker.address for worker in workers]
    return team


def own_team(wanted: int) -> Array:
    """Return a team, of one thread at least, for a caller that keeps it for several calls, one after the other.

    The kernels claim its workers in each call, as far as they are free then.
    """
    workers = _workers[: available(wanted)]
    return _new_team(len(workers), workers) if workers else NO_TEAM


def new_records(calls: int) -> Array:
    """Return room for so many calls: element n of it is the team of a kernel called with thread -1, to be run later."""
    records = np.zeros((calls, RECORD_ROWS, 8), np.int64)
    records[:, 1, THREADS] = 1
    return records


_NO_RECORDS = new_records(0)


def can_run_at_once(calls: int) -> bool:
    """Say whether there is a worker for recorded calls at this moment, and the kernel that runs them."""
    return _can_call(run_records) and available(calls - 1) > 0 and run_records(_NO_RECORDS, NO_TEAM, 0) is None


def run_at_once(records: Array) -> None:
    """Run recorded calls, whose arguments still exist, each by a thread of its own as far as there are free ones."""
    run_team(run_records, (records,), available(len(records) - 1))
