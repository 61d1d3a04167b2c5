"""A team of threads for one kernel call.

Numba's own threading layers are not used: its OpenMP layer kills a forked child at its first parallel
kernel, and its default layer does not bear two user threads calling at once. Here the threads are
Python's; a kernel releases the GIL and is called once for each thread of a team, with its number.

A call takes the workers that are idle, at most as many as it asked for, and runs with those: two calls at
once share the workers, and none ever waits for another. Results do not depend on the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError

__all__ = ["get_num_threads", "run_team", "set_num_threads"]

_Job = tuple[Callable[..., None], tuple[Any, ...], int, int, "SimpleQueue[BaseException | None]"]


class _Worker(threading.Thread):
    """A thread that runs its share of a kernel whenever it is handed one."""

    def __init__(self) -> None:
        super().__init__(name="fastlstm-worker", daemon=True)
        self.jobs: SimpleQueue[_Job] = SimpleQueue()
        self.cores: set[int] = set()  # it may be woken on, as far as this was set
        self.start()

    def run(self) -> None:
        while True:
            kernel, args, thread, threads, done = self.jobs.get()
            try:
                kernel(*args, thread, threads)
            except BaseException as error:
                done.put(error)
            else:
                done.put(None)
            del kernel, args, done  # an idle worker must not keep a caller's arrays alive


_core_of_this_thread = getattr(ctypes.CDLL(None), "sched_getcpu", None) if sys.platform == "linux" else None


def _keep_off_this_core(workers: list[_Worker]) -> None:
    """Have workers woken on other cores than this thread's, if there are others.

    Linux often wakes a worker on the very core from which it is handed its job, and moves it milliseconds later.
    Until then the two take turns on one core, which is worst where they meet after each step.
    """
    if _core_of_this_thread is None:
        return
    allowed = os.sched_getaffinity(0)
    others = allowed - {_core_of_this_thread()} or allowed
    for worker in workers:
        if worker.cores != others:  # it takes longer to set than all else here
            assert worker.native_id
            with contextlib.suppress(OSError):  # somebody changes at this moment what is allowed
                os.sched_setaffinity(worker.native_id, others)
                worker.cores = others


_NO_COUNTERS = np.zeros((2, 8), np.int64)  # for a kernel without a team, which meets no one

_lock = threading.Lock()
_idle: list[_Worker] = []
_busy = 0
_limit: int | None = None


def _forget_workers() -> None:
    """Start anew in a forked child, which has none of its parent's threads."""
    global _lock, _busy  # noqa: PLW0603
    _lock = threading.Lock()
    _idle.clear()
    _busy = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)


def get_num_threads() -> int:
    """Return the most threads that one call uses on the CPU.

    By default ``FASTLSTM_NUM_THREADS`` if that is set, else the number of cores this process may run on
    (``NUMBA_NUM_THREADS`` is heeded). Small calls use fewer.
    """
    if _limit is not None:
        return _limit
    given = os.environ.get("FASTLSTM_NUM_THREADS") or os.environ.get("NUMBA_NUM_THREADS")
    if given and given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(threads: int | None) -> None:
    """Set the most threads that one call uses on the CPU, for this process; None for the default.

    Results do not depend on it: they are bit-identical for any number of threads.

    Raises
    ------
    ArgumentError
        If `threads` is not a positive integer.
    """
    global _limit  # noqa: PLW0603
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"threads must be an integer of at least 1, got {threads!r}")
    _limit = threads


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
    return taken


def release(workers: list[_Worker]) -> None:
    """Put workers back among the idle ones."""
    global _busy  # noqa: PLW0603
    with _lock:
        _idle.extend(workers)
        _busy -= len(workers)


def run_team(prepare: Callable[[int], tuple[Any, ...]], kernel: Callable[..., None], wanted: int) -> int:
    """Run a kernel with a team of threads, this one among them.

    Parameters
    ----------
    prepare : callable
        Given the size of the team, returns the kernel's arguments; all but the last three, which are the
        counters of its barrier, the thread's number and the team's size.
    kernel : callable
        The kernel; releases the GIL.
    wanted : int
        The most threads of use.

    Returns
    -------
    int
        The team's size.
    """
    workers = reserve(min(wanted, get_num_threads()) - 1) if wanted > 1 else []
    threads = 1 + len(workers)
    if threads == 1:  # no one to wait for
        kernel(*prepare(1), _NO_COUNTERS, 0, 1)
        return 1
    counters = np.zeros((1 + threads, 8), np.int64)
    done: SimpleQueue[BaseException | None] = SimpleQueue()
    started = 0
    try:
        args = (*prepare(threads), counters)
        _keep_off_this_core(workers)
        for worker in workers:
            worker.jobs.put((kernel, args, started + 1, threads, done))
            started += 1
        kernel(*args, 0, threads)
    except BaseException:
        counters[0, 1] = 1  # the others must not wait for this thread
        raise
    finally:
        errors = [done.get() for _ in range(started)]
        release(workers)
    for error in errors:
        if error is not None:
            raise error
    return threads
