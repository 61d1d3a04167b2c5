"""How many threads one call uses on the CPU."""

from __future__ import annotations

import os

from fastlstm.errors import ArgumentError

__all__ = ["get_num_threads", "set_num_threads"]

_limit: int | None = None


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
