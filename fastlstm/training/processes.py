"""Communication of the processes of a training run over MPI: none waits for one that has failed."""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

from fastlstm.errors import ArgumentError

__all__ = ["abort_on_error", "checked_comm", "refuse_together"]

# Between the message of a process that fails and the end of its job: time for mpiexec to forward the message. Without,
# a job on a busy machine was seen to end without any.
SECONDS_TO_FORWARD = 0.5
MOST_SHOWN = 4  # differences in a message; the others are counted


def checked_comm(comm: Any, *methods: str, optional: bool = False) -> None:
    """Check that `comm` is a communicator: that it has these methods of mpi4py's."""
    if optional and comm is None:
        return
    if not all(callable(getattr(comm, method, None)) for method in methods):
        raise ArgumentError(
            f"comm must be a communicator of mpi4py, such as mpi4py.MPI.COMM_WORLD, got {type(comm).__qualname__}"
        )


@contextlib.contextmanager
def refuse_together(comm: Any) -> Iterator[dict[str, str]]:
    """Raise in all processes if one of them raises, so that no other goes on to wait for it.

    Yield a mapping for what must be the same in all processes. If it is not, all raise.
    """
    common: dict[str, str] = {}
    if comm is None:
        yield common
        return
    error = None
    try:
        yield common
    except Exception as caught:
        error = caught
    except BaseException:  # such as SystemExit: it is not one argument that does not fit
        _end_job(comm)
        raise
    gathered = comm.allgather((None if error is None else f"{type(error).__name__}: {error}", common))
    if error is not None:
        raise error
    for rank, (refusal, _) in enumerate(gathered):
        if refusal is not None:
            raise ArgumentError(f"process {rank} of the communicator cannot train: {refusal}")
    if different := differences([other for _, other in gathered]):
        raise ArgumentError(f"{different}; all need the same, and each takes its part of each batch of the whole data")


def differences(found: list[dict[str, str]]) -> str:
    """Say in what the mapping of a process differs from that of process 0; nothing if all are the same."""
    for rank, other in enumerate(found):
        names = [name for name in found[0] | other if found[0].get(name) != other.get(name)]
        if names:
            pairs = [f"{name} ({found[0].get(name)} and {other.get(name)})" for name in names[:MOST_SHOWN]]
            more = f", and {len(names) - MOST_SHOWN} more" if len(names) > MOST_SHOWN else ""
            return f"processes 0 and {rank} of the communicator have different arguments: {', '.join(pairs)}{more}"
    return ""


@contextlib.contextmanager
def abort_on_error(comm: Any) -> Iterator[None]:
    """End the job if this process raises: the others would wait for its gradients without end."""
    try:
        yield
    except BaseException:
        _end_job(comm)
        raise


def _end_job(comm: Any) -> None:
    """End the processes that would wait for this one, which is handling an exception."""
    if comm is None or comm.Get_size() == 1:
        return
    print(f"fastlstm: process {comm.Get_rank()} fails, which ends the job", file=sys.stderr)  # noqa: T201
    traceback.print_exc()
    sys.stderr.flush()
    time.sleep(SECONDS_TO_FORWARD)
    comm.Abort(1)
