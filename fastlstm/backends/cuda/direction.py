"""The directions of one layer: the recurrence, and products over all steps around it.

Forward: one product of all inputs with W_ih, then the recurrence. Backward: the recurrence, then the gradients of the
weights and of the input, each one product over all steps. The recurrence is one launch (``persistent.py``) where the
plan says so, of both directions at once if they fit. Otherwise it is, forward, for each step one product of h_{t-1}
with W_hh, added to the inputs' share, and one kernel; backward one kernel and one product, or none if the gradient is
truncated. Both leave and read the same tape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastlstm.backends.base import Array, Steps
from fastlstm.backends.cuda.launch import column_sum, geometry, step_kernel, step_records
from fastlstm.backends.cuda.persistent import parts, persistent_backward, persistent_forward
from fastlstm.backends.cuda.plans import Plan
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.layers import Weights

__all__ = ["DirectionsTape", "directions_backward", "directions_forward", "weight_gradients"]


@dataclass(frozen=True)
class DirectionsTape:
    """The tape of K directions that run at once, by packed rows (see ``Packing.step_rows``)."""

    gates: Array  # (K, N, 4H): i, f, g, o
    c: Array  # (K, B + N, H): the initial states, sorted, then c of each row
    h_rows: Array  # (K, N, H): the h before each row's step

    def of(self, chosen: slice | int) -> DirectionsTape:
        """Return that of some of the directions or, without the first axis, of one."""
        return DirectionsTape(self.gates[chosen], self.c[chosen], self.h_rows[chosen])


def directions_forward(
    weights: Sequence[Weights],  # of each direction, C-contiguous
    x: Array,  # (T, B, I), IN
    h0: Array,  # (D, B, H), IN
    c0: Array,  # (D, B, H), IN
    rows: Rows,
    y: Array,  # (T, B, D, H), OUT
    h_n: Array,  # (D, B, H), OUT for every length but 0
    c_n: Array,  # (D, B, H), likewise
    keep_tape: bool,
) -> list[DirectionsTape]:
    """Run the recurrence of all directions: as one launch or two where the plan says so, else step after step."""
    empty, packing, (_, batch, hidden), tapes = rows.device.xp.empty, rows.packing, h0.shape, []
    for part, plan in parts(rows, len(weights)):
        count, first = part.stop - part.start, part.start
        gates, tape = empty((count, packing.rows, weights[0].weight_ih.shape[0]), x.dtype), None
        for k in range(count):
            _project(weights[first + k], x, rows, first + k, gates[k])
        if keep_tape:
            tape = DirectionsTape(
                gates, *(empty((count, number, hidden), x.dtype) for number in (batch + packing.rows, packing.rows))
            )
            tapes.append(tape)
        of_part = h0[part], c0[part], rows, first, y, h_n[part], c_n[part]
        kept = (None, None) if tape is None else (tape.c, tape.h_rows)
        if plan is not None:
            if persistent_forward(plan, weights[part], gates, *of_part, *kept):
                continue
            for k in range(count if keep_tape else 0):  # a wave before the refused one may have overwritten them
                _project(weights[first + k], x, rows, first + k, gates[k])
        for k, d in enumerate(range(first, part.stop)):
            of_one = h0[d], c0[d], rows, d, y, h_n[d], c_n[d]
            _forward_by_steps(weights[d], gates[k], *of_one, None if tape is None else tape.of(k))
    return tapes


def _forward_by_steps(
    weights: Weights,
    gates: Array,  # (N, 4H), the inputs' share IN, gates OUT
    h0: Array,
    c0: Array,
    rows: Rows,
    direction: int,
    y: Array,
    h_n: Array,
    c_n: Array,
    tape: DirectionsTape | None,  # of this direction alone, OUT
) -> None:
    """Run the recurrence as a product and a kernel for each step."""
    device, packing, (batch, hidden) = rows.device, rows.packing, h0.shape
    reverse, keep_tape = rows.reverse(direction), tape is not None
    starts, h0 = packing.step_rows(reverse), rows.without_reset(h0, direction)  # c0 is the kernel's to reset
    if tape is not None:
        h_before, c_before = h_rows, c = tape.h_rows, tape.c
        if starts:
            rows.gather(h0, h_rows[starts[0][0] :], starts[0][1])
        rows.gather(c0, c, batch)
    else:
        # h and c have one place for all steps: a kernel reads them before it writes them. With equal lengths it is that
        # of the final states, and the first step reads the initial states where the caller has them.
        h_before, c_before = rows.sorted(h0), rows.sorted(c0)
        h_rows, c = (h_before, c_before) if packing.ragged else (h_n, c_n)

    kernel, units = step_kernel(
        device, "step_forward", rows.variant, hidden, gates.dtype, (weights.bias, weights.weight_peephole, c_before)
    )
    recurrent = rows.product(h_before, weights.weight_hh, gates, transpose_b=True, accumulate=True)
    records = step_records(packing, starts, hidden, y.shape[2], direction, keep_tape=keep_tape, reverse=reverse)
    for step, ((first, active), record) in enumerate(zip(starts, device.by_value(records), strict=True)):
        if step and c_before is not c:
            c_before = c
            recurrent = rows.product(h_rows, weights.weight_hh, gates, transpose_b=True, accumulate=True)
        recurrent(active, first if keep_tape else 0, first)
        kernel(
            *geometry(active, units),
            (
                gates, weights.bias, weights.weight_peephole, rows.order, rows.lengths, rows.resets, c_before,
                c, h_rows, y, h_n, c_n, record,
            ),
        )  # fmt: skip


def directions_backward(
    weights: Sequence[Weights],  # of each direction, C-contiguous
    tapes: Sequence[DirectionsTape],  # of all directions, in order
    x: Array,  # (T, B, I), IN
    rows: Rows,
    dy: Array | None,  # (T, B, D*H), IN
    dh_n: Array,  # (D, B, H), IN
    dc_n: Array,  # (D, B, H), IN
    dx: Array | None,  # (T, B, I), OUT; None if it is not wanted
    dh0: Array,  # (D, B, H), OUT
    dc0: Array,  # (D, B, H), OUT
    out: Sequence[Weights],  # the gradients by the weights of each direction, OUT
    steps: Steps | None = None,  # (T, D, B, H) each: the gradients by the states, OUT but for padding
) -> None:
    """Back-propagate through all directions; what has run at once forward can do so backward."""
    first = 0
    for taped in tapes:
        last = first + taped.gates.shape[0]
        for part, plan in parts(rows, last - first):
            tape, chosen = taped.of(part), slice(first + part.start, first + part.stop)
            states = dy, dh_n[chosen], dc_n[chosen]
            da, dp = _part_backward(
                plan, weights[chosen], tape, rows, chosen.start, len(weights), *states, dh0[chosen], dc0[chosen], steps
            )
            for k, d in enumerate(range(chosen.start, chosen.stop)):
                if dx is not None:
                    _input_gradient(weights[d], da[k], rows, d, dx)
                weight_gradients(tape.of(k), x, rows, d, da[k], None if dp is None else dp[k], out[d])
        first = last


def _part_backward(
    plan: Plan | None,
    weights: Sequence[Weights],
    tape: DirectionsTape,
    rows: Rows,
    first: int,
    directions: int,
    dy: Array | None,
    dh_n: Array,
    dc_n: Array,
    dh0: Array,
    dc0: Array,
    steps: Steps | None,
) -> tuple[Array, Array | None]:
    """Return the gradients of K directions by the pre-activations, (K, N, 4H), and peepholes, (K, B, 3H) or None."""
    xp, peephole, (count, batch, _) = rows.device.xp, weights[0].weight_peephole, dh_n.shape
    da = xp.empty(tape.gates.shape, dh_n.dtype)
    dp = None if peephole is None else xp.zeros((count, batch, peephole.size), dh_n.dtype)
    states = dy, dh_n, dc_n, da, dp, dh0, dc0, steps
    if plan is None or not persistent_backward(plan, weights, tape.gates, tape.c, rows, first, directions, *states):
        if plan is not None and dp is not None:
            dp[...] = 0  # a wave before the refused one may have written there
        for k in range(count):
            dp_k = None if dp is None else dp[k]
            of_one = dy, dh_n[k], dc_n[k], da[k], dp_k, dh0[k], dc0[k], steps
            _backward_by_steps(weights[k], tape.of(k), rows, first + k, directions, *of_one)
    return da, dp


def _backward_by_steps(
    weights: Weights,
    tape: DirectionsTape,  # of this direction alone
    rows: Rows,
    direction: int,
    directions: int,
    dy: Array | None,
    dh_n: Array,
    dc_n: Array,
    da: Array,  # (N, 4H), OUT
    dp: Array | None,  # (B, UNIT_WEIGHTS * H): gains the gradients by the unit weights
    dh0: Array,
    dc0: Array,
    steps: Steps | None,
) -> None:
    """Run the recurrence backward as a kernel and a product for each step."""
    device, packing, hidden, peephole = rows.device, rows.packing, dh_n.shape[1], weights.weight_peephole
    # In a ragged batch, sequences that end before a step keep the gradient of their final state until their own end.
    dh_next, dc_next = rows.sorted(dh_n), rows.sorted(dc_n)
    dh, dc = (dh_next, dc_next) if packing.ragged else (dh0, dc0)

    kernel, units = step_kernel(
        device, "step_backward", rows.variant, hidden, da.dtype, (dy, dh_next, dc_next, peephole)
    )
    to_h = rows.product(da, weights.weight_hh, dh)
    reverse, zeros = rows.reverse(direction), 0  # rows of dh that a truncated gradient has made zero
    starts, (dh_steps, dc_steps) = packing.step_rows(reverse), (None, None) if steps is None else steps
    records = step_records(packing, starts, hidden, directions, direction, keep_tape=True, reverse=reverse)
    for (first, active), record in zip(reversed(starts), reversed(device.by_value(records)), strict=True):
        kernel(
            *geometry(active, units),
            (
                dy, dh_next, dc_next, dc, tape.gates, tape.c, peephole, rows.order, rows.lengths,
                rows.resets, dh_steps, dc_steps, da, dp, record,
            ),
        )  # fmt: skip
        if not rows.cell.truncated:
            to_h(active, first)
        elif active > zeros:  # the others were zero before
            dh[zeros:active], zeros = 0, active
        dh_next, dc_next = dh, dc
    rows.restore(dh, dh0)
    rows.restore(dc, dc0)
    if rows.resets is not None:
        dh0[...] = rows.without_reset(dh0, direction)


def _project(weights: Weights, x: Array, rows: Rows, direction: int, a: Array) -> None:
    """Write the inputs' share of all pre-activations to `a` (N, 4H)."""
    if rows.packing.rows:
        rows.product(rows.pack(x, rows.reverse(direction)), weights.weight_ih, a, transpose_b=True)()


def _input_gradient(weights: Weights, da: Array, rows: Rows, direction: int, dx: Array) -> None:
    """Write the gradient by the input to `dx` (T, B, I); the second direction adds its share."""
    device, inputs = rows.device, dx.shape[2]
    if not rows.packing.ragged:
        rows.product(da, weights.weight_ih, dx.reshape(-1, inputs), accumulate=direction > 0)()
        return
    packed = device.xp.empty((rows.packing.rows, inputs), dx.dtype)
    if rows.packing.rows:
        rows.product(da, weights.weight_ih, packed)()
    rows.unpack(packed, dx, rows.reverse(direction), accumulate=direction > 0)


def weight_gradients(
    tape: DirectionsTape, x: Array, rows: Rows, direction: int, da: Array, dp: Array | None, out: Weights
) -> None:
    """Write the sums over all rows of da x^T, da h^T and da, and those over the batch of `dp`."""
    device = rows.device
    if da.shape[0]:
        rows.product(da, rows.pack(x, rows.reverse(direction)), out.weight_ih, transpose_a=True)()
        rows.product(da, tape.h_rows, out.weight_hh, transpose_a=True)()
    else:
        out.weight_ih[...] = out.weight_hh[...] = 0
    if out.bias is not None:
        column_sum(device, da, out.bias)
    if out.weight_peephole is not None:
        column_sum(device, dp, out.weight_peephole.reshape(-1))
