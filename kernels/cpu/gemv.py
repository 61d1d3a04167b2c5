"""Products of a small batch with unpacked weights, where packing the weights would take longer than the products.

The microkernel of ``gemm_microkernel.py`` has a column of the weights in each lane. Here a vector is a part of one row
of the weights, and is multiplied by the same part of a row of x, so nothing has to be packed; the lanes are summed at
the end. Several rows of x and of the weights are taken at a time, so that each loaded vector is used in several
multiply-adds.

The order of a sum depends only on the lengths of the rows, not on which rows are computed together.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.cell_step import GATES
from fastlstm.kernels.cpu.gemm_microkernel import MR, NR, emit_choice, rows_of_tile
from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.vector import (
    CACHE_LINE,
    VECTOR_BYTES,
    first_lanes,
    lanes,
    lanes_of,
    llvm_vector,
    load_masked,
    load_vector,
    minimum,
    offset,
    prefetch,
)
from fastlstm.kernels.cpu.vector_arithmetic import call_llvm

__all__ = ["Unpacked", "gate_dots"]

# Rows of the weights that are taken at a time with several rows of x, and with one row: their sums fit the registers,
# and hide the latency of two multiply-adds per cycle that take four cycles each. Processors with AVX-512 need half as
# many for one row: out-of-order execution begins the next rows meanwhile.
_WITH_MORE = NR
_WITH_ONE = NR if VECTOR_BYTES == 64 else 2 * NR


def _halved(builder, dtype, vectors, run, span):
    """Emit half as many vectors: for each two, the sums of neighbouring runs of elements.

    Within each `span` of elements, the first half of the result comes from one vector, the second from the other.
    """
    count = lanes(dtype)
    order = ir.VectorType(ir.IntType(32), count)
    even = [
        vector + start + n + i
        for start in range(0, count, span)
        for vector in (0, count)
        for n in range(0, span, 2 * run)
        for i in range(run)
    ]
    choices = [ir.Constant(order, even), ir.Constant(order, [n + run for n in even])]
    return [
        builder.fadd(*(builder.shuffle_vector(a, b, choice) for choice in choices))
        for a, b in zip(vectors[::2], vectors[1::2], strict=True)
    ]


def _sum_over_lanes(builder, dtype, vectors):
    """Emit a vector whose lane n is the sum of the elements of vector number n; if there are fewer, they repeat."""
    count, near = lanes(dtype), 128 // dtype.bitwidth
    run = 1
    while run < count:
        # Shuffles within 16 bytes are faster than across.
        vectors = vectors if len(vectors) > 1 else 2 * vectors
        vectors = _halved(builder, dtype, vectors, *((1, near) if run < near else (near, count)))
        run *= 2
    return vectors[0]


def _emit_updates(builder, dtype, sums, load, weights, xs):
    """Emit sums + products of parts of rows of the weights and of x; `load` loads a part."""
    parts = [load(x) for x in xs]
    updated = [[] for _ in sums]
    for w, pointer in enumerate(weights):
        weight = load(pointer)
        for row, part, new in zip(sums, parts, updated, strict=True):
            new.append(call_llvm(builder, "fma", dtype, [weight, part, row[w]]))
    return updated


def _phis(builder, sums):
    return [[builder.phi(value.type) for value in row] for row in sums]


def _add_incoming(phis, values, block):
    for phi_row, row in zip(phis, values, strict=True):
        for phi, value in zip(phi_row, row, strict=True):
            phi.add_incoming(value, block)


def _emit_sums(builder, dtype, rows, numbers, products):
    """Emit the sums, lane by lane, of the rows of x times those `numbers` of the weights, over two products in turn."""
    (matrix1, length1, x1, x1_row), (matrix2, length2, x2, x2_row) = products
    intp, width, truth = length1.type, lanes(dtype), ir.IntType(1)
    zero, step = ir.Constant(intp, 0), ir.Constant(intp, width)
    before = builder.block
    product, body, after, tail, end, done = (
        builder.append_basic_block(f"dots_{name}") for name in ("product", "k", "after", "tail", "end", "done")
    )
    builder.branch(product)

    builder.position_at_end(product)
    second = builder.phi(truth)
    start = [[builder.phi(llvm_vector(dtype)) for _ in numbers] for _ in range(rows)]
    matrix, length = builder.select(second, matrix2, matrix1), builder.select(second, length2, length1)
    x, x_row = builder.select(second, x2, x1), builder.select(second, x2_row, x1_row)
    weights = [builder.gep(matrix, [builder.mul(n, length)]) for n in numbers]
    xs = [builder.gep(x, [builder.mul(ir.Constant(intp, r), x_row)]) for r in range(rows)]
    rest = builder.srem(length, step)
    whole = builder.sub(length, rest)
    builder.cbranch(builder.icmp_signed(">", whole, zero), body, after)

    builder.position_at_end(body)
    k, totals = builder.phi(intp), _phis(builder, start)
    updated = _emit_updates(
        builder, dtype, totals, lambda p: load_vector(builder, builder.gep(p, [k]), dtype), weights, xs
    )
    following = builder.add(k, step)
    builder.cbranch(builder.icmp_signed("<", following, whole), body, after)
    k.add_incoming(zero, product)
    k.add_incoming(following, body)
    _add_incoming(totals, start, product)
    _add_incoming(totals, updated, body)

    builder.position_at_end(after)
    summed = _phis(builder, start)
    _add_incoming(summed, start, product)
    _add_incoming(summed, updated, body)
    builder.cbranch(builder.icmp_signed(">", rest, zero), tail, end)

    builder.position_at_end(tail)
    mask = first_lanes(builder, builder.trunc(rest, ir.IntType(32)), dtype)
    with_tail = _emit_updates(
        builder, dtype, summed, lambda p: load_masked(builder, builder.gep(p, [whole]), mask, dtype), weights, xs
    )
    builder.branch(end)

    builder.position_at_end(end)
    results = _phis(builder, start)
    _add_incoming(results, summed, after)
    _add_incoming(results, with_tail, tail)
    builder.cbranch(second, done, product)
    second.add_incoming(ir.Constant(truth, 0), before)
    second.add_incoming(ir.Constant(truth, 1), end)
    zeros = [[ir.Constant(llvm_vector(dtype), None)] * len(row) for row in start]
    _add_incoming(start, zeros, before)
    _add_incoming(start, results, end)
    builder.position_at_end(done)
    return results


def _emit_dots(builder, dtype, rows, _, arguments):
    """Emit the products of some rows of x with some of the weights."""
    units, matrix1, length1, x1, x1_row, matrix2, length2, x2, x2_row, bias, biases, c, c_row = arguments
    count, intp, integer = lanes(dtype), units.type, ir.IntType(32)
    last = builder.sub(units, ir.Constant(intp, 1))
    together = min(count, _WITH_ONE if rows == 1 else _WITH_MORE)
    found = ir.VectorType(llvm_vector(dtype).element, together)
    first = ir.Constant(ir.VectorType(integer, together), list(range(together)))
    numbers = [ir.Constant(intp, n) for n in range(together)]
    numbers = [builder.select(builder.icmp_signed("<", n, last), n, last) for n in numbers]  # none beyond the units
    products = (matrix1, length1, x1, x1_row), (matrix2, length2, x2, x2_row)
    start = load_masked(builder, bias, first_lanes(builder, builder.trunc(biases, integer), dtype), dtype)
    for vectors in _emit_sums(builder, dtype, rows, numbers, products):
        total = builder.fadd(_sum_over_lanes(builder, dtype, vectors), start)
        target = builder.bitcast(c, found.as_pointer())
        builder.store(builder.shuffle_vector(total, total, first), target, align=dtype.bitwidth // 8)
        c = builder.gep(c, [c_row])


@intrinsic
def _dots(
    typingctx, rows, vectors, units, matrix1, length1, x1, x1_row, matrix2, length2, x2, x2_row, bias, biases, c, c_row
):  # fmt: skip
    def codegen(context, builder, signature, args):
        return emit_choice(context, builder, signature, args, [(r, 1) for r in range(1, MR + 1)], _emit_dots)

    return types.void(
        rows, vectors, units, matrix1, length1, x1, x1_row, matrix2, length2, x2, x2_row, bias, biases, c, c_row
    ), codegen


@routine
def _dot_tile(rows, units, matrix1, length1, x1, x1_row, matrix2, length2, x2, x2_row, bias, biases, c, c_row):
    """Compute x @ W1.T + h @ W2.T + b for up to MR rows and one vector of units of one gate."""
    _dots(rows, 1, units, matrix1, length1, x1, x1_row, matrix2, length2, x2, x2_row, bias, biases, c, c_row)


@routine
def _prefetch_share(following, size, row, end, rows):
    """Prefetch the share of the rows `row` to `end`, of `rows` in all, of the `size` elements that are needed next."""
    line = CACHE_LINE * lanes_of(following) // VECTOR_BYTES
    for n in range(size * row // rows, size * end // rows, line):
        prefetch(offset(following, n))


class Unpacked(NamedTuple):
    """The unpacked weights of a layer."""

    ih: Any  # (4H, I)
    hh: Any  # (4H, H)
    bias: Any  # (4H,), if there is one
    inputs: Any  # I
    hidden: Any  # H
    biased: Any


@routine
def gate_dots(rows, block, weights, x, h, h_row, a, a_row, far):
    """Compute a = x @ W_ih.T + h @ W_hh.T + b for some rows, and the four gates of one block of units.

    Parameters
    ----------
    rows, block : int
    weights : Unpacked
    x, h : pointer, IN
        Element (row, k) is ``x[row * I + k]`` and ``h[row * h_row + k]``.
    a : pointer, OUT
        Row r, a vector for each gate, starts at ``a[r * a_row]``. Lanes beyond the last unit may hold anything.
    far : bool
        Whether to prefetch the weights that are needed next.
    """
    width, inputs, hidden = lanes_of(a), weights.inputs, weights.hidden
    units = minimum(width, hidden - block * width)
    together = minimum(width, _WITH_ONE if rows == 1 else _WITH_MORE)
    for gate in range(GATES):
        # These rows of the weights stay in L1 while the rows of x are taken one after the other.
        for first in range(0, units, together):
            unit, left = gate * hidden + block * width + first, units - first
            w_ih, w_hh = offset(weights.ih, unit * inputs), offset(weights.hh, unit * hidden)
            row = 0
            while row < rows:
                count = rows_of_tile(rows - row)
                if far and rows > 2 * MR:
                    size = together * hidden
                    _prefetch_share(offset(w_hh, size), size, row, row + count, rows)
                _dot_tile(
                    count, left, w_ih, inputs, offset(x, row * inputs), inputs, w_hh, hidden, offset(h, row * h_row),
                    h_row, offset(weights.bias, unit), left if weights.biased else 0,
                    offset(a, row * a_row + gate * width + first), a_row,
                )  # fmt: skip
                row += count
