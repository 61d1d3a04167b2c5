"""The rows of a batch, as the kernels take them (``kernels/cpu/ragged.py`` says how)."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.kernels.cpu.ragged import fill_index, measure

__all__ = ["Rows"]

_KEPT_NUMBERS, _KEPT_SIZES = 1 << 14, 16  # of an index that is kept: at most 128 KiB each, 2 MiB in all


class Rows:
    """How the steps of a batch are packed.

    Attributes
    ----------
    steps, batch : int
        T and B.
    longest : int
        S, the longest length.
    count : int
        N, the number of steps of all sequences.
    ragged : bool
        Whether the lengths differ from T.
    is_plain : bool
        Whether all sequences have all steps, without resets.
    resets : array or None, (T, B) bool
        Where the state of a sequence is zero before a step.
    is_kept : bool
        Whether its index is kept between calls, as of a small batch of equal lengths. Otherwise it is freed with this
        object: those of many large batches could take more memory than the calls themselves.
    """

    __slots__ = ("_indices", "batch", "count", "is_kept", "is_plain", "lengths", "longest", "ragged", "resets", "steps")

    def __init__(self, lengths: Array | None, steps: int, batch: int, resets: Array | None = None) -> None:
        self.steps, self.batch, self.longest, self.count, self.ragged = steps, batch, steps, steps * batch, False
        if lengths is not None:
            shortest, longest, count = measure(lengths)
            if shortest < steps:
                self.longest, self.count, self.ragged = longest, count, True
        self.lengths, self.resets = lengths, resets
        self.is_plain = not self.ragged and resets is None
        self.is_kept = self.is_plain and self.count + steps + 2 * batch <= _KEPT_NUMBERS
        self._indices: dict[bool, Array] = {}

    def index(self, reverse: bool) -> Array:
        """Return order, lengths, offsets, places and, of a call with resets, these, in the order of computation.

        With equal lengths, the rows are in the order of time in both directions.
        """
        if self.is_kept:
            return _kept_index(self.steps, self.batch, reverse)
        found = self._indices.get(reverse)
        if found is None:
            if self.ragged:
                found = np.empty(2 * self.batch + self.longest + 1 + self.count, np.int64)
                fill_index(self.lengths, self.longest, reverse, found)
            else:
                found = _index(self.steps, self.batch, reverse)
            if self.resets is not None:
                places = found[2 * self.batch + self.longest + 1 :]
                found = np.concatenate([found, self.resets.reshape(-1)[places]])
            self._indices[reverse] = found
        return found

    def pack(self, x: Array, reverse: bool) -> Array:
        """Return the rows of a sequence (T, B, I) in the order of computation: a view, if they are in it."""
        flat = x.reshape(-1, x.shape[2])
        if not (self.ragged or reverse):
            return flat
        start = 2 * self.batch + self.longest + 1
        packed: Array = flat.take(self.index(reverse)[start : start + self.count], axis=0)
        return packed

    def begins_reset(self, reverse: bool) -> Array:
        """Return the sequences, (B,) bool, whose state is reset before their first step."""
        assert self.resets is not None
        if self.lengths is None:
            begin: Array = self.resets[-1 if reverse else 0]
            return begin
        first = np.maximum(self.lengths - 1, 0) if reverse else np.zeros(self.batch, np.int64)
        begin = self.resets[first, np.arange(self.batch)] & (self.lengths > 0)
        return begin


def _index(steps: int, batch: int, reverse: bool) -> Array:
    """Return the index of a batch of equal lengths."""
    index: Any = np.empty(2 * batch + steps + 1 + steps * batch, np.int64)
    index[:batch], index[batch : 2 * batch] = np.arange(batch), steps
    index[2 * batch : 2 * batch + steps + 1] = np.arange(steps + 1) * batch
    places = np.arange(steps * batch).reshape(steps, batch)
    index[2 * batch + steps + 1 :] = (places[::-1] if reverse else places).reshape(-1)
    return index


# It is never written to, so short calls need not make it anew.
_kept_index = functools.lru_cache(maxsize=_KEPT_SIZES)(_index)
