"""Memory of the CPU backend: a call's arrays side by side in one block, and what nobody uses any more used again."""

from __future__ import annotations

import collections
import functools
import math
import threading
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.kernels.cpu.simd import CACHE_LINE

__all__ = ["POOL", "SCRATCH", "Pool", "Scratch", "new_array", "one_block"]


def one_block(dtype: Any, *shapes: tuple[int, ...]) -> list[Array]:
    """Allocate arrays side by side in one block of memory, each from the start of a cache line on.

    So no vector that a kernel loads lies across two lines. And the C library keeps one freed block for the next
    call, where it gives the memory of several of some size back to the system, which then has to provide every
    page anew: for a short sequence that takes longer than the arithmetic. Large blocks, which it always gives
    back, come from :data:`POOL`.

    Parameters
    ----------
    dtype : numpy.dtype
        Of all arrays.
    *shapes : tuple of int
        One for each array.

    Returns
    -------
    list of array
        Uninitialised, C-contiguous. The block is freed, or goes back to the pool, with the last of them.
    """
    starts, size = _layout(dtype.itemsize, shapes)
    block = POOL.take(size) if size >= Pool.LEAST else _from_a_line_on(size)
    return [np.ndarray(shape, dtype, block, start) for shape, start in zip(shapes, starts, strict=True)]


def new_array(shape: tuple[int, ...], dtype: Any, *, zero: bool = False) -> Array:
    """Allocate an array for the caller, whose large block comes from the pool, and goes back when he drops it.

    Without `zero` it is uninitialised.
    """
    size = math.prod(shape) * dtype.itemsize
    # What is larger than the pool would not be kept; and of zeros, the system provides only those that are touched.
    if not Pool.LEAST <= size <= Pool.MOST:
        return (np.zeros if zero else np.empty)(shape, dtype)
    array: Array = np.ndarray(shape, dtype, POOL.take(size))
    if zero:
        array.fill(0.0)
    return array


@functools.lru_cache(maxsize=256)
def _layout(itemsize: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[list[int], int]:
    """Where in a block each array starts; and the size of the block, in bytes."""
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) * itemsize // CACHE_LINE) * CACHE_LINE
    return starts, end


def _from_a_line_on(size: int) -> Array:
    """Allocate a block of bytes that starts where a cache line does."""
    block: Array = np.empty(size + CACHE_LINE, np.uint8)
    first = -block.__array_interface__["data"][0] % CACHE_LINE
    return block[first : first + size]


class Scratch:
    """Sets of arrays that calls work with, each lent to one at a time and then to the next that needs the same.

    To make them anew would take a short call longer than to use them. A set in a large block is not kept: that block
    goes back to the pool, where other calls find it.
    """

    SHAPES = 16  # different sets that are kept

    def __init__(self) -> None:
        self._idle: dict[Any, list[list[Array]]] = {}

    def borrow(self, dtype: Any, shapes: tuple[tuple[int, ...], ...]) -> list[Array]:
        """Return uninitialised arrays of these shapes, as :func:`one_block` makes them, for this caller alone."""
        try:
            return self._idle[dtype, shapes].pop()
        except (KeyError, IndexError):  # none yet, or all are in use
            return one_block(dtype, *shapes)

    def give_back(self, dtype: Any, shapes: tuple[tuple[int, ...], ...], arrays: list[Array]) -> None:
        """Keep borrowed arrays for the next call; only once nobody works with them any more."""
        if _layout(dtype.itemsize, shapes)[1] >= Pool.LEAST:
            return
        if len(self._idle) >= self.SHAPES and (dtype, shapes) not in self._idle:
            self._idle.clear()
        self._idle.setdefault((dtype, shapes), []).append(arrays)


class Pool:
    """Blocks of memory that nobody uses, kept for the next call.

    The system provides a fresh block page by page, each set to zero; a virtual machine's may have to ask its host for
    each. That can take as long as the call itself. So a block goes back to the pool when the last array in it is
    gone, and :data:`MOST` bytes at most are kept. None is lent for less than half its size. Where a new block has to be
    made, those kept that are too small are freed before.
    """

    LEAST = 1 << 20  # bytes of a block; the C library recycles smaller ones itself
    MOST = 1 << 28  # bytes kept

    def __init__(self) -> None:
        self._kept: list[Array] = []
        self._returned: collections.deque[Array] = collections.deque()
        # Never waited for: a block may come back at any point at which Python collects garbage, also while
        # this very thread holds the lock; and in a forked child it may be held by a thread that is not there.
        self._lock = threading.Lock()

    def take(self, size: int) -> Array:
        """Return a block of at least `size` bytes, which comes back by itself."""
        block = None
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
                fitting = [n for n, kept in enumerate(self._kept) if size <= kept.size <= 2 * size]
                if fitting:
                    block = self._kept.pop(min(fitting, key=lambda n: self._kept[n].size))
                else:
                    self._kept = [kept for kept in self._kept if kept.size >= size]
            finally:
                self._lock.release()
        return np.asarray(_Lease(_from_a_line_on(size) if block is None else block, self))

    def give_back(self, block: Array) -> None:
        """Keep a block for later."""
        self._returned.append(block)
        if self._lock.acquire(blocking=False):
            try:
                self._collect()
            finally:
                self._lock.release()

    def clear(self) -> None:
        """Free what is kept."""
        with self._lock:
            self._collect()
            self._kept.clear()

    @property
    def size(self) -> int:
        """Bytes that are kept."""
        with self._lock:
            self._collect()
            return sum(block.size for block in self._kept)

    def _collect(self) -> None:
        """Put what has come back among what is kept, and free the oldest of too much."""
        while self._returned:
            self._kept.append(self._returned.popleft())
        while sum(block.size for block in self._kept) > self.MOST:
            self._kept.pop(0)


class _Lease:
    """Owns a block on behalf of the arrays in it: NumPy keeps what their memory comes from, this, as long as them."""

    def __init__(self, block: Array, pool: Pool) -> None:
        self.block, self.pool = block, pool

    @property
    def __array_interface__(self) -> dict[str, Any]:
        interface: dict[str, Any] = self.block.__array_interface__
        return interface

    def __del__(self) -> None:
        self.pool.give_back(self.block)


POOL = Pool()
SCRATCH = Scratch()
