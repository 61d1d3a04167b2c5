"""Closed loops on a GPU: a step is two products and a kernel for each layer, on memory that a run allocates once.

A step forward leaves on the tape what a call for the whole sequence leaves there, and a step back puts the gradients by
the pre-activations in the place of its gates. So the gradients by the weights are one product over all steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastlstm.backends.base import Array, Dropout, Params
from fastlstm.backends.base import Unrolled as AnyUnrolled
from fastlstm.backends.cuda.device import Device, Product
from fastlstm.backends.cuda.direction import DirectionsTape, weight_gradients
from fastlstm.backends.cuda.launch import geometry, step_kernel, step_records
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.layers import Weights, dropout_mask
from fastlstm.backends.ragged import Packing
from fastlstm.cell import Cell

__all__ = ["OnDevice", "Unrolled"]


class _Products(NamedTuple):
    """The products of a layer, for the thread that prepared them; rows are chosen at the call."""

    project: Product  # of x with W_ih, to the pre-activations
    recur: Product  # of h with W_hh, added there
    to_h: Product  # of the gradients by the pre-activations with W_hh
    to_x: Product  # and with W_ih


class _Layer:
    """The memory of one layer. The gradients by the pre-activations take the place of the gates."""

    def __init__(self, rows: Rows, weights: Weights, x: Array, h: Array, c: Array) -> None:
        xp, (steps, batch, inputs) = rows.device.xp, x.shape
        self.weights, self.x, self.h, self.c = weights, x, h, c  # x (T, B, I); h and c (T + 1, B, H)
        self.gates = xp.empty((steps, batch, weights.weight_ih.shape[0]), x.dtype)
        self.dx = xp.empty((batch, inputs), x.dtype)
        peephole = weights.weight_peephole
        self.dp = None if peephole is None else xp.zeros((batch, peephole.size), x.dtype)

    def products(self, rows: Rows, dh: Array) -> _Products:
        """Prepare the products; `dh` (B, H) is what :attr:`_Products.to_h` writes."""
        x, h, gates = (array.reshape(-1, array.shape[2]) for array in (self.x, self.h, self.gates))
        w_ih, w_hh = self.weights.weight_ih, self.weights.weight_hh
        return _Products(
            rows.product(x, w_ih, gates, transpose_b=True),
            rows.product(h, w_hh, gates, transpose_b=True, accumulate=True),
            rows.product(gates, w_hh, dh),
            rows.product(gates, w_ih, self.dx),
        )


class Unrolled:
    """A run (see ``base.Unrolled``) of a cell without phases.

    Parameters
    ----------
    device : Device
    cell : Cell
    weights : sequence of Weights
        Of each layer, with rows for all gates; C-contiguous.
    fold : callable
        Returns the gradients by the model's parameters by name, given a function that writes those by the weights of
        all layers.
    others
        As for ``base.Backend.unroll``.
    """

    def __init__(
        self, device: Device, cell: Cell, weights: Sequence[Weights], fold: Any, steps: int, batch: int,
        h0: Array | None, c0: Array | None, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        xp, layers, dtype = device.xp, cell.num_layers, cell.dtype
        self._device, self._cell, self._fold, self._batch = device, cell, fold, batch
        self._rows = Rows(device, Packing.of(None, 1, batch), cell)
        # The record of a step is that of a sequence of one step; the arrays of each are given by their addresses.
        starts = self._rows.packing.step_rows(False)
        self._records = step_records(self._rows.packing, starts, cell.hidden_size, 1, 0, keep_tape=True)
        (self._record,) = device.by_value(self._records)
        self._h, self._c = (xp.empty((layers, steps + 1, batch, cell.hidden_size), dtype) for _ in range(2))
        for states, given in ((self._h, h0), (self._c, c0)):
            states[:, 0] = 0 if given is None else given
        self._dh, self._dc = (xp.zeros((layers, batch, cell.hidden_size), dtype) for _ in range(2))
        self._last_c = xp.empty((batch, cell.hidden_size), dtype)  # the kernel's copy of the final state
        self._masks: list[Array | None] = [None] * layers
        self._layers = []
        for number, w in enumerate(weights):
            x = self._h[number - 1, 1:] if number else xp.empty((steps, batch, cell.input_size), dtype)
            if number and dropout is not None and dropout.probability:
                self._masks[number] = dropout_mask(xp, dropout, number, x)
                x = xp.empty(x.shape, dtype)
            self._layers.append(_Layer(self._rows, w, x, self._h[number], self._c[number]))
        self._prepared: tuple[int, list[_Products]] | None = None
        self._taken, self._left = 0, -1

    def _products(self) -> list[_Products]:
        """Return the products of all layers, which are prepared for one thread."""
        thread = threading.get_ident()
        if self._prepared is None or self._prepared[0] != thread:
            made = [layer.products(self._rows, dh) for layer, dh in zip(self._layers, self._dh, strict=True)]
            self._prepared = thread, made
        return self._prepared[1]

    def step(self, x: Array) -> Array:
        """Run the next step (see ``base.Unrolled.step``)."""
        t, batch, rows, hidden = self._taken, self._batch, self._rows, self._cell.hidden_size
        with self._device.of(self._h):
            y = self._device.xp.empty((batch, hidden), self._cell.dtype)
            self._layers[0].x[t] = x
            for number, (layer, products) in enumerate(zip(self._layers, self._products(), strict=True)):
                mask, w = self._masks[number], layer.weights
                if mask is not None:
                    layer.x[t] = self._h[number - 1, t + 1] * mask[t]
                products.project(batch, t * batch, t * batch)
                products.recur(batch, t * batch, t * batch)
                kernel, units = step_kernel(
                    self._device, "step_forward", rows.variant, hidden, y.dtype, (w.bias, w.weight_peephole)
                )
                h = layer.h[t + 1]
                kernel(
                    *geometry(batch, units),
                    (
                        layer.gates[t], w.bias, w.weight_peephole, None, None, None, layer.c[t], layer.c[t : t + 2],
                        h, y if number == len(self._layers) - 1 else h, h, self._last_c, self._record,
                    ),
                )  # fmt: skip
        self._taken += 1
        return y

    def state(self) -> tuple[Array, Array]:
        """Return the state after the last step (see ``base.Unrolled.state``)."""
        with self._device.of(self._h):
            return self._h[:, self._taken].copy(), self._c[:, self._taken].copy()

    def begin_back(self, dh: Array | None, dc: Array | None) -> None:
        """Start the way back (see ``base.Unrolled.begin_back``)."""
        with self._device.of(self._h):
            self._dh[...] = 0 if dh is None else dh
            self._dc[...] = 0 if dc is None else dc
        self._left = self._taken

    def step_back(self, dh: Array | None) -> Array:
        """Take the gradients back through one step (see ``base.Unrolled.step_back``)."""
        t, batch, rows, hidden = self._left - 1, self._batch, self._rows, self._cell.hidden_size
        with self._device.of(self._h):
            products, dy = self._products(), None if dh is None else self._device.xp.ascontiguousarray(dh)
            for number in reversed(range(len(self._layers))):
                layer, (dh_state, dc_state) = self._layers[number], (self._dh[number], self._dc[number])
                peephole, gates = layer.weights.weight_peephole, layer.gates[t]
                kernel, units = step_kernel(
                    self._device, "step_backward", rows.variant, hidden, gates.dtype, (dy, peephole)
                )
                kernel(
                    *geometry(batch, units),
                    (
                        dy, dh_state, dc_state, dc_state, gates, layer.c[t : t + 2], peephole, None, None, None, None,
                        None, gates, layer.dp, self._record,
                    ),
                )  # fmt: skip
                if self._cell.truncated:
                    dh_state[...] = 0
                else:
                    products[number].to_h(batch, t * batch)
                products[number].to_x(batch, t * batch)
                mask = self._masks[number]
                dy = layer.dx if mask is None else layer.dx * mask[t]
            dx = self._layers[0].dx.copy()
        self._left = t
        return dx

    def state_gradient(self) -> tuple[Array, Array]:
        """Return the gradients by the state before the last step taken back (see ``base.Unrolled.state_gradient``)."""
        with self._device.of(self._h):
            return self._dh.copy(), self._dc.copy()

    def finish(self) -> dict[str, Array]:
        """Return the gradients by the parameters (see ``base.Unrolled.finish``)."""
        with self._device.of(self._h):
            found: Params = self._fold(self._write_gradients)
        return dict(found)

    def _write_gradients(self, out: Sequence[Weights]) -> None:
        """Write the gradients by the weights of each layer."""
        steps = self._taken
        for layer, of_layer in zip(self._layers, out, strict=True):
            h = layer.h[:steps].reshape(1, -1, self._cell.hidden_size)
            da = layer.gates[:steps].reshape(-1, layer.gates.shape[2])
            tape = DirectionsTape(da[None], layer.c[None], h).of(0)
            weight_gradients(tape, layer.x[:steps], self._rows, 0, da, layer.dp, of_layer)


class OnDevice:
    """A run that does not choose its device (see ``base.Unrolled``), on that of an array, whichever is current."""

    def __init__(self, device: Device, like: Array, make: Callable[[], AnyUnrolled]) -> None:
        self._device, self._like = device, like
        with device.of(like):
            self._run = make()

    def step(self, x: Array) -> Array:
        """Run the next step."""
        with self._device.of(self._like):
            return self._run.step(x)

    def state(self) -> tuple[Array, Array]:
        """Return the state after the last step."""
        with self._device.of(self._like):
            return self._run.state()

    def begin_back(self, dh: Array | None, dc: Array | None) -> None:
        """Start the way back."""
        with self._device.of(self._like):
            self._run.begin_back(dh, dc)

    def step_back(self, dh: Array | None) -> Array:
        """Take the gradients back through one step."""
        with self._device.of(self._like):
            return self._run.step_back(dh)

    def state_gradient(self) -> tuple[Array, Array]:
        """Return the gradients by the state before the last step taken back."""
        with self._device.of(self._like):
            return self._run.state_gradient()

    def finish(self) -> dict[str, Array]:
        """Return the gradients by the parameters."""
        with self._device.of(self._like):
            return self._run.finish()
