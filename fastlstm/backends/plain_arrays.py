"""The check which NumPy arrays the compiled kernels take without a copy.

A kernel takes an ``ndarray`` (not a subclass) of the model's dtype in native byte order, C-contiguous, aligned and
writeable. Kernels do not write to their inputs, but Numba has another type for read-only arrays, and would compile a
kernel again for each combination.

Numba's own check is not enough. Its array type has number of axes, contiguity and writeability, but neither byte order
nor alignment. It rejects a byte-swapped array at first sight, but caches types by these properties and the kind of
dtype: after one unaligned array, in any function, a byte-swapped array passes as plain, and the kernel reads its bytes
in the wrong order. It also takes a subclass, such as a masked array, for a plain array.

So an array reaches a kernel only in one of two ways:

- as :func:`as_plain` returns it;
- in short calls, if it passed :func:`are_native` in this call (the owner of an array can change its dtype between
  calls), to a kernel with ``jit.refuse_others``: Numba's type then decides contiguity and writeability, and the kernel
  checks shape and alignment. That costs 30 ns per array; checking flags in Python would double it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import ndarray  # by a name of its own, which is found faster

from fastlstm.backends.base import Array

__all__ = ["are_native", "as_plain", "is_native"]


def is_native(array: Any, dtype: np.dtype[Any]) -> bool:
    """Say whether an argument is an array of a type and dtype that the kernels take; its layout may be any.

    Parameters
    ----------
    array : object
        Anything.
    dtype : numpy.dtype
        The model's dtype, in native byte order.

    Returns
    -------
    bool
        Whether it is an ``ndarray``, not of a subclass, with this dtype in native byte order.
    """
    # Identity first: NumPy has one object for each native dtype, except in arrays and models that were unpickled.
    return type(array) is ndarray and (array.dtype is dtype or array.dtype == dtype)


def are_native(dtype: np.dtype[Any], a: Any, b: Any, c: Any, d: Any) -> bool:
    """Say whether four arguments satisfy :func:`is_native`.

    They are two weights, a bias and a variant's own parameters. A loop over them takes twice as long; the difference is
    5 % of a short step.
    """
    return (type(a) is type(b) is type(c) is type(d) is ndarray) and (
        a.dtype is b.dtype is c.dtype is d.dtype is dtype or a.dtype == b.dtype == c.dtype == d.dtype == dtype
    )


def as_plain(array: Array) -> Array:
    """Return an array that the kernels take: the given one if it is plain, else a copy.

    Parameters
    ----------
    array : numpy.ndarray
        In any byte order and layout. Subclasses are read as plain arrays, such as memmap.
    """
    if type(array) is ndarray and array.flags.carray and array.dtype.isnative:
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C", subok=False)
