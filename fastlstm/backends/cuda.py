"""The CUDA backend: sorts and packs the batch, and calls ``kernels/cuda`` and matrix products step by step.

For each layer and direction, forward: one product of all inputs with W_ih, then for each step one product
of h_{t-1} with W_hh, added to it, and one kernel. Backward: for each step one kernel and one product, then
the gradients of the weights and of the input, each one product over all steps.

Everything goes to the caller's current stream on the arrays' device, and nothing waits for it. The only
thing that comes from the host is the packing of a ragged batch, copied once before the steps. Memory is CuPy's;
what a training call keeps are six numbers for each hidden unit and step (the four gates, c, and the h
before), and the backward pass takes four more while it runs. When memory runs out, CuPy's
``OutOfMemoryError``, a :class:`MemoryError`, passes through; nothing that the caller holds has changed then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, Dropout, ForwardResult, Params
from fastlstm.backends.device import CupyDevice, Device, Kernel
from fastlstm.backends.layers import LayeredBackend, LayerGradients, LayerResult, StackTape, Weights, layer_weights
from fastlstm.backends.packing import Packing
from fastlstm.cell import Cell
from fastlstm.kernels.cuda import loader

__all__ = ["CudaBackend"]

GATES = 4  # i, f, g, o

_THREADS = 128  # of a block
_MOST_BLOCKS = 65535  # along the second axis of a grid; kernels loop over what is beyond
# As in reduce.cu: columns and lanes of a block; and the rows that one block sums, few enough to keep the GPU busy.
_COLUMNS, _LANES, _SLAB = 32, 8, 256


class Rows(NamedTuple):
    """A packing, and its arrays on the device as the kernels take them."""

    packing: Packing
    order: Array  # (B,) int64
    lengths: Array  # (B,) int64, in that order, descending
    offsets: Array | None  # (S + 1,) int64; None with equal lengths, where nothing is packed


@dataclass(frozen=True)
class DirectionTape:
    """What one direction leaves on the tape, by packed rows (see ``Packing.step_rows``)."""

    gates: Array  # (N, 4H): i, f, g, o
    c: Array  # (B + N, H): the initial states, sorted, then c of each row
    h_rows: Array  # (N, H): the h before each row's step


@dataclass(frozen=True)
class LayerTape:
    """What one layer leaves on the tape."""

    x: Array  # (T, B, I), the input itself
    rows: Rows
    directions: list[DirectionTape]


class CudaBackend(LayeredBackend):
    """CuPy arrays on kernels of our own; see the module's docstring."""

    name = "cuda"

    def __init__(self, device: Device) -> None:
        self.device = device
        self.xp = device.xp

    def forward(
        self,
        cell: Cell,
        params: Params,
        x: Array,
        h0: Array | None,
        c0: Array | None,
        lengths: Array | None,
        dropout: Dropout | None,
        keep_tape: bool,
        recompute: bool = False,
    ) -> ForwardResult:
        """Run the whole sequence through all layers, on the device of `x` (see ``base.Backend.forward``)."""
        with self.device.of(x):
            return super().forward(cell, params, x, h0, c0, lengths, dropout, keep_tape, recompute)

    def backward(
        self,
        cell: Cell,
        params: Params,
        tape: StackTape,
        dy: Array | None,
        dh_n: Array | None,
        dc_n: Array | None,
    ) -> BackwardResult:
        """Back-propagate through all layers, on the device of the parameters (see ``base.Backend.backward``)."""
        with self.device.of(params["weight_hh_l0"]):
            return super().backward(cell, params, tape, dy, dh_n, dc_n)

    def step(self, cell: Cell, params: Params, x: Array, h: Array | None, c: Array | None) -> tuple[Array, Array]:
        """Advance one time step (see ``base.Backend.step``): two products and one kernel for each layer."""
        with self.device.of(x):
            batch, hidden, dtype = x.shape[0], cell.hidden_size, x.dtype
            if not batch:
                return super().step(cell, params, x, h, c)
            h, c = self._states(cell, batch, dtype, h, c)
            h, h_n, c_n = self.xp.ascontiguousarray(h), self.xp.empty(h.shape, dtype), self.xp.empty(c.shape, dtype)
            c_n[...] = c  # the kernel reads c_{t-1} where it writes c_t
            rows, x = self._rows(Packing.of(None, 1, batch)), self.xp.ascontiguousarray(x)
            for layer in range(cell.num_layers):
                weights, h_t, c_t = layer_weights(cell, params, layer)[0], h_n[layer], c_n[layer]
                weight_ih, weight_hh = (self.xp.ascontiguousarray(w) for w in (weights.weight_ih, weights.weight_hh))
                gates, bias = self.xp.empty((batch, GATES * hidden), dtype), self._bias(weights)
                self.device.product(x, weight_ih, gates, transpose_b=True)()
                self.device.product(h[layer], weight_hh, gates, transpose_b=True, accumulate=True)()
                kernel, units = self._gate_kernel("gates_forward", hidden, dtype, bias)
                # Every sequence ends with this step: h_t is output and final state in one, and nothing goes to h_rows.
                kernel(
                    *_geometry(batch, units),
                    (
                        gates, bias, rows.order, rows.lengths, c_t, h_t, h_t, h_t, c_t,
                        0, 0, 0, 0, batch, 0, 0, batch, hidden, 1, 0,
                    ),
                )  # fmt: skip
                x = h_t
            return h_n, c_n

    def layer_forward(
        self,
        weights: Sequence[Weights],
        x: Array,
        h0: Array,
        c0: Array,
        lengths: Array | None,
        keep_tape: bool,
        recompute: bool,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        steps, batch = x.shape[:2]
        directions, _, hidden = h0.shape
        x, h0, c0 = (self.xp.ascontiguousarray(array) for array in (x, h0, c0))
        rows = self._rows(Packing.of(lengths, steps, batch))
        y = (self.xp.zeros if rows.packing.ragged else self.xp.empty)((steps, batch, directions, hidden), x.dtype)
        h_n, c_n = h0.copy(), c0.copy()  # what a length of 0 returns
        tapes = [
            self._direction_forward(w, x, h0[d], c0[d], rows, d, y, h_n[d], c_n[d], keep_tape)
            for d, w in enumerate(weights)
        ]
        tape = LayerTape(x, rows, tapes) if keep_tape else None
        return LayerResult(y.reshape(steps, batch, directions * hidden), h_n, c_n, tape)

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        dh_n, dc_n = self.xp.ascontiguousarray(dh_n), self.xp.ascontiguousarray(dc_n)
        if dy is not None:
            dy = self.xp.ascontiguousarray(dy)
        dx = self.xp.empty(tape.x.shape, dh_n.dtype)
        dh0, dc0 = self.xp.empty_like(dh_n), self.xp.empty_like(dc_n)
        dweights = [
            self._direction_backward(w, tape, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d])
            for d, w in enumerate(weights)
        ]
        return LayerGradients(dx, dh0, dc0, dweights)

    def _direction_forward(
        self,
        weights: Weights,
        x: Array,  # (T, B, I), IN
        h0: Array,  # (B, H), IN
        c0: Array,  # (B, H), IN
        rows: Rows,
        direction: int,
        y: Array,  # (T, B, D, H), OUT at `direction`
        h_n: Array,  # (B, H), OUT for every length but 0
        c_n: Array,  # (B, H), likewise
        keep_tape: bool,
    ) -> DirectionTape:
        """Run the recurrence of one direction."""
        packing, reverse = rows.packing, direction == 1
        (batch, hidden), dtype = h0.shape, x.dtype
        weight_hh, bias = self.xp.ascontiguousarray(weights.weight_hh), self._bias(weights)
        gates = self._project(weights, x, rows, reverse)
        # Without a tape, h and c have one place for all steps: a kernel reads them before it writes them.
        h_rows = self.xp.empty((packing.rows if keep_tape else batch, hidden), dtype)
        c = self.xp.empty((batch + packing.rows if keep_tape else batch, hidden), dtype)
        steps = packing.step_rows(reverse)
        if steps:
            self._gather(h0, rows, h_rows[steps[0][0] :] if keep_tape else h_rows, steps[0][1])
        self._gather(c0, rows, c, batch)

        kernel, units = self._gate_kernel("gates_forward", hidden, dtype, bias)
        recurrent = self.device.product(h_rows, weight_hh, gates, transpose_b=True, accumulate=True)
        c_from = 0
        for step, (first, active) in enumerate(steps):
            c_to = batch + first if keep_tape else 0
            h_to = steps[step + 1][0] if keep_tape and step + 1 < len(steps) else 0
            recurrent(active, first if keep_tape else 0, first)
            kernel(
                *_geometry(active, units),
                (
                    gates, bias, rows.order, rows.lengths, c, h_rows, y, h_n, c_n,
                    first, c_from, c_to, h_to, active, step, int(reverse), batch, hidden, y.shape[2], direction,
                ),
            )  # fmt: skip
            c_from = c_to
        return DirectionTape(gates, c, h_rows)

    def _direction_backward(
        self,
        weights: Weights,
        layer: LayerTape,
        direction: int,
        dy: Array | None,  # (T, B, D*H), IN
        dh_n: Array,  # (B, H), IN
        dc_n: Array,  # (B, H), IN
        dx: Array,  # (T, B, I), OUT, or added to after the first direction
        dh0: Array,  # (B, H), OUT
        dc0: Array,  # (B, H), OUT
    ) -> Weights:
        """Back-propagate through one direction; the gradients of its weights."""
        tape, rows, reverse = layer.directions[direction], layer.rows, direction == 1
        (batch, hidden), dtype, directions = dh_n.shape, dh_n.dtype, len(layer.directions)
        weight_hh = self.xp.ascontiguousarray(weights.weight_hh)
        da = self.xp.empty(tape.gates.shape, dtype)
        dh, dc = self.xp.empty_like(dh_n), self.xp.empty_like(dc_n)
        self._gather(dh_n, rows, dh, batch)
        self._gather(dc_n, rows, dc, batch)

        kernel, units = self._gate_kernel("gates_backward", hidden, dtype, dy)
        to_h = self.device.product(da, weight_hh, dh)
        steps = rows.packing.step_rows(reverse)
        for step in reversed(range(len(steps))):
            first, active = steps[step]
            c_from = batch + steps[step - 1][0] if step else 0
            kernel(
                *_geometry(active, units),
                (
                    dc if dy is None else dy, dh, dc, tape.gates, tape.c, rows.order, rows.lengths, da,
                    int(dy is not None), first, c_from, batch + first, active, step, int(reverse), batch, hidden,
                    directions, direction,
                ),
            )  # fmt: skip
            # Sequences that end before this step keep the gradient of their final state until their own end.
            to_h(active, first)
        self._scatter(dh, rows, dh0)
        self._scatter(dc, rows, dc0)
        self._input_gradient(weights, da, rows, reverse, dx, accumulate=direction > 0)
        return self._weight_gradients(weights, layer, tape, da, reverse)

    def _project(self, weights: Weights, x: Array, rows: Rows, reverse: bool) -> Array:
        """Return the inputs' share of all pre-activations, (N, 4H)."""
        weight_ih = self.xp.ascontiguousarray(weights.weight_ih)
        a = self.xp.empty((rows.packing.rows, weight_ih.shape[0]), x.dtype)
        if rows.packing.rows:
            self.device.product(self._pack(x, rows, reverse), weight_ih, a, transpose_b=True)()
        return a

    def _input_gradient(
        self, weights: Weights, da: Array, rows: Rows, reverse: bool, dx: Array, *, accumulate: bool
    ) -> None:
        """Write the gradient by the input to `dx` (T, B, I), or add it there."""
        steps, batch, inputs = dx.shape
        weight_ih = self.xp.ascontiguousarray(weights.weight_ih)
        if not rows.packing.ragged:
            self.device.product(da, weight_ih, dx.reshape(-1, inputs), accumulate=accumulate)()
            return
        packed = self.xp.empty((rows.packing.rows, inputs), dx.dtype)
        if rows.packing.rows:
            self.device.product(da, weight_ih, packed)()
        self.device.kernel("unpack_rows", dx.dtype, 1)(
            *_geometry(steps * batch, inputs),
            (
                packed, rows.order, rows.lengths, rows.offsets, dx,
                steps, int(reverse), batch, inputs, int(accumulate),
            ),
        )  # fmt: skip

    def _weight_gradients(
        self, weights: Weights, layer: LayerTape, tape: DirectionTape, da: Array, reverse: bool
    ) -> Weights:
        """Return the sums over all rows of da x^T, da h^T and da."""
        zeros_or_empty = self.xp.empty if da.shape[0] else self.xp.zeros
        dweight_ih = zeros_or_empty(weights.weight_ih.shape, da.dtype)
        dweight_hh = zeros_or_empty(weights.weight_hh.shape, da.dtype)
        if da.shape[0]:
            self.device.product(da, self._pack(layer.x, layer.rows, reverse), dweight_ih, transpose_a=True)()
            self.device.product(da, tape.h_rows, dweight_hh, transpose_a=True)()
        return Weights(dweight_ih, dweight_hh, None if weights.bias is None else self._column_sum(da))

    def _column_sum(self, values: Array) -> Array:
        """Return the sum over the rows, (columns,): slab by slab, then the sums of the slabs."""
        kernel = self.device.kernel("column_sum", values.dtype, 1)
        columns = values.shape[1]
        while True:
            rows = values.shape[0]
            slabs = max(1, -(-rows // _SLAB))
            sums = self.xp.empty((slabs, columns), values.dtype)
            kernel((slabs, -(-columns // _COLUMNS)), (_COLUMNS, _LANES), (values, sums, rows, columns, _SLAB))
            if slabs == 1:
                return sums.reshape(columns)
            values = sums

    def _rows(self, packing: Packing) -> Rows:
        """Bring a packing to the device, in one copy; equal lengths need none."""
        batch = packing.order.size
        if not packing.ragged:
            order, lengths = self.xp.arange(batch, dtype=np.int64), self.xp.full(batch, packing.steps, np.int64)
            return Rows(packing, order, lengths, None)
        index = self.device.upload(np.concatenate([packing.order, packing.lengths, packing.offsets], dtype=np.int64))
        return Rows(packing, index[:batch], index[batch : 2 * batch], index[2 * batch :])

    def _pack(self, x: Array, rows: Rows, reverse: bool) -> Array:
        """Return the inputs (T, B, I) by packed rows, (N, I)."""
        _, batch, inputs = x.shape
        if not rows.packing.ragged:
            return x.reshape(-1, inputs)
        packed = self.xp.empty((rows.packing.rows, inputs), x.dtype)
        steps = rows.packing.offsets.size - 1
        self.device.kernel("pack_rows", x.dtype, 1)(
            *_geometry(steps * batch, inputs),
            (x, rows.order, rows.lengths, rows.offsets, packed, steps, int(reverse), batch, inputs),
        )
        return packed

    def _gather(self, state: Array, rows: Rows, out: Array, count: int) -> None:
        """Sort the first `count` rows of a state (B, H) into `out`."""
        kernel = self.device.kernel("gather_rows", state.dtype, 1)
        kernel(*_geometry(count, state.shape[1]), (state, rows.order, out, count, state.shape[1]))

    def _scatter(self, sorted_state: Array, rows: Rows, out: Array) -> None:
        """Bring the rows of a sorted state (B, H) back to their sequences."""
        kernel = self.device.kernel("scatter_rows", out.dtype, 1)
        kernel(*_geometry(*out.shape), (sorted_state, rows.order, out, *out.shape))

    def _bias(self, weights: Weights) -> Array:
        """Return the bias, or zeros for none, so that the kernel need not ask."""
        if weights.bias is None:
            return self.xp.zeros(weights.weight_hh.shape[0], weights.weight_hh.dtype)
        return self.xp.ascontiguousarray(weights.bias)

    def _gate_kernel(self, name: str, hidden: int, dtype: Any, given: Array | None) -> tuple[Kernel, int]:
        """Return a gate kernel and its number of threads a row: wide loads where H and the caller's array allow them.

        All other buffers are the backend's own, so they are aligned, and so is each of their rows then.
        """
        width = loader.wide(dtype)
        if hidden % width or (given is not None and not self.device.aligned(given)):
            width = 1
        return self.device.kernel(name, dtype, width), hidden // width


@lru_cache(maxsize=1024)
def _geometry(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the grid and block of a kernel with one thread an element, columns along the first axis."""
    x = min(_THREADS, 1 << max(columns - 1, 0).bit_length())
    y = _THREADS // x
    return (-(-columns // x), min(max(1, -(-rows // y)), _MOST_BLOCKS)), (x, y)


def __getattr__(name: str) -> Any:
    """Make ``BACKEND`` when it is asked for: importing this file needs no CuPy."""
    if name == "BACKEND":
        return CudaBackend(CupyDevice())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
