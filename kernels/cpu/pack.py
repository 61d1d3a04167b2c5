"""Weights, rearranged for the tile: so that the columns of one tile lie together, padded with zeros to whole vectors.

Below, V is the number of lanes of a vector, and hidden units come in blocks of V: unit u is lane u % V
of block u // V.
"""

from __future__ import annotations

from numba import njit

from fastlstm.kernels.cpu.gates import GATES

__all__ = ["pack_backward", "pack_forward", "unpack_gradient"]


@njit(nogil=True)
def pack_forward(weight_ih, weight_hh, bias, packed, packed_bias, first, last):
    """Pack the weights for the forward pass: the columns of a tile are the four gates of one block of units.

    Parameters
    ----------
    weight_ih, weight_hh, bias : (4H, I), (4H, H), (4H,) or (0,) array, IN
    packed : (H/V, I + H, 4, V) array, OUT
    packed_bias : (H/V, 4, V) array, OUT
    first, last : int
        The blocks of units to pack.
    """
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    width = packed.shape[3]
    for block in range(first, last):
        for gate in range(GATES):
            for lane in range(width):
                unit = block * width + lane
                row = gate * hidden + unit
                if unit < hidden:
                    packed_bias[block, gate, lane] = bias[row] if bias.size else 0.0
                    for k in range(inputs):
                        packed[block, k, gate, lane] = weight_ih[row, k]
                    for k in range(hidden):
                        packed[block, inputs + k, gate, lane] = weight_hh[row, k]
                else:
                    packed_bias[block, gate, lane] = 0.0
                    for k in range(inputs + hidden):
                        packed[block, k, gate, lane] = 0.0


@njit(nogil=True)
def pack_backward(weight, packed, first, last):
    """Pack a weight for products with the gates' gradients: k runs over the blocks' gates and lanes.

    Parameters
    ----------
    weight : (4H, N) array, IN
    packed : (H/V, 4, V, N padded to whole vectors) array, OUT
    first, last : int
        The blocks of units to pack.
    """
    hidden, columns = weight.shape[0] // GATES, weight.shape[1]
    width, padded = packed.shape[2], packed.shape[3]
    for block in range(first, last):
        for gate in range(GATES):
            for lane in range(width):
                unit = block * width + lane
                start = 0
                if unit < hidden:
                    for n in range(columns):
                        packed[block, gate, lane, n] = weight[gate * hidden + unit, n]
                    start = columns
                for n in range(start, padded):
                    packed[block, gate, lane, n] = 0.0


@njit(nogil=True)
def unpack_gradient(packed, gradient, first, last):
    """Bring a weight's gradient back to the layout of the weight: the inverse of :func:`pack_backward`.

    Parameters
    ----------
    packed : (H/V, 4, V, N padded to whole vectors) array, IN
    gradient : (4H, N) array, OUT
    first, last : int
        The blocks of units to unpack.
    """
    hidden, columns = gradient.shape[0] // GATES, gradient.shape[1]
    width = packed.shape[2]
    for block in range(first, last):
        for gate in range(GATES):
            for lane in range(min(width, hidden - block * width)):
                row = gate * hidden + block * width + lane
                for n in range(columns):
                    gradient[row, n] = packed[block, gate, lane, n]
