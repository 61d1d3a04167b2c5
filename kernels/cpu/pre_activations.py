"""Pre-activations from packed weights, for every driver: a = (x @ W_ih.T + start) + h @ W_hh.T."""

from __future__ import annotations

from fastlstm.kernels.cpu.cell_step import GATES
from fastlstm.kernels.cpu.gemm_microkernel import KC, gate_tiles
from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.vector import lanes_of, maximum, minimum, offset

__all__ = ["pre_activations"]


@routine(inline=True)
def pre_activations(rows, blocks, x, inputs, of_x, h, depth, h_row, of_h, start, start_row, a, a_row, far, after):
    """Compute a = (x @ W_ih.T + start) + h @ W_hh.T for some rows and one block of units, or for one row and several.

    The weights are taken KC rows at a time, which stay in L1 and L2 while the rows are computed. Where they are cut
    depends only on I and H, so that results do not depend on the schedule. If the weights exceed L2, each part
    prefetches the next one, and the last part prefetches `after`.
    """
    tile_row = GATES * lanes_of(a)
    x_block, h_block = inputs * tile_row, depth * tile_row
    # At least one input is left, if there are any, for the block that starts the products of h.
    whole = maximum(0, inputs - 1) // KC * KC
    k = 0
    while k < inputs + depth:
        k1, k2, a1, a1_row, b1, b1_block = KC, 0, offset(x, k), inputs, offset(of_x, k * tile_row), x_block
        if k == whole:
            k1, k2 = inputs - whole, minimum(KC, depth)
        elif k > whole:
            a1, a1_row, b1, b1_block = offset(h, k - inputs), h_row, offset(of_h, (k - inputs) * tile_row), h_block
            k1 = minimum(KC, inputs + depth - k)
        following = offset(of_h, k2 * tile_row) if k2 else offset(b1, k1 * tile_row)
        following = after if k + k1 + k2 == inputs + depth else following
        gate_tiles(
            rows, blocks, k1, a1, a1_row, b1, b1_block, k2, h, h_row, of_h, h_block, start, start_row, a, a_row, far,
            following,
        )  # fmt: skip
        start, start_row = a, a_row
        k += k1 + k2
