"""A prepared call on the CPU: decisions by the signature are made once; each layer is a kernel launch.

What a caller can change between two calls with the same signature is checked in each call: type, dtype, byte order and
shape in ``fastlstm/calls.py``; strides, alignment and writeability where an array goes to a kernel (``as_plain``).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, Dropout, ForwardResult, Params, RefusedError, Signature
from fastlstm.backends.cpu.layer import LayerCall
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.small_batch import Inference
from fastlstm.backends.cpu.state_gradients import backward_with_steps
from fastlstm.backends.cpu.thread_pool import NO_TEAM
from fastlstm.backends.cpu.weights import PACKED, Packed, again, frozen_arrays, packed_model
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.backends.layers import StackTape, dropout_mask
from fastlstm.backends.plain_arrays import are_native, as_plain
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.jit import VECTOR_BYTES
from fastlstm.kernels.cpu.small_batch import small_forward, small_forward_packed
from fastlstm.parameters import shapes

__all__ = ["PreparedCall"]


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
        self.cell, self.dtype, self.signature, self.frozen = cell, cell.dtype, signature, signature.frozen
        self.state_shape = (cell.num_layers * cell.num_directions, signature.batch, cell.hidden_size)
        self.layers = [LayerCall(cell, layer, signature) for layer in range(cell.num_layers)]
        self.rows = Rows(None, signature.steps, signature.batch)
        self.is_empty = self.rows.count == 0
        # One launch for one layer with a small batch, or for one step of several layers on packed weights.
        one_layer = cell.num_layers == 1
        self.is_one_launch = (
            not self.is_empty
            and all(layer.is_small for layer in self.layers)
            and (one_layer or (signature.frozen and signature.steps == 1))
        )
        self.folding = Folding(cell) if is_folded(cell) else None
        self.checks_itself = self.is_one_launch and self.folding is None
        self._given, self._names = self.layers[0].directions[0].given, len(shapes(cell))
        # A few rows, which no call changes.
        self._zeros = np.zeros(self.state_shape, self.dtype) if self.is_one_launch else None
        self._no_state = np.empty((0, *self.state_shape[1:]), self.dtype)
        self._launch: Any = None  # prepared at the first call: it compiles
        self._x_shape, self._y_shape = (self.rows.count, cell.input_size), (self.rows.count, cell.hidden_size)
        self._sequence_shape = signature.steps, signature.batch, cell.hidden_size

    def __reduce__(self) -> Any:
        return again, (VECTOR_BYTES, PreparedCall, self.cell, self.signature)

    def forward(
        self,
        params: Params,
        x: Array,
        h0: Array | None,
        c0: Array | None,
        lengths: Array | None,
        dropout: Dropout | None,
        recompute: bool,
        resets: Array | None = None,
    ) -> ForwardResult:
        """Run the whole sequence through all layers (see ``base.Prepared.forward``)."""
        shape, dtype = self.state_shape, self.dtype
        x = x if x.flags.carray else as_plain(x)
        if h0 is None or c0 is None:
            h0 = c0 = np.zeros(shape, dtype) if self._zeros is None else self._zeros
        if self.is_empty:
            return self._empty(x, h0, c0)
        h_n, c_n = np.empty(shape, dtype), np.empty(shape, dtype)
        if self.is_one_launch and lengths is None and resets is None:
            y = self._at_once(params, x.reshape(self._x_shape), h0, c0, h_n, c_n)
            return ForwardResult(y.reshape(self._sequence_shape), h_n, c_n, None)
        rows = self.rows
        if lengths is not None or resets is not None or not rows.is_kept:
            rows = Rows(lengths, rows.steps, rows.batch, resets)
        if resets is not None:
            h0, c0 = (self._without_reset(rows, np.array(state)) for state in (h0, c0))
        y, tape = self._forward_layers(params, x, h0, c0, h_n, c_n, rows, dropout, recompute)
        return ForwardResult(y, h_n, c_n, tape)

    def step(self, params: Params, x: Array, h0: Array | None, c0: Array | None) -> tuple[Array, Array, Array]:
        """Advance one time step (see ``base.Prepared.step``)."""
        shape, dtype = self.state_shape, self.dtype
        if h0 is None or c0 is None:
            h0 = c0 = np.zeros(shape, dtype) if self._zeros is None else self._zeros
        h_n, c_n = np.empty(shape, dtype), np.empty(shape, dtype)
        if self.is_one_launch:
            return self._at_once(params, x, h0, c0, h_n, c_n), h_n, c_n
        result = self.forward(params, x[None], h0, c0, None, None, False)
        return result.y[0], result.h_n, result.c_n

    def _empty(self, x: Array, h0: Array, c0: Array) -> ForwardResult:
        """Return the result of a call without time steps, or without sequences."""
        y = np.zeros((*x.shape[:2], self.cell.output_size), self.dtype)
        tape = StackTape((self.rows.steps, self.rows.batch), [], []) if self.signature.keep_tape else None
        return ForwardResult(y, h0.copy(), c0.copy(), tape)

    def _at_once(self, params: Any, x: Array, h0: Array, c0: Array, h_n: Array, c_n: Array) -> Array:
        """Run all layers by one launch, from x (T * B, I) to the output (T * B, H)."""
        if self._launch is None:
            self._launch = self._inference()
        launch, y = self._launch, np.empty(self._y_shape, self.dtype)
        arrays: Any
        if self.frozen:
            arrays = (params.kept.get(PACKED) or packed_model(self.cell, params)).at_once
        else:
            arrays = self._given(params if self.folding is None else self.folding.unfold(params))
            if len(params) != self._names or not are_native(self.dtype, *arrays):
                raise RefusedError
        try:
            if launch.direct and launch.kernel(*arrays, x, h0, c0, y, h_n, c_n, launch.settings, NO_TEAM, 0):
                return y
        except TypeError:  # Numba's, of an array of another layout
            launch.careful, launch.direct = True, False
        launch(*arrays, x, h0, c0, y, h_n, c_n)
        return y

    def _inference(self) -> Inference:
        """Prepare the one launch."""
        size, steps, batch = self.layers[0].size, self.rows.steps, self.rows.batch
        if self.frozen:
            return Inference(small_forward_packed, size, len(self.layers), steps, batch)
        return Inference(small_forward, size, 1, steps, batch)

    def _forward_layers(
        self,
        params: Params,
        x: Array,
        h0: Array,
        c0: Array,
        h_n: Array,
        c_n: Array,
        rows: Rows,
        dropout: Dropout | None,
        recompute: bool,
    ) -> tuple[Array, StackTape | None]:
        """Run one layer after the other; the output and the tape."""
        packed: Packed | None = packed_model(self.cell, params) if isinstance(params, FrozenParams) else None
        arrays = self._arrays(params)
        if len(self.layers) == 1:
            y, tape = self.layers[0].forward(arrays, packed, x, h0, c0, h_n, c_n, rows, recompute)
            return y, StackTape((rows.steps, rows.batch), [tape], [None]) if self.signature.keep_tape else None
        stack = StackTape((rows.steps, rows.batch), [], [])
        for number, layer in enumerate(self.layers):
            mask = dropout_mask(np, dropout, number, x) if number and dropout else None
            if mask is not None:
                x = x * mask
            state = layer.state_rows
            x, tape = layer.forward(arrays, packed, x, h0[state], c0[state], h_n[state], c_n[state], rows, recompute)
            stack.layers.append(tape)
            stack.masks.append(mask)
        return x, stack if self.signature.keep_tape else None

    def _arrays(self, params: Params) -> Params:
        """Return the parameters with rows for all gates; of a frozen model, arrays that the kernels take."""
        if isinstance(params, FrozenParams):
            return frozen_arrays(self.cell, params)
        return params if self.folding is None else self.folding.unfold(params)

    def _without_reset(self, rows: Rows, states: Array) -> Array:
        """Set what belongs to states before the first step, (L * D, B, H), to zero in place where they are reset."""
        directions = self.cell.num_directions
        for direction in range(directions):
            begins = rows.begins_reset(direction == 1 or self.cell.reverse)
            states[direction::directions, begins] = 0
        return states

    def backward(
        self,
        params: Params,
        tape: StackTape,
        dy: Array | None,
        dh_n: Array | None,
        dc_n: Array | None,
        keep_steps: bool = False,
        input_gradient: bool = True,
    ) -> BackwardResult:
        """Back-propagate through all layers (see ``base.Prepared.backward``)."""
        if keep_steps:
            return backward_with_steps(self.cell, params, tape, dy, dh_n, dc_n, input_gradient)
        shape, dtype = self.state_shape, self.dtype
        # The kernel for small batches takes a state of no layers for zeros.
        small = len(self.layers) == 1 == len(tape.layers) and self.layers[0].small_back and tape.layers[0].rows.is_plain
        nothing = self._no_state if small else np.zeros(shape, dtype)
        dh_n = nothing if dh_n is None else as_plain(dh_n)
        dc_n = nothing if dc_n is None else as_plain(dc_n)
        if not tape.layers:
            dx = np.zeros((*tape.shape, self.cell.input_size), dtype) if input_gradient else None
            zeros = {name: np.zeros(value.shape, dtype) for name, value in params.items()}
            return BackwardResult(dx, dh_n.copy(), dc_n.copy(), zeros)
        arrays = self._arrays(params)
        dh0, dc0 = np.empty(shape, dtype), np.empty(shape, dtype)
        if len(self.layers) == 1:
            dx, found = self.layers[0].backward(arrays, tape.layers[0], dy, dh_n, dc_n, dh0, dc0, input_gradient)
            return self._result(tape, dx, dh0, dc0, found)
        by_layer = []
        for number in reversed(range(len(self.layers))):
            layer = self.layers[number]
            state = layer.state_rows
            dx, found = layer.backward(
                arrays, tape.layers[number], dy, dh_n[state], dc_n[state], dh0[state], dc0[state],
                input_gradient or number > 0,
            )  # fmt: skip
            by_layer.append(found)
            mask = tape.masks[number]
            dy = dx if mask is None else dx * mask
        found = {name: array for found in by_layer[::-1] for name, array in found.items()}
        return self._result(tape, dx, dh0, dc0, found)

    def _result(
        self, tape: StackTape, dx: Array | None, dh0: Array, dc0: Array, found: dict[str, Array]
    ) -> BackwardResult:
        """Bring the gradients to the parameters that there are, and to the states before a reset."""
        rows: Rows = tape.layers[0].rows
        if rows.resets is not None:
            dh0, dc0 = self._without_reset(rows, dh0), self._without_reset(rows, dc0)
        return BackwardResult(dx, dh0, dc0, self.folding.fold(found) if self.folding else found)
