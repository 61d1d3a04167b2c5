"""Layer norm of one row: n = (v - mean) / sqrt(variance + 1e-5), with the biased variance; gains come after it.

A row is what a step has for one sequence: the products over all gates, (Hp/V, 4, V), or the cell state, (Hp/V, V). The
lanes beyond the units count for nothing. Back from n = (v - mean) * scale, it is

    dv = scale * (dn - mean(dn) - n * mean(dn * n))

Rows of gates may be missing, or shared by the units of a block: the kernels have a row for each gate and unit all the
same. A gate's `share` is what each of its rows counts for: 0 if they are missing, 1 / S if S units share each. The
gradients of S such rows belong to one, so each gets the same part of the means.

Each row is summed by itself and in one order, so that results do not depend on how rows are divided among threads.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.cell_step import GATES
from fastlstm.kernels.cpu.gate_gradients import strip
from fastlstm.kernels.cpu.jit import routine, stay_outlined
from fastlstm.kernels.cpu.vector import (
    VECTOR_BYTES,
    fill,
    first_lanes,
    lanes,
    lanes_of,
    llvm_vector,
    load,
    load_first,
    minimum,
    offset,
    splat,
    store,
    vector_pointer,
)
from fastlstm.kernels.cpu.vector_arithmetic import call_llvm, fma

__all__ = [
    "FAR", "normalise_gates", "normalise_gates_back", "normalise_units", "normalise_units_back",
]  # fmt: skip

_EPSILON = 1e-5  # that of the reference
FAR = 2  # of what is kept, that it exceeds the caches


@intrinsic
def _keep_first(typingctx, vector, n):
    """Set all lanes but the first `n` to zero."""

    def codegen(context, builder, signature, args):
        n = context.cast(builder, args[1], signature.args[1], types.int32)
        zero = ir.Constant(llvm_vector(vector.dtype), None)
        return builder.select(first_lanes(builder, n, vector.dtype), args[0], zero)

    return vector(vector, n), codegen


@intrinsic
def _sum_of_lanes(typingctx, vector):
    """Put the sum of all lanes into each lane: halves, then quarters, and so on."""

    def codegen(context, builder, signature, args):
        total, count = args[0], lanes(vector.dtype)
        order = ir.VectorType(ir.IntType(32), count)
        distance = count // 2
        while distance:
            other = ir.Constant(order, [lane ^ distance for lane in range(count)])
            total = builder.fadd(total, builder.shuffle_vector(total, total, other))
            distance //= 2
        return total

    return vector(vector), codegen


@intrinsic
def _sqrt(typingctx, vector):
    """Return the square root, lane by lane."""

    def codegen(context, builder, signature, args):
        return call_llvm(builder, "sqrt", vector.dtype, args)

    return vector(vector), codegen


@intrinsic
def _stream(typingctx, pointer, vector):
    """Store a vector past the caches: what is read again only much later. The address is a multiple of its size."""

    def codegen(context, builder, signature, args):
        dtype = pointer.dtype
        stored = builder.store(args[1], vector_pointer(builder, args[0], dtype), align=VECTOR_BYTES)
        stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(pointer, vector), codegen


@routine(inline=True)
def _scale_of(squares, count):
    """Return 1 / sqrt(variance + epsilon), given the sums of squares of `count` centred numbers."""
    return 1.0 / _sqrt(_sum_of_lanes(squares) / count + _EPSILON)


@routine(inline=True)
def _shared(i, f, g, o, shares):
    """Return the sum over the four gates, each by its share."""
    one, other = i * splat(shares), f * splat(offset(shares, 1))
    return (one + other) + (g * splat(offset(shares, 2)) + o * splat(offset(shares, 3)))


@routine
def _statistics(a, shares, hidden, blocks):
    """Return mean and scale of the products of one row over all gates of all units, (Hp/V, 4, V), zero in the padding.

    `shares` are those of the four gates; after them comes the number of rows that there are.

    Zeros do not change the sum; in that of the squares, the padding is left out.
    """
    stay_outlined()
    width, count = lanes_of(a), splat(offset(shares, GATES))
    i = f = g = o = fill(a, 0.0)
    for block in range(blocks):
        here = offset(a, block * GATES * width)
        i, f = i + load(here), f + load(offset(here, width))
        g, o = g + load(offset(here, 2 * width)), o + load(offset(here, 3 * width))
    mean = _sum_of_lanes(_shared(i, f, g, o, shares)) / count
    i = f = g = o = fill(a, 0.0)
    for block in range(blocks):
        here, units = offset(a, block * GATES * width), minimum(width, hidden - block * width)
        n_i, n_f = load(here) - mean, load(offset(here, width)) - mean
        n_g, n_o = load(offset(here, 2 * width)) - mean, load(offset(here, 3 * width)) - mean
        if units < width:
            n_i, n_f = _keep_first(n_i, units), _keep_first(n_f, units)
            n_g, n_o = _keep_first(n_g, units), _keep_first(n_o, units)
        i, f, g, o = fma(n_i, n_i, i), fma(n_f, n_f, f), fma(n_g, n_g, g), fma(n_o, n_o, o)
    return mean, _scale_of(_shared(i, f, g, o, shares), count)


@routine
def normalise_units(v, hidden, blocks):
    """Normalise the cell states of one row, (Hp/V, V), in place; return the scale."""
    stay_outlined()
    width = lanes_of(v)
    total = fill(v, 0.0)
    for block in range(blocks):
        total = total + load_first(offset(v, block * width), minimum(width, hidden - block * width))
    mean, squares = _sum_of_lanes(total) / hidden, fill(v, 0.0)
    for block in range(blocks):
        here = offset(v, block * width)
        centred = _keep_first(load(here) - mean, minimum(width, hidden - block * width))
        squares = fma(centred, centred, squares)
        store(here, centred)
    scale = _scale_of(squares, hidden)
    for block in range(blocks):
        here = offset(v, block * width)
        store(here, load(here) * scale)
    return scale


@routine
def normalise_gates(a, a_h, norms, scales, gains, bias, shares, hidden, blocks, kept):
    """Compute a = norm(a) * gain_x + norm(a_h) * gain_h + bias for one row.

    Parameters
    ----------
    a, a_h : pointer, IN and OUT, IN
        The products with x and with h, (Hp/V, 4, V).
    norms, scales : pointer, OUT
        The normalised products, (2, Hp/V, 4, V), if they are `kept`; and two vectors.
    gains : pointer, IN
        (2, Hp/V, 4, V), zero in the padding, where the normalised products may be anything finite.
    bias : pointer, IN
        (Hp/V, 4, V).
    shares : pointer, IN
        Of the four gates, and the number of rows.
    """
    stay_outlined()
    width = lanes_of(a)
    size = blocks * GATES * width
    mean_x, scale_x = _statistics(a, shares, hidden, blocks)
    mean_h, scale_h = _statistics(a_h, shares, hidden, blocks)
    store(scales, scale_x)
    store(offset(scales, width), scale_h)
    gains_h, norms_h = offset(gains, size), offset(norms, size)
    for k in range(0, size, width):
        n_x, n_h = (load(offset(a, k)) - mean_x) * scale_x, (load(offset(a_h, k)) - mean_h) * scale_h
        if kept == FAR:
            _stream(offset(norms, k), n_x)
            _stream(offset(norms_h, k), n_h)
        elif kept:
            store(offset(norms, k), n_x)
            store(offset(norms_h, k), n_h)
        total = fma(n_x, load(offset(gains, k)), load(offset(bias, k)))
        store(offset(a, k), fma(n_h, load(offset(gains_h, k)), total))


@routine
def normalise_units_back(d, n, gain, scale, hidden, blocks):
    """Take the gradient by n * gain of one row's cell states back to that by the cell states, in place."""
    stay_outlined()
    width = lanes_of(d)
    total = products = fill(d, 0.0)
    for block in range(blocks):
        k = block * width
        dn = load(offset(d, k)) * load_first(offset(gain, k), minimum(width, hidden - k))
        total, products = total + dn, fma(dn, load(offset(n, k)), products)
    mean, of_n = _sum_of_lanes(total) / hidden, _sum_of_lanes(products) / hidden
    for block in range(blocks):
        k = block * width
        dn = load(offset(d, k)) * load_first(offset(gain, k), minimum(width, hidden - k))
        store(offset(d, k), scale * (dn - mean - load(offset(n, k)) * of_n))


@routine
def normalise_gates_back(da, da_x, da_h, row, norms, gains, scales, shares, blocks):
    """Take the gradient by the pre-activations of one row back to those by the products with x and with h.

    Parameters
    ----------
    da, da_x, da_h : GateGradients, IN, OUT, OUT
        The gradients; padding lanes may become anything finite.
    row : int
        Of them.
    norms : pointer, IN
        The normalised products, (2, Hp/V, 4, V).
    gains : pointer, IN
        Likewise, zero in the padding.
    scales : pointer, IN
        Two vectors.
    shares : pointer, IN
        Of the four gates, and the number of rows.
    """
    stay_outlined()
    width, count, size = lanes_of(norms), splat(offset(shares, GATES)), blocks * GATES * lanes_of(norms)
    gains_h, norms_h = offset(gains, size), offset(norms, size)
    total_x = of_n_x = total_h = of_n_h = fill(norms, 0.0)
    for block in range(blocks):
        part, part_row = strip(da, block * GATES * width)
        here = offset(part, row * part_row)
        for gate in range(GATES):
            k = (block * GATES + gate) * width
            d = load(offset(here, gate * width))
            d_x, d_h = d * load(offset(gains, k)), d * load(offset(gains_h, k))
            total_x, of_n_x = total_x + d_x, fma(d_x, load(offset(norms, k)), of_n_x)
            total_h, of_n_h = total_h + d_h, fma(d_h, load(offset(norms_h, k)), of_n_h)
    total_x, of_n_x = _sum_of_lanes(total_x) / count, _sum_of_lanes(of_n_x) / count
    total_h, of_n_h = _sum_of_lanes(total_h) / count, _sum_of_lanes(of_n_h) / count
    scale_x, scale_h = load(scales), load(offset(scales, width))
    for block in range(blocks):
        part, part_row = strip(da, block * GATES * width)
        here, (part_x, _), (part_h, _) = (
            offset(part, row * part_row), strip(da_x, block * GATES * width), strip(da_h, block * GATES * width),
        )  # fmt: skip
        for gate in range(GATES):
            k = (block * GATES + gate) * width
            d, at = load(offset(here, gate * width)), row * part_row + gate * width
            d_x, d_h = d * load(offset(gains, k)), d * load(offset(gains_h, k))
            share = splat(offset(shares, gate))
            mean_x = fma(load(offset(norms, k)), of_n_x, total_x)
            mean_h = fma(load(offset(norms_h, k)), of_n_h, total_h)
            store(offset(part_x, at), scale_x * (d_x - share * mean_x))
            store(offset(part_h, at), scale_h * (d_h - share * mean_h))
