"""The matrix tile: C += A @ B on a block of C that stays in registers. Every product of the library is made of it.

The block has up to :data:`ROWS` rows and :data:`VECTORS` vectors of columns. For each k, one vector load
per column vector of B, and per row one broadcast of A and one fused multiply-add per column vector: with
6 x 4 vectors, 24 independent accumulators, 24 multiply-adds for 4 loads and 6 broadcasts, which keeps the
multipliers busy. A and B may lie at any strides, so the same tile serves A transposed.

The sum over k runs in order, whatever the number of rows: a row's result does not depend on which rows
share its tile. That is why results are bit-identical for any number of threads. The sum starts at zero and
C is added at the end: a long product, taken in parts, loses less to rounding than one long chain of sums.
"""

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.simd import REGISTERS, call_llvm, llvm_vector, load_vector, splat_scalar, vector_pointer

__all__ = ["ROWS", "VECTORS", "tile"]

VECTORS = 4  # the four gates
ROWS = 6 if REGISTERS == 32 else 2  # 24 or 8 accumulators; 7 rows of 4, or 3 with 16 registers, spill


def _advance(builder, pointer, count):
    return builder.gep(pointer, [count])


def _emit_block(builder, dtype, rows, vectors, arguments):
    """Emit the loop over k for a block of fixed size."""
    k_end, a, a_row, a_k, b, b_k, c, c_row = arguments
    vector, intp = llvm_vector(dtype), k_end.type
    width = ir.Constant(intp, vector.count)
    c_rows, a_rows = [c], [ir.Constant(intp, 0)]
    for _ in range(rows - 1):
        c_rows.append(_advance(builder, c_rows[-1], c_row))
        a_rows.append(builder.add(a_rows[-1], a_row))
    c_blocks = []
    for row in c_rows:
        pointers = [row]
        for _ in range(vectors - 1):
            pointers.append(_advance(builder, pointers[-1], width))
        c_blocks.append(pointers)
    nothing = ir.Constant(vector, None)

    before = builder.block
    body, after = builder.append_basic_block("tile_k"), builder.append_basic_block("tile_end")
    builder.cbranch(builder.icmp_signed(">", k_end, ir.Constant(intp, 0)), body, after)

    builder.position_at_end(body)
    k = builder.phi(intp)
    a_now, b_now = builder.phi(a.type), builder.phi(b.type)
    sums = [[builder.phi(vector) for _ in range(vectors)] for _ in range(rows)]
    columns, pointer = [], b_now
    for _ in range(vectors):
        columns.append(load_vector(builder, pointer, dtype))
        pointer = _advance(builder, pointer, width)
    updated = []
    for r in range(rows):
        factor = splat_scalar(builder, builder.load(_advance(builder, a_now, a_rows[r])), dtype)
        updated.append([call_llvm(builder, "fma", dtype, [factor, columns[v], sums[r][v]]) for v in range(vectors)])
    k_next = builder.add(k, ir.Constant(intp, 1))
    successors = (
        (k, ir.Constant(intp, 0), k_next),
        (a_now, a, _advance(builder, a_now, a_k)),
        (b_now, b, _advance(builder, b_now, b_k)),
    )
    builder.cbranch(builder.icmp_signed("<", k_next, k_end), body, after)
    for phi, start, following in successors:
        phi.add_incoming(start, before)
        phi.add_incoming(following, body)
    for r in range(rows):
        for v in range(vectors):
            sums[r][v].add_incoming(nothing, before)
            sums[r][v].add_incoming(updated[r][v], body)

    builder.position_at_end(after)
    for r in range(rows):
        for v in range(vectors):
            result = builder.phi(vector)
            result.add_incoming(nothing, before)
            result.add_incoming(updated[r][v], body)
            updated[r][v] = result
    for r in range(rows):
        for v in range(vectors):
            total = builder.fadd(load_vector(builder, c_blocks[r][v], dtype), updated[r][v])
            target = vector_pointer(builder, c_blocks[r][v], dtype)
            builder.store(total, target, align=dtype.bitwidth // 8)


@intrinsic
def _tile(typingctx, rows, vectors, k, a, a_row, a_k, b, b_k, c, c_row):
    """Emit one block for each size, and the choice between them."""

    def codegen(context, builder, signature, args):
        # Inlined at each of its uses, its 24 blocks would make the compiler's time five times as long.
        builder.function.attributes.add("noinline")
        intp = context.get_value_type(types.intp)
        arguments = [
            context.cast(builder, value, t, types.intp) if isinstance(t, types.Integer) else value
            for value, t in zip(args, signature.args, strict=True)
        ]
        rows, vectors, *rest = arguments
        size = builder.add(builder.mul(rows, ir.Constant(intp, VECTORS + 1)), vectors)
        end = builder.append_basic_block("tile_done")
        choice = builder.switch(size, end)
        for r in range(1, ROWS + 1):
            for v in range(1, VECTORS + 1):
                block = builder.append_basic_block(f"tile_{r}x{v}")
                choice.add_case(ir.Constant(intp, r * (VECTORS + 1) + v), block)
                builder.position_at_end(block)
                _emit_block(builder, a.dtype, r, v, rest)
                builder.branch(end)
        builder.position_at_end(end)
        return context.get_dummy_value()

    return types.void(rows, vectors, k, a, a_row, a_k, b, b_k, c, c_row), codegen


@njit
def tile(rows, vectors, k, a, a_row, a_k, b, b_k, c, c_row):
    """Add a product to a block of C.

    Parameters
    ----------
    rows, vectors : int
        Size of the block: 1 to ROWS rows, 1 to VECTORS vectors of columns.
    k : int
        Length of the inner dimension; 0 leaves C as it is.
    a : pointer, IN
        Element (row, k) of A is ``a[row * a_row + k * a_k]``.
    b : pointer, IN
        Row k of B, `vectors` whole vectors, starts at ``b[k * b_k]``.
    c : pointer, IN and OUT
        Row r of C, `vectors` whole vectors, starts at ``c[r * c_row]``; must not overlap A or B.
    """
    _tile(rows, vectors, k, a, a_row, a_k, b, b_k, c, c_row)
