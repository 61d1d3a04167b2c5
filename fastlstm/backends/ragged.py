"""Ragged batches without padding: sequences sorted by length, their steps packed. Plain NumPy, on the host."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from fastlstm.backends.base import Array

__all__ = ["Packing", "is_kept"]


@dataclass(frozen=True, eq=False)
class Packing:
    """How the steps of a ragged batch are packed: the longest sequence first, step by step, without padding.

    For equal lengths it is kept for each small batch size, so that short calls do not make it again.
    """

    steps: int  # T
    order: Array  # (B,) the sequence at each row
    lengths: Array  # (B,) in that order, descending
    offsets: Array  # (S + 1,) first row of each step
    ragged: bool

    @classmethod
    def of(cls, lengths: Array | None, steps: int, batch: int) -> Packing:
        """Work out the packing of a batch; None stands for equal lengths."""
        if lengths is None or (lengths == steps).all():
            return _equal(steps, batch)
        order = np.argsort(-lengths, kind="stable")
        sorted_lengths = lengths[order]
        active = batch - np.searchsorted(sorted_lengths[::-1], np.arange(sorted_lengths[0]), side="right")
        offsets = np.zeros(active.size + 1, np.int64)
        np.cumsum(active, out=offsets[1:])
        return cls(steps, order, sorted_lengths, offsets, True)

    @functools.cached_property
    def rows(self) -> int:
        """N, the number of steps of all sequences."""
        return int(self.offsets[-1])

    def step_rows(self, reverse: bool) -> list[tuple[int, int]]:
        """List, in the order of computation, each step's first row and number of rows.

        With equal lengths the rows are in the order of time in both directions, so that nothing has to be
        copied; the reverse direction then takes them from the end.
        """
        starts = [(int(first), int(rows)) for first, rows in zip(self.offsets, np.diff(self.offsets), strict=False)]
        return starts[::-1] if reverse and not self.ragged else starts

    def places(self, reverse: bool) -> Array:
        """Where each row belongs in (T * B): (N,)."""
        batch = self.order.size
        if not self.ragged:
            return _equal_places(self.steps, batch, reverse)
        step = np.repeat(np.arange(self.offsets.size - 1), np.diff(self.offsets))
        row = np.arange(self.rows) - self.offsets[step]
        return (self.lengths[row] - 1 - step if reverse else step) * batch + self.order[row]

    def pack(self, x: Array, reverse: bool) -> tuple[Array, Array]:
        """Pack a sequence (T, B, I) into (N, I), a view where the rows are in order already; return it and `places`."""
        flat, places = x.reshape(-1, x.shape[2]), self.places(reverse)
        # A third of the time that indexing takes.
        return flat.take(places, axis=0) if self.ragged or reverse else flat, places

    def rows_of_chunk(self, chunk: int) -> int:
        """Return the most rows that `chunk` successive steps have; the chunks are counted from the last step."""
        if not self.ragged:
            return int(min(chunk, self.steps) * self.order.size)
        firsts = self.offsets[::-1][::chunk]
        return int(max(-np.diff(firsts, append=0), default=0))


# The arrays of equal lengths depend on little, and are never written: short calls need not make them anew. Long calls
# make them, in a few percent of their time at most: those of sixteen sizes could take more than a gigabyte. So only
# small ones are kept, at most 16 * 128 KiB = 2 MiB of each kind.
KEPT_BYTES, _KEPT_SIZES = 1 << 17, 16


def is_kept(steps: int, batch: int) -> bool:
    """Say whether what depends on the size of a batch of equal lengths is small enough to be kept between calls."""
    return 8 * (steps * batch + steps + 1 + 2 * batch) <= KEPT_BYTES


def _make_equal(steps: int, batch: int) -> Packing:
    offsets = np.arange(steps + 1, dtype=np.int64) * batch
    return Packing(steps, np.arange(batch), np.full(batch, steps, np.int64), offsets, False)


def _make_equal_places(steps: int, batch: int, reverse: bool) -> Array:
    places = np.arange(steps * batch)
    if not reverse:
        return places
    # Of a single sequence this would be a view with steps of -1, for which kernels would be compiled once more.
    return np.ascontiguousarray(places.reshape(steps, batch)[::-1].reshape(-1))


_kept_equal = functools.lru_cache(maxsize=_KEPT_SIZES)(_make_equal)
_kept_equal_places = functools.lru_cache(maxsize=_KEPT_SIZES)(_make_equal_places)


def _equal(steps: int, batch: int) -> Packing:
    return (_kept_equal if is_kept(steps, batch) else _make_equal)(steps, batch)


def _equal_places(steps: int, batch: int, reverse: bool) -> Array:
    return (_kept_equal_places if is_kept(steps, batch) else _make_equal_places)(steps, batch, reverse)
