"""Which NumPy arrays the compiled kernels take as they are: the one place that decides it.

A kernel takes an ``ndarray``, of no subclass, of the model's dtype in native byte order, C-contiguous, aligned and
writeable. Kernels write to none of their inputs, but Numba has another type for read-only arrays, and would compile
each combination anew.

Numba alone does not decide it. Its type of an array has number of axes, contiguity and writeability, but neither byte
order nor alignment. It rejects a byte-swapped array that it looks at; but it remembers the type of what it saw by these
and the kind of dtype, so after one unaligned array, in whatever function, a byte-swapped one passes as plain, and the
kernel reads its bytes in the wrong order. And it takes a subclass, such as a masked array, for a plain array.

So an array goes to a kernel in one of two ways only:

- as :func:`as_plain` returns it;
- in short calls, if it passed :func:`are_native` in this call (the holder of an array can change its dtype meanwhile),
  to a kernel that refuses others (``compile.refuse_others``): there Numba's type decides on contiguity and
  writeability, and the kernel itself on shape and alignment. That costs 30 ns per array; flags would double it.
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
        Of the model, in native byte order.

    Returns
    -------
    bool
        Whether it is an ``ndarray``, of no subclass, and has this dtype in native byte order.
    """
    # Identity first: NumPy has one object for each native dtype, except in arrays and models that were unpickled.
    return type(array) is ndarray and (array.dtype is dtype or array.dtype == dtype)


def are_native(dtype: np.dtype[Any], a: Any, b: Any, c: Any) -> bool:
    """Say whether three arguments satisfy :func:`is_native`.

    Three, because they come so: the input and two states, or two weights and a bias. One after the other in a loop
    takes twice as long, a twentieth of a short step.
    """
    return (type(a) is type(b) is type(c) is ndarray) and (
        a.dtype is b.dtype is c.dtype is dtype or a.dtype == b.dtype == c.dtype == dtype
    )


def as_plain(array: Array) -> Array:
    """Return an array that the kernels take: the given one if it is plain, else a copy.

    Parameters
    ----------
    array : numpy.ndarray
        In any byte order and layout, and of any subclass that means no more than its numbers, such as memmap.
    """
    if type(array) is ndarray and array.flags.carray and array.dtype.isnative:
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C", subok=False)
