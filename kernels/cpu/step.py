"""One time step on the weights as they lie: for streaming, where packing them would cost more than the step."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.compile import kernel
from fastlstm.kernels.cpu.gates import gates_forward
from fastlstm.kernels.cpu.simd import (
    Vector,
    address,
    call_llvm,
    first_lanes,
    lanes,
    lanes_of,
    llvm_vector,
    load_first,
    load_masked,
    load_vector,
    offset,
    store_first,
)

__all__ = ["step_forward"]


def _sum_of_rows(builder, dtype, rows):
    """Emit the vector whose lane r is the sum of the elements of vector number r: halve the vectors until one is left.

    At each stage two vectors become one, which holds the partial sums of both in alternating runs.
    """
    count, integer = lanes(dtype), ir.IntType(32)
    distance = 1
    while len(rows) > 1:
        low = [j if not j & distance else count + j - distance for j in range(count)]
        high = [j + distance if not j & distance else count + j for j in range(count)]
        order = ir.VectorType(integer, count)
        rows = [
            builder.fadd(*(builder.shuffle_vector(a, b, ir.Constant(order, indices)) for indices in (low, high)))
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]
        distance *= 2
    return rows[0]


@intrinsic
def _dot_rows(typingctx, matrix, row_length, count, x):
    """Return the products of the first `count` (1 to V) rows of a matrix with a vector x, one in each lane.

    `matrix` points to the first row, `row_length` elements each, and `x` to as many. Lanes beyond `count`
    repeat the last row's.
    """
    dtype = matrix.dtype

    def codegen(context, builder, signature, args):
        matrix, row_length, count, x = args
        row_length = context.cast(builder, row_length, signature.args[1], types.intp)
        count = context.cast(builder, count, signature.args[2], types.intp)
        intp, vector, width = row_length.type, llvm_vector(dtype), lanes(dtype)
        zero, step = ir.Constant(intp, 0), ir.Constant(intp, width)
        last = builder.sub(count, ir.Constant(intp, 1))
        rows = []
        for r in range(width):
            number = ir.Constant(intp, r)
            number = builder.select(builder.icmp_signed("<", number, last), number, last)
            rows.append(builder.gep(matrix, [builder.mul(number, row_length)]))
        whole = builder.sub(row_length, builder.srem(row_length, step))

        before = builder.block
        body, after = builder.append_basic_block("dot_k"), builder.append_basic_block("dot_tail")
        builder.cbranch(builder.icmp_signed(">", whole, zero), body, after)
        builder.position_at_end(body)
        k = builder.phi(intp)
        sums = [builder.phi(vector) for _ in range(width)]
        part = load_vector(builder, builder.gep(x, [k]), dtype)
        updated = [
            call_llvm(builder, "fma", dtype, [load_vector(builder, builder.gep(row, [k]), dtype), part, total])
            for row, total in zip(rows, sums, strict=True)
        ]
        following = builder.add(k, step)
        builder.cbranch(builder.icmp_signed("<", following, whole), body, after)
        k.add_incoming(zero, before)
        k.add_incoming(following, body)
        nothing = ir.Constant(vector, None)
        for total, value in zip(sums, updated, strict=True):
            total.add_incoming(nothing, before)
            total.add_incoming(value, body)

        builder.position_at_end(after)
        totals = []
        for value in updated:
            total = builder.phi(vector)
            total.add_incoming(nothing, before)
            total.add_incoming(value, body)
            totals.append(total)
        rest = builder.sub(row_length, whole)
        tail, end = builder.append_basic_block("dot_rest"), builder.append_basic_block("dot_end")
        builder.cbranch(builder.icmp_signed(">", rest, zero), tail, end)
        builder.position_at_end(tail)
        mask = first_lanes(builder, builder.trunc(rest, ir.IntType(32)), dtype)
        part = load_masked(builder, builder.gep(x, [whole]), mask, dtype)
        with_tail = [
            call_llvm(
                builder, "fma", dtype, [load_masked(builder, builder.gep(row, [whole]), mask, dtype), part, total]
            )
            for row, total in zip(rows, totals, strict=True)
        ]
        builder.branch(end)
        builder.position_at_end(end)
        finals = []
        for total, value in zip(totals, with_tail, strict=True):
            final = builder.phi(vector)
            final.add_incoming(total, after)
            final.add_incoming(value, tail)
            finals.append(final)
        return _sum_of_rows(builder, dtype, finals)

    return Vector(dtype)(matrix, row_length, count, x), codegen


@kernel
def step_forward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    x,  # (B, I), IN
    h_prev,  # (L, B, H), IN
    c_prev,  # (L, B, H), IN
    layer,  # which of the L
    h_next,  # (L, B, H), OUT
    c_next,  # (L, B, H), OUT
):
    """Advance one layer by one step."""
    batch, inputs = x.shape
    hidden, width = h_prev.shape[2], lanes_of(address(x))
    w_ih, w_hh = address(weight_ih), address(weight_hh)
    for row in range(batch):
        here = (layer * batch + row) * hidden
        x_row, h_row = offset(address(x), row * inputs), offset(address(h_prev), here)
        for unit in range(0, hidden, width):
            units = min(width, hidden - unit)
            i, f, g, o = unit, hidden + unit, 2 * hidden + unit, 3 * hidden + unit
            a_i = _dot_rows(offset(w_ih, i * inputs), inputs, units, x_row)
            a_i = a_i + _dot_rows(offset(w_hh, i * hidden), hidden, units, h_row)
            a_f = _dot_rows(offset(w_ih, f * inputs), inputs, units, x_row)
            a_f = a_f + _dot_rows(offset(w_hh, f * hidden), hidden, units, h_row)
            a_g = _dot_rows(offset(w_ih, g * inputs), inputs, units, x_row)
            a_g = a_g + _dot_rows(offset(w_hh, g * hidden), hidden, units, h_row)
            a_o = _dot_rows(offset(w_ih, o * inputs), inputs, units, x_row)
            a_o = a_o + _dot_rows(offset(w_hh, o * hidden), hidden, units, h_row)
            if bias.size:
                a_i = a_i + load_first(offset(address(bias), i), units)
                a_f = a_f + load_first(offset(address(bias), f), units)
                a_g = a_g + load_first(offset(address(bias), g), units)
                a_o = a_o + load_first(offset(address(bias), o), units)
            c = load_first(offset(address(c_prev), here + unit), units)
            _, _, _, _, c, h = gates_forward(a_i, a_f, a_g, a_o, c)
            store_first(offset(address(h_next), here + unit), h, units)
            store_first(offset(address(c_next), here + unit), c, units)
