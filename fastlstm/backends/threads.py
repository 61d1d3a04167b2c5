"""How many threads one call uses on the CPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from fastlstm.backends.cpu_limits import Limit, cgroup_cpus, limits, number_in, usable_cores
from fastlstm.errors import ArgumentError

__all__ = ["describe_num_threads", "get_num_threads", "set_num_threads"]

# The limit that was set, and the lowest limit besides the number of cores. Every call needs both; reading environment
# variables and files each time would take longer than a short call.
_chosen: Limit | None
_least: Limit | None
_held: list[int] = []  # limits of the calls of `at_most` that are not over


def _look() -> None:
    """Read the limits from the environment and the system."""
    global _chosen, _least  # noqa: PLW0603
    text = os.environ.get("FASTLSTM_NUM_THREADS", "")
    given = number_in(text)
    if text and given is None:
        warnings.warn(f"FASTLSTM_NUM_THREADS={text!r} is ignored: it is not an integer of at least 1", stacklevel=3)
    _chosen = None if given is None else Limit(given, f"FASTLSTM_NUM_THREADS={given}")
    _least = min(limits(os.environ, cgroup_cpus()), default=None)


_look()


def get_num_threads() -> int:
    """Return the largest number of threads that one call uses on the CPU.

    It is set by :func:`set_num_threads` or the environment variable ``FASTLSTM_NUM_THREADS``; by default, it is the
    lowest of the number of cores this process may run on, ``OMP_NUM_THREADS``, ``NUMBA_NUM_THREADS``, and the CPU quota
    of a container (of the process's control groups). Small calls use fewer threads.

    All but the number of cores are read once, when fastlstm is first used, and again by ``set_num_threads(None)``.
    ``fastlstm info`` shows which limit holds.
    """
    if _held and (held := min(_held, default=0)):  # the last one may be over by now
        return held
    if _chosen is not None:
        return _chosen.threads
    cores = usable_cores()
    return cores if _least is None or cores < _least.threads else _least.threads


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Hold every call of this process to so many threads, for the length of a ``with`` block in any of its threads.

    For engines that run several calls at once: where each took all cores, they would wait for each other.
    """
    _held.append(threads)
    try:
        yield
    finally:
        _held.remove(threads)


def describe_num_threads() -> str:
    """Describe the largest number of threads of one call, and its reason."""
    if _chosen is not None:
        reason = _chosen.reason
    elif _least is not None and _least.threads <= usable_cores():
        reason = _least.reason
    else:
        reason = "the cores this process may run on"
    return f"at most {get_num_threads()} per call: {reason}"


def set_num_threads(threads: int | None) -> None:
    """Set the largest number of threads that one call uses on the CPU; None for the default, read again.

    Results do not depend on it: they are bit-identical for any number of threads.

    Raises
    ------
    ArgumentError
        If `threads` is not a positive integer.
    """
    global _chosen  # noqa: PLW0603
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"threads must be an integer of at least 1, got {threads!r}")
    if threads is None:
        _look()
    else:
        _chosen = Limit(threads, "set_num_threads")
