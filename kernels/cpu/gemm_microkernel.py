"""The matrix-product microkernel: C = A @ B + start, for a block of C in registers. All products are built from it.

The block has up to :data:`MR` rows and :data:`NR` vectors of columns. For each k there is one vector load per column
vector of B, and for each row one broadcast of A and one fused multiply-add per column vector. With 6 x 4 vectors: 24
independent accumulators, and 24 multiply-adds for 4 loads and 6 broadcasts, which keeps the FMA units busy. A and B may
have any strides, so the same microkernel serves A transposed.

With a single row, one block of units has too few independent sums to hide the latency of the FMA units, so several
blocks are computed together.

The sum over k runs in order, for any number of rows, so the result of a row does not depend on the other rows of its
block. That is why results are bit-identical for any number of threads. The sum starts at zero, and `start` is added at
the end: a long product that is taken in parts has a smaller rounding error than one long chain.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.jit import cgutils, routine, unroll_loops
from fastlstm.kernels.cpu.vector import (
    REGISTERS,
    VECTOR_BYTES,
    emit_prefetch,
    lanes,
    lanes_of,
    llvm_vector,
    load_vector,
    minimum,
    offset,
    splat_scalar,
    unseen,
    vector_pointer,
)
from fastlstm.kernels.cpu.vector_arithmetic import call_llvm

__all__ = [
    "KC",
    "MC",
    "MR",
    "NR",
    "ROW_BLOCKS",
    "are_far",
    "emit_choice",
    "gate_tile",
    "gate_tiles",
    "rows_of_tile",
    "tile",
    "tiles",
    "zero_row",
]  # fmt: skip

NR = 4  # the four gates
MR = 6 if REGISTERS == 32 else 3  # 24 or 12 accumulators; with one more row, registers spill
ROW_BLOCKS = 2  # blocks for a single row: eight sums, for two multiply-adds per cycle with a latency of four cycles
_ROW_OF_SIZES = ROW_BLOCKS * NR + 1  # more than the vectors of any block
# A long product takes KC rows of B at a time, for at most MC rows of A and C: the rows of B then stay in caches that
# are fast enough for the microkernel while it goes over the rows of C.
KC = 128
MC = 64
_FAR = 3 << 20  # bytes that exceed the L2 cache, see are_far


def _advance(builder, pointer, count):
    return builder.gep(pointer, [count])


def _rows_of(builder, pointer, stride, rows):
    """Emit pointers to the rows of a matrix."""
    pointers = [pointer]
    for _ in range(rows - 1):
        pointers.append(_advance(builder, pointers[-1], stride))
    return pointers


def _vectors_of(builder, pointer, vectors, width):
    """Emit pointers to successive vectors."""
    return _rows_of(builder, pointer, ir.Constant(ir.IntType(64), width), vectors)


def _emit_outer_product(builder, dtype, sums, elements, columns):
    """Emit sums + (a column of A) @ (a row of B), given pointers to their elements and vectors.

    The shorter of the two stays in registers while the elements of the longer are loaded one by one: that leaves the
    most registers for the sums.
    """
    updated = [[None] * len(columns) for _ in elements]
    if len(elements) < len(columns):
        factors = [splat_scalar(builder, builder.load(p), dtype) for p in elements]
        for v, pointer in enumerate(columns):
            vector = load_vector(builder, pointer, dtype)
            for r, factor in enumerate(factors):
                updated[r][v] = call_llvm(builder, "fma", dtype, [factor, vector, sums[r][v]])
    else:
        vectors = [load_vector(builder, p, dtype) for p in columns]
        for r, pointer in enumerate(elements):
            factor = splat_scalar(builder, builder.load(pointer), dtype)
            for v, vector in enumerate(vectors):
                updated[r][v] = call_llvm(builder, "fma", dtype, [factor, vector, sums[r][v]])
    return updated


def _emit_loop(builder, dtype, start, k_end, a_rows, a_k, panels, b_k, soon, soon_k, *, as_written=False):
    """Emit the loop over k, adding to the block `start`; return the sums.

    The panels are separate, and their vectors together make a row of the block. With `as_written` the loop is not
    unrolled: training is then faster, inference is not.

    For each k, the cache line at ``soon[k * soon_k]`` is prefetched. Many prefetches at once would occupy all the line
    fill buffers of a core, and the loop's own loads, from nearer caches, would wait for them. A single row is not
    prefetched for: it already loads one vector per multiply-add.
    """
    intp, vector = k_end.type, llvm_vector(dtype)
    zero, one = ir.Constant(intp, 0), ir.Constant(intp, 1)
    before = builder.block
    body, after = builder.append_basic_block("tile_k"), builder.append_basic_block("tile_end")
    builder.cbranch(builder.icmp_signed(">", k_end, zero), body, after)

    builder.position_at_end(body)
    k, b_now, soon_now = builder.phi(intp), [builder.phi(b.type) for b in panels], builder.phi(soon.type)
    a_now = [builder.phi(row.type) for row in a_rows]
    sums = [[builder.phi(vector) for _ in row] for row in start]
    width = len(start[0]) // len(panels)
    if len(a_rows) > 1:
        emit_prefetch(builder, soon_now)
    columns = [p for b in b_now for p in _vectors_of(builder, b, width, vector.count)]
    updated = _emit_outer_product(builder, dtype, sums, a_now, columns)
    b_then = [_advance(builder, p, b_k) for p in b_now]
    k_then = unseen(builder, builder.add(k, one)) if as_written else builder.add(k, one)
    following = [k_then, *b_then, *(_advance(builder, p, a_k) for p in a_now), _advance(builder, soon_now, soon_k)]
    builder.cbranch(builder.icmp_signed("<", following[0], k_end), body, after)
    for phi, first, then in zip([k, *b_now, *a_now, soon_now], [zero, *panels, *a_rows, soon], following, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, body)

    builder.position_at_end(after)
    results = []
    for first, total, then in zip(start, sums, updated, strict=True):
        results.append([])
        for x, phi, y in zip(first, total, then, strict=True):
            phi.add_incoming(x, before)
            phi.add_incoming(y, body)
            result = builder.phi(phi.type)
            result.add_incoming(x, before)
            result.add_incoming(y, body)
            results[-1].append(result)
    return results


def _emit_store(builder, dtype, values, c_rows):
    """Emit the stores of a block."""
    for row, pointer in zip(values, c_rows, strict=True):
        for value, p in zip(row, _vectors_of(builder, pointer, len(row), lanes(dtype)), strict=True):
            builder.store(value, vector_pointer(builder, p, dtype), align=dtype.bitwidth // 8)


def _emit_load(builder, dtype, rows, vectors):
    """Emit the loads of a block, given pointers to its rows."""
    count = lanes(dtype)
    return [[load_vector(builder, p, dtype) for p in _vectors_of(builder, row, vectors, count)] for row in rows]


def _sums(builder, one, other):
    """Emit the sum of two blocks."""
    return [[builder.fadd(x, y) for x, y in zip(*rows, strict=True)] for rows in zip(one, other, strict=True)]


def _zeros(dtype, rows, vectors):
    """Make a block of zeros."""
    return [[ir.Constant(llvm_vector(dtype), None)] * vectors for _ in range(rows)]


def _emit_tile(builder, dtype, rows, vectors, arguments):
    """Emit C = A @ B + start for a block of fixed size."""
    k_end, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, soon_k = arguments
    a_rows, c_rows = _rows_of(builder, a, a_row, rows), _rows_of(builder, c, c_row, rows)
    zeros = _zeros(dtype, rows, vectors)
    product = _emit_loop(builder, dtype, zeros, k_end, a_rows, a_k, [b], b_k, soon, soon_k, as_written=True)
    given = _emit_load(builder, dtype, _rows_of(builder, start, start_row, rows), vectors)
    _emit_store(builder, dtype, _sums(builder, given, product), c_rows)


def _emit_gate_tile(builder, dtype, rows, vectors, arguments):
    """Emit C = (A1 @ B1 + start) + A2 @ B2 for a block of fixed size."""
    k1, a1, a1_row, b1, b1_block, k2, a2, a2_row, b2, b2_block, start, start_row, c, c_row, soon, soon_k = arguments
    one, b_k, panels = ir.Constant(k1.type, 1), ir.Constant(k1.type, NR * lanes(dtype)), vectors // NR
    a_rows, b_panels = _rows_of(builder, a1, a1_row, rows), _rows_of(builder, b1, b1_block, panels)
    sums = _emit_loop(builder, dtype, _zeros(dtype, rows, vectors), k1, a_rows, one, b_panels, b_k, soon, soon_k)
    given = _emit_load(builder, dtype, _rows_of(builder, start, start_row, rows), vectors)
    a_rows, b_panels = _rows_of(builder, a2, a2_row, rows), _rows_of(builder, b2, b2_block, panels)
    soon = _advance(builder, soon, builder.mul(k1, soon_k))
    sums = _emit_loop(builder, dtype, _sums(builder, sums, given), k2, a_rows, one, b_panels, b_k, soon, soon_k)
    _emit_store(builder, dtype, sums, _rows_of(builder, c, c_row, rows))


def emit_choice(context, builder, signature, args, sizes, emit):
    """Emit a block for each of `sizes`, and the choice between them by the first two arguments."""
    # Inlined at each use, the blocks would multiply the compile time.
    builder.function.attributes.add("noinline")
    unroll_loops(builder)
    intp, dtype = (
        context.get_value_type(types.intp),
        next(t.dtype for t in signature.args if not isinstance(t, types.Integer)),
    )
    arguments = [
        context.cast(builder, value, t, types.intp) if isinstance(t, types.Integer) else value
        for value, t in zip(args, signature.args, strict=True)
    ]
    rows, vectors, *rest = arguments
    size = builder.add(builder.mul(rows, ir.Constant(intp, _ROW_OF_SIZES)), vectors)
    end = builder.append_basic_block("tile_done")
    choice = builder.switch(size, end)
    for r, v in sizes:
        block = builder.append_basic_block(f"tile_{r}x{v}")
        choice.add_case(ir.Constant(intp, r * _ROW_OF_SIZES + v), block)
        builder.position_at_end(block)
        emit(builder, dtype, r, v, rest)
        builder.branch(end)
    builder.position_at_end(end)
    return context.get_dummy_value()


@intrinsic
def _tile(typingctx, rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, soon_k):
    sizes = [(r, v) for r in range(1, MR + 1) for v in range(1, NR + 1)]

    def codegen(context, builder, signature, args):
        return emit_choice(context, builder, signature, args, sizes, _emit_tile)

    return types.void(rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, soon_k), codegen


@intrinsic
def _gate_tile(
    typingctx, rows, vectors, k1, a1, a1_row, b1, b1_block, k2, a2, a2_row, b2, b2_block, start, start_row, c, c_row,
    soon, soon_k,
):  # fmt: skip
    sizes = [(r, NR) for r in range(1, MR + 1)] + [(1, n * NR) for n in range(2, ROW_BLOCKS + 1)]

    def codegen(context, builder, signature, args):
        return emit_choice(context, builder, signature, args, sizes, _emit_gate_tile)

    return types.void(
        rows, vectors, k1, a1, a1_row, b1, b1_block, k2, a2, a2_row, b2, b2_block, start, start_row, c, c_row, soon,
        soon_k,
    ), codegen  # fmt: skip


@intrinsic
def zero_row(typingctx, like):
    """Return a pointer to zeros, as many as a row of any block has, of the type of `like`: the start of new sums."""

    def codegen(context, builder, signature, args):
        count = ROW_BLOCKS * NR * lanes(like.dtype)
        zeros = ir.Constant(ir.ArrayType(context.get_value_type(like.dtype), count), None)
        return builder.bitcast(cgutils.global_constant(builder, "zero_row", zeros), args[0].type)

    return like(like), codegen


@routine
def tile(rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, soon_k):
    """Compute a block of C = A @ B + start.

    Parameters
    ----------
    rows, vectors : int
        Size of the block: 1 to MR rows, 1 to NR vectors of columns.
    k : int
        Length of the inner dimension.
    a : pointer, IN
        Element (row, k) of A is ``a[row * a_row + k * a_k]``.
    b : pointer, IN
        Row k of B, `vectors` whole vectors, starts at ``b[k * b_k]``.
    start : pointer, IN
        Row r starts at ``start[r * start_row]``: C itself, to add to it, or :func:`zero_row` for every row (0).
    c : pointer, OUT
        Row r of C, `vectors` whole vectors, starts at ``c[r * c_row]``; must not overlap A or B. If it exceeds L2, the
        caller prefetches it.
    soon, soon_k : pointer and int
        Memory that is needed soon: for each k, the cache line at ``soon[k * soon_k]`` is prefetched.
    """
    _tile(rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, soon_k)


@routine(inline=True)
def rows_of_tile(left):
    """Return how many of the remaining rows the next block takes.

    Of many rows, the last block gets more than one or two where possible: too few sums do not hide the FMA latency.
    """
    return (left + 1) // 2 if MR < left <= MR + 2 else minimum(MR, left)


@routine
def are_far(first, count):
    """Say whether `count` numbers, of the factors or sums of a product, exceed L2 and are prefetched.

    If they fit L2, even by half, the hardware prefetcher is good enough: software prefetches would take load slots, and
    evict lines from L1 that are still in use.
    """
    return count * VECTOR_BYTES > _FAR * lanes_of(first)


@routine(inline=True)
def _stream(soon, size, row, count, rows, k, near):
    """Return where a block of `count` rows starts to prefetch its share of `size` elements, and its step for each k.

    If there is nothing to prefetch, it is `near`: prefetches of unmapped addresses take time. A single block of rows
    does not prefetch either: it loads as many lines as it would prefetch, and the hardware prefetcher follows those
    loads.

    The loop then prefetches the same line again and again. A second loop without that has 21 in place of 22.75
    instructions for 12 multiply-adds (3 x 4 blocks, AVX2), but takes 0.987 to 1.006 of the time on one thread of a
    Zen 5: the multiply-adds take six cycles, in each of which it could begin more than these four instructions.
    """
    if size == 0 or rows <= MR:
        return near, 0
    return offset(soon, size * row // rows), (size * count + rows * k - 1) // (rows * k)


@routine
def tiles(rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, size):
    """Compute any number of rows of C with :func:`tile`, and prefetch `size` elements that are needed soon."""
    row = 0
    while row < rows:
        count = rows_of_tile(rows - row)
        soon_here, soon_k = _stream(soon, size, row, count, rows, k, b)
        tile(
            count, vectors, k, offset(a, row * a_row), a_row, a_k, b, b_k, offset(start, row * start_row), start_row,
            offset(c, row * c_row), c_row, soon_here, soon_k,
        )  # fmt: skip
        row += count


@routine
def gate_tile(
    rows, blocks, k1, a1, a1_row, b1, b1_block, k2, a2, a2_row, b2, b2_block, start, start_row, c, c_row, soon, soon_k
):  # fmt: skip
    """Compute the pre-activations of a block: C = (A1 @ B1 + start) + A2 @ B2, as one chain of sums over k.

    The chain may be cut at `start`: the first part alone (k2 = 0), and later the second (k1 = 0) from its result, are
    bit-identical to one call.

    Parameters
    ----------
    rows : int
        1 to MR.
    blocks : int
        Blocks of units: 1, or for a single row up to ROW_BLOCKS.
    k1, k2 : int
        Lengths of the inner dimensions.
    a1, a2 : pointer, IN
        Element (row, k) is ``a[row * a_row + k]``.
    b1, b2 : pointer, IN
        For block n at ``b1[n * b1_block]``: the k1 rows of B1, NR whole vectors each; B2 likewise.
    start : pointer, IN
        Row r starts at ``start[r * start_row]``, with NR whole vectors for each block, one after the other; may
        be C.
    c : pointer, OUT
        Row r starts at ``c[r * c_row]``, likewise.
    soon, soon_k : pointer and int
        As for :func:`tile`; unused for a single row.
    """
    _gate_tile(
        rows, NR * blocks, k1, a1, a1_row, b1, b1_block, k2, a2, a2_row, b2, b2_block, start, start_row, c, c_row,
        soon, soon_k,
    )  # fmt: skip


@routine(inline=True)
def gate_tiles(
    rows, blocks, k1, a1, a1_row, b1, b1_block, k2, a2, a2_row, b2, b2_block, start, start_row, c, c_row, far, following
):  # fmt: skip
    """Run :func:`gate_tile` over any number of rows; if B exceeds L2, prefetch the rows of B that come next."""
    k = k1 + k2
    size = k * NR * lanes_of(c) if far else 0
    row = 0
    while row < rows:
        count = rows_of_tile(rows - row)
        soon, soon_k = _stream(following, size, row, count, rows, k, b2)
        gate_tile(
            count, blocks, k1, offset(a1, row * a1_row), a1_row, b1, b1_block, k2, offset(a2, row * a2_row), a2_row,
            b2, b2_block, offset(start, row * start_row), start_row, offset(c, row * c_row), c_row, soon, soon_k,
        )  # fmt: skip
        row += count
