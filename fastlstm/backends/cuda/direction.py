"""One direction of one layer: a product and a kernel for each time step, and products over all steps around them.

Forward: one product of all inputs with W_ih, then for each step one product of h_{t-1} with W_hh, added to it, and one
kernel. Backward: for each step one kernel and one product, then the gradients of the weights and of the input, each one
product over all steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastlstm.backends.base import Array
from fastlstm.backends.cuda.launch import column_sum, geometry, step_kernel, step_records
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.layers import Weights

__all__ = ["DirectionTape", "direction_backward", "direction_forward"]


@dataclass(frozen=True)
class DirectionTape:
    """What one direction leaves on the tape, by packed rows (see ``Packing.step_rows``)."""

    gates: Array  # (N, 4H): i, f, g, o
    c: Array  # (B + N, H): the initial states, sorted, then c of each row
    h_rows: Array  # (N, H): the h before each row's step


def direction_forward(
    weights: Weights,  # C-contiguous
    x: Array,  # (T, B, I), IN
    h0: Array,  # (B, H), IN
    c0: Array,  # (B, H), IN
    rows: Rows,
    direction: int,
    y: Array,  # (T, B, D, H), OUT at `direction`
    h_n: Array,  # (B, H), OUT for every length but 0
    c_n: Array,  # (B, H), likewise
    keep_tape: bool,
) -> DirectionTape | None:
    """Run the recurrence of one direction."""
    device, packing, (batch, hidden) = rows.device, rows.packing, h0.shape
    starts = packing.step_rows(direction == 1)
    gates = _project(weights, x, rows, direction)
    if keep_tape:
        h_rows = device.xp.empty((packing.rows, hidden), x.dtype)
        c = device.xp.empty((batch + packing.rows, hidden), x.dtype)
        if starts:
            rows.gather(h0, h_rows[starts[0][0] :], starts[0][1])
        rows.gather(c0, c, batch)
        h_before, c_before = h_rows, c
    else:
        # h and c have one place for all steps: a kernel reads them before it writes them. With equal lengths it is that
        # of the final states, and the first step reads the initial states where the caller has them.
        h_before, c_before = rows.sorted(h0), rows.sorted(c0)
        h_rows, c = (h_before, c_before) if packing.ragged else (h_n, c_n)

    kernel, units = step_kernel(
        device, "step_forward", weights, hidden, x.dtype, (weights.bias, weights.weight_peephole, c_before)
    )
    recurrent = device.product(h_before, weights.weight_hh, gates, transpose_b=True, accumulate=True)
    records = step_records(packing, starts, hidden, y.shape[2], direction, keep_tape=keep_tape)
    for step, ((first, active), record) in enumerate(zip(starts, device.by_value(records), strict=True)):
        if step and c_before is not c:
            c_before = c
            recurrent = device.product(h_rows, weights.weight_hh, gates, transpose_b=True, accumulate=True)
        recurrent(active, first if keep_tape else 0, first)
        kernel(
            *geometry(active, units),
            (
                gates, weights.bias, weights.weight_peephole, rows.order, rows.lengths, c_before,
                c, h_rows, y, h_n, c_n, record,
            ),
        )  # fmt: skip
    return DirectionTape(gates, c, h_rows) if keep_tape else None


def direction_backward(
    weights: Weights,  # C-contiguous
    tape: DirectionTape,
    x: Array,  # (T, B, I), IN
    rows: Rows,
    direction: int,
    directions: int,
    dy: Array | None,  # (T, B, D*H), IN
    dh_n: Array,  # (B, H), IN
    dc_n: Array,  # (B, H), IN
    dx: Array,  # (T, B, I), OUT, or added to after the first direction
    dh0: Array,  # (B, H), OUT
    dc0: Array,  # (B, H), OUT
) -> Weights:
    """Back-propagate through one direction; the gradients of its weights."""
    device, packing, (batch, hidden) = rows.device, rows.packing, dh_n.shape
    da = device.xp.empty(tape.gates.shape, dh_n.dtype)
    peephole = weights.weight_peephole
    dp = None if peephole is None else device.xp.zeros((batch, peephole.size), dh_n.dtype)
    # In a ragged batch, sequences that end before a step keep the gradient of their final state until their own end.
    dh_next, dc_next = rows.sorted(dh_n), rows.sorted(dc_n)
    dh, dc = (dh_next, dc_next) if packing.ragged else (dh0, dc0)

    kernel, units = step_kernel(device, "step_backward", weights, hidden, da.dtype, (dy, dh_next, dc_next, peephole))
    to_h = device.product(da, weights.weight_hh, dh)
    starts = packing.step_rows(direction == 1)
    records = step_records(packing, starts, hidden, directions, direction, keep_tape=True)
    for (first, active), record in zip(reversed(starts), reversed(device.by_value(records)), strict=True):
        kernel(
            *geometry(active, units),
            (
                dy, dh_next, dc_next, dc, tape.gates, tape.c, peephole, rows.order, rows.lengths,
                da, dp, record,
            ),
        )  # fmt: skip
        to_h(active, first)
        dh_next, dc_next = dh, dc
    rows.restore(dh, dh0)
    rows.restore(dc, dc0)
    _input_gradient(weights, da, rows, direction, dx)
    return _weight_gradients(weights, tape, x, rows, direction, da, dp)


def _project(weights: Weights, x: Array, rows: Rows, direction: int) -> Array:
    """Return the inputs' share of all pre-activations, (N, 4H)."""
    a = rows.device.xp.empty((rows.packing.rows, weights.weight_ih.shape[0]), x.dtype)
    if rows.packing.rows:
        rows.device.product(rows.pack(x, direction == 1), weights.weight_ih, a, transpose_b=True)()
    return a


def _input_gradient(weights: Weights, da: Array, rows: Rows, direction: int, dx: Array) -> None:
    """Write the gradient by the input to `dx` (T, B, I); the second direction adds its share."""
    device, inputs = rows.device, dx.shape[2]
    if not rows.packing.ragged:
        device.product(da, weights.weight_ih, dx.reshape(-1, inputs), accumulate=direction > 0)()
        return
    packed = device.xp.empty((rows.packing.rows, inputs), dx.dtype)
    if rows.packing.rows:
        device.product(da, weights.weight_ih, packed)()
    rows.unpack(packed, dx, direction == 1, accumulate=direction > 0)


def _weight_gradients(
    weights: Weights, tape: DirectionTape, x: Array, rows: Rows, direction: int, da: Array, dp: Array | None
) -> Weights:
    """Return the sums over all rows of da x^T, da h^T and da, and those over the batch of `dp`."""
    device = rows.device
    zeros_or_empty = device.xp.empty if da.shape[0] else device.xp.zeros
    dweight_ih = zeros_or_empty(weights.weight_ih.shape, da.dtype)
    dweight_hh = zeros_or_empty(weights.weight_hh.shape, da.dtype)
    if da.shape[0]:
        device.product(da, rows.pack(x, direction == 1), dweight_ih, transpose_a=True)()
        device.product(da, tape.h_rows, dweight_hh, transpose_a=True)()
    return Weights(
        dweight_ih,
        dweight_hh,
        None if weights.bias is None else column_sum(device, da),
        None if weights.weight_peephole is None else column_sum(device, dp).reshape(weights.weight_peephole.shape),
    )
