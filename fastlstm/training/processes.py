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


def checked_comm(comm: Any, *methods: str, optional: bool = False) -> None:
    """Check that `comm` is a communicator: that it has these methods of mpi4py's."""
    if optional and comm is None:
        return
    if not all(callable(getattr(comm, method, None)) for method in methods):
        raise ArgumentError(
            f"comm must be a communicator of mpi4py, such as mpi4py.MPI.COMM_WORLD, got {type(comm).__qualname__}"
        )


@contextlib.contextmanager
def refuse_together(comm: Any) -> Iterator[None]:
    """Raise in all processes if one of them raises, so that no other goes on to wait for it."""
    if comm is None:
        yield
        return
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    refusals = comm.allgather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, refusal in enumerate(refusals):
        if refusal is not None:
            raise ArgumentError(f"process {rank} of the communicator cannot train: {refusal}")


@contextlib.contextmanager
def abort_on_error(comm: Any) -> Iterator[None]:
    """End the job if this process raises: the others would wait for its gradients without end."""
    try:
        yield
    except BaseException:
        if comm is not None and comm.Get_size() > 1:
            print(f"fastlstm: process {comm.Get_rank()} fails, which ends the job", file=sys.stderr)  # noqa: T201
            traceback.print_exc()
            sys.stderr.flush()
            time.sleep(SECONDS_TO_FORWARD)
            comm.Abort(1)
        raise
