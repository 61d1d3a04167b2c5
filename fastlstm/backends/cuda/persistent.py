"""The recurrence of one direction in one launch: the host's side of kernels/cuda/persistent.cu.

A call runs in waves if the batch has more groups of sequences than the device holds at once. Each returns False if the
step path has to run instead, with nothing done so far.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cuda.device import Device, RefusedLaunchError
from fastlstm.backends.cuda.launch import variant_of
from fastlstm.backends.cuda.plans import Choice, Plan, choose
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.layers import Weights
from fastlstm.errors import BackendError
from fastlstm.kernels.cuda import loader

__all__ = ["FIELDS", "choice_of", "persistent_backward", "persistent_forward"]

# The fields of struct Direction in kernels/cuda/persistent.cu, each of 64 bits.
FIELDS = ("row", "steps", "batch", "hidden", "directions", "direction", "reverse")


def choice_of(
    device: Device, dtype: np.dtype[Any], hidden: int, steps_of_all: int, batch: int, precision: str = "float32"
) -> Choice:
    """Decide how a direction runs on the current device (see ``plans.choose``); what was refused is not tried again."""
    limits = device.limits()
    choice = choose(limits, dtype, hidden, steps_of_all, batch, precision)
    refusal = device.refusals.get((limits, choice.plan)) if choice.plan and device.refusals else None
    return choice if refusal is None else Choice(None, f"a persistent kernel was refused ({refusal})")


def persistent_forward(
    weights: Weights,  # C-contiguous
    gates: Array,  # (N, 4H), the inputs' share IN, gates OUT if there is a tape
    h0: Array,  # (B, H), IN
    c0: Array,  # (B, H), IN
    rows: Rows,
    direction: int,
    y: Array,  # (T, B, D, H), OUT at `direction`
    h_n: Array,  # (B, H), OUT
    c_n: Array,  # (B, H), OUT
    c_tape: Array | None,  # (B + N, H), OUT
    h_rows: Array | None,  # (N, H), OUT
) -> bool:
    """Run the recurrence forward."""
    arrays = (
        gates, weights.weight_hh, weights.bias, weights.weight_peephole, rows.order, rows.lengths, rows.offsets,
        h0, c0, c_tape, h_rows, y, h_n, c_n,
    )  # fmt: skip
    return _run("persistent_forward", weights, rows, arrays, y.shape[2], direction)


def persistent_backward(
    weights: Weights,  # C-contiguous
    gates: Array,  # (N, 4H), IN
    c_tape: Array,  # (B + N, H), IN
    rows: Rows,
    direction: int,
    directions: int,
    dy: Array | None,  # (T, B, D*H), IN
    dh_n: Array,  # (B, H), IN
    dc_n: Array,  # (B, H), IN
    da: Array,  # (N, 4H), OUT
    dp: Array | None,  # (B, UNIT_WEIGHTS * H), OUT
    dh0: Array,  # (B, H), OUT
    dc0: Array,  # (B, H), OUT
) -> bool:
    """Run the recurrence backward."""
    arrays = (
        dy, dh_n, dc_n, gates, c_tape, weights.weight_hh, weights.weight_peephole,
        rows.order, rows.lengths, rows.offsets, da, dp, dh0, dc0,
    )  # fmt: skip
    return _run("persistent_backward", weights, rows, arrays, directions, direction)


def _run(
    name: str, weights: Weights, rows: Rows, arrays: tuple[Array | None, ...], directions: int, direction: int
) -> bool:
    """Launch a kernel once for each wave, if the plan of this batch has one."""
    device, packing, hidden = rows.device, rows.packing, weights.weight_hh.shape[1]
    batch, dtype = packing.order.size, weights.weight_hh.dtype
    plan = choice_of(device, dtype, hidden, packing.rows, batch, rows.cell.precision).plan
    backward = name == "persistent_backward"
    if plan is None or rows.resets is not None or (backward and rows.cell.truncated):  # no product backward
        return False
    starts = range(0, batch, plan.rows * plan.groups)
    blocks = [plan.blocks * min(plan.groups, -(-(batch - start) // plan.rows)) for start in starts]
    vectors, flags = _scratch(device, plan, backward, blocks)
    numbers = [(start, packing.steps, batch, hidden, directions, direction, int(rows.reverse(direction)))
               for start in starts]  # fmt: skip
    records = np.array(numbers, np.int64).reshape(-1, len(FIELDS)).view(f"V{8 * len(FIELDS)}")
    options = (*loader.options(dtype, 1, variant_of(rows.cell)), *(f"-D{macro}" for macro in plan.macros))
    for wave, record in enumerate(device.by_value(records)):
        flag = None if flags is None else flags[wave]
        try:
            device.launch_resident(
                name, options, plan.shared(backward), not plan.cluster, blocks[wave],
                (*arrays, vectors, flag, record),
            )  # fmt: skip
        except RefusedLaunchError as error:
            if wave:  # the rows before are done, and their inputs may be overwritten
                raise BackendError(f"a persistent kernel was refused after another one had run: {error}") from error
            device.refusals[device.limits(), plan] = str(error)
            return False
    return True


def _scratch(device: Device, plan: Plan, backward: bool, blocks: list[int]) -> tuple[Array | None, Array | None]:
    """Return what groups exchange through, and their flags, zero, for each wave; a cluster needs neither."""
    if plan.cluster:
        return None, None
    inner = plan.size * (4 if backward else 1)
    vectors = device.xp.empty((blocks[0] // plan.blocks, 2, plan.rows, inner), np.float32)
    return vectors, device.xp.zeros((len(blocks), blocks[0]), np.uint32)
