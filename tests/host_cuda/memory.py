"""The memory of the stand-in for CuPy: poisoned, fenced and counted."""

from __future__ import annotations

import numpy as np

FENCE = 64  # bytes before and after each allocation; also its alignment
POISON, POST = 0xFF, 0xA5


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class Pool:
    """The memory of all devices, and what happened to it."""

    def __init__(self) -> None:
        self.live = 0  # bytes
        self.allocations = 0
        self.fail_at: int | None = None  # the number of the allocation that fails, counted from 0
        self.overwritten: list[str] = []
        self.waits: list[str] = []  # what made the host wait for the device
        self.copies: list[int] = []  # bytes of each copy from the host
        self.launched: list[str] = []  # the name of each kernel and product that was called
        self.own: list[str] = []  # what CuPy itself launched: a fill, a copy, arithmetic

    def allocate(self, size: int) -> Allocation:
        number, self.allocations = self.allocations, self.allocations + 1
        if number == self.fail_at:
            raise OutOfMemoryError(f"Out of memory allocating {size} bytes")
        return Allocation(self, size)


class Allocation:
    """One piece of memory between two fences."""

    def __init__(self, pool: Pool, size: int) -> None:
        whole = np.full(size + 3 * FENCE, POST, np.uint8)
        start = FENCE + -whole.ctypes.data % FENCE
        self.pool, self.whole, self.start, self.size = pool, whole, start, size
        self.memory = whole[start : start + size]
        self.memory.fill(POISON)
        pool.live += size

    def __del__(self) -> None:
        if not hasattr(self, "memory"):
            return
        self.pool.live -= self.size
        before, after = self.whole[: self.start], self.whole[self.start + self.size :]
        if (before != POST).any() or (after != POST).any():
            self.pool.overwritten.append(f"outside an array of {self.size} bytes")
