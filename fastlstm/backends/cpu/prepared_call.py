"""A call of a model on the CPU: what its signature decides is decided once; layer by layer, a kernel is launched.

What a caller can change between two calls of one signature (strides, alignment, byte order, writeability, the
parameters) is looked at in each call, by ``plain_arrays.as_plain``, and only there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, Dropout, ForwardResult, Params, Signature
from fastlstm.backends.cpu import small_batch
from fastlstm.backends.cpu.launch import AtOnce, launch
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.sequence import DirectionTape, direction_backward, direction_forward, schedules
from fastlstm.backends.cpu.weights import arguments_of, packed_model, size_of
from fastlstm.backends.cpu.workspace import new_array
from fastlstm.backends.layers import StackTape, Weights, dropout_mask, layer_weights
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.small_batch import small_forward, small_forward_packed
from fastlstm.parameters import direction_names

__all__ = ["LayerTape", "PreparedCall"]


class LayerTape(NamedTuple):
    """What one layer leaves on the tape."""

    x: Array  # (T, B, I), the input itself
    rows: Rows
    directions: list[DirectionTape]


class PreparedCall:
    """A call of a model (see ``base.Prepared``).

    Parameters
    ----------
    cell : Cell
        The model.
    signature : Signature
        What its calls have in common.
    """

    def __init__(self, cell: Cell, signature: Signature) -> None:
        self.cell, self.signature = cell, signature
        self.sizes = [size_of(cell, layer) for layer in range(cell.num_layers)]
        self.state_shape = (cell.num_layers * cell.num_directions, signature.batch, cell.hidden_size)
        steps, batch, packed = signature.steps, signature.batch, signature.frozen
        one_way = cell.num_directions == 1 and steps * batch > 0
        # What is kept of a frozen model is packed; the kernel for training on few rows reads unpacked weights, and
        # sums in another order.
        inference = not signature.keep_tape
        self._small = [
            one_way and (inference or not packed) and small_batch.is_small(size, steps, batch, packed=packed)
            for size in self.sizes
        ]
        self._small_back = [one_way and small_batch.is_small(size, steps, batch, backward=True) for size in self.sizes]
        # One launch for all layers, if they are few rows on packed weights.
        self._whole: Any = None
        if inference and packed and all(self._small) and (steps == 1 or cell.num_layers == 1):
            self._whole = functools.partial(small_batch.infer, small_forward_packed, self.sizes[0], cell.num_layers)
        self._runs: dict[
            int, Any
        ] = {}  # by layer, -1 for all at once: what runs small ones, prepared at the first call

    def forward(
        self,
        params: Params,
        x: Array,
        h0: Array | None,
        c0: Array | None,
        lengths: Array | None,
        dropout: Dropout | None,
        recompute: bool,
    ) -> ForwardResult:
        """Run the whole sequence through all layers (see ``base.Prepared.forward``)."""
        steps, batch, keep_tape, is_step, _ = self.signature
        cell, dtype = self.cell, self.cell.dtype
        x = x if x.flags.carray else as_plain(x)
        h0 = np.zeros(self.state_shape, dtype) if h0 is None else h0 if h0.flags.carray else as_plain(h0)
        c0 = np.zeros(self.state_shape, dtype) if c0 is None else c0 if c0.flags.carray else as_plain(c0)
        if self._whole is not None and lengths is None:
            return self._forward_whole(params, x, h0, c0)
        x = x[None] if is_step else x
        if steps == 0 or batch == 0:
            y = np.zeros((batch, cell.output_size) if is_step else (steps, batch, cell.output_size), dtype)
            return ForwardResult(y, h0.copy(), c0.copy(), StackTape((steps, batch), [], []) if keep_tape else None)
        h_n, c_n = np.empty(self.state_shape, dtype), np.empty(self.state_shape, dtype)
        rows, stack = Rows(lengths, steps, batch), StackTape((steps, batch), [], [])
        packed = packed_model(cell, params) if isinstance(params, FrozenParams) else None
        for layer in range(cell.num_layers):
            mask = dropout_mask(np, dropout, layer, x) if layer and dropout else None
            if mask is not None:
                x = x * mask
            weights = layer_weights(cell, params, layer)
            state = slice(layer * cell.num_directions, (layer + 1) * cell.num_directions)
            states = h0[state], c0[state], h_n[state], c_n[state]
            if self._small[layer] and not rows.ragged:
                x, tape = self._small_layer(layer, weights[0], packed, x, rows, *states)
            else:
                of_layer = packed.layers[layer] if packed else [None] * cell.num_directions
                x, tape = self._large_layer(layer, weights, of_layer, x, rows, *states, recompute)
            stack.layers.append(tape)
            stack.masks.append(mask)
        return ForwardResult(x[0] if is_step else x, h_n, c_n, stack if keep_tape else None)

    def _forward_whole(self, params: Any, x: Array, h0: Array, c0: Array) -> ForwardResult:
        """Run all layers by one launch."""
        steps, batch = self.signature.steps, self.signature.batch
        packed, dtype, hidden = packed_model(self.cell, params), self.cell.dtype, self.cell.hidden_size
        run = self._runs.get(-1)
        if run is None:
            run = self._runs[-1] = self._whole((), steps, batch)
        y = np.empty((steps * batch, hidden), dtype)
        h_n, c_n = np.empty(self.state_shape, dtype), np.empty(self.state_shape, dtype)
        rows = x if x.ndim == 2 else x.reshape(steps * batch, self.cell.input_size)
        run(packed.weights[0], packed.bias[0], packed.own[0], rows, h0, c0, y, h_n, c_n)
        return ForwardResult(y if x.ndim == 2 else y.reshape(steps, batch, hidden), h_n, c_n, None)

    def _small_layer(
        self, layer: int, weights: Weights, packed: Any, x: Array, rows: Rows,
        h0: Array, c0: Array, h_n: Array, c_n: Array,
    ) -> tuple[Array, LayerTape | None]:  # fmt: skip
        """Run a layer over a few rows."""
        size, steps, batch = self.sizes[layer], rows.steps, rows.batch
        y = np.empty((rows.count, size.hidden), size.dtype)
        given = x.reshape(rows.count, size.inputs), h0, c0, y, h_n, c_n
        tape = None
        if self.signature.keep_tape:
            tape = LayerTape(x, rows, [small_batch.small_forward(size, weights, *given)])
        else:
            run = self._runs.get(layer)
            if run is None:
                kernel = small_forward_packed if packed else small_forward
                run = self._runs[layer] = small_batch.infer(kernel, size, 1, (), steps, batch)
            if packed:
                of_weights, bias = packed.layers[layer][0]
                own = packed.own[0][layer * size.own : (layer + 1) * size.own]
                run(of_weights.reshape(-1), bias.reshape(-1), own, *given)
            else:
                run(*arguments_of(weights, size), *given)
        return y.reshape(steps, batch, size.hidden), tape

    def _large_layer(
        self, layer: int, weights: list[Weights], packed: list[Any], x: Array, rows: Rows,
        h0: Array, c0: Array, h_n: Array, c_n: Array, recompute: bool,
    ) -> tuple[Array, LayerTape | None]:  # fmt: skip
        """Run a layer, both directions at once if that is better."""
        size, directions, keep_tape = self.sizes[layer], len(weights), self.signature.keep_tape
        y = new_array((rows.steps * rows.batch, directions * size.hidden), size.dtype, padded=rows.ragged)
        threads = get_num_threads()
        at_once = None
        if directions == 2 and threads > 1:
            chosen = schedules(size, rows.count, rows.batch, threads, directions=2)
            at_once = AtOnce(directions) if chosen[0].kind == "directions" else None
        tapes = [
            direction_forward(
                size, weights[d], packed[d], x, h0[d], c0[d], rows, d, y, h_n[d], c_n[d], keep_tape, recompute,
                1 if at_once else threads, at_once.launch if at_once else launch,
            )
            for d in range(directions)
        ]  # fmt: skip
        if at_once:
            at_once.run()
        y = y.reshape(rows.steps, rows.batch, y.shape[1])
        return y, LayerTape(x, rows, tapes) if keep_tape else None  # type: ignore[arg-type]

    def backward(
        self, params: Params, tape: StackTape, dy: Array | None, dh_n: Array | None, dc_n: Array | None
    ) -> BackwardResult:
        """Back-propagate through all layers (see ``base.Prepared.backward``)."""
        steps, batch = tape.shape
        cell, dtype = self.cell, self.cell.dtype
        dh_n = np.zeros(self.state_shape, dtype) if dh_n is None else as_plain(dh_n)
        dc_n = np.zeros(self.state_shape, dtype) if dc_n is None else as_plain(dc_n)
        if not tape.layers:
            dx = np.zeros((steps, batch, cell.input_size), dtype)
            zeros = {name: np.zeros(value.shape, dtype) for name, value in params.items()}
            return BackwardResult(dx, dh_n.copy(), dc_n.copy(), zeros)
        dh0, dc0 = np.empty(self.state_shape, dtype), np.empty(self.state_shape, dtype)
        found: Params = {}
        for layer in reversed(range(cell.num_layers)):
            state = slice(layer * cell.num_directions, (layer + 1) * cell.num_directions)
            weights = layer_weights(cell, params, layer)
            dx, grads = self._layer_back(
                layer, weights, tape.layers[layer], dy, dh_n[state], dc_n[state], dh0[state], dc0[state]
            )
            for direction, of_direction in enumerate(grads):
                for role, name in direction_names(cell, layer, direction).items():
                    found[name] = getattr(of_direction, role)
            mask = tape.masks[layer]
            dy = dx if mask is None else dx * mask
        return BackwardResult(dy, dh0, dc0, {name: found[name] for name in params})

    def _layer_back(
        self, layer: int, weights: list[Weights], tape: LayerTape, dy: Array | None,
        dh_n: Array, dc_n: Array, dh0: Array, dc0: Array,
    ) -> tuple[Array, list[Weights]]:  # fmt: skip
        """Back-propagate through one layer; dx and the gradients of each direction's parameters."""
        size, rows = self.sizes[layer], tape.rows
        columns = len(weights) * size.hidden
        dy = np.empty((0, columns), size.dtype) if dy is None else as_plain(dy).reshape(-1, columns)
        dx = new_array((rows.steps * rows.batch, size.inputs), size.dtype, padded=rows.ragged)
        if self._small_back[layer] and not rows.ragged:
            x = tape.x.reshape(dx.shape)
            grads = [small_batch.small_backward(size, weights[0], x, tape.directions[0], dy, dh_n, dc_n, dx, dh0, dc0)]
        else:
            # One direction after the other: each adds to dx, and a second dx would exceed the promised memory.
            grads = [
                direction_backward(
                    size, w, tape.x, tape.directions[d], rows, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d]
                )
                for d, w in enumerate(weights)
            ]
        return dx.reshape(tape.x.shape), grads
