"""Working memory of a call: its arrays side by side in one block."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fastlstm.backends.base import Array

__all__ = ["CACHE_LINE", "one_block"]

CACHE_LINE = 64  # bytes


def one_block(dtype: Any, *shapes: tuple[int, ...]) -> list[Array]:
    """Allocate arrays side by side in one block of memory, each from the start of a cache line on.

    So no vector that a kernel loads lies across two lines. And the C library keeps one freed block for the next
    call, where it gives the memory of several of some size back to the system, which then has to provide every
    page anew: for a short sequence that takes longer than the arithmetic.

    Parameters
    ----------
    dtype : numpy.dtype
        Of all arrays.
    *shapes : tuple of int
        One for each array.

    Returns
    -------
    list of array
        Uninitialised, C-contiguous. The block is freed with the last of them.
    """
    starts, size = _layout(dtype.itemsize, shapes)
    block = np.empty(size, np.uint8)
    first = -block.__array_interface__["data"][0] % CACHE_LINE
    return [np.ndarray(shape, dtype, block, first + start) for shape, start in zip(shapes, starts, strict=True)]


@functools.lru_cache(maxsize=256)
def _layout(itemsize: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[list[int], int]:
    """Where in a block each array starts, from its first cache line on; and the size of the block, in bytes."""
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) * itemsize // CACHE_LINE) * CACHE_LINE
    return starts, end + CACHE_LINE
