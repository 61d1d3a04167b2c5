"""Gradients of the weights, the bias, a variant's own parameters and the input, from the gate gradients of a chunk."""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.cell_step import GATES, cell_at, own_gradients
from fastlstm.kernels.cpu.gate_gradients import long_product, strip
from fastlstm.kernels.cpu.gemm_microkernel import KC, NR, are_far, tiles, zero_row
from fastlstm.kernels.cpu.jit import routine, stay_outlined
from fastlstm.kernels.cpu.vector import fill, lanes_of, load, load_first, minimum, offset, store, store_first
from fastlstm.kernels.cpu.weight_packing import pack_rows

__all__ = [
    "PANEL_ROWS", "CellStates", "Product", "add_bias", "add_own", "add_weights", "cell_before", "cell_state",
    "finish_edge", "inputs_back", "weights_back",
]  # fmt: skip

# Rows of a chunk that a block of the weights' gradients takes at most: with 4 vectors each, those of x or h stay in L1
# while the microkernel goes over the gates of some units.
_DEPTH = 128
# The sums of a block of units stay in the caches while this many pieces are added to them. Loaded again for each piece,
# they would be most of the memory traffic of these products.
_PIECES = 4
# Rows of the gradient of x whose sums stay in L2 while all weights are read.
_INPUT_ROWS = 128
PANEL_ROWS = _PIECES * _DEPTH


class Product(NamedTuple):
    """The gradient of a weight: da^T @ x or da^T @ h, whose sums are kept in panels of columns until the last chunk."""

    operand: Any  # (N, row_size) the rows of x or h
    row_size: Any
    columns: Any  # of the weight: I or H
    sums: Any  # (panels, 4 * Hp, 4 * V)
    gradient: Any  # (4H, columns), OUT
    hidden: Any  # H


@routine
def add_bias(da, first_row, rows, sums, first, last):
    """Add some rows of da to the bias's gradient, (4 * Hp,), for this thread's blocks."""
    stay_outlined()
    width = lanes_of(sums)
    for block in range(first, last):
        part, part_row = strip(da, block * GATES * width)
        place = offset(sums, block * GATES * width)
        i = f = g = o = fill(place, 0.0)
        for row in range(first_row, first_row + rows):
            here = offset(part, row * part_row)
            i, f = i + load(here), f + load(offset(here, width))
            g, o = g + load(offset(here, 2 * width)), o + load(offset(here, 3 * width))
        store(place, load(place) + i)
        store(offset(place, width), load(offset(place, width)) + f)
        store(offset(place, 2 * width), load(offset(place, 2 * width)) + g)
        store(offset(place, 3 * width), load(offset(place, 3 * width)) + o)


@routine
def add_own(cell, da, rows, tape, c0, chunk_first, chunk_last, sums, first, last):
    """Add the rows of a chunk's steps to the gradients by a variant's own parameters, for this thread's blocks.

    `sums` is (E, H), `c0` (B, H), and `tape` the record of the cell states.
    """
    stay_outlined()
    width, low = tape.width, rows.offsets[chunk_first]
    for block in range(first, last):
        unit = block * width
        units, here = minimum(width, cell.hidden - unit), cell_at(cell, unit)
        part, part_row = strip(da, unit * GATES)
        for step in range(chunk_first, chunk_last):
            for row in range(rows.offsets[step + 1] - rows.offsets[step]):
                c_prev = cell_before(tape, c0, cell.hidden, rows, step, row, block, units)
                n = rows.offsets[step] + row
                own_gradients(
                    here, offset(part, (n - low) * part_row), units, c_prev, load(cell_state(tape, n, block)),
                    offset(sums, unit),
                )  # fmt: skip


class CellStates(NamedTuple):
    """The cell states on the tape."""

    start: Any  # pointer to the first
    blocks: Any  # Hp/V
    kept: Any  # vectors that a block of units leaves on the tape; c is the last
    width: Any  # V


@routine(inline=True)
def cell_state(tape, row, block):
    """Return a pointer to c of a row and block."""
    return offset(tape.start, ((row * tape.blocks + block) * tape.kept + tape.kept - 1) * tape.width)


@routine(inline=True)
def cell_before(tape, c0, hidden, rows, step, row, block, units):
    """Load the cell state before a step, of one of the step's rows."""
    if rows.has_resets and rows.resets[rows.offsets[step] + row]:
        return fill(c0, 0.0)
    if step:
        return load(cell_state(tape, rows.offsets[step - 1] + row, block))
    return load_first(offset(c0, rows.order[row] * hidden + block * tape.width), units)


@routine
def weights_back(product, da, first_row, rows, operand_row, panel, add, finish, first, last):
    """Add da^T @ operand to the sums, for at most PANEL_ROWS rows, panel by panel of the operand's columns.

    The first rows start the sums. The last rows store the sums to the gradient, except those of a last panel that ends
    with a part of a vector, which would overwrite the gradient's next row. The rows are cut into nearly equal pieces;
    where they are cut, and so the rounding of the sums, depends only on their number.
    """
    stay_outlined()
    width = lanes_of(panel)
    columns = NR * width
    for number in range((product.columns + columns - 1) // columns):
        column = number * columns
        vectors = minimum(NR, (product.columns - column + width - 1) // width)
        finish_here = finish and column + vectors * width <= product.columns
        pack_rows(product.operand, product.row_size, column, columns, panel, operand_row, operand_row + rows)
        for block in range(first, last):
            _block_back(product, da, first_row, rows, panel, add, finish_here, number, vectors, block, first, last)


@routine
def add_weights(layer, rows, ih, hh, sums_bias, chunk_first, chunk_last, first, last):
    """Add a chunk's gradients by the weights and the bias, for this thread's blocks; `layer` has `da` and `panel`."""
    stay_outlined()
    low, high = rows.offsets[chunk_first], rows.offsets[chunk_last]
    for start in range(low, high, PANEL_ROWS):
        count = minimum(PANEL_ROWS, high - start)
        add_bias(layer.da, start - low, count, sums_bias, first, last)
        add, finish = chunk_last < rows.steps or start > low, chunk_first == 0 and start + count == high
        weights_back(ih, layer.da, start - low, count, start, layer.panel, add, finish, first, last)
        weights_back(hh, layer.da, start - low, count, start, layer.panel, add, finish, first, last)


@routine
def _block_back(product, da, first_row, rows, panel, add, finish, number, vectors, block, first, last):
    """Add da^T @ operand for one panel and one block of units, piece by piece of the rows."""
    stay_outlined()
    width = lanes_of(panel)
    columns, pieces, depth = NR * width, (rows + _DEPTH - 1) // _DEPTH, da.depth
    sums = product.sums
    far = are_far(da.start, da.rows * depth)
    far_sums = are_far(sums, (product.columns + columns - 1) // columns * depth * columns)
    of_strip = pieces - 1 if far or far_sums else pieces
    part, part_row = strip(da, block * columns)
    left = offset(part, first_row * part_row)
    # While the blocks of one strip are computed, each prefetches its share of the next one; but with its last piece the
    # next block's sums, which exceed the caches too where the strips do: all of these passed by since.
    k = block * columns % KC
    other = block * columns - k + KC
    other_part, other_row = strip(da, other if other < last * columns else first * columns)
    next_strip = offset(other_part, first_row * other_row + k * rows)
    out = offset(sums, (number * depth + block * columns) * columns)
    next_row = (block + 1) * columns if block + 1 < last else depth + first * columns
    next_sums = offset(sums, (number * depth + next_row) * columns)
    for piece in range(pieces):
        start, end = rows * piece // pieces, rows * (piece + 1) // pieces
        a, b = offset(left, start * part_row), offset(panel, start * columns)
        before, before_row = (out, columns) if add or piece else (zero_row(out), 0)
        soon, size = next_sums, columns  # the size is that of each column's share
        if piece < of_strip:
            share = rows * piece // of_strip
            soon, size = offset(next_strip, columns * share), rows * (piece + 1) // of_strip - share
            size = size if far else 0
        if finish and piece + 1 == pieces:
            _finish_block(
                product, vectors, end - start, a, part_row, b, before, before_row, number * columns, block, soon, size
            )
        else:
            tiles(
                columns, vectors, end - start, a, 1, part_row, b, columns, before, before_row, out, columns, soon,
                size * columns,
            )  # fmt: skip


@routine(inline=True)
def _finish_block(product, vectors, depth, a, a_k, b, before, before_row, column, block, soon, size):
    """Compute the last piece of a block's sums, and store it to the gradient."""
    width, hidden = lanes_of(a), product.hidden
    columns = NR * width
    for gate in range(GATES):
        row = gate * width
        target = offset(product.gradient, (gate * hidden + block * width) * product.columns + column)
        tiles(
            minimum(width, hidden - block * width), vectors, depth, offset(a, row), 1, a_k, b, columns,
            offset(before, row * before_row), before_row, target, product.columns, offset(soon, row * size),
            width * size,
        )  # fmt: skip


@routine
def finish_edge(product, depth, first, last):
    """Store the sums of a last panel that ends with a part of a vector to the gradient."""
    stay_outlined()
    width, inputs = lanes_of(product.sums), product.columns
    columns = NR * width
    number = (inputs + columns - 1) // columns - 1
    column = number * columns
    if inputs % width == 0:
        return
    for block in range(first, last):
        for gate in range(GATES):
            for lane in range(minimum(width, product.hidden - block * width)):
                source = (number * depth + (block * GATES + gate) * width + lane) * columns
                target = (gate * product.hidden + block * width + lane) * inputs + column
                for v in range(0, inputs - column, width):
                    value = load(offset(product.sums, source + v))
                    store_first(offset(product.gradient, target + v), value, inputs - column - v)


@routine
def inputs_back(da, first_row, last_row, places, weights, inputs, accumulate, dx, block):
    """Compute dx = da @ W_ih for some rows of the chunk, whose first row has its place at ``places[0]``."""
    stay_outlined()
    width, depth = lanes_of(dx), da.depth
    columns = NR * width
    panels = (inputs + columns - 1) // columns
    far, da_far = are_far(dx, panels * depth * columns), are_far(dx, da.rows * depth)
    for panel in range(panels):
        column = panel * columns
        vectors = minimum(NR, (inputs - column + width - 1) // width)
        b = offset(weights, panel * depth * columns)
        for start in range(first_row, last_row, _INPUT_ROWS):
            rows = minimum(_INPUT_ROWS, last_row - start)
            # Of the factors, the one that exceeds the caches by more is prefetched.
            soon, soon_k, size = offset(b, KC * columns), columns, KC * columns if far else 0
            if da_far and not far:
                soon, _ = strip(da, minimum(KC, depth - 1))
                soon, soon_k, size = offset(soon, start * KC), da.rows, rows * KC
            long_product(rows, vectors, da, start, b, block, columns, soon, soon_k, size)
            for r in range(rows):
                target = places[start + r] * inputs + column
                for v in range(vectors):
                    units = minimum(width, inputs - column - v * width)
                    out = offset(dx, target + v * width)
                    value = load(offset(block, r * columns + v * width))
                    if accumulate:
                        value = value + load_first(out, units)
                    store_first(out, value, units)
