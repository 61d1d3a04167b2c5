"""The recurrence of one direction, or of both, in one launch: the host's side of kernels/cuda/persistent.cu.

A call runs in waves if the batch has more groups of sequences than the device holds at once. Each returns False if the
step path has to run instead, over the whole batch: a part of the outputs may have been written, forward with a tape a
part of the gates too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from fastlstm.backends.base import Array, Steps
from fastlstm.backends.cuda.device import Device, RefusedLaunchError
from fastlstm.backends.cuda.launch import variant_of
from fastlstm.backends.cuda.plans import Choice, Plan, choose
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.layers import Weights
from fastlstm.cell import Cell
from fastlstm.kernels.cuda import loader

__all__ = ["FIELDS", "choice_of", "parts", "persistent_backward", "persistent_forward"]

# The fields of struct Direction in kernels/cuda/persistent.cu, each of 64 bits.
FIELDS = ("row", "groups", "rows", "steps", "batch", "hidden", "directions", "direction", "reverse")


def choice_of(device: Device, cell: Cell, steps: int, batch: int, *, resets: bool = False) -> Choice:
    """Decide how a layer runs on the current device (see ``plans.choose``); what was refused is not tried again."""
    limits, variant, refusal = device.limits(), _variant(cell, resets), ""
    for directions in dict.fromkeys((cell.num_directions, 1)):  # at once, if that was not refused
        sizes = cell.dtype, cell.hidden_size, steps, batch, directions
        choice = choose(limits, *sizes, cell.precision, variant)
        refused = device.refusals.get((limits, choice.plan, variant)) if choice.plan else None
        if refused is None:
            return choice
        refusal = refused
    return Choice(None, f"a persistent kernel was refused ({refusal})")


def _variant(cell: Cell, resets: bool) -> tuple[str, ...]:
    """Return the macros of the cell as the persistent kernels take them."""
    more = {"TRUNCATED": cell.truncated, "RESETS": resets}
    return (*variant_of(cell), *(macro for macro, given in more.items() if given))


def parts(rows: Rows, directions: int) -> Iterator[tuple[slice, Plan | None]]:
    """Divide directions into those that run at once, each with its plan, or None for the step path.

    The choice is made anew for each, so that what is refused meanwhile is not tried again.
    """
    packing, first = rows.packing, 0
    while first < directions:
        batch = packing.order.size
        steps = packing.steps if packing.rows else 0  # of lengths that are all 0, no step is left to run
        plan = choice_of(rows.device, rows.cell, steps, batch, resets=rows.resets is not None).plan
        last = min(first + (plan.directions if plan else 1), directions)
        yield slice(first, last), plan
        first = last


def persistent_forward(
    plan: Plan,
    weights: Sequence[Weights],  # of each of the K directions that run at once, C-contiguous
    gates: Array,  # (K, N, 4H), the inputs' share IN, gates OUT if there is a tape
    h0: Array,  # (K, B, H), IN
    c0: Array,  # (K, B, H), IN
    rows: Rows,
    first: int,  # number of the first of the directions
    y: Array,  # (T, B, D, H), OUT at these directions
    h_n: Array,  # (K, B, H), OUT
    c_n: Array,  # (K, B, H), OUT
    c_tape: Array | None,  # (K, B + N, H), OUT
    h_rows: Array | None,  # (K, N, H), OUT
) -> bool:
    """Run the recurrence forward."""
    arrays = (
        gates, *_of_each(weights, "weight_hh"), *_of_each(weights, "bias"), *_of_each(weights, "weight_peephole"),
        rows.order, rows.lengths, rows.offsets, rows.resets, h0, c0, c_tape, h_rows, y, h_n, c_n,
    )  # fmt: skip
    return _run("persistent_forward", plan, len(weights), rows, arrays, y.shape[2], first)


def persistent_backward(
    plan: Plan,
    weights: Sequence[Weights],  # of each of the K directions that run at once, C-contiguous
    gates: Array,  # (K, N, 4H), IN
    c_tape: Array,  # (K, B + N, H), IN
    rows: Rows,
    first: int,  # number of the first of the directions
    directions: int,  # D
    dy: Array | None,  # (T, B, D*H), IN
    dh_n: Array,  # (K, B, H), IN
    dc_n: Array,  # (K, B, H), IN
    da: Array,  # (K, N, 4H), OUT
    dp: Array | None,  # (K, B, UNIT_WEIGHTS * H), OUT
    dh0: Array,  # (K, B, H), OUT
    dc0: Array,  # (K, B, H), OUT
    steps: Steps | None,  # (T, D, B, H) each: the gradients by the states, OUT at these directions but for padding
) -> bool:
    """Run the recurrence backward."""
    arrays = (
        dy, dh_n, dc_n, gates, c_tape, *_of_each(weights, "weight_hh"), *_of_each(weights, "weight_peephole"),
        rows.order, rows.lengths, rows.offsets, rows.resets, *(steps or (None, None)), da, dp, dh0, dc0,
    )  # fmt: skip
    return _run("persistent_backward", plan, len(weights), rows, arrays, directions, first)


def _of_each(weights: Sequence[Weights], role: str) -> tuple[Array | None, Array | None]:
    """Return a parameter of the first direction and of the second, None if there is none."""
    found = [getattr(of_direction, role) for of_direction in weights]
    return found[0], found[1] if len(found) > 1 else None


def _run(
    name: str, plan: Plan, at_once: int, rows: Rows, arrays: tuple[Array | None, ...], directions: int, first: int
) -> bool:
    """Launch a kernel once for each wave, until one is refused."""
    device, packing, cell, backward = rows.device, rows.packing, rows.cell, name == "persistent_backward"
    batch, variant = packing.order.size, _variant(cell, rows.resets is not None)
    starts = range(0, batch, plan.rows * plan.groups)
    groups = [min(plan.groups, -(-(batch - start) // plan.rows)) for start in starts]
    blocks = [plan.blocks * number * at_once for number in groups]
    vectors, flags = _scratch(device, plan, backward, blocks)
    numbers = [(start, number, packing.rows, packing.steps, batch, cell.hidden_size, directions, first,
                int(rows.reverse(first))) for start, number in zip(starts, groups, strict=True)]  # fmt: skip
    records = np.array(numbers, np.int64).reshape(-1, len(FIELDS)).view(f"V{8 * len(FIELDS)}")
    options = (*loader.options(cell.dtype, 1, variant), *(f"-D{macro}" for macro in plan.macros))
    for wave, record in enumerate(device.by_value(records)):
        flag = None if flags is None else flags[wave]
        try:
            device.launch_resident(
                name, options, plan.shared(backward), plan.cooperative, blocks[wave],
                (*arrays, vectors, flag, record),
            )  # fmt: skip
        except RefusedLaunchError as error:
            device.refusals[device.limits(), plan, variant] = str(error)
            return False
    return True


def _scratch(device: Device, plan: Plan, backward: bool, blocks: list[int]) -> tuple[Array | None, Array | None]:
    """Return what groups exchange through, and their flags, zero, for each wave; a cluster needs neither."""
    if plan.cluster:
        return None, None
    inner = plan.size * (4 if backward else 1)
    vectors = device.xp.empty((blocks[0] // plan.blocks, 2, plan.rows, inner), np.float32)
    return vectors, device.xp.zeros((len(blocks), blocks[0]), np.uint32)
