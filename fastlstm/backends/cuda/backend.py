"""The CUDA backend: whole models and layers, on the kernels in ``kernels/cuda`` and on cuBLAS's matrix products.

All work goes to the caller's current stream on the arrays' device, and nothing waits for it. Only the packing of a
ragged batch comes from the host, copied once before the steps. Memory is CuPy's; a training call keeps six numbers for
each hidden unit and step (the four gates, c, and the h before), and the backward pass takes four more while it runs.
When memory runs out, CuPy's ``OutOfMemoryError``, a :class:`MemoryError`, passes through, and the caller's arrays are
unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastlstm.backends.base import Array, BackwardResult, Dropout, ForwardResult, Params, Prepared, Signature
from fastlstm.backends.cuda.device import Device
from fastlstm.backends.cuda.direction import DirectionTape, direction_backward, direction_forward
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.layers import (
    Given,
    LayeredBackend,
    LayerGradients,
    LayerResult,
    StackTape,
    Weights,
    layer_weights,
)
from fastlstm.backends.ragged import Packing
from fastlstm.cell import VARIANTS, Cell
from fastlstm.errors import BackendError

__all__ = ["CudaBackend"]


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

    def prepare(self, cell: Cell, signature: Signature) -> Prepared:
        """Prepare calls of a signature (see ``base.Backend.prepare``)."""
        missing = [name for name, plain in VARIANTS.items() if name != "peephole" and getattr(cell, name) != plain]
        if missing:
            raise BackendError(f"the cuda backend has no {', '.join(missing)} yet")
        return super().prepare(cell, signature)

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
        resets: Array | None = None,
    ) -> ForwardResult:
        """Run the whole sequence through all layers, on the device of `x` (see ``base.Prepared.forward``)."""
        if resets is not None:
            raise BackendError("the cuda backend does not reset states within a call yet: call it for each part")
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
        keep_steps: bool = False,
    ) -> BackwardResult:
        """Back-propagate through all layers, on the device of the parameters (see ``base.Prepared.backward``)."""
        if keep_steps:
            raise BackendError("the cuda backend does not keep the gradients by the states of each step yet")
        with self.device.of(params["weight_hh_l0"]):
            return super().backward(cell, params, tape, dy, dh_n, dc_n)

    def step(self, cell: Cell, params: Params, x: Array, h: Array | None, c: Array | None) -> tuple[Array, Array]:
        """Advance one time step (see ``base.Backend.step``): two products and one kernel for each layer."""
        with self.device.of(x):
            batch, hidden, dtype = x.shape[0], cell.hidden_size, x.dtype
            if not batch:
                return super().step(cell, params, x, h, c)
            h, c = (self.xp.ascontiguousarray(s) for s in self._states(cell, batch, dtype, h, c))
            h_n, c_n = self.xp.empty(h.shape, dtype), self.xp.empty(c.shape, dtype)
            rows, x = Rows(self.device, Packing.of(None, 1, batch)), self.xp.ascontiguousarray(x)
            for layer in range(cell.num_layers):
                weights = self._contiguous(layer_weights(cell, params, layer)[0])
                # h_t is output and final state in one.
                inputs, y = x.reshape(1, batch, -1), h_n[layer].reshape(1, batch, 1, hidden)
                direction_forward(weights, inputs, h[layer], c[layer], rows, 0, y, h_n[layer], c_n[layer], False)
                x = h_n[layer]
            return h_n, c_n

    def layer_forward(
        self,
        weights: Sequence[Weights],
        x: Array,
        h0: Array,
        c0: Array,
        given: Given,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        steps, batch = x.shape[:2]
        directions, _, hidden = h0.shape
        x, h0, c0 = (self.xp.ascontiguousarray(array) for array in (x, h0, c0))
        rows = Rows(self.device, Packing.of(given.lengths, steps, batch))
        y = (self.xp.zeros if rows.packing.ragged else self.xp.empty)((steps, batch, directions, hidden), x.dtype)
        if rows.packing.lengths[-1]:  # the shortest
            h_n, c_n = self.xp.empty_like(h0), self.xp.empty_like(c0)
        else:  # a length of 0 returns the initial state
            h_n, c_n = h0.copy(), c0.copy()
        tapes = [
            direction_forward(self._contiguous(w), x, h0[d], c0[d], rows, d, y, h_n[d], c_n[d], given.keep_tape)
            for d, w in enumerate(weights)
        ]
        tape = LayerTape(x, rows, [found for found in tapes if found]) if given.keep_tape else None
        return LayerResult(y.reshape(steps, batch, directions * hidden), h_n, c_n, tape)

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
        keep_steps: bool = False,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        dh_n, dc_n = self.xp.ascontiguousarray(dh_n), self.xp.ascontiguousarray(dc_n)
        if dy is not None:
            dy = self.xp.ascontiguousarray(dy)
        dx = self.xp.empty(tape.x.shape, dh_n.dtype)
        dh0, dc0 = self.xp.empty_like(dh_n), self.xp.empty_like(dc_n)
        dweights = [
            direction_backward(
                self._contiguous(w), tape.directions[d], tape.x, tape.rows, d, len(weights),
                dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d],
            )
            for d, w in enumerate(weights)
        ]  # fmt: skip
        return LayerGradients(dx, dh0, dc0, dweights)

    def _contiguous(self, weights: Weights) -> Weights:
        """Return the parameters as the kernels and products take them."""
        return Weights(*(None if w is None else self.xp.ascontiguousarray(w) for w in weights[:4]))

    def _states(self, cell: Cell, batch: int, dtype: Any, h: Array | None, c: Array | None) -> tuple[Array, Array]:
        """Fill in zeros for None, the same for both: states that are given are never written."""
        if h is None or c is None:
            zeros = self.xp.zeros((cell.num_layers * cell.num_directions, batch, cell.hidden_size), dtype)
            h, c = (zeros if state is None else state for state in (h, c))
        return h, c
