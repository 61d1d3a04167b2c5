"""The gradients of a closed loop: back through one step at a time, and the weights' gradients at the end.

A step back computes the gradients by the pre-activations, the input and the states alone. The first are kept for all
steps, so that the gradients by the weights are one product over all of them, as in a call for a whole sequence: one for
each step would read and write as many numbers as the weights have, a step.
"""

from __future__ import annotations

from typing import Any

from numba import from_dtype, types

from fastlstm.kernels.cpu.cell_step import GATES, TAPE, backward, cell_at, cell_of, own_gradients
from fastlstm.kernels.cpu.gate_gradients import GateGradients, long_product, long_row, strip
from fastlstm.kernels.cpu.gemm_microkernel import KC, NR, ROW_BLOCKS
from fastlstm.kernels.cpu.jit import by_address, kernel, routine
from fastlstm.kernels.cpu.room import MOST_ROWS, make_room
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, share, summon, threads_of
from fastlstm.kernels.cpu.unrolled_step import (
    ADDRESSES,
    BACK_WEIGHTS,
    BATCH,
    BETWEEN,
    BIASED,
    BLOCKS,
    CELLS,
    CHUNK,
    DC,
    DH,
    DROPPED,
    HIDDEN,
    INPUTS,
    LAYERS,
    LEFT,
    MASKS,
    OWN,
    OWN_PARAMETERS,
    PANELS,
    STEPS,
    SUMS_BIAS,
    SUMS_HH,
    SUMS_IH,
    TAKEN,
    TRUNCATED,
    C,
    H,
    X,
    at,
    multiply,
    steps_of_cells,
)
from fastlstm.kernels.cpu.vector import (
    address,
    fill,
    lanes_of,
    load,
    load_first,
    maximum,
    minimum,
    offset,
    prefetch,
    store_first,
)
from fastlstm.kernels.cpu.weight_gradients import PANEL_ROWS, Product, add_bias, finish_edge, weights_back
from fastlstm.kernels.cpu.weight_packing import pack_backward
from fastlstm.kernels.cpu.worker import this_call

__all__ = ["pack_for_back", "signatures", "unrolled_back", "unrolled_finish"]


_ROWS_EACH = 8  # of a thread at least, where threads share the rows of a product


@kernel
def pack_for_back(
    weights,  # (4H, H + I): W_hh and W_ih side by side, IN
    packed,  # one-dimensional: (panels of H + I, 4 * Hp, 4 * V), OUT
):
    """Pack the weights of a layer for products with gradients by pre-activations.

    Side by side, the columns of a narrow input fill up the last vectors of W_hh: on their own, four columns would take
    a fifth of the time of 100.
    """
    hidden, start = weights.shape[0] // GATES, address(packed)
    blocks = (hidden + lanes_of(start) - 1) // lanes_of(start)
    pack_backward(address(weights), hidden, weights.shape[1], start, blocks, 0, blocks)


@routine(inline=True)
def _packed_size(columns, blocks, like):
    """Return the size of a weight of so many columns, packed for the backward pass."""
    panel = NR * lanes_of(like)
    return (columns + panel - 1) // panel * panel * blocks * GATES * lanes_of(like)


@by_address
def unrolled_back(
    kit,  # (KIT,), IN
    tape,  # (TAPED,), IN and OUT
    dh,  # (B, H) the gradient by the output of the step, IN
    dx,  # (B, I), OUT
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Take the gradients back through the last step that is left, for all layers."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    like, batch = address(dx), tape[BATCH]
    inputs, hidden, layers, blocks = kit[INPUTS], kit[HIDDEN], kit[LAYERS], kit[BLOCKS]
    t, tile = tape[LEFT] - 1, make_room(like)
    row = t % tape[CHUNK] * batch  # the first of the step in its chunk
    between, dy = at(tape[BETWEEN], like), address(dh)
    first, further = _packed_size(inputs + hidden, blocks, like), _packed_size(2 * hidden, blocks, like)
    mine = share(blocks, team, thread)
    for turn in range(layers):
        number = layers - 1 - turn
        da = _gate_gradients(kit, tape, number, t // tape[CHUNK], like)
        _cells_back(kit, tape, number, t, dy, da, mine)
        barrier(team, thread)
        state = offset(at(tape[DH], like), number * batch * hidden)
        weights = at(kit[BACK_WEIGHTS], like)
        if number == 0:
            soon = _cells_of(kit, tape, layers - 1, maximum(0, t - 1), mine[0], like)
            _product_back(kit, da, row, batch, weights, state, inputs, like, tile, soon, mine, team, thread)
        else:
            soon = _cells_of(kit, tape, number - 1, t, mine[0], like)
            weights = offset(weights, first + (number - 1) * further)
            _product_back(kit, da, row, batch, weights, state, hidden, between, tile, soon, mine, team, thread)
            barrier(team, thread)  # the next layer reads all of it
            if tape[MASKS]:
                place = ((number - 1) * tape[STEPS] + t) * batch * hidden
                if thread == 0:
                    multiply(batch * hidden, between, offset(at(tape[MASKS], like), place), between)
                barrier(team, thread)
            dy = between
    if thread == 0:
        dismiss(team)
        tape[LEFT] = t


@routine(inline=True)
def _gate_gradients(kit, tape, number, chunk, like):
    """Return the record of the gradients by the pre-activations of a chunk of steps, in a layer."""
    rows, unit_row = tape[CHUNK] * tape[BATCH], kit[BLOCKS] * lanes_of(like)
    cells = offset(at(tape[CELLS], like), number * steps_of_cells(tape) * tape[BATCH] * TAPE * unit_row)
    return GateGradients(offset(cells, (chunk + 1) * rows * TAPE * unit_row), rows, GATES * unit_row)


@routine(inline=True)
def _cells_of(kit, tape, number, t, block, like):
    """Return a pointer to the cells' values of a layer, step and block of units: (B, 5, V)."""
    step = number * steps_of_cells(tape) + t
    return offset(at(tape[CELLS], like), (step * kit[BLOCKS] + block) * tape[BATCH] * TAPE * lanes_of(like))


@routine
def _cells_back(kit, tape, number, t, dy, da, mine):
    """Take the gradients of a step back through some cells of a layer: dc in place, the others to `da`."""
    width, batch, hidden = lanes_of(dy), tape[BATCH], kit[HIDDEN]
    own = at(kit[OWN_PARAMETERS], dy)
    cell = cell_of(kit, ADDRESSES, offset(own, number * kit[OWN] * hidden), hidden)
    states = number * batch * hidden
    dh_rows, dc_rows = offset(at(tape[DH], dy), states), offset(at(tape[DC], dy), states)
    c_rows = offset(at(tape[C], dy), (number * (tape[STEPS] + 1) + t) * batch * hidden)
    first_row = t % tape[CHUNK] * batch
    for block in range(mine[0], mine[1]):
        unit = block * width
        units, here = minimum(width, hidden - unit), cell_at(cell, unit)
        part, part_row = strip(da, unit * GATES)
        cells = _cells_of(kit, tape, number, t, block, dy)
        for row in range(batch):
            state = row * hidden + unit
            prefetch(offset(c_rows, state - batch * hidden))  # the next step back reads there
            dh = load_first(offset(dh_rows, state), units) + load_first(offset(dy, state), units)
            dc_prev = backward(
                here, dh, load_first(offset(dc_rows, state), units),
                offset(cells, row * TAPE * width), units, load_first(offset(c_rows, state), units),
                offset(part, (first_row + row) * part_row),
            )  # fmt: skip
            store_first(offset(dc_rows, state), dc_prev, units)
            if kit[TRUNCATED]:
                store_first(offset(dh_rows, state), fill(dy, 0.0), units)


@routine
def _product_back(kit, da, first_row, rows, weights, state, inputs, below, tile, soon, mine, team, thread):
    """Compute da @ [W_hh, W_ih] for some rows; W is packed in panels of its columns.

    The threads share the panels, or the rows if there are few panels, which cannot be shared evenly.
    The first columns go to `state`, (rows, H), the others to `below`, (rows, I). Meanwhile the cells' values that this
    thread needs next are prefetched from `soon` on: on the way back, no hardware prefetcher foresees the step before.
    """
    width, hidden, truncated = lanes_of(state), kit[HIDDEN], kit[TRUNCATED]
    columns = hidden + inputs
    panel_columns = NR * width
    panels, threads = (columns + panel_columns - 1) // panel_columns, threads_of(team, thread)
    first, last = share(panels, team, thread)
    row_first, row_last = 0, rows
    if threads > 1 and panels < 4 * threads and rows >= _ROWS_EACH * threads:
        first, last = 0, panels
        row_first, row_last = share(rows, team, thread)
    # Elements to prefetch with each k.
    soon_k = (mine[1] - mine[0]) * rows * TAPE * width // maximum(1, (last - first) * da.depth)
    # A single row has too few sums in one panel to fill the multipliers' pipelines; so it takes several.
    together = ROW_BLOCKS if rows == 1 else 1
    for low in range(row_first, row_last, MOST_ROWS):
        count = minimum(MOST_ROWS, row_last - low)
        for number in range(first, last, together):
            some = minimum(together, last - number)
            column, end = number * panel_columns, minimum((number + some) * panel_columns, columns)
            packed = offset(weights, column * da.depth)
            if rows == 1:
                long_row(some, da, first_row, packed, tile)
            else:
                vectors = (end - column + width - 1) // width
                here = offset(soon, (number - first) * da.depth * soon_k)
                size = KC * soon_k if low == row_first else 0
                long_product(count, vectors, da, first_row + low, packed, tile, panel_columns, here, soon_k, size)
            of_h, after_h = minimum(end, hidden), maximum(column, hidden)
            if not truncated:
                _hand_out(tile, panel_columns, count, column, of_h, state, low, hidden)
            place = offset(tile, after_h - column)
            _hand_out(place, panel_columns, count, after_h - hidden, end - hidden, below, low, inputs)


@routine(inline=True)
def _hand_out(source, source_row, rows, first, last, target, low, columns):
    """Copy a block to the columns `first` to `last` of a matrix of so many columns, from its row `low` on."""
    width = lanes_of(target)
    for row in range(rows):
        here = offset(target, (low + row) * columns)
        for column in range(first, last, width):
            value = load_first(offset(source, row * source_row + column - first), last - column)
            store_first(offset(here, column), value, minimum(width, last - column))


@by_address
def unrolled_finish(
    kit,  # (KIT,), IN
    tape,  # (TAPED,), IN
    gradients,  # one-dimensional: those by weight_ih, weight_hh, bias and own parameters of each layer in turn, OUT
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Compute the gradients by all parameters, from all steps that were taken.

    Each thread has some of the units; none reads what another writes.
    """
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    first, last = share(kit[BLOCKS], team, thread)
    _finish(kit, tape, address(gradients), first, last, thread)
    if thread == 0:
        dismiss(team)


@routine
def _finish(kit, tape, gradients, first, last, thread):
    """Compute the gradients by the parameters of some blocks of units, layer by layer."""
    width, batch, steps, hidden, layers = lanes_of(gradients), tape[BATCH], tape[STEPS], kit[HIDDEN], kit[LAYERS]
    inputs, chunk_rows, rows = kit[INPUTS], tape[CHUNK] * batch, tape[TAKEN] * batch
    panel = offset(at(tape[PANELS], gradients), thread * PANEL_ROWS * NR * width)
    sums_bias = at(tape[SUMS_BIAS], gradients)
    x = at(tape[X], gradients)
    for number in range(layers):
        h = offset(at(tape[H], gradients), number * (steps + 1) * batch * hidden)
        of_hh = offset(gradients, GATES * hidden * inputs)
        of_bias = offset(of_hh, GATES * hidden * hidden)
        of_own = offset(of_bias, GATES * hidden if kit[BIASED] else 0)
        ih = Product(x, inputs, inputs, at(tape[SUMS_IH], gradients), gradients, hidden)
        hh = Product(h, hidden, hidden, at(tape[SUMS_HH], gradients), of_hh, hidden)
        _begin(kit, ih, hh, rows, sums_bias, of_own, first, last)
        for low in range(0, rows, chunk_rows):
            da = _gate_gradients(kit, tape, number, low // chunk_rows, gradients)
            _add_chunk(da, low, minimum(chunk_rows, rows - low), rows, ih, hh, sums_bias, panel, first, last)
            if kit[OWN]:
                _add_own(kit, tape, number, da, low, minimum(chunk_rows, rows - low), of_own, first, last)
        if rows:
            finish_edge(ih, kit[BLOCKS] * GATES * width, first, last)
            finish_edge(hh, kit[BLOCKS] * GATES * width, first, last)
        if kit[BIASED]:
            _write_bias(hidden, sums_bias, of_bias, first, last)
        gradients, inputs = offset(of_own, kit[OWN] * hidden), hidden
        x = offset(h, batch * hidden)
        if tape[MASKS]:
            x = offset(at(tape[DROPPED], gradients), number * steps * batch * hidden)


@routine
def _begin(kit, ih, hh, rows, sums_bias, of_own, first, last):
    """Set to zero what is added to; and the gradients by the weights, if there was no step."""
    width, hidden = lanes_of(sums_bias), ih.hidden
    tile_row = GATES * width
    _clear(offset(sums_bias, first * tile_row), (last - first) * tile_row)
    for block in range(first, last):
        unit = block * width
        units = minimum(width, hidden - unit)
        for row in range(kit[OWN]):
            _clear(offset(of_own, row * hidden + unit), units)
        if rows == 0:
            for gate in range(GATES):
                row = gate * hidden + unit
                _clear(offset(ih.gradient, row * ih.columns), units * ih.columns)
                _clear(offset(hh.gradient, row * hh.columns), units * hh.columns)


@routine
def _add_chunk(da, low, count, rows, ih, hh, sums_bias, panel, first, last):
    """Add the gradients by weights and bias of a chunk's rows, of which `low` is the first of all `rows`."""
    for start in range(0, count, PANEL_ROWS):
        some, row = minimum(PANEL_ROWS, count - start), low + start
        add_bias(da, start, some, sums_bias, first, last)
        weights_back(ih, da, start, some, row, panel, row > 0, row + some == rows, first, last)
        weights_back(hh, da, start, some, row, panel, row > 0, row + some == rows, first, last)


@routine
def _clear(start, size):
    """Set some numbers to zero."""
    for n in range(0, size, lanes_of(start)):
        store_first(offset(start, n), fill(start, 0.0), size - n)


@routine
def _write_bias(hidden, sums, gradient, first, last):
    """Write the gradient by the bias."""
    width = lanes_of(sums)
    for block in range(first, last):
        for gate in range(GATES):
            total = load(offset(sums, (block * GATES + gate) * width))
            store_first(offset(gradient, gate * hidden + block * width), total, minimum(width, hidden - block * width))


@routine
def _add_own(kit, tape, number, da, low, count, gradient, first, last):
    """Add the gradients by a variant's own parameters, (E, H), of a chunk's rows."""
    width, hidden, batch = lanes_of(gradient), kit[HIDDEN], tape[BATCH]
    cell = cell_of(kit, ADDRESSES, gradient, hidden)  # no parameters are read
    c = offset(at(tape[C], gradient), (number * (tape[STEPS] + 1) * batch + low) * hidden)
    for block in range(first, last):
        unit = block * width
        units, here, sums = minimum(width, hidden - unit), cell_at(cell, unit), offset(gradient, unit)
        part, part_row = strip(da, unit * GATES)
        for row in range(count):
            before, after = offset(c, row * hidden + unit), offset(c, (row + batch) * hidden + unit)
            own_gradients(
                here, offset(part, row * part_row), units, load_first(before, units), load_first(after, units), sums
            )


def signatures(dtype: Any, by_pointers: bool) -> dict[Any, tuple[Any, ...]]:
    """Return the types of the arguments of the functions by address, as arrays of a dtype or as pointers."""
    number = from_dtype(dtype)
    if by_pointers:
        matrix = vector = types.CPointer(number)
        record = types.CPointer(types.int64)
    else:
        matrix, vector, record = (
            types.Array(number, 2, "C"),
            types.Array(number, 1, "C"),
            types.Array(types.int64, 1, "C"),
        )
    team = types.Array(types.int64, 2, "C")
    return {
        unrolled_back: (record, record, matrix, matrix, team, types.intp),
        unrolled_finish: (record, record, vector, team, types.intp),
    }
