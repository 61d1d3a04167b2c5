"""Packing of weights for the microkernel: the columns of one block are contiguous, padded with zeros to whole vectors.

Below, V is the number of lanes of a vector, and hidden units come in blocks of V: unit u is lane u % V of
block u // V. A product with the gates' gradients runs over 4 * Hp of them, in the order (block, gate, lane),
Hp being H padded to whole vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.cell_step import GATES
from fastlstm.kernels.cpu.gemm_microkernel import NR
from fastlstm.kernels.cpu.gemv import Unpacked
from fastlstm.kernels.cpu.jit import kernel, routine, stay_outlined
from fastlstm.kernels.cpu.vector import (
    address,
    fill,
    is_zero,
    lanes,
    lanes_of,
    load,
    load_first,
    load_vector,
    minimum,
    offset,
    peek,
    poke,
    store,
    vector_pointer,
)
from fastlstm.kernels.cpu.vector_arithmetic import fma

__all__ = [
    "Packed", "is_at_rest", "pack_backward", "pack_columns", "pack_forward", "pack_rows", "pack_weights", "packed_at",
]  # fmt: skip


def _swapped(builder, dtype, a, b, distance):
    """Emit the exchange of two rows' elements that lie `distance` off the diagonal of a matrix being transposed."""
    count, integer = lanes(dtype), ir.IntType(32)
    low = [j if not j & distance else count + j - distance for j in range(count)]
    high = [j + distance if not j & distance else count + j for j in range(count)]
    order = ir.VectorType(integer, count)
    return tuple(builder.shuffle_vector(a, b, ir.Constant(order, indices)) for indices in (low, high))


@intrinsic
def _transpose(typingctx, source, source_row, target, target_row):
    """Transpose V rows of V elements: recursively, the off-diagonal quarters change places."""
    dtype = source.dtype

    def codegen(context, builder, signature, args):
        source, source_row, target, target_row = args
        source_row = context.cast(builder, source_row, signature.args[1], types.intp)
        target_row = context.cast(builder, target_row, signature.args[3], types.intp)
        count = lanes(dtype)
        rows = []
        for _ in range(count):
            rows.append(load_vector(builder, source, dtype))
            source = builder.gep(source, [source_row])
        distance = 1
        while distance < count:
            for i in range(count):
                if not i & distance:
                    rows[i], rows[i + distance] = _swapped(builder, dtype, rows[i], rows[i + distance], distance)
            distance *= 2
        for row in rows:
            builder.store(row, vector_pointer(builder, target, dtype), align=dtype.bitwidth // 8)
            target = builder.gep(target, [target_row])
        return context.get_dummy_value()

    return types.void(source, source_row, target, target_row), codegen


@routine
def pack_columns(weight, hidden, inputs, packed, block):
    """Write one block's rows of a weight (4H, K) as columns to `packed` (K, 4, V)."""
    width = lanes_of(packed)
    units = minimum(width, hidden - block * width)
    for gate in range(GATES):
        rows = offset(weight, (gate * hidden + block * width) * inputs)
        done = 0
        if units == width:
            done = inputs - inputs % width
            for k in range(0, done, width):
                _transpose(offset(rows, k), inputs, offset(packed, (k * GATES + gate) * width), GATES * width)
        for k in range(done, inputs):
            for lane in range(width):
                value = peek(offset(rows, lane * inputs + k)) if lane < units else 0.0
                poke(offset(packed, (k * GATES + gate) * width + lane), value)


class Packed(NamedTuple):
    """Packed weights of a layer, from the first block of units on.

    The weights of x come first, block by block, and then those of h: a step that needs one of the two reads it from end
    to end. The columns of a block are its four gates.
    """

    of_x: Any  # (Hp/V, I, 4, V)
    of_h: Any  # (Hp/V, H, 4, V)
    bias: Any  # (Hp/V, 4, V)
    of_zeros: Any  # (Hp/V, 4, V) W_hh times zeros: zero, or NaN where one of the weights is not finite
    inputs: Any  # I
    hidden: Any  # H
    blocks: Any  # Hp/V


@routine(inline=True)
def packed_at(weights, bias, inputs, hidden, blocks):
    """Return the record of packed weights, given where they start: (Hp/V * (I + H), 4, V) and (2, Hp/V, 4, V)."""
    tile_row = GATES * lanes_of(weights)
    of_h, of_zeros = offset(weights, blocks * inputs * tile_row), offset(bias, blocks * tile_row)
    return Packed(weights, of_h, bias, of_zeros, inputs, hidden, blocks)


@routine
def pack_forward(weights, packed, first, last):
    """Pack the weights for the forward pass.

    Parameters
    ----------
    weights : Unpacked, IN
    packed : Packed, OUT
    first, last : int
        The blocks of units to pack.
    """
    stay_outlined()
    inputs, hidden, width = weights.inputs, weights.hidden, lanes_of(weights.ih)
    tile_row = GATES * width
    for block in range(first, last):
        of_h = offset(packed.of_h, block * hidden * tile_row)
        pack_columns(weights.ih, hidden, inputs, offset(packed.of_x, block * inputs * tile_row), block)
        pack_columns(weights.hh, hidden, hidden, of_h, block)
        units = minimum(width, hidden - block * width) if weights.biased else 0
        for gate in range(GATES):
            value = load_first(offset(weights.bias, gate * hidden + block * width), units)
            store(offset(packed.bias, block * tile_row + gate * width), value)
        _zero_times(of_h, hidden, offset(packed.of_zeros, block * tile_row))


@routine
def _zero_times(weights, rows, target):
    """Write the sum of zero times the rows of four vectors: what a product with zeros is."""
    stay_outlined()
    width = lanes_of(weights)
    i = f = g = o = fill(weights, 0.0)
    for _ in range(rows):
        i, f = fma(load(weights), 0.0, i), fma(load(offset(weights, width)), 0.0, f)
        g, o = fma(load(offset(weights, 2 * width)), 0.0, g), fma(load(offset(weights, 3 * width)), 0.0, o)
        weights = offset(weights, GATES * width)
    store(target, i)
    store(offset(target, width), f)
    store(offset(target, 2 * width), g)
    store(offset(target, 3 * width), o)


@routine
def is_at_rest(h0, size, packed):
    """Say whether the first step's product with h is zero, and need not be computed; h0 has so many elements.

    Computing it anyway, on two threads of a Zen 5 virtual machine, a call of (T, B, I, H) = (1, 1, 128, 256) takes 2.6
    times as long, and of (10, 32, 64, 128) 1.05 times.
    """
    stay_outlined()
    return _is_zero(h0, size) and _is_zero(packed.of_zeros, packed.blocks * GATES * lanes_of(packed.of_zeros))


@routine
def _is_zero(start, size):
    width = lanes_of(start)
    together = 4 * width  # testing four vectors takes hardly longer than testing one
    whole = size // together * together
    for n in range(0, whole, together):
        here = offset(start, n)
        some = abs(load(here)) + abs(load(offset(here, width)))
        more = abs(load(offset(here, 2 * width))) + abs(load(offset(here, 3 * width)))
        if not is_zero(some + more):
            return False
    for n in range(whole, size, width):  # noqa: SIM110  # Numba knows no generators here
        if not is_zero(load_first(offset(start, n), size - n)):
            return False
    return True


@kernel
def pack_weights(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    packed,  # (Hp/V * (I + H), 4, V), OUT
    packed_bias,  # (2, Hp/V, 4, V), OUT
):
    """Pack the weights for the forward pass, once for many calls."""
    inputs, hidden, blocks = weight_ih.shape[1], weight_hh.shape[1], packed_bias.shape[1]
    weights = Unpacked(address(weight_ih), address(weight_hh), address(bias), inputs, hidden, bias.size > 0)
    pack_forward(weights, packed_at(address(packed), address(packed_bias), inputs, hidden, blocks), 0, blocks)


@routine
def pack_backward(weight, hidden, columns, packed, blocks, first, last):
    """Pack a weight for products with the gates' gradients, in panels of NR vectors of columns.

    Parameters
    ----------
    weight : pointer, IN
        (4H, N).
    hidden, columns : int
        H and N.
    packed : pointer, OUT
        (panels, 4 * Hp, 4 * V).
    blocks : int
        Hp/V.
    first, last : int
        The blocks of units to pack.
    """
    stay_outlined()
    width = lanes_of(packed)
    depth = blocks * GATES * width
    for panel in range((columns + NR * width - 1) // (NR * width)):
        column = panel * NR * width
        for block in range(first, last):
            for gate in range(GATES):
                for lane in range(width):
                    unit = block * width + lane
                    k = (block * GATES + gate) * width + lane
                    for v in range(NR):
                        inside = minimum(width, columns - column - v * width) if unit < hidden else 0
                        target = offset(packed, ((panel * depth + k) * NR + v) * width)
                        if inside > 0:
                            source = (gate * hidden + unit) * columns + column + v * width
                            store(target, load_first(offset(weight, source), inside))
                        else:
                            store(target, fill(target, 0.0))


@routine
def pack_rows(source, row_length, column, columns, packed, first, last):
    """Copy some columns of the rows `first` to `last` of a matrix contiguously, for the microkernel.

    Parameters
    ----------
    source : pointer, IN
        The matrix, `row_length` elements a row.
    column, columns : int
        The columns to copy; where there are fewer, the rest is zero.
    packed : pointer, OUT
        Whole vectors: `columns` elements a row.
    """
    width = lanes_of(source)
    for row in range(first, last):
        for v in range(0, columns, width):
            inside = minimum(width, row_length - column - v)
            target = offset(packed, (row - first) * columns + v)
            if inside > 0:
                store(target, load_first(offset(source, row * row_length + column + v), inside))
            else:
                store(target, fill(target, 0.0))
