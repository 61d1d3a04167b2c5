"""Weights, rearranged for the tile: the columns of one tile lie together, padded with zeros to whole vectors.

Below, V is the number of lanes of a vector, and hidden units come in blocks of V: unit u is lane u % V of
block u // V. A product with the gates' gradients runs over 4 * Hp of them, in the order (block, gate, lane),
Hp being H padded to whole vectors.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.gates import GATES
from fastlstm.kernels.cpu.jit import kernel, routine
from fastlstm.kernels.cpu.simd import (
    address,
    fill,
    fma,
    is_zero,
    lanes,
    lanes_of,
    load,
    load_first,
    load_vector,
    minimum,
    offset,
    poke,
    store,
    store_first,
    vector_pointer,
)
from fastlstm.kernels.cpu.tile import VECTORS

__all__ = [
    "clear_padding", "is_at_rest", "pack_backward", "pack_forward", "pack_rows", "pack_weights", "packed_weights",
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
def _pack_columns(weight, packed, block):
    """Write one block's rows of a weight (4H, K) as columns to `packed` (K, 4, V)."""
    hidden, inputs = weight.shape[0] // GATES, weight.shape[1]
    width = lanes_of(packed)
    units = minimum(width, hidden - block * width)
    for gate in range(GATES):
        row = gate * hidden + block * width
        done = 0
        if units == width:
            done = inputs - inputs % width
            for k in range(0, done, width):
                source = offset(address(weight), row * inputs + k)
                _transpose(source, inputs, offset(packed, (k * GATES + gate) * width), GATES * width)
        for k in range(done, inputs):
            for lane in range(width):
                poke(offset(packed, (k * GATES + gate) * width + lane), weight[row + lane, k] if lane < units else 0.0)


@routine
def pack_forward(weight_ih, weight_hh, bias, packed, packed_bias, first, last):
    """Pack the weights for the forward pass: the columns of a tile are the four gates of one block of units.

    Parameters
    ----------
    weight_ih, weight_hh, bias : (4H, I), (4H, H), (4H,) or (0,) array, IN
    packed : (H/V * (I + H), 4, V) array, OUT
        The weights of x, block by block, and then those of h: a step that needs one of the two reads it from end to
        end.
    packed_bias : (2, H/V, 4, V) array, OUT
        The bias; and what the recurrent weights make of an h of zeros. That is zero, so that a first step from zeros
        need not read them, or NaN where one of them is not finite.
    first, last : int
        The blocks of units to pack.
    """
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    blocks, width = packed_bias.shape[1], packed_bias.shape[3]
    for block in range(first, last):
        of_x, of_h = packed_weights(packed, inputs, hidden, block)
        _pack_columns(weight_ih, of_x, block)
        _pack_columns(weight_hh, of_h, block)
        for gate in range(GATES):
            units = minimum(width, hidden - block * width) if bias.size else 0
            target = offset(address(packed_bias), (block * GATES + gate) * width)
            store(target, load_first(offset(address(bias), gate * hidden + block * width), units))
        _zero_times(of_h, hidden, offset(address(packed_bias), (blocks + block) * GATES * width))


@routine(inline=True)
def packed_weights(packed, inputs, hidden, block):
    """Return pointers to the packed weights of x and to those of h, from one block of units on."""
    tile_row = GATES * packed.shape[2]
    of_x, of_h = block * inputs, packed.shape[0] // (inputs + hidden) * inputs + block * hidden
    return offset(address(packed), of_x * tile_row), offset(address(packed), of_h * tile_row)


@routine
def _zero_times(weights, rows, target):
    """Write the sum of zero times the rows of four vectors: what a product with zeros is."""
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
def is_at_rest(h0, packed_bias):
    """Say whether the first step's product with h is zero, and need not be computed."""
    size = packed_bias.size // 2
    return _is_zero(address(h0), h0.size) and _is_zero(offset(address(packed_bias), size), size)


@routine
def _is_zero(start, size):
    width = lanes_of(start)
    together = 4 * width  # for a look at four vectors takes hardly longer than one at a single one
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
    pack_forward(weight_ih, weight_hh, bias, packed, packed_bias, 0, packed_bias.shape[1])


@routine
def pack_backward(weight, packed, first, last):
    """Pack a weight for products with the gates' gradients, in panels of as many columns as a tile has.

    Parameters
    ----------
    weight : (4H, N) array, IN
    packed : (panels, 4 * Hp, 4 * V) array, OUT
    first, last : int
        The blocks of units to pack.
    """
    hidden, columns = weight.shape[0] // GATES, weight.shape[1]
    width = packed.shape[2] // VECTORS
    for panel in range(packed.shape[0]):
        column = panel * VECTORS * width
        for block in range(first, last):
            for gate in range(GATES):
                for lane in range(width):
                    unit = block * width + lane
                    k = (block * GATES + gate) * width + lane
                    for v in range(VECTORS):
                        inside = minimum(width, columns - column - v * width) if unit < hidden else 0
                        target = offset(address(packed), ((panel * packed.shape[1] + k) * VECTORS + v) * width)
                        if inside > 0:
                            source = (gate * hidden + unit) * columns + column + v * width
                            store(target, load_first(offset(address(weight), source), inside))
                        else:
                            store(target, fill(target, 0.0))


@routine
def clear_padding(rows, column, columns, order, offsets, first_step, step):
    """Set some columns of what lies past the lengths to zero, at every `step`-th time step from the first on.

    Parameters
    ----------
    rows : (T * B, N) array, OUT
    column, columns : int
        The first of the columns, and their number.
    order, offsets : (B,) and (S + 1,) array, IN
        As in ``forward.py``.
    first_step, step : int
        The time steps: each thread takes its own.
    """
    batch, width = order.size, lanes_of(address(rows))
    for t in range(first_step, rows.shape[0] // batch, step):
        inside = offsets[t + 1] - offsets[t] if t + 1 < offsets.size else 0
        for row in range(inside, batch):
            target = offset(address(rows), (t * batch + order[row]) * rows.shape[1] + column)
            for n in range(0, columns, width):
                store_first(offset(target, n), fill(target, 0.0), columns - n)


@routine
def pack_rows(source, row_length, column, columns, packed, first, last):
    """Copy some columns of the rows `first` to `last` of a matrix side by side, for the tile's reach.

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
