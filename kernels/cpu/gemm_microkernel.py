"""The matrix tile: C = A @ B + start, for a block of C that stays in registers. Every product here is made of it.

The block has up to :data:`MR` rows and :data:`NR` vectors of columns. For each k, one vector load
per column vector of B, and per row one broadcast of A and one fused multiply-add per column vector: with
6 x 4 vectors, 24 independent accumulators, 24 multiply-adds for 4 loads and 6 broadcasts, which keeps the
multipliers busy. A and B may lie at any strides, so the same tile serves A transposed.

A single row has too few sums in one block of units to fill the multipliers' pipelines, each waiting for the one
before, so it takes several blocks at a time.

The sum over k runs in order, whatever the number of rows: a row's result does not depend on which rows
share its tile. That is why results are bit-identical for any number of threads. The sum starts at zero, and
what it starts from is added at the end: a long product, taken in parts, loses less to rounding than one long chain.
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
MR = 6 if REGISTERS == 32 else 3  # 24 or 12 accumulators; one row more spills
ROW_BLOCKS = 2  # of a single row: eight sums, for two multiply-adds a cycle that take four cycles each
_ROW_OF_SIZES = ROW_BLOCKS * NR + 1  # more than the vectors of any tile
# A long product is taken KC rows of B at a time, for MC rows of A and C at most: the rows of B then stay in
# caches that keep up with the tile while it goes over the rows of C.
KC = 128
MC = 64
_FAR = 3 << 20  # bytes


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

    The shorter of the two stays in registers while the longer passes by: this decides how many sums fit beside it.
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

    The panels lie apart, and are as many vectors wide each as together make a row of the block. `as_written`, the loop
    is not unrolled, with which training as a whole is faster, and inference is not.

    For each k, the line of memory at ``soon[k * soon_k]`` is fetched. Many hints at once would take all the places
    where a core keeps what it waits for, and the loop's own loads, from the nearer caches, would wait with them. A
    single row has no time for hints: it loads a vector for every multiply-add.
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
    """Emit one block for each of `sizes`, and the choice between them by the two leading arguments."""
    # Inlined at each of its uses, the blocks would multiply the compiler's time.
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
    """Return a pointer to zeros, as many as a row of any tile has, of the type of another: a start for new sums."""

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
        Row r of C, `vectors` whole vectors, starts at ``c[r * c_row]``; must not overlap A or B. If it lies far away,
        the caller has it fetched before.
    soon, soon_k : pointer and int
        What will be wanted soon, whatever it is: for each k, the cache line at ``soon[k * soon_k]`` is fetched.
    """
    _tile(rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, soon_k)


@routine(inline=True)
def rows_of_tile(left):
    """Return how many of the rows that are left the next tile takes.

    The last tile has no one or two of many rows, as far as that goes: their few sums wait in turn.
    """
    return (left + 1) // 2 if MR < left <= MR + 2 else minimum(MR, left)


@routine
def are_far(first, count):
    """Say whether so many numbers, of the factors of a product or of its sums, are fetched ahead.

    What lies in the second-level cache, be it but half of them, the processor fetches well enough by itself: hints
    would take turns from the loads, and push lines out of the first-level cache that are still in use.
    """
    return count * VECTOR_BYTES > _FAR * lanes_of(first)


@routine(inline=True)
def _stream(soon, size, row, count, rows, k, near):
    """Return where a tile of `count` rows starts to fetch its share of `size` elements, and its step for each k.

    If there is nothing to fetch, it is `near`: to look for memory where there may be none would take time. Neither is
    there for a tile that is alone: it loads as many lines as it would have to fetch, and the processor, who sees them
    pass by, fetches the next ones better.
    """
    if size == 0 or rows <= MR:
        return near, 0
    return offset(soon, size * row // rows), (size * count + rows * k - 1) // (rows * k)


@routine
def tiles(rows, vectors, k, a, a_row, a_k, b, b_k, start, start_row, c, c_row, soon, size):
    """Compute any number of rows of C, as :func:`tile` does, and fetch `size` elements that will be wanted soon."""
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
    """Compute the pre-activations of a tile: C = (A1 @ B1 + start) + A2 @ B2, as one chain of sums over k.

    The chain may be cut at `start`: the first part alone (k2 = 0), and later the second (k1 = 0) from where
    that left off, give the same result to the last bit.

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
    """Run :func:`gate_tile` over any number of rows; where B is far, fetch as many rows of it that come after these."""
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
