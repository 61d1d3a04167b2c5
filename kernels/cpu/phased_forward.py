"""One layer in one direction over a whole sequence, forward, of a cell whose time step has several phases.

These are the cells that need more of a row than one vector of units at a time: layer norm, a projection, zoneout and
recurrent dropout of h, and the plain RNN. Each thread has its own rows and all units, so that no step has a barrier.
For at most MC rows at a time, a step computes

1. the pre-activations: input products, for the rows of several steps together where each step has few, and recurrent
   products; with layer norm, both are normalised, row by row;
2. the cell: c, and the output of the cell, by the routines of ``cell_step.py``, after the peephole inputs of
   shared gates (``shared_peepholes.py``); or h of the plain RNN;
3. the projection, if there is one;
4. zoneout of h, the output, and the h that the next step multiplies.

A matrix of R rows that is no gate's is packed as if its rows were four gates of U = ceil(R / 4) units: so the plain
RNN's weights (R = H) and the projection (R = P) use the products of the four gates. Their results are spread to
features in their own order. The caller pads such a matrix to 4U rows.

``ragged.py`` says how the rows are packed. V is the number of lanes of a vector, and p marks a size that is padded to
whole vectors. F is the number of features of h: P with a projection, else H; U is the number of units, H of an LSTM.

For each row, training keeps i, f, g, o and c (LSTM), h and c before the step (h as it is multiplied, after recurrent
dropout), the output of the cell (with a projection, and of the RNN), and with layer norm 9 numbers a unit: input
products, recurrent products and c, normalised. No mask is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.cell_step import CELL, GATES, cell_of
from fastlstm.kernels.cpu.gemm_microkernel import MC, ROW_BLOCKS, are_far, zero_row
from fastlstm.kernels.cpu.held import hold
from fastlstm.kernels.cpu.jit import kernel, routine, stay_outlined
from fastlstm.kernels.cpu.layer_norm import FAR
from fastlstm.kernels.cpu.phased_cells import (
    LSTM,
    block_of_cells,
    c_before,
    hand_on,
    keep_h,
    normed_rows,
    rows_at,
    spread,
)
from fastlstm.kernels.cpu.pre_activations import pre_activations
from fastlstm.kernels.cpu.ragged import clear_padding, rows_of, share_rows
from fastlstm.kernels.cpu.shared_peepholes import seen
from fastlstm.kernels.cpu.state_masks import NUMBERS, Masks, recurrent_mask
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, share, summon, threads_of
from fastlstm.kernels.cpu.vector import (
    address,
    fill,
    lanes_of,
    load_first,
    minimum,
    offset,
    peek,
    store,
    store_first,
)
from fastlstm.kernels.cpu.weight_packing import pack_columns
from fastlstm.kernels.cpu.worker import this_call

__all__ = ["SETTINGS", "phased_forward"]

# The numbers in a call's `settings`, one int64 array: B; the longest length; T; the first column of y to write;
# whether to set y past the lengths to zero, to write the tape, to pack the weights; for how many steps input products
# are computed together, 0 for none; whether pre-activations are kept for whole rows, and are normalised; the kind of
# cell; I; U of the projection, 0 for none; F; U; U in vectors; V; the row sizes of y, h, pre-activations, outputs of
# the cell, and normalised rows; vectors that a block of units leaves on the tape, 0 for none; whether there are resets,
# and outputs of the cell are kept; S of the blocks that gates see, 0 for none. Then come the places in `packed` and in
# `scratch` of what the kernel works with, the numbers of ``state_masks.py``, and the addresses of a variant's routines.
(BATCH, STEPS, TOTAL, COLUMN, CLEAR, TRAINING, PACK, AHEAD, WHOLE, NORMED, KIND, INPUTS, OUT_UNITS, FEATURES, UNITS,
 BLOCKS, WIDTH, Y_ROW, H_ROW, A_ROW, OUT_ROW, NORM_ROW, KEPT, HAS_RESETS, KEEPS_OUTS, SEES, OF_X, OF_H, BIAS, GAINS,
 OF_OUT, H_ROWS, C_ROWS, H_STATE, FACTORS, A, A_H, OUTS, H_NEW, NORMS, MASKS) = range(41)  # fmt: skip
ADDRESSES = MASKS + NUMBERS
SETTINGS = ADDRESSES + CELL


# Rows whose products are normalised at a time: those with x and with h, 4H numbers each, stay in the nearer caches.
_NORMED_ROWS = 24


class _Numbers(NamedTuple):
    """The numbers of a call: a record to be held, see ``held.py``."""

    numbers: Any


class _Layer(NamedTuple):
    """The arguments of the parts of the driver, to be held: pointers to rows; those of scratch are this thread's."""

    numbers: Any  # of the call
    cell: Any  # of the first block
    masks: Any  # Masks, held
    of_x: Any  # (Up/V, I, 4, V)
    of_h: Any  # (Up/V, F, 4, V)
    bias: Any  # (Up/V, 4, V)
    gains: Any  # (2, Up/V, 4, V)
    norm_c: Any  # (2, H) gain and bias
    of_out: Any  # (Up/V of the projection, H, 4, V)
    x: Any  # (N, I) packed
    y: Any  # (T * B, y_row), from the first column to write on
    h_n: Any  # (B, F)
    c_n: Any  # (B, H)
    resets: Any  # (T * B,)
    h_rows: Any  # (N, h_row) h before each row's step, as it is multiplied, for training, else (B, h_row)
    c_rows: Any  # (N, Up) likewise
    h_state: Any  # (B, h_row) h before recurrent dropout, for zoneout
    factors: Any  # (B, h_row) of recurrent dropout
    a: Any  # pre-activations: of the rows of `ahead` steps, or of MC rows and one block, or all blocks if `whole`
    a_h: Any  # (MC, 4 * Up) recurrent products, with layer norm; or the products of the projection
    outs: Any  # (N, out_row) the output of the cell if it is kept, else (MC, out_row)
    h_new: Any  # (MC, h_row) the new h, with a projection; else it is in `outs`
    tape: Any  # (N, Up/V, 5, V)
    norms: Any  # (N, norm_row) normalised rows if they are kept, else one row
    keeps_norms: Any  # FAR if they exceed the caches


@kernel
def phased_forward(
    weight_ih,  # (4U, I), IN
    weight_hh,  # (4U, F), IN
    bias,  # (4U,), or (0,) for none, IN
    own,  # (E, H) the variant's own parameters, IN
    weight_hr,  # (4U of the projection, H), or (0, H), IN
    gains,  # (2, 4U) of input and recurrent products, or (0, 4U), IN
    norm_c,  # (2, H) gain and bias of c, or (0, H), IN
    rates,  # (RATES,), IN: see state_masks.py
    x,  # (N, I) packed, IN
    h0,  # (B, F), IN
    c0,  # (B, H), or (B, 0) for a plain RNN, IN
    index,  # order, lengths, offsets and places, IN: see ragged.py
    resets,  # (T * B,) uint8, or (0,) for none, IN
    y,  # (T * B, D * F), OUT
    h_n,  # (B, F), OUT
    c_n,  # (B, H), OUT
    tape,  # (N, Up/V, 5, V) for training, else (0, Up/V, 0, V); of a plain RNN too, OUT
    h_rows,  # (N, h_row) for training, else (0, h_row), OUT
    c_rows,  # (N, Up) for training, OUT
    outs,  # (N, out_row) for training, if they are kept, else (0, out_row), OUT
    norms,  # (N, norm_row) for training with layer norm, else (0, norm_row), OUT
    packed,  # one-dimensional: the packed weights, IN, or OUT if they are packed here
    scratch,  # one-dimensional
    settings,  # (SETTINGS,), IN
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Run the recurrence; see the module's docstring."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    rows = rows_of(index, settings[BATCH], settings[STEPS], 0)
    numbers = hold(_Numbers(address(settings)))
    cell = hold(cell_of(numbers.numbers, ADDRESSES, own, numbers.units))
    masks = hold(Masks(offset(numbers.numbers, MASKS), address(rates)))
    layer = hold(_layer(
        numbers, cell, masks, address(packed), address(scratch), thread, address(norm_c), address(x), address(y),
        address(h_n), address(c_n), address(resets), address(tape), address(h_rows), address(c_rows), address(outs),
        address(norms), norms.size,
    ))  # fmt: skip
    if layer.pack:
        _pack(layer, address(weight_ih), address(weight_hh), address(bias), bias.size > 0, address(weight_hr),
              address(gains), team, thread)  # fmt: skip
    _begin(layer, rows, address(h0), address(c0), team, thread)
    if layer.clear:
        clear_padding(layer.y, layer.y_row, layer.features, rows, layer.total, thread, threads_of(team, thread))
    barrier(team, thread)
    first, last = share_rows(rows, 0, rows.steps, team, thread)
    for step in range(rows.steps):
        _step(layer, rows, first, last, step)
    if thread == 0:
        dismiss(team)


@routine(inline=True)
def _layer(
    numbers, cell, masks, weights, work, thread, norm_c, x, y, h_n, c_n, resets, tape, h_rows, c_rows, outs, norms,
    size_of_norms,
):  # fmt: skip
    """Gather what the parts of the driver work on, given what of it a call keeps, which inference does not."""
    a = offset(work, numbers.a + (0 if numbers.ahead else thread * MC * numbers.a_row))
    keeps_norms = 0
    if not numbers.training:
        h_rows, c_rows = offset(work, numbers.h_rows), offset(work, numbers.c_rows)
    if not numbers.keeps_outs:
        outs = offset(work, numbers.outs + thread * MC * numbers.out_row)
    if size_of_norms:
        keeps_norms = FAR if are_far(norms, size_of_norms) else 1
    else:
        norms = offset(work, numbers.norms + thread * numbers.norm_row)
    a_h_row = numbers.blocks * GATES * numbers.width
    return _Layer(
        numbers.numbers, cell, masks, offset(weights, numbers.of_x), offset(weights, numbers.of_h),
        offset(weights, numbers.bias), offset(weights, numbers.gains), norm_c, offset(weights, numbers.of_out), x,
        offset(y, numbers.column), h_n, c_n, resets, h_rows, c_rows, offset(work, numbers.h_state),
        offset(work, numbers.factors), a, offset(work, numbers.a_h + thread * MC * a_h_row), outs,
        offset(work, numbers.h_new + thread * MC * numbers.h_row), tape, norms, keeps_norms,
    )  # fmt: skip


@routine
def _pack(layer, weight_ih, weight_hh, bias, biased, weight_hr, gains, team, thread):
    """Pack this thread's share of the weights, of the bias, and of the gains of layer norm."""
    stay_outlined()
    units, width, tile_row = layer.units, layer.width, GATES * layer.width
    first, last = share(layer.blocks, team, thread)
    for block in range(first, last):
        pack_columns(weight_ih, units, layer.inputs, offset(layer.of_x, block * layer.inputs * tile_row), block)
        pack_columns(weight_hh, units, layer.features, offset(layer.of_h, block * layer.features * tile_row), block)
        _pack_gates(bias, units if biased else 0, block, layer.bias)
        if layer.normed:
            _pack_gates(gains, units, block, layer.gains)
            _pack_gates(offset(gains, GATES * units), units, block, offset(layer.gains, layer.blocks * tile_row))
    first, last = share((layer.out_units + width - 1) // width, team, thread)
    for block in range(first, last):
        pack_columns(weight_hr, layer.out_units, units, offset(layer.of_out, block * units * tile_row), block)


@routine
def _pack_gates(source, units, block, target):
    """Bring one block of (4, U) numbers to (Up/V, 4, V); zeros, if there are no units."""
    width = lanes_of(source)
    here = minimum(width, units - block * width) if units else 0
    for gate in range(GATES):
        value = load_first(offset(source, gate * units + block * width), here)
        store(offset(target, (block * GATES + gate) * width), value)


@routine
def _begin(layer, rows, h0, c0, team, thread):
    """Put this thread's share of the initial states in place; a sequence of length 0 ends with them."""
    stay_outlined()
    features, width, is_rnn = layer.features, layer.width, layer.kind != LSTM
    first, last = share(rows.batch, team, thread)
    for row in range(first, last):
        sequence = rows.order[row]
        runs = rows.lengths[row] > 0
        gone = layer.has_resets and runs and peek(offset(layer.resets, rows.places[row])) != 0
        for k in range(0, layer.h_row, width):
            units = minimum(width, features - k)
            h = load_first(offset(h0, sequence * features + k), units) if units > 0 else fill(layer.h_n, 0.0)
            if layer.masks.recurrent:
                factors = recurrent_mask(layer.masks, sequence * features + k)
                store(offset(layer.factors, row * layer.h_row + k), factors)
            if runs:
                keep_h(layer, row, row, k, fill(layer.h_n, 0.0) if gone else h)
            elif units > 0:
                store_first(offset(layer.h_n, sequence * features + k), h, units)
        for block in range(0 if is_rnn else layer.blocks):
            k = block * width
            units = minimum(width, layer.units - k)
            c = load_first(offset(c0, sequence * layer.units + k), units)
            if runs:
                store(offset(layer.c_rows, (row * layer.blocks + block) * width), fill(layer.h_n, 0.0) if gone else c)
            else:
                store_first(offset(layer.c_n, sequence * layer.units + k), c, units)


@routine
def _step(layer, rows, row_first, row_last, step):
    """Run one time step of this thread's rows."""
    stay_outlined()
    low = rows.offsets[step]
    active = minimum(rows.offsets[step + 1] - low, row_last)
    far = are_far(layer.h_rows, layer.blocks * (layer.inputs + layer.features) * GATES * layer.width)
    if layer.ahead and step % layer.ahead == 0:  # every row is this thread's
        count = rows.offsets[minimum(step + layer.ahead, rows.steps)] - low
        _input_products(layer, count, low, layer.a, far)
    most = _NORMED_ROWS if layer.normed else MC
    for start in range(row_first, active, most):
        count = minimum(most, active - start)
        outs = offset(layer.outs, (low + start) * layer.out_row if layer.keeps_outs else 0)
        _cells(layer, rows, step, low, start, count, outs, far)
        if layer.out_units:
            _project(layer, count, outs, step & 1)
            hand_on(layer, rows, step, low, start, count, layer.h_new, layer.h_row)
        else:
            hand_on(layer, rows, step, low, start, count, outs, layer.out_row)


@routine
def _input_products(layer, count, row, a, far):
    """Compute the input products of some rows, from number `row` on: with the bias, if they are not normalised."""
    stay_outlined()
    x, tile_row = offset(layer.x, row * layer.inputs), GATES * layer.width
    start, start_block = (zero_row(a), 0) if layer.normed else (layer.bias, tile_row)
    _products(
        count, x, layer.inputs, layer.of_x, x, 0, 0, layer.of_h, start, 0, start_block, a, layer.a_row, tile_row, 0,
        layer.blocks, 0, far,
    )  # fmt: skip


@routine
def _cells(layer, rows, step, low, start, count, outs, far):
    """Compute pre-activations and cells of some rows."""
    stay_outlined()
    inputs, depth, h_row, blocks, tile_row = (
        layer.inputs,
        layer.features,
        layer.h_row,
        layer.blocks,
        GATES * layer.width,
    )
    x = offset(layer.x, (low + start) * inputs)
    h, backwards = offset(layer.h_rows, (rows_at(layer, low) + start) * h_row), step & 1
    if not layer.whole:
        for turn in range(blocks):
            # Serpentine order: the caches still hold the weights that the step before used last.
            block = blocks - 1 - turn if backwards else turn
            _products(
                count, x, inputs, layer.of_x, h, depth, h_row, layer.of_h, layer.bias, 0, tile_row, layer.a, tile_row,
                0, block, block + 1, backwards, far,
            )  # fmt: skip
            block_of_cells(layer, rows, step, low, start, count, block, layer.a, outs)
        return
    a = layer.a
    if layer.ahead:
        a = offset(a, (low - rows.offsets[step - step % layer.ahead] + start) * layer.a_row)
    if layer.normed:
        if not layer.ahead:
            _input_products(layer, count, low + start, a, far)
        _products(
            count, h, 0, layer.of_x, h, depth, h_row, layer.of_h, zero_row(a), 0, 0, layer.a_h, layer.a_row, tile_row,
            0, blocks, backwards, far,
        )  # fmt: skip
        normed_rows(layer, rows, step, low, start, count, a, outs)
        return
    if layer.ahead:
        inputs = 0
    start_of, start_row = (a, layer.a_row) if layer.ahead else (layer.bias, 0)
    _products(
        count, x, inputs, layer.of_x, h, depth, h_row, layer.of_h, start_of, start_row, tile_row, a, layer.a_row,
        tile_row, 0, blocks, backwards, far,
    )  # fmt: skip
    for n in range(count if layer.sees else 0):
        seen(layer, c_before(layer, low, start + n), offset(a, n * layer.a_row), offset(outs, n * layer.out_row))
    for block in range(blocks):
        block_of_cells(layer, rows, step, low, start, count, block, offset(a, block * tile_row), outs)


@routine
def _products(
    count, x, inputs, of_x, h, depth, h_row, of_h, start, start_row, start_block, a, a_row, a_block, first, last,
    backwards, far,
):  # fmt: skip
    """Compute a = (x @ W_ih.T + start) + h @ W_hh.T for some rows and the blocks of units from first to last.

    Either product may be left out: `inputs` or `depth`, the numbers of x and h, is 0 then. The start and the sums of a
    block lie `start_block` and `a_block` from those of the block before.
    """
    stay_outlined()
    tile_row = GATES * lanes_of(a)
    together = ROW_BLOCKS if count == 1 else 1
    for turn in range(first, last, together):
        blocks = minimum(together, last - turn)
        block = first + last - blocks - turn if backwards else turn
        other = block - together if backwards else block + together
        other = other if first <= other < last else block  # where the next step begins
        after = offset(of_x, other * inputs * tile_row) if inputs else offset(of_h, other * depth * tile_row)
        pre_activations(
            count, blocks, x, inputs, offset(of_x, block * inputs * tile_row), h, depth, h_row,
            offset(of_h, block * depth * tile_row), offset(start, block * start_block), start_row,
            offset(a, block * a_block), a_row, far, after,
        )  # fmt: skip


@routine
def _project(layer, count, outs, backwards):
    """Compute the projection of some rows, to `h_new`."""
    stay_outlined()
    width = layer.width
    blocks, a_row = (layer.out_units + width - 1) // width, layer.blocks * GATES * width
    far = are_far(outs, blocks * layer.units * GATES * width)
    _products(
        count, outs, 0, layer.of_out, outs, layer.units, layer.out_row, layer.of_out, zero_row(outs), 0, 0, layer.a_h,
        a_row, GATES * width, 0, blocks, backwards, far,
    )  # fmt: skip
    for block in range(blocks):
        a = offset(layer.a_h, block * GATES * width)
        spread(count, a, a_row, layer.out_units, block, LSTM, layer.h_new, layer.h_row)
