"""Gradients of several processes, averaged over MPI: data-parallel training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace, kind_of
from fastlstm.errors import ArgumentError, DTypeError
from fastlstm.training import arguments
from fastlstm.training.processes import checked_comm

__all__ = ["allreduce", "broadcast"]


def allreduce(grads: Mapping[str, Array] | Any, comm: Any, weight: float = 1.0) -> dict[str, Array]:
    """Average gradients over all processes of an MPI communicator, by one call of ``Allreduce``.

    All arrays go into one buffer on the host, sorted by name, in their own dtype, with the weight as its last number::

        grad = sum over processes (weight * grad) / sum over processes (weight)

    If each process has a part of a batch and a loss that is a mean, the weights are the number of positions that count
    in each part; the result is the gradient of the mean over the whole batch. A process with nothing to add has a
    weight of zero. All processes must call it, with the same names, in any order, and shapes; all get the same result.

    Parameters
    ----------
    grads : mapping of str to array, or what has one as its `params`
        The gradients of this process, of one dtype; not changed. CuPy arrays are copied to the host and back.
    comm : mpi4py.MPI.Comm
        The communicator, such as ``mpi4py.MPI.COMM_WORLD``; or an object with the same ``Allreduce(send, receive)``.
    weight : float
        How much this process's gradients count, at least zero and finite.

    Returns
    -------
    dict of str to array
        New arrays under the same names. If all weights are zero, they are zero.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        Before any communication, if an argument does not fit. The other processes then wait: end the job with
        ``comm.Abort()``, as ``python -m mpi4py`` does after an exception.

    Examples
    --------
    >>> class Alone:  # stands for mpi4py.MPI.COMM_WORLD
    ...     def Allreduce(self, send, receive):
    ...         receive[:] = send
    >>> allreduce({"a": np.array([1.0, 2.0])}, Alone(), weight=3.0)
    {'a': array([1., 2.])}
    """
    checked = arguments.arrays("grads", "gradient", grads)
    checked_comm(comm, "Allreduce")
    weight = arguments.number("weight", weight, least=0.0)
    if weight == np.inf:
        raise ArgumentError("weight must be finite, got inf")
    first = next(iter(checked.values()))
    for name, value in checked.items():
        arguments.same_library(f"gradient {name}", value, "the first gradient", first)
        if value.dtype != first.dtype:
            raise DTypeError(f"gradient {name} is {value.dtype}, but the first one is {first.dtype}")
    send = _flat(checked, first.dtype, 1)
    if weight:
        send[:-1] *= send.dtype.type(weight)
    else:
        send[:-1] = 0  # NaN times zero would be NaN
    send[-1] = weight
    receive = np.empty_like(send)
    comm.Allreduce(send, receive)
    total = receive[-1]
    if total > 0:
        receive[:-1] /= total
    return _apart(receive, checked)


def broadcast(params: Mapping[str, Array], comm: Any) -> None:
    """Give all processes the parameters of process 0, in place, by one call of ``Bcast``."""
    first = next(iter(params.values()))
    buffer = _flat(params, first.dtype, 0)
    comm.Bcast(buffer, 0)
    for name, value in _apart(buffer, params).items():
        params[name][...] = value


def _flat(arrays: Mapping[str, Array], dtype: np.dtype[Any], more: int) -> np.ndarray[Any, Any]:
    """Return all numbers in one buffer on the host, sorted by name, with room for some more at its end.

    The order of a mapping may differ between processes; that of its names does not.
    """
    buffer = np.empty(sum(int(value.size) for value in arrays.values()) + more, dtype)
    position = 0
    for name in sorted(arrays):
        value = arrays[name]
        host = value if kind_of("gradient", value).library == "numpy" else value.get()
        buffer[position : position + host.size] = host.ravel()
        position += host.size
    return buffer


def _apart(buffer: np.ndarray[Any, Any], like: Mapping[str, Array]) -> dict[str, Array]:
    """Take a buffer of :func:`_flat` apart into arrays of the shapes, the library and the order of `like`."""
    position, found = 0, dict[str, Array]()
    for name in sorted(like):
        value = like[name]
        part = buffer[position : position + value.size].reshape(value.shape)
        found[name] = array_namespace(value).array(part)
        position += value.size
    return {name: found[name] for name in like}
