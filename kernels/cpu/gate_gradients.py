"""The gradients of the pre-activations of a chunk of steps: their layout, and their products with packed weights."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.gemm_microkernel import KC, NR, gate_tile, tiles, zero_row
from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.vector import lanes_of, minimum, offset

__all__ = ["GateGradients", "long_product", "long_row", "strip"]


class GateGradients(NamedTuple):
    """A matrix (rows, 4 * Hp) in strips of KC columns.

    A product takes the columns of one strip at a time. They are contiguous, row by row: one stream through memory. Rows
    of all columns would be MR streams, a page apart. The last strip may be narrower.
    """

    start: Any  # pointer
    rows: Any  # of a chunk
    depth: Any  # 4 * Hp


@routine(inline=True)
def strip(da, k):
    """Find column k: a pointer to its first row, and the distance of the rows."""
    first = k // KC * KC
    return offset(da.start, first * da.rows + k - first), minimum(KC, da.depth - first)


@routine
def long_product(rows, vectors, da, first_row, weights, out, out_row, soon, soon_k, size):
    """Compute da @ weights, for some rows of gate gradients and one panel of the weights.

    With the slice that begins at k, `size` elements at ``soon[k * soon_k]`` are prefetched.
    """
    columns = NR * lanes_of(out)
    start, start_row = zero_row(out), 0
    for k in range(0, da.depth, KC):
        part, part_row = strip(da, k)
        gates, b = offset(part, first_row * part_row), offset(weights, k * columns)
        tiles(
            rows, vectors, part_row, gates, part_row, 1, b, columns, start, start_row, out, out_row,
            offset(soon, k * soon_k), size,
        )  # fmt: skip
        start, start_row = out, out_row


@routine
def long_row(panels, da, row, weights, out):
    """Compute da @ weights for one row and several whole panels, with the sums of :func:`long_product`."""
    columns = NR * lanes_of(out)
    start = zero_row(out)
    for k in range(0, da.depth, KC):
        part, part_row = strip(da, k)
        a, b = offset(part, row * part_row), offset(weights, k * columns)
        gate_tile(1, panels, part_row, a, 0, b, da.depth * columns, 0, a, 0, b, 0, start, 0, out, 0, b, 0)
        start = out
