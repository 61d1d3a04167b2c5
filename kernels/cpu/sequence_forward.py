"""One layer in one direction over a whole sequence, forward: the driver for large batches.

A kernel is run by a team of threads, each calling it with its own number: the first, which Python called, has the
others do so (``thread_team.py``). Each computes some sequences (rows) or some blocks of hidden units. Where every
thread has its own rows and all units, the steps need no synchronisation; where units are divided, the team meets after
each step, and a thread that is ready early takes blocks of threads that are behind.

``ragged.py`` says how the rows are packed. Arrays are C-contiguous; V is the number of lanes of a vector, Hp is H
padded to whole vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.cell_step import CELL, GATES, cell_at, cell_of, output, update
from fastlstm.kernels.cpu.gemm_microkernel import MC, ROW_BLOCKS, are_far
from fastlstm.kernels.cpu.gemv import Unpacked, gate_dots
from fastlstm.kernels.cpu.jit import kernel, routine, stay_outlined
from fastlstm.kernels.cpu.pre_activations import pre_activations
from fastlstm.kernels.cpu.ragged import clear_padding, rows_of, share_rows
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, fetch, record, share, summon, take, threads_of
from fastlstm.kernels.cpu.vector import address, fill, lanes_of, load, load_first, minimum, offset, store, store_first
from fastlstm.kernels.cpu.weight_packing import is_at_rest, pack_forward, packed_at
from fastlstm.kernels.cpu.worker import size_of_call, this_call

__all__ = ["SETTINGS", "sequence_forward"]

# The numbers in a call's `settings`, one int64 array: B; the longest length; T; the first column of y to write;
# whether to set y past the lengths to zero, to write the tape, to pack the weights, to use packed ones; for how many
# steps input products are computed together, 0 for none; whether units are divided among the threads, and whether there
# are resets. Then come the places in `scratch` of what the kernel works with, the length of a row of `a`, and the
# addresses of a variant's routines.
(BATCH, STEPS, TOTAL, COLUMN, CLEAR, TRAINING, PACK, IS_PACKED, AHEAD, DIVIDED, RESETS, H_ROWS, C_ROWS, A, A_ROW,
 WEIGHTS, BIAS, ADDRESSES) = range(18)  # fmt: skip
SETTINGS = ADDRESSES + CELL


class _Layer(NamedTuple):
    """The arguments of the parts of the driver: sizes, and pointers to rows."""

    cell: Any  # of the first block
    unpacked: Any  # the weights as given, if they are used so
    packed: Any  # the packed weights
    is_packed: Any
    hidden: Any  # H
    blocks: Any  # Hp/V
    width: Any  # V
    x: Any  # (N, I) packed
    y: Any  # (T * B, y_row), from the first column to write on
    y_row: Any
    h_n: Any  # (B, H)
    c_n: Any  # (B, H)
    h_rows: Any  # (N, Hp) the state before each row for training, else (2 * B, Hp)
    c_rows: Any  # (B, Hp)
    a: Any  # pre-activations: of the rows of `ahead` steps, or of this thread's MC rows and one block
    a_row: Any
    a_block: Any
    tape: Any  # (N, Hp/V, kept, V)
    kept: Any  # vectors a block of units leaves on the tape, 0 for none
    ahead: Any  # steps whose input products are computed together, 0 for none


class _Share(NamedTuple):
    """The share of one thread."""

    row_first: Any
    row_last: Any
    block_first: Any
    block_last: Any
    divided: Any  # whether units are divided among the threads


@kernel
def sequence_forward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    own,  # (E, H) the variant's own parameters, IN
    x,  # (N, I) packed, IN
    h0,  # (B, H), IN
    c0,  # (B, H), IN
    index,  # order, lengths, offsets and places, IN: see ragged.py
    y,  # (T * B, D * H), OUT
    h_n,  # (B, H), OUT
    c_n,  # (B, H), OUT
    tape,  # (N, Hp/V, 5, V) for training, or (N, Hp/V, 1, V) to keep c alone; else (0, Hp/V, 0, V), OUT
    h_rows,  # (N, Hp) for training, the state before each row, OUT
    packed,  # (Hp/V * (I + H), 4, V) packed weights, or (0, 4, V) if there are none yet, IN
    packed_bias,  # (2, Hp/V, 4, V), or (2, 0, 4, V), IN
    scratch,  # one-dimensional: h_rows (2 * B, Hp) for inference, c_rows, a, and weights that are packed here
    settings,  # (SETTINGS,), IN
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,  # number of the thread; or -1 to leave the call in `team`, a record, and do nothing
):
    """Run the recurrence; see the module's docstring for the layout."""
    if thread <= 0:
        call, arguments = this_call()
        if thread < 0:
            record(team, call, arguments, size_of_call())
            return
        summon(team, call, arguments)
    inputs, hidden, blocks = weight_ih.shape[1], weight_hh.shape[1], tape.shape[1]
    rows = rows_of(index, settings[BATCH], settings[STEPS], settings[RESETS])
    weights = Unpacked(address(weight_ih), address(weight_hh), address(bias), inputs, hidden, bias.size > 0)
    found, found_bias = address(packed), address(packed_bias)
    if settings[PACK]:
        found, found_bias = offset(address(scratch), settings[WEIGHTS]), offset(address(scratch), settings[BIAS])
    order = packed_at(found, found_bias, inputs, hidden, blocks)
    if settings[PACK]:
        first, last = share(blocks, team, thread)
        pack_forward(weights, order, first, last)
    cell = cell_of(settings, ADDRESSES, own, hidden)
    layer = _layer(cell, weights, order, x, y, h_n, c_n, tape, h_rows, scratch, settings, thread)
    _begin(layer, rows, h0, c0, team, thread)
    if settings[CLEAR]:
        clear_padding(layer.y, layer.y_row, hidden, rows, settings[TOTAL], thread, threads_of(team, thread))
    barrier(team, thread)

    mine = _share_of(rows, blocks, settings[DIVIDED], team, thread)
    at_rest = layer.is_packed and is_at_rest(address(h0), h0.size, order)
    for step in range(rows.steps):
        _step(layer, rows, mine, step, 0 if step == 0 and at_rest else hidden, team, thread)
        if mine.divided:
            barrier(team, thread)
        if rows.has_resets and step + 1 < rows.steps:
            _reset(layer, rows, mine, step + 1)
            if mine.divided:
                barrier(team, thread)
    if thread == 0:
        dismiss(team)


@routine(inline=True)
def _layer(cell, weights, packed, x, y, h_n, c_n, tape, h_rows, scratch, settings, thread):
    """Gather what the parts of the driver work on."""
    work, width, kept = address(scratch), tape.shape[3], tape.shape[2]
    ahead, a, a_row = settings[AHEAD], offset(work, settings[A]), settings[A_ROW]
    return _Layer(
        cell, weights, packed, settings[IS_PACKED], weights.hidden, tape.shape[1], width, address(x),
        offset(address(y), settings[COLUMN]), y.shape[1], address(h_n), address(c_n),
        address(h_rows) if settings[TRAINING] else offset(work, settings[H_ROWS]), offset(work, settings[C_ROWS]),
        a if ahead else offset(a, thread * MC * a_row), a_row, GATES * width if ahead else 0, address(tape),
        kept if settings[TRAINING] else 0, ahead,
    )  # fmt: skip


@routine
def _share_of(rows, blocks, divided, team, thread):
    """Return what this thread computes: some units of all rows, or all units of some rows."""
    stay_outlined()
    if divided:
        first, last = share(blocks, team, thread)
        return _Share(0, rows.batch, first, last, divided)
    first, last = share_rows(rows, 0, rows.steps, team, thread)
    return _Share(first, last, 0, blocks, divided)


@routine(inline=True)
def _step(layer, rows, mine, step, depth, team, thread):
    """Run one time step; `depth` is H, or 0 if h is zero and need not be multiplied."""
    low = rows.offsets[step]
    active, stride = minimum(rows.offsets[step + 1] - low, mine.row_last), layer.blocks * layer.width
    # Training keeps the state before each row; inference alternates between two.
    here = low if layer.kept else (step & 1) * rows.batch
    following = rows.offsets[step + 1] if layer.kept else (1 - (step & 1)) * rows.batch
    h_prev, far = offset(layer.h_rows, here * stride), _is_far(layer, mine)
    if mine.divided:
        fetch(h_prev, active * stride)
    if layer.ahead and step % layer.ahead == 0:  # full microkernels even where each step has few rows
        _project(layer, rows, mine, step, far)
    together = mine.block_last - mine.block_first if layer.ahead else 1
    left = mine.block_last - mine.block_first
    # A step of few rows is over before one could help.
    helped = mine.divided and not layer.ahead and threads_of(team, thread) > 1
    while True:
        if helped:
            first = take(layer.blocks, team, thread, step)
            if first < 0:
                break
        elif not left:
            break
        else:
            left -= together
            # Serpentine order: the caches still hold the weights that the step before used last.
            first = mine.block_first + left if step & 1 else mine.block_last - together - left
        for start in range(mine.row_first, active, MC):
            count = minimum(MC, active - start)
            a = _pre_activations(
                layer,
                rows,
                step,
                low,
                start,
                count,
                offset(h_prev, start * stride),
                depth,
                first,
                first + together,
                far,
            )
            for block in range(first, first + together):
                _cells(
                    layer, rows, step, low, start, count, block, offset(a, block * layer.a_block), following
                )  # fmt: skip


@routine
def _reset(layer, rows, mine, step):
    """Set the state before a step to zero where a reset says so, of this thread's rows and units."""
    stay_outlined()
    low, zero = rows.offsets[step], fill(layer.c_rows, 0.0)
    here = low if layer.kept else (step & 1) * rows.batch
    for row in range(mine.row_first, minimum(rows.offsets[step + 1] - low, mine.row_last)):
        if rows.resets[low + row]:
            for block in range(mine.block_first, mine.block_last):
                store(offset(layer.h_rows, ((here + row) * layer.blocks + block) * layer.width), zero)
                store(offset(layer.c_rows, (row * layer.blocks + block) * layer.width), zero)


@routine(inline=True)
def _is_far(layer, mine):
    """Say whether this thread's weights exceed the second-level cache."""
    columns = layer.packed.inputs + layer.hidden
    return are_far(layer.h_rows, (mine.block_last - mine.block_first) * columns * GATES * layer.width)


@routine
def _project(layer, rows, mine, step, far):
    """Compute the input products of all rows of the next `ahead` steps."""
    stay_outlined()
    low = rows.offsets[step]
    count = rows.offsets[minimum(step + layer.ahead, rows.steps)] - low
    x = offset(layer.x, low * layer.packed.inputs)
    _products(layer, count, x, layer.packed.inputs, x, 0, layer.packed.bias, 0, layer.a,
              mine.block_first, mine.block_last, 0, far)  # fmt: skip


@routine
def _pre_activations(layer, rows, step, low, start, count, h_prev, depth, first, last, far):
    """Compute the pre-activations of some rows and the blocks from first to last; return where they are."""
    x = offset(layer.x, (low + start) * layer.packed.inputs)
    if layer.ahead:  # every row is this thread's
        ahead_low = rows.offsets[step - step % layer.ahead]
        a = offset(layer.a, (low - ahead_low + start) * layer.a_row)
        _products(layer, count, h_prev, 0, h_prev, depth, a, layer.a_row, a, first, last, step & 1, far)
        return a
    if layer.is_packed:
        _products(
            layer, count, x, layer.packed.inputs, h_prev, depth, layer.packed.bias, 0, layer.a, first, last, step & 1,
            far,
        )  # fmt: skip
    else:
        stride = layer.blocks * layer.width
        gate_dots(count, first, layer.unpacked, x, h_prev, stride, layer.a, layer.a_row, far)
    return layer.a


@routine
def _products(layer, count, x, inputs, h, depth, start, start_row, a, first, last, backwards, far):
    """Compute a = (x @ W_ih.T + start) + h @ W_hh.T for some rows and the blocks of units from first to last.

    Either product may be left out: `inputs` or `depth`, the numbers of x and h, is 0 then. Where the product with x is
    in `start` already, this has a row for each row. Otherwise it is the bias, one for all rows (`start_row` 0).
    """
    stay_outlined()
    packed, tile_row = layer.packed, GATES * lanes_of(a)
    start_block = layer.a_block if start_row else tile_row
    together = ROW_BLOCKS if count == 1 else 1
    for turn in range(first, last, together):
        blocks = minimum(together, last - turn)
        block = first + last - blocks - turn if backwards else turn
        other = block - together if backwards else block + together
        other = other if first <= other < last else block  # where the next step begins
        after = (
            offset(packed.of_x, other * inputs * tile_row) if inputs else offset(packed.of_h, other * depth * tile_row)
        )
        pre_activations(
            count, blocks, x, inputs, offset(packed.of_x, block * inputs * tile_row), h, depth,
            layer.blocks * layer.width, offset(packed.of_h, block * depth * tile_row),
            offset(start, block * start_block), start_row, offset(a, block * layer.a_block), layer.a_row, far, after,
        )  # fmt: skip


@routine(inline=True)
def _cells(layer, rows, step, low, start, count, block, a, following):
    """Run the cell step for some rows of a block.

    While one row's gates are computed, so is h of the row before: tanh(c) has to wait for all gates of its cell, and
    the processor does not look so far ahead that it would find work in the next row by itself.
    """
    cell = cell_at(layer.cell, block * layer.width)
    held, c = _update(layer, cell, low, start, block, a)
    for n in range(1, count):
        held_next, c_next = _update(layer, cell, low, start + n, block, offset(a, n * layer.a_row))
        _hand_on(layer, rows, step, low, start + n - 1, block, output(cell, held, c), c, following)
        held, c = held_next, c_next
    _hand_on(layer, rows, step, low, start + count - 1, block, output(cell, held, c), c, following)


@routine(inline=True)
def _update(layer, cell, low, row, block, a):
    """Update the cell state of a row of a block in place; write the tape."""
    width = lanes_of(a)
    units = minimum(width, layer.hidden - block * width)
    here = offset(layer.c_rows, (row * layer.blocks + block) * width)
    tape = offset(layer.tape, ((low + row) * layer.blocks + block) * layer.kept * width)
    held, c = update(cell, a, units, load(here), tape, layer.kept)
    store(here, c)
    return held, c


@routine(inline=True)
def _hand_on(layer, rows, step, low, row, block, h, c, following):
    """Write h of a row of a block to y, and to the next step or, where the sequence ends, to the final states."""
    width = lanes_of(layer.y)
    units = minimum(width, layer.hidden - block * width)
    store_first(offset(layer.y, rows.places[low + row] * layer.y_row + block * width), h, units)
    if step + 1 < rows.lengths[row]:
        store(offset(layer.h_rows, ((following + row) * layer.blocks + block) * width), h)
    else:
        final = rows.order[row] * layer.hidden + block * width
        store_first(offset(layer.h_n, final), h, units)
        store_first(offset(layer.c_n, final), c, units)


@routine
def _begin(layer, rows, h0, c0, team, thread):
    """Put this thread's share of the initial states in place; a sequence of length 0 ends with them."""
    stay_outlined()
    hidden, width = layer.hidden, layer.width
    first, last = share(rows.batch, team, thread)
    for row in range(first, last):
        source = rows.order[row] * hidden
        for block in range(layer.blocks):
            unit, target = source + block * width, (row * layer.blocks + block) * width
            units = minimum(width, hidden - block * width)
            h, c = load_first(offset(address(h0), unit), units), load_first(offset(address(c0), unit), units)
            store(offset(layer.c_rows, target), c)
            if rows.lengths[row] > 0 or not layer.kept:
                store(offset(layer.h_rows, target), h)
            if rows.lengths[row] == 0:
                store_first(offset(layer.h_n, unit), h, units)
                store_first(offset(layer.c_n, unit), c, units)
