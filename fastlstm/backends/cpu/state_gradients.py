"""The gradients by the states after each time step, computed by the reference: the kernels do not keep them.

It runs each layer once more on what the tape has, and back-propagates. That takes the time and the memory of the
reference, and is for looking at gradients, not for training.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, Params
from fastlstm.backends.layers import Given, StackTape, layer_weights
from fastlstm.backends.reference import BACKEND as REFERENCE
from fastlstm.cell import Cell

__all__ = ["backward_with_steps"]


def backward_with_steps(
    cell: Cell, params: Params, tape: StackTape, dy: Array | None, dh_n: Array | None, dc_n: Array | None,
    input_gradient: bool,
) -> BackwardResult:  # fmt: skip
    """Back-propagate through all layers, and keep the gradients by the states (see ``base.Prepared.backward``)."""
    layers = []
    for number, layer in enumerate(tape.layers):
        given = Given(cell, number, layer.rows.lengths, layer.rows.resets, None, True, False)
        h0 = np.stack([_first_h(cell, layer, direction) for direction in range(cell.num_directions)])
        c0 = np.stack([direction.c0 for direction in layer.directions])
        weights = layer_weights(cell, params, number)
        layers.append(REFERENCE.layer_forward(weights, layer.x, h0, c0, given).tape)
    stack = StackTape(tape.shape, layers, tape.masks)
    return REFERENCE.backward(cell, params, stack, dy, dh_n, dc_n, True, input_gradient)


def _first_h(cell: Cell, layer: Any, direction: int) -> Array:
    """Return the h before the first step, (B, H), of the sequences that have one."""
    rows = layer.rows
    index = rows.index(direction == 1 or cell.reverse)
    count = index[2 * rows.batch + 1] if rows.longest else 0  # rows of the first step
    h0 = np.zeros((rows.batch, cell.hidden_size), cell.dtype)
    h0[index[:count]] = layer.directions[direction].h_rows[:count, : cell.hidden_size]
    return h0
