"""Limits on the threads of this process from outside: cores, environment variables, and a container's CPU quota.

A quota is a share of CPU time, not a number of cores: a container may run on all 64 cores of a machine, but use two
seconds of CPU time per second. Where more threads run, the system halts them in the middle of a call, and the others
wait for them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

__all__ = ["Limit", "cgroup_cpus", "limits", "usable_cores"]


class Limit(NamedTuple):
    """A largest number of threads, and its reason."""

    threads: int
    reason: str


def usable_cores() -> int:
    """Return the number of cores that this process may run on."""
    if count := getattr(os, "process_cpu_count", None):  # Python 3.13: respects the option -X cpu_count
        return count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def limits(environment: Mapping[str, str], quota: float | None) -> list[Limit]:
    """List the limits besides the number of cores; values that make no sense are ignored.

    Parameters
    ----------
    environment : mapping of str to str
        Such as ``os.environ``: ``OMP_NUM_THREADS`` (of a list, the first number counts) and
        ``NUMBA_NUM_THREADS``.
    quota : float or None
        From :func:`cgroup_cpus`. Its whole part counts, or 1.
    """
    found = []
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        threads = number_in(environment.get(name, "").partition(",")[0])
        if threads is not None:
            found.append(Limit(threads, f"{name}={threads}"))
    if quota is not None:
        found.append(Limit(max(1, int(quota)), f"a cgroup's quota of {quota:.4g} CPUs"))
    return found


def number_in(text: str) -> int | None:
    """Return a text as a positive integer, None if it is not one or has seven digits or more."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 and int(text) > 0 else None


def cgroup_cpus(membership: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Return how many CPUs the quotas of this process's control groups allow, None for any number.

    The quota of a group holds for all groups below it, so the lowest one counts, of version 2 (``cpu.max``) and version
    1 (``cpu.cfs_quota_us``). In a container, the groups may have their names from outside, while the container's own
    group is mounted as the root: names that do not exist are skipped. Files that cannot be read or parsed set no limit.

    Parameters
    ----------
    membership, mounted : path
        Other files, for tests.
    """
    return min(
        (cpus for folder, version in _groups(membership, mounted) if (cpus := _quota(folder, version))), default=None
    )


def _groups(membership: Path, mounted: Path) -> Iterator[tuple[Path, int]]:
    """List the folder of each group that this process is in, and of each above it, with the version of its files."""
    for line in _read(membership).splitlines():
        number, _, rest = line.partition(":")
        controllers, _, name = rest.partition(":")
        parts = [part for part in name.split("/") if part not in ("", ".", "..")]
        if number == "0" and not controllers:
            # With version 1 present, version 2 is mounted in a folder of its own.
            roots, version = (mounted, mounted / "unified"), 2
        elif "cpu" in controllers.split(","):
            roots, version = (mounted / controllers, mounted / "cpu"), 1
        else:
            continue
        for root in roots:
            for depth in range(len(parts) + 1):
                yield root.joinpath(*parts[:depth]), version


def _quota(folder: Path, version: int) -> float | None:
    """Return the CPUs that one group may use: its quota of CPU time divided by its period, both in microseconds."""
    if version == 2:
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
    else:
        quota, period = (_read(folder / f"cpu.cfs_{part}_us").strip() for part in ("quota", "period"))
    try:
        cpus = int(quota) / int(period)  # "max" or -1 for none
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return cpus if cpus > 0 else None


def _read(path: Path) -> str:
    try:
        with path.open(encoding="ascii") as file:
            return file.read(1 << 16)
    except (OSError, ValueError):  # missing, not readable, or not text
        return ""
