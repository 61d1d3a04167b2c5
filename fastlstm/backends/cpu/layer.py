"""One layer of a prepared call: which kernels run it, and how."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Params, Signature
from fastlstm.backends.cpu import small_batch
from fastlstm.backends.cpu.launch import AtOnce, launch
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.sequence import DirectionCall, schedules
from fastlstm.backends.cpu.thread_pool import can_run_at_once
from fastlstm.backends.cpu.weights import Packed, size_of
from fastlstm.backends.cpu.workspace import new_array
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import Cell
from fastlstm.kernels.cpu.small_batch import small_forward, small_forward_packed
from fastlstm.parameters import direction_names

__all__ = ["LayerCall", "LayerTape"]


class LayerTape(NamedTuple):
    """The tape of one layer."""

    x: Array  # (T, B, I), the input itself
    rows: Rows
    directions: list[Any]  # of DirectionTape
    y: Array | None = None  # (T, B, D*H), if the outputs of two directions are multiplied


class LayerCall:
    """One layer of a prepared call.

    Attributes
    ----------
    is_small : bool
        Whether the kernels for small batches run it for inference, unless the batch is ragged or has resets.
    small_back : bool
        Likewise of the backward pass.
    state_rows : slice
        Its rows in the states of all layers.
    """

    def __init__(self, cell: Cell, number: int, signature: Signature) -> None:
        steps, batch, self.keep_tape, frozen = signature
        directions = cell.num_directions
        self.number, self.size, self.merge = number, size_of(cell, number), cell.merge
        self.state_rows = slice(number * directions, (number + 1) * directions)
        names = [direction_names(cell, number, direction) for direction in range(directions)]
        self.names = [tuple(name.values()) for name in names]
        self.directions = [
            DirectionCall(self.size, names[direction], direction, signature) for direction in range(directions)
        ]
        in_order = directions == 1 and not (cell.reverse and steps > 1)
        small = in_order and small_batch.is_small(self.size, steps, batch, packed=frozen)
        self.is_small = small and not self.keep_tape
        # A frozen model always uses packed weights, so that inference and training are bit-identical; the small-batch
        # training kernel reads unpacked weights, and sums in another order.
        self._trains_small = small and self.keep_tape and not frozen
        self.small_back = in_order and small_batch.is_small(self.size, steps, batch, backward=True)
        self._training = small_batch.Training(self.size, steps * batch)
        self._x_shape = steps * batch, self.size.inputs
        self._launch: Any = None  # of a small layer, prepared at the first call: it compiles

    def forward(
        self,
        arrays: Params,
        packed: Packed | None,
        x: Array,  # (T, B, I)
        h0: Array,  # (D, B, H)
        c0: Array,
        h_n: Array,  # (D, B, H), OUT
        c_n: Array,
        rows: Rows,
        recompute: bool,
    ) -> tuple[Array, LayerTape | None]:
        """Run the layer: its output (T, B, D*H), and what it leaves on the tape."""
        if (self.is_small or self._trains_small) and rows.is_plain:
            return self._forward_small(arrays, packed, x, h0, c0, h_n, c_n, rows)
        size, directions, threads = self.size, self.directions, get_num_threads()
        h0, c0 = as_plain(h0), as_plain(c0)
        y = new_array((rows.steps * rows.batch, len(directions) * size.hidden), size.dtype, padded=rows.ragged)
        at_once = None
        if len(directions) == 2 and threads > 1:
            chosen = schedules(size, rows.count, rows.batch, threads, directions=2)
            at_once = AtOnce(2) if chosen[0].kind == "directions" and can_run_at_once(2) else None
        tapes = []
        for d, direction in enumerate(directions):
            weights = packed.layers[self.number][d] if packed else None
            tapes.append(
                direction.forward(
                    arrays, weights, x, h0[d], c0[d], rows, y, h_n[d], c_n[d], recompute,
                    1 if at_once else threads, at_once.launch if at_once else launch,
                )
            )  # fmt: skip
        if at_once:
            at_once.run()
        y = y.reshape(rows.steps, rows.batch, y.shape[1])
        kept = y if self.merge == "product" else None
        return _merged(self.merge, y), LayerTape(x, rows, tapes, kept) if self.keep_tape else None

    def _forward_small(
        self, arrays: Params, packed: Packed | None, x: Array, h0: Array, c0: Array, h_n: Array, c_n: Array, rows: Rows
    ) -> tuple[Array, LayerTape | None]:
        """Run the layer over a small batch."""
        size, direction = self.size, self.directions[0]
        if self._trains_small:
            h0 = h0 if type(h0) is np.ndarray and h0.flags.carray else as_plain(h0)
            c0 = c0 if type(c0) is np.ndarray and c0.flags.carray else as_plain(c0)
            y, tape = self._training.forward(direction.arguments(arrays), x.reshape(self._x_shape), h0, c0, h_n, c_n)
            return y.reshape(rows.steps, rows.batch, size.hidden), LayerTape(x, rows, [tape])
        y = np.empty((rows.count, size.hidden), size.dtype)
        given = x.reshape(self._x_shape), h0, c0, y, h_n, c_n
        y = y.reshape(rows.steps, rows.batch, size.hidden)
        if self._launch is None:
            kernel = small_forward_packed if packed else small_forward
            self._launch = small_batch.Inference(kernel, size, 1, rows.steps, rows.batch)
        if packed:
            weights, bias = packed.layers[self.number][0]
            own = packed.own[0][self.number * size.own : (self.number + 1) * size.own]
            self._launch(weights.reshape(-1), bias.reshape(-1), own, *given)
        else:
            self._launch(*direction.given(arrays), *given)
        return y, None

    def backward(
        self,
        arrays: Params,
        tape: LayerTape,
        dy: Array | None,  # (T, B, D*H)
        dh_n: Array,  # (D, B, H)
        dc_n: Array,
        dh0: Array,  # (D, B, H), OUT
        dc0: Array,
        input_gradient: bool = True,
    ) -> tuple[Array | None, dict[str, Array]]:
        """Back-propagate through the layer: dx (T, B, I) or None, and the gradients by its parameters."""
        size, rows, columns = self.size, tape.rows, len(self.directions) * self.size.hidden
        if dy is None:
            dy = np.empty((0, columns), size.dtype)
        else:
            dy = dy if self.merge == "concat" else _unmerged(self.merge, dy, tape.y)
            dy = (dy if dy.flags.carray else as_plain(dy)).reshape(-1, columns)
        if self.small_back and rows.is_plain:
            direction = self.directions[0]
            dx, grads = self._training.backward(
                direction.arguments(arrays), tape.x.reshape(self._x_shape), tape.directions[0], dy, dh_n, dc_n,
                dh0, dc0, input_gradient,
            )  # fmt: skip
            found = direction.named(grads)
        else:
            count, found = rows.steps * rows.batch if input_gradient else 0, {}
            dx = new_array((count, size.inputs), size.dtype, padded=rows.ragged)
            # One direction after the other: each adds to dx, and a second dx would exceed the promised memory.
            for d, direction in enumerate(self.directions):
                grads = direction.backward(
                    arrays, tape.x, tape.directions[d], rows, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d]
                )
                found |= direction.named(grads)
        return dx.reshape(tape.x.shape) if input_gradient else None, found


def _merged(merge: str, y: Array) -> Array:
    """Put the outputs of two directions together: (T, B, 2H), or (T, B, H) for all but "concat"."""
    if merge == "concat":
        return y
    half = y.shape[2] // 2
    one, other = y[..., :half], y[..., half:]
    if merge == "product":
        return one * other
    total = one + other
    return total * total.dtype.type(0.5) if merge == "mean" else total


def _unmerged(merge: str, dy: Array, y: Array | None) -> Array:
    """Take the gradient by the output of a merge but "concat" to that by the outputs of the directions, (T, B, 2H)."""
    if merge == "product":
        assert y is not None
        half = dy.shape[2]
        return np.concatenate([dy * y[..., half:], dy * y[..., :half]], axis=2)
    return np.concatenate([dy * dy.dtype.type(0.5) if merge == "mean" else dy] * 2, axis=2)
