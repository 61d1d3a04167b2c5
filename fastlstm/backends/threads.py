"""How many threads one call uses on the CPU."""

from __future__ import annotations

import os

from fastlstm.errors import ArgumentError

__all__ = ["get_num_threads", "set_num_threads"]


def _given() -> int | None:
    """Return what the environment says, if it does."""
    given = os.environ.get("FASTLSTM_NUM_THREADS") or os.environ.get("NUMBA_NUM_THREADS")
    return int(given) if given and given.isdigit() and int(given) > 0 else None


# Asked for by every call: to look into the environment each time would take a short one a tenth of its time.
_limit = _given()


def get_num_threads() -> int:
    """Return the most threads that one call uses on the CPU.

    By default ``FASTLSTM_NUM_THREADS`` if that was set when fastlstm was imported, else the number of cores this
    process may run on (``NUMBA_NUM_THREADS`` is heeded). Small calls use fewer.
    """
    if _limit is not None:
        return _limit
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_num_threads(threads: int | None) -> None:
    """Set the most threads that one call uses on the CPU, for this process; None for the default, looked up anew.

    Results do not depend on it: they are bit-identical for any number of threads.

    Raises
    ------
    ArgumentError
        If `threads` is not a positive integer.
    """
    global _limit  # noqa: PLW0603
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise ArgumentError(f"threads must be an integer of at least 1, got {threads!r}")
    _limit = _given() if threads is None else threads
