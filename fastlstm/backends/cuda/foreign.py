"""Arrays of other libraries on a GPU, taken as CuPy arrays without a copy."""

from __future__ import annotations

from typing import Any

from fastlstm.backends.base import Array
from fastlstm.errors import ArrayTypeError

__all__ = ["from_device_memory"]

# Types of devices in DLPack: memory that a GPU can read where it is.
_CUDA, _CUDA_MANAGED = 2, 13


def from_device_memory(xp: Any, value: Any, device: Any = None, name: str = "x") -> Array:
    """View an array of another library as one of CuPy's.

    The two share their memory. The current stream waits for what the other library has put on its own: both protocols
    ask for that.

    Parameters
    ----------
    xp : module
        CuPy.
    value : object
        An array on a GPU with ``__dlpack__``, as PyTorch, JAX and TensorFlow have it, or with
        ``__cuda_array_interface__``, as Numba has it.
    device : cupy.cuda.Device, optional
        Where it must be; anywhere by default.
    name : str
        How messages call it.

    Returns
    -------
    cupy.ndarray
        A view of the same memory.

    Raises
    ------
    ArrayTypeError
        If it has neither protocol, is not in a GPU's memory, is on another device, or cannot be shared.
    """
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if isinstance(value, xp.ndarray):
        found = value
    elif hasattr(value, "__dlpack_device__") and hasattr(value, "__dlpack__"):
        memory = int(value.__dlpack_device__()[0])
        if memory not in (_CUDA, _CUDA_MANAGED):
            raise ArrayTypeError(
                f"{name}, a {kind}, is not in a GPU's memory (DLPack's device type {memory}): copy it there first"
            )
        found = _shared(xp.from_dlpack, value, f"{name}, a {kind}, cannot be shared through DLPack")
    elif hasattr(value, "__cuda_array_interface__"):
        found = _shared(xp.asarray, value, f"{name}, a {kind}, cannot be shared through __cuda_array_interface__")
        if found.size and found.data.ptr != value.__cuda_array_interface__["data"][0]:
            raise ArrayTypeError(f"{name}, a {kind}, cannot be taken without a copy: convert it first")
    else:
        raise ArrayTypeError(f"{name}, a {kind}, has neither __dlpack__ nor __cuda_array_interface__")
    if device is not None and found.device != device:
        raise ArrayTypeError(f"{name} is on {found.device!r}, but {device!r} is asked for: copy it there first")
    return found


def _shared(take: Any, value: Any, refusal: str) -> Array:
    """Call what takes an array of another library; its errors name what that library refuses, such as autograd."""
    try:
        return take(value)
    except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        more = "; detach() it first" if "grad" in str(error) else ""
        raise ArrayTypeError(f"{refusal}: {error}{more}") from error
