"""Memory of the CPU backend: the arrays of a call in one block, and unused blocks reused by later calls."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import sys
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.kernels.cpu.vector import CACHE_LINE

__all__ = ["POOL", "SCRATCH", "Pool", "Scratch", "Workspace", "is_to_be_cleared", "new_array", "one_block"]


def one_block(dtype: Any, *shapes: tuple[int, ...], lasting: bool = False) -> list[Array]:
    """Allocate arrays side by side in one block of memory, each from the start of a cache line on.

    With this alignment no vector load crosses a cache line. One block, because the C library keeps one freed block for
    the next call, but returns several of some size to the system, which then has to provide every page again: for a
    short sequence that takes longer than the arithmetic. Large blocks, which the C library always returns, come from
    :data:`POOL`.

    Parameters
    ----------
    dtype : numpy.dtype
        Of all arrays.
    *shapes : tuple of int
        One for each array.
    lasting : bool
        Whether they outlive the call: then they do not come from the pool, which keeps track of what it lends.

    Returns
    -------
    list of array
        Uninitialised, C-contiguous. The block is freed, or free for the next call, with the last of them.
    """
    starts, size = _layout(dtype.itemsize, shapes)
    memory, first = POOL.take(size) if size >= Pool.LEAST and not lasting else _bytes_and_line(size)
    return [np.ndarray(shape, dtype, memory, first + start) for shape, start in zip(shapes, starts, strict=True)]


def new_array(shape: tuple[int, ...], dtype: Any, *, padded: bool = False) -> Array:
    """Allocate an uninitialised array for the caller; a large one in a block of the pool, free when it is dropped.

    The padding of a `padded` one may have to be set to zero: see :func:`is_to_be_cleared`.
    """
    size = math.prod(shape) * dtype.itemsize
    if not Pool.LEAST <= size <= Pool.MOST:  # larger than the pool: would not be kept
        return np.zeros(shape, dtype) if padded and size > Pool.MOST else np.empty(shape, dtype)
    return np.ndarray(shape, dtype, *POOL.take(size))


def is_to_be_cleared(padded: Array) -> bool:
    """Say whether a kernel has to set the padding of a new array to zero.

    An array that is larger than the pool is made of zero pages, which the system provides only when they are touched.
    """
    found: bool = padded.nbytes <= Pool.MOST
    return found


@functools.lru_cache(maxsize=256)
def _layout(itemsize: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[list[int], int]:
    """Where in a block each array starts; and the size of the block, in bytes."""
    starts, end = [], 0
    for shape in shapes:
        starts.append(end)
        end += -(-math.prod(shape) * itemsize // CACHE_LINE) * CACHE_LINE
    return starts, end


def _bytes_and_line(size: int) -> tuple[Array, int]:
    """Allocate bytes; return them, and where among them a cache line starts, from which on there are `size`."""
    memory: Array = np.empty(size + CACHE_LINE, np.uint8)
    # NumPy's own functions for the address take several times as long.
    return memory, -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % CACHE_LINE


class Workspace:
    """The layout of the scratch memory of one kind of call; made once, so that it is looked up by identity.

    Parameters
    ----------
    dtype : numpy.dtype
        Of all arrays.
    *shapes : tuple of int
        One for each array.

    Attributes
    ----------
    starts : list of int
        Where each array starts in the memory, in elements; each from the start of a cache line on.
    size : int
        Elements in all.
    """

    __slots__ = ("dtype", "most_kept", "size", "starts")

    def __init__(self, dtype: Any, *shapes: tuple[int, ...]) -> None:
        starts, size = _layout(dtype.itemsize, shapes)
        self.dtype = dtype
        # Pieces kept between calls; none is so large that it would come from the pool.
        self.most_kept = (Pool.LEAST - 1) // max(CACHE_LINE, size)
        self.starts, self.size = [start // dtype.itemsize for start in starts], size // dtype.itemsize


class Scratch:
    """Scratch memory: each piece is lent to one call at a time, and then to the next that needs the same layout.

    For a short call, allocating takes longer than using the memory. Large pieces are not kept: their blocks return to
    the pool. For each kind of call, fewer than :data:`Pool.LEAST` bytes are kept, for any number of threads.
    """

    KINDS = 16  # of calls whose memory is kept

    def __init__(self) -> None:
        self._idle: dict[Workspace, list[Array]] = {}

    def borrow(self, workspace: Workspace) -> Array:
        """Return uninitialised one-dimensional memory that no other call uses."""
        try:
            return self._idle[workspace].pop()
        except (KeyError, IndexError):  # none yet, or all is in use
            return one_block(workspace.dtype, (workspace.size,))[0]

    def give_back(self, workspace: Workspace, memory: Array) -> None:
        """Keep borrowed memory for the next call; call this once nothing uses it."""
        if not workspace.most_kept:
            return
        idle = self._idle.get(workspace)
        if idle is None:
            if len(self._idle) >= self.KINDS:
                self._idle.clear()
            idle = self._idle.setdefault(workspace, [])
        if len(idle) < workspace.most_kept:
            idle.append(memory)


class _Block(NamedTuple):
    """A block of memory of the pool."""

    memory: Array  # bytes, owned by this array: every array made of them refers to it
    first: int  # of its bytes, where a cache line starts
    size: int  # from there on


class Pool:
    """Large blocks of memory, lent again once they are unused.

    The system provides a fresh block page by page and sets each page to zero; in a virtual machine each may be a
    request to the host. That can take as long as the call itself. The pool refers to the blocks that it lent,
    :data:`MOST` bytes in all. A block is unused when its reference count shows that only the pool refers to it, so
    nothing has to be given back. A block is not lent for less than half its size. Before a new block is made, unused
    ones that are too small are freed.

    Without the pool, training of (T, B, I, H) = (100, 64, 32, 256) takes 1.27 times as long on two threads of a Zen 5
    virtual machine.
    """

    LEAST = 1 << 20  # bytes of a block; the C library reuses smaller ones itself
    MOST = 1 << 28  # bytes of all blocks; beyond, the one lent longest ago is dropped

    def __init__(self) -> None:
        # The block lent longest ago is first. Each step is one operation of the interpreter, so no lock is needed: a
        # signal handler, a finaliser or a forked child may run at any point.
        self._blocks: deque[_Block] = deque()

    def take(self, size: int) -> tuple[Array, int]:
        """Return unused memory, and the position in it from which on there are at least `size` bytes.

        Meanwhile all blocks are taken out of the pool. Another call makes a new block then; if this call is
        interrupted, the pool loses the blocks that are out.
        """
        if not _COUNTS_REFERENCES:
            return _bytes_and_line(size)
        blocks = self._take_out()
        fitting = [block for block in blocks if size <= block.size <= 2 * size and _is_idle(block)]
        if fitting:
            block = min(fitting, key=lambda fit: fit.size)
            blocks = [other for other in blocks if other is not block]
        else:
            blocks = [other for other in blocks if other.size >= size or not _is_idle(other)]
            block = _Block(*_bytes_and_line(size), size)
        memory = block.memory  # referred to before other threads see the block again: it is not idle
        if size <= self.MOST:
            blocks.append(block)
            self._forget(blocks)
        self._blocks.extend(blocks)
        return memory, block.first

    def _take_out(self) -> list[_Block]:
        """Take all blocks out of the pool, so that no other call gets them."""
        blocks = []
        with contextlib.suppress(IndexError):
            while True:
                blocks.append(self._blocks.popleft())
        return blocks

    def clear(self) -> None:
        """Free the unused blocks."""
        self._blocks.clear()

    @property
    def size(self) -> int:
        """Bytes of the unused blocks."""
        return sum(block.size for block in list(self._blocks) if _is_idle(block))

    def _forget(self, blocks: list[_Block]) -> None:
        """Drop the oldest blocks beyond :data:`MOST`."""
        surplus = sum(block.size for block in blocks) - self.MOST
        while surplus > 0:
            surplus -= blocks.pop(0).size


# Without the interpreter's lock, a reference count is no proof that no other thread has the memory: nothing is pooled.
_COUNTS_REFERENCES: bool = getattr(sys, "_is_gil_enabled", lambda: True)()


def _is_idle(block: _Block) -> bool:
    return sys.getrefcount(block.memory) == _IDLE


_probe = _Block(np.empty(0, np.uint8), 0, 0)
_IDLE = sys.getrefcount(_probe.memory)  # references to the memory of a block that only the pool refers to

POOL = Pool()
SCRATCH = Scratch()
