"""The packed rows of a batch on the device: sorted states, packed inputs, and the way back."""

from __future__ import annotations

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cuda.device import Device, Product
from fastlstm.backends.cuda.launch import geometry, variant_of
from fastlstm.backends.ragged import Packing
from fastlstm.cell import Cell

__all__ = ["Rows"]


class Rows:
    """A packing, its arrays on the device as the kernels take them, and the cell that runs on them.

    With equal lengths the arrays are None, states stand as in the batch, and inputs are packed as they are: nothing is
    uploaded. Only a training call that runs step after step copies something: h0 and c0 to its tape, in two launches a
    direction.

    Parameters
    ----------
    device : Device
    packing : Packing
    cell : Cell
    resets : array, (T, B) bool, or None
        Where a sequence's state is zero before the step that reads x_t.
    """

    def __init__(self, device: Device, packing: Packing, cell: Cell, resets: Array | None = None) -> None:
        self.device = device
        self.packing = packing
        self.cell = cell
        self.variant = variant_of(cell) if resets is None else (*variant_of(cell), "RESETS")  # of the step kernels
        self.resets = None if resets is None else device.xp.ascontiguousarray(resets)
        self.order: Array | None = None  # (B,) int64, the sequence at each row
        self.lengths: Array | None = None  # (B,) int64, in that order, descending
        self.offsets: Array | None = None  # (S + 1,) int64, the first row of each step
        if packing.ragged:  # in one copy
            batch = packing.order.size
            index = device.upload(np.concatenate([packing.order, packing.lengths, packing.offsets], dtype=np.int64))
            self.order, self.lengths, self.offsets = index[:batch], index[batch : 2 * batch], index[2 * batch :]

    def reverse(self, direction: int) -> bool:
        """Say whether a direction runs backwards in time."""
        return direction == 1 or self.cell.reverse

    def product(self, a: Array, b: Array, out: Array, **options: bool) -> Product:
        """Prepare a product (see ``Device.product``) in the precision of the cell."""
        return self.device.product(a, b, out, **options, precision=self.cell.precision)

    def without_reset(self, state: Array, direction: int) -> Array:
        """Return the h before a direction's first step (B, H), or its gradient, zero where it is reset there."""
        if self.resets is None:
            return state
        xp, lengths = self.device.xp, self.lengths
        if lengths is None:
            first = self.resets[self.packing.steps - 1 if self.reverse(direction) else 0]
        else:  # in the order of the packing, from where each sequence begins
            begins = lengths - 1 if self.reverse(direction) else xp.zeros_like(lengths)
            sorted_resets = self.resets[xp.maximum(begins, 0), self.order] & (lengths > 0)
            first = xp.empty(sorted_resets.shape, bool)
            first[self.order] = sorted_resets
        return xp.where(first[:, None], state.dtype.type(0), state)

    def pack(self, x: Array, reverse: bool) -> Array:
        """Return the inputs (T, B, I) by packed rows, (N, I)."""
        _, batch, inputs = x.shape
        if not self.packing.ragged:
            return x.reshape(-1, inputs)
        packed = self.device.xp.empty((self.packing.rows, inputs), x.dtype)
        steps = self.packing.offsets.size - 1
        self.device.kernel("pack_rows", x.dtype)(
            *geometry(steps * batch, inputs),
            (x, self.order, self.lengths, self.offsets, packed, steps, int(reverse), batch, inputs),
        )
        return packed

    def unpack(self, packed: Array, x: Array, reverse: bool, *, accumulate: bool) -> None:
        """Bring packed rows (N, I) of a ragged batch back to `x` (T, B, I), zero in the padding, or add them there."""
        steps, batch, inputs = x.shape
        self.device.kernel("unpack_rows", x.dtype)(
            *geometry(steps * batch, inputs),
            (
                packed, self.order, self.lengths, self.offsets, x,
                steps, int(reverse), batch, inputs, int(accumulate),
            ),
        )  # fmt: skip

    def gather(self, state: Array, out: Array, count: int) -> None:
        """Copy the first `count` rows of a state (B, H), sorted, to `out`."""
        kernel = self.device.kernel("gather_rows", state.dtype)
        kernel(*geometry(count, state.shape[1]), (state, self.order, out, count, state.shape[1]))

    def sorted(self, state: Array) -> Array:
        """Return a state (B, H) sorted, in memory of its own; with equal lengths, itself."""
        if not self.packing.ragged:
            return state
        out = self.device.xp.empty_like(state)
        self.gather(state, out, state.shape[0])
        return out

    def restore(self, sorted_state: Array, out: Array) -> None:
        """Bring the rows of a sorted state (B, H) back to their sequences in `out`, unless it is `out` itself."""
        if sorted_state is not out:
            kernel = self.device.kernel("scatter_rows", out.dtype)
            kernel(*geometry(*out.shape), (sorted_state, self.order, out, *out.shape))
