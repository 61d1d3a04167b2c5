"""Memory of the CPU backend: a call's arrays side by side in one block, and what nobody uses any more used again."""

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

__all__ = ["POOL", "SCRATCH", "Pool", "Scratch", "Workspace", "is_to_be_cleared", "new_array", "new_like", "one_block"]


def one_block(dtype: Any, *shapes: tuple[int, ...], lasting: bool = False) -> list[Array]:
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
    lasting : bool
        Whether they are kept for longer than a call: then the pool, which remembers what it lends, is left alone.

    Returns
    -------
    list of array
        Uninitialised, C-contiguous. The block is freed, or free for the next call, with the last of them.
    """
    starts, size = _layout(dtype.itemsize, shapes)
    memory, first = POOL.take(size) if size >= Pool.LEAST and not lasting else _bytes_and_line(size)
    return [np.ndarray(shape, dtype, memory, first + start) for shape, start in zip(shapes, starts, strict=True)]


def new_array(shape: tuple[int, ...], dtype: Any, *, padded: bool = False) -> Array:
    """Allocate an array for the caller, uninitialised; a large one in a block of the pool, free when he drops it.

    One that is `padded` may have to be zero where no sequence reaches: see :func:`is_to_be_cleared`.
    """
    size = math.prod(shape) * dtype.itemsize
    if not Pool.LEAST <= size <= Pool.MOST:  # what is larger than the pool would not be kept
        return np.zeros(shape, dtype) if padded and size > Pool.MOST else np.empty(shape, dtype)
    return np.ndarray(shape, dtype, *POOL.take(size))


def is_to_be_cleared(padded: Array) -> bool:
    """Say whether a kernel has to set the padding of a new array to zero.

    Where it is larger than the pool, it consists of zeros, of which the system provides only those that are touched.
    """
    found: bool = padded.nbytes <= Pool.MOST
    return found


def new_like(array: Array) -> Array:
    """Allocate an array for the caller, as :func:`new_array` does, of the shape and dtype of another.

    In C order, whatever the other's: a kernel refuses an array in another order, and would get a copy to write into.
    """
    if array.nbytes < Pool.LEAST:
        return np.empty_like(array, order="C", subok=False)
    return new_array(array.shape, array.dtype)


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
    # NumPy's own ways to ask for the address take several times as long.
    return memory, -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % CACHE_LINE


class Workspace:
    """The scratch memory of one kind of call: arrays side by side; made once, so that it is found by identity.

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
        # Pieces that are kept between calls; none of a size that comes from the pool.
        self.most_kept = (Pool.LEAST - 1) // max(CACHE_LINE, size)
        self.starts, self.size = [start // dtype.itemsize for start in starts], size // dtype.itemsize


class Scratch:
    """Scratch memory, each piece lent to one call at a time and then to the next that needs the same.

    To allocate it anew would take a short call longer than to use it. A large piece is not kept: other calls find its
    block in the pool. Of each kind of call less than :data:`Pool.LEAST` bytes are kept, however many threads called at
    once.
    """

    KINDS = 16  # of calls whose memory is kept

    def __init__(self) -> None:
        self._idle: dict[Workspace, list[Array]] = {}

    def borrow(self, workspace: Workspace) -> Array:
        """Return uninitialised memory, one-dimensional, for this caller alone."""
        try:
            return self._idle[workspace].pop()
        except (KeyError, IndexError):  # none yet, or all is in use
            return one_block(workspace.dtype, (workspace.size,))[0]

    def give_back(self, workspace: Workspace, memory: Array) -> None:
        """Keep borrowed memory for the next call; only once nothing works with it any more."""
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
    """A block of memory that the pool knows."""

    memory: Array  # bytes, owned by this array: every array made of them refers to it
    first: int  # of its bytes, where a cache line starts
    size: int  # from there on


class Pool:
    """Large blocks of memory, each lent again once nobody uses it.

    The system provides a fresh block page by page, each set to zero; a virtual machine's may have to ask its host for
    each. That can take as long as the call itself. So the pool remembers the blocks that it lent, :data:`MOST` bytes
    in all, and has nothing to do when one is not used any more: that only the pool refers to it shows its reference
    count. None is lent for less than half its size. Where a new block has to be made, those that lie idle and are too
    small are freed before.

    Without the pool, training of (T, B, I, H) = (100, 64, 32, 256) takes 1.27 times as long on two threads of a Zen 5
    virtual machine.
    """

    LEAST = 1 << 20  # bytes of a block; the C library recycles smaller ones itself
    MOST = 1 << 28  # bytes of all blocks; the one lent longest ago is forgotten, and freed when it is not used

    def __init__(self) -> None:
        # The block lent longest ago is the first. Each step on it is one operation of the interpreter, so there is no
        # lock: a signal handler, a finaliser or a forked child may come at any point.
        self._blocks: deque[_Block] = deque()

    def take(self, size: int) -> tuple[Array, int]:
        """Return bytes that are nobody else's, and the first of them, from which on there are at least `size`.

        The blocks are taken out meanwhile. Another call that comes then makes a new one; and where this one is broken
        off, the pool forgets those that are out.
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
        """Take all blocks out, so that they are this caller's alone."""
        blocks = []
        with contextlib.suppress(IndexError):
            while True:
                blocks.append(self._blocks.popleft())
        return blocks

    def clear(self) -> None:
        """Free what nobody uses."""
        self._blocks.clear()

    @property
    def size(self) -> int:
        """Bytes that are kept, and nobody uses."""
        return sum(block.size for block in list(self._blocks) if _is_idle(block))

    def _forget(self, blocks: list[_Block]) -> None:
        """Let go of the oldest of too many."""
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
