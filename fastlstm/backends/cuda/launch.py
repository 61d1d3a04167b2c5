"""How the kernels are launched: grids, the record of each time step, the step kernels, and sums over rows."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cuda.device import Device, Kernel
from fastlstm.backends.layers import Weights
from fastlstm.backends.ragged import Packing
from fastlstm.cell import VARIANTS, Cell
from fastlstm.kernels.cuda import loader

__all__ = ["FIELDS", "column_sum", "geometry", "single_step", "step_kernel", "step_records", "variant_of"]

# The fields of struct Step in kernels/cuda/common.cuh, each of 64 bits.
FIELDS = ("first", "c_from", "c_to", "h_to", "rows", "step", "steps", "batch", "hidden", "directions", "direction",
          "reverse")  # fmt: skip

# The structs of kernels/cuda/activations.cuh.
_ACTIVATIONS: dict[Any, str] = {
    "sigmoid": "Sigmoid", "tanh": "Tanh", "relu": "Relu", "hard_sigmoid": "HardSigmoid", "softsign": "Softsign",
    "identity": "Identity", ("CANDIDATE_ACTIVATION", "1997"): "Candidate1997",
    ("OUTPUT_ACTIVATION", "1997"): "Output1997",
}  # fmt: skip

_THREADS = 128  # of a block
_MOST_BLOCKS = 65535  # along the second axis of a grid; kernels loop over the rows beyond it
# As in column_sum.cu: columns and lanes of a block; and the rows that one block sums, few enough to keep the GPU busy.
_COLUMNS, _LANES, _SLAB = 32, 8, 256
# As in single_step.cu: lanes of a warp, hidden units of a block, and sequences of a warp.
_WARP, _UNITS, _STEP_ROWS = 32, 4, 4


@lru_cache(maxsize=1024)
def geometry(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the grid and block of a kernel with one thread an element, columns along the first axis."""
    x = min(_THREADS, 1 << max(columns - 1, 0).bit_length())
    y = _THREADS // x
    return (-(-columns // x), min(max(1, -(-rows // y)), _MOST_BLOCKS)), (x, y)


def step_records(
    packing: Packing,
    starts: list[tuple[int, int]],
    hidden: int,
    directions: int,
    direction: int,
    *,
    keep_tape: bool,
    reverse: bool = False,
) -> np.ndarray[Any, Any]:
    """Return the record of each step, (S, 1), in the order of computation; `starts` is ``packing.step_rows``.

    With a tape, c of each step follows the initial states, (B + N, H), and h goes to the rows of the next step.
    Without one, h and c have one place for all steps. Direction 1 runs backwards in time, and direction 0 if `reverse`.

    Their dtype is plain bytes: with named fields, NumPy lists these whenever CuPy asks for the address, which takes 10
    times as long.
    """
    numbers = np.zeros((len(starts), len(FIELDS)), np.int64)
    column = {name: numbers[:, k] for k, name in enumerate(FIELDS)}
    batch = packing.order.size
    first, rows = np.array(starts, np.int64).reshape(-1, 2).T
    if keep_tape:
        column["c_to"][:] = batch + first
        column["c_from"][1:] = column["c_to"][:-1]
        column["h_to"][:-1] = first[1:]
    for name, value in (
        ("first", first), ("rows", rows), ("step", np.arange(len(starts))), ("steps", packing.steps),
        ("batch", batch), ("hidden", hidden), ("directions", directions), ("direction", direction),
        ("reverse", reverse or direction == 1),
    ):  # fmt: skip
        column[name][:] = value
    return numbers.view(f"V{numbers.itemsize * len(FIELDS)}")


def step_kernel(
    device: Device, name: str, variant: tuple[str, ...], hidden: int, dtype: Any, given: tuple[Array | None, ...]
) -> tuple[Kernel, int]:
    """Return a step kernel and its number of threads a row: wide loads where H and the caller's arrays allow them.

    `given` are the caller's arrays among its arguments. All others are the backend's own, so they are aligned, and
    each of their rows is, too, if H is a multiple of the width.
    """
    width = loader.wide(dtype)
    if hidden % width or not all(array is None or device.aligned(array) for array in given):
        width = 1
    return device.kernel(name, dtype, width, variant), hidden // width


@lru_cache(maxsize=256)
def variant_of(cell: Cell) -> tuple[str, ...]:
    """Return the macros of a cell's variant (see ``loader.VARIANTS``); a number that is too large bounds nothing."""
    flags = {"PEEPHOLE": cell.peephole, "NO_FORGET_GATE": not cell.forget_gate, "COUPLED": cell.coupled}
    places = ("GATE_ACTIVATION", "CANDIDATE_ACTIVATION", "OUTPUT_ACTIVATION")
    names = zip(places, cell.activations, VARIANTS["activations"], strict=True)
    largest = float(np.finfo(cell.dtype).max)
    bounds = {"CLIP": cell.clip, "CELL_CLIP": cell.cell_clip}
    return (
        *(macro for macro, given in flags.items() if given),
        *(f"{place}={_ACTIVATIONS.get((place, name)) or _ACTIVATIONS[name]}" for place, name, plain in names
          if name != plain),
        *(f"{macro}={bound!r}" for macro, bound in bounds.items() if bound and bound <= largest),
    )  # fmt: skip


def single_step(
    device: Device,
    cell: Cell,
    weights: Weights,  # C-contiguous, the model's own: without rows of gates that the cell lacks or shares
    x: Array,  # (B, I), IN
    h_prev: Array | None,  # (B, H), IN, zeros if None
    c_prev: Array | None,  # (B, H), IN, zeros if None
    h: Array,  # (B, H), OUT
    c: Array,  # (B, H), OUT
    y: Array | None,  # (B, H), OUT: a copy of h
) -> None:
    """Run one time step of one layer in one launch."""
    (batch, inputs), hidden = x.shape, h.shape[1]
    device.kernel("single_step", x.dtype, 1, variant_of(cell))(
        (-(-hidden // _UNITS), min(-(-batch // _STEP_ROWS), _MOST_BLOCKS)),
        (_WARP, _UNITS),
        (
            x, h_prev, c_prev, weights.weight_ih, weights.weight_hh, weights.bias, weights.weight_peephole, h, c, y,
            batch, inputs, hidden, cell.block_size,
        ),
    )  # fmt: skip


def column_sum(device: Device, values: Array, out: Array) -> None:
    """Write the sum over the rows to `out` (columns,): slab by slab, then the sums of the slabs."""
    kernel = device.kernel("column_sum", values.dtype)
    columns = values.shape[1]
    while True:
        rows = values.shape[0]
        slabs = max(1, -(-rows // _SLAB))
        sums = out if slabs == 1 else device.xp.empty((slabs, columns), values.dtype)
        kernel((slabs, -(-columns // _COLUMNS)), (_COLUMNS, _LANES), (values, sums, rows, columns, _SLAB))
        if slabs == 1:
            return
        values = sums
