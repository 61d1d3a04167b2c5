"""Explicit conversion of other libraries' arrays; no other call converts an array."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArrayTypeError, BackendError, DTypeError

__all__ = ["as_array"]

_ON_HOST, _ON_CUDA = (1, 3), (2, 13)  # DLPack's numbers: CPU and pinned memory; CUDA and its managed memory


def as_array(value: Any) -> Array:
    """Convert another library's array to a NumPy array or, on a GPU, to a CuPy array.

    No data moves between devices: arrays in host memory become NumPy arrays, arrays on an NVIDIA GPU CuPy arrays, and
    arrays on other devices raise. Memory is shared where the owner allows it: a change of one then changes the other.

    Parameters
    ----------
    value : object
        An array with ``__dlpack__`` (a tensor of PyTorch, an array of JAX), ``__cuda_array_interface__`` (a device
        array of Numba, always shared) or ``__array__`` (pandas, xarray). An array of NumPy or CuPy is returned as it
        is.

    Returns
    -------
    numpy.ndarray or cupy.ndarray
        In the dtype of `value`. It may be read-only, which every call takes.

    Raises
    ------
    ArrayTypeError
        If `value` is no such object, or on another device, or sparse, or of a dtype that NumPy does not have, or a
        tensor that requires gradients: ``detach()`` it.
    BackendError
        If it is on a GPU and CuPy is missing.
    DTypeError
        If it holds objects that are no numbers.

    Examples
    --------
    >>> import fastlstm
    >>> class Series:
    ...     def __array__(self, dtype=None, copy=None):
    ...         return np.arange(3.0)
    >>> fastlstm.as_array(Series())
    array([0., 1., 2.])
    """
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, np.ndarray) or kind.__module__.partition(".")[0] == "cupy":
        kind_of("value", value)  # refuses masked arrays, whose mask would be lost
        return value
    if hasattr(kind, "__dlpack__") and hasattr(kind, "__dlpack_device__"):
        return _of_dlpack(value, name)
    if hasattr(value, "__cuda_array_interface__"):  # before __array__, which would copy it to the host
        return _of_gpu(value, name)
    if not hasattr(kind, "__array__"):
        raise ArrayTypeError(f"{name} has neither __dlpack__ nor __array__: convert it with numpy.asarray")
    try:
        found = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArrayTypeError(f"NumPy can make no array of a {name}: {error}") from error
    if found.dtype.kind not in "fiub":
        raise DTypeError(
            f"a {name} becomes an array of {found.dtype}, not of numbers: choose columns and a dtype first"
        )
    return found


def _of_dlpack(value: Any, name: str) -> Array:
    try:
        device = int(value.__dlpack_device__()[0])
        if device in _ON_HOST:
            return np.from_dlpack(value)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        if "grad" in str(error):
            raise ArrayTypeError(f"this {name} requires gradients: detach() it first") from error
        raise ArrayTypeError(f"the memory of this {name} cannot be shared: {error}") from error
    if device not in _ON_CUDA:
        raise ArrayTypeError(f"this {name} is neither in the processor's memory nor on an NVIDIA GPU: move it first")
    return _of_gpu(value, name)


def _of_gpu(value: Any, name: str) -> Array:
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        raise BackendError(
            f'this {name} is on a GPU, which takes CuPy: pip install "fastlstm[cuda12]" (or cuda13); or move it first'
        ) from error
    from fastlstm.backends.cuda.foreign import from_device_memory  # here: it imports the backend

    return from_device_memory(cupy, value, name="value")
