"""Working memory of the CPU backend: a call's arrays side by side in one block, and large blocks used again."""

from __future__ import annotations

import collections
import functools
import math
import threading
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.kernels.cpu.simd import CACHE_LINE

__all__ = ["POOL", "Pool", "one_block"]


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
    block = POOL.take(size) if size >= Pool.LEAST else np.empty(size, np.uint8)
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


class Pool:
    """Blocks of memory that nobody uses, kept for the next call.

    The system provides a fresh block page by page, each set to zero; a virtual machine's may have to ask its host for
    each. That can take as long as the call itself. So a block goes back to the pool when the last array in it is
    gone, and :data:`MOST` bytes at most are kept. A new block is made only after all that were kept, and are
    then too small, have been freed: they never come on top of what a call needs.
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
                fitting = [n for n, kept in enumerate(self._kept) if kept.size >= size]
                if fitting:
                    block = self._kept.pop(min(fitting, key=lambda n: self._kept[n].size))
                else:
                    self._kept.clear()
            finally:
                self._lock.release()
        return np.asarray(_Lease(np.empty(size, np.uint8) if block is None else block, self))

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
