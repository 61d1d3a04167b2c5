"""One layer in one direction over a whole sequence, backward, of a cell whose time step has several phases.

The twin of ``phased_forward.py``, which says what the phases are and how matrices of other than gates are packed. As in
``sequence_backward.py``, the gate gradients of a chunk of steps are computed back in time, each thread having its own
rows; then their products, over all rows of the chunk at once, are added to the gradients of the weights and written to
those of the input. With layer norm, a chunk has the gradients by the pre-activations, which belong to the bias and the
gains, and those by the products with x and with h.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.cell_step import CELL, GATES, TAPE, cell_of
from fastlstm.kernels.cpu.gate_gradients import GateGradients, long_product, long_row
from fastlstm.kernels.cpu.gemm_microkernel import KC, MC, NR, ROW_BLOCKS, are_far
from fastlstm.kernels.cpu.held import hold
from fastlstm.kernels.cpu.jit import kernel, routine, stay_outlined
from fastlstm.kernels.cpu.phased_cells import LSTM
from fastlstm.kernels.cpu.phased_cells_back import (
    cells_back,
    end_step,
    gather,
    normed_rows_back,
    rnn_back,
    states_back,
)  # fmt: skip
from fastlstm.kernels.cpu.phased_gradients import (
    add_others,
    add_weights,
    clear,
    finish_gates,
    finish_states,
    finish_units,
    finish_weights,
)  # fmt: skip
from fastlstm.kernels.cpu.ragged import clear_padding, rows_of, share_rows
from fastlstm.kernels.cpu.state_masks import NUMBERS, Masks, recurrent_mask
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, share, summon, threads_of
from fastlstm.kernels.cpu.vector import (
    address,
    fill,
    lanes_of,
    load_first,
    maximum,
    minimum,
    offset,
    store,
)
from fastlstm.kernels.cpu.weight_gradients import (
    PANEL_ROWS,
    Product,
    inputs_back,
)
from fastlstm.kernels.cpu.weight_packing import pack_backward
from fastlstm.kernels.cpu.worker import this_call

__all__ = ["SETTINGS", "phased_backward"]

# The numbers in a call's `settings`, one int64 array: B; the longest length; T; the first column of dy to read; whether
# to add to dx in place of setting it, and to set it past the lengths to zero; for how many steps gate gradients are
# kept at a time, and how many rows these have at most; whether pre-activations were normalised; the kind of cell; I; U
# of the projection, 0 for none, and in vectors; F; U; U in vectors; V; the row sizes of dy, h, outputs of the cell, and
# normalised rows; whether no gradient goes to the h before a step, there are resets, and gradients of each step's
# states are asked for; S of the blocks that gates see, 0 for none. Then come the places in `scratch` of what the kernel
# works with, the numbers of ``state_masks.py``, and the addresses of a variant's routines.
(BATCH, STEPS, TOTAL, COLUMN, ACCUMULATE, CLEAR, CHUNK, CHUNK_ROWS, NORMED, KIND, INPUTS, OUT_UNITS, OUT_BLOCKS,
 FEATURES, UNITS, BLOCKS, WIDTH, DY_ROW, H_ROW, OUT_ROW, DOUT_ROW, NORM_ROW, TRUNCATED, HAS_RESETS, HAS_DY, HAS_STEPS,
 SEES, DA, DA_X, DA_H, D_SHOWN, D_OUT, DH_ROWS, DH_OLD, DC_ROWS, DOUT_ROWS, FACTORS, OF_X, OF_H, OF_OUT, SUMS_IH,
 SUMS_HH, SUMS_OUT, SUMS_BIAS, SUMS_GAINS, SUMS_C, GAINS, D_ROW, PANEL, MASKS) = range(50)  # fmt: skip
ADDRESSES = MASKS + NUMBERS
SETTINGS = ADDRESSES + CELL


class _Numbers(NamedTuple):
    """The numbers of a call: a record to be held, see ``held.py``."""

    numbers: Any


class _Layer(NamedTuple):
    """The arguments of the parts of the driver, to be held: pointers to rows."""

    numbers: Any  # of the call
    cell: Any  # of the first block
    masks: Any  # Masks, held
    tape: Any  # (N, Up/V, 5, V)
    c_rows: Any  # (N, Up)
    outs: Any  # (N, out_row)
    norms: Any  # (N, norm_row)
    norm_c: Any  # (2, H) gain and bias
    resets: Any  # (T * B,)
    dy: Any  # (T * B, dy_row), from the first column to read on
    dh_steps: Any  # (T * B, F)
    dc_steps: Any  # (T * B, H)
    gains: Any  # (2, Up/V, 4, V)
    da: Any  # GateGradients by the pre-activations
    da_x: Any  # by the products with x; without layer norm the same
    da_h: Any
    d_shown: Any  # (CHUNK_ROWS, Up) by the normalised c
    d_out: Any  # GateGradients by the projection
    dh_rows: Any  # (B, h_row)
    dh_old: Any  # (B, h_row) what goes past a step by zoneout
    dc_rows: Any  # (B, Up)
    dout_rows: Any  # (B, dout_row) by the output of the cell; without a projection they are `dh_rows`
    factors: Any  # (B, h_row) of recurrent dropout
    of_x: Any  # (panels of I, 4 * Up, 4 * V)
    of_h: Any  # (panels of F, 4 * Up, 4 * V)
    of_out: Any  # (panels of H, 4 * Up of the projection, 4 * V)
    d_row: Any  # this thread's, (Up,)
    panel: Any  # this thread's, (PANEL_ROWS, 4 * V)


@kernel
def phased_backward(
    weight_ih,  # (4U, I), IN
    weight_hh,  # (4U, F), IN
    own,  # (E, H) the variant's own parameters, IN
    weight_hr,  # (4U of the projection, H), or (0, H), IN
    gains,  # (2, 4U) of input and recurrent products, or (0, 4U), IN
    norm_c,  # (2, H) gain and bias of c, or (0, H), IN
    rates,  # (RATES,), IN: see state_masks.py
    x,  # (N, I) packed, IN
    tape,  # what phased_forward left: (N, Up/V, 5, V), or (0, Up/V, 0, V) of a plain RNN, IN
    h_rows,  # (N, h_row), IN
    c_rows,  # (N, Up), IN
    outs,  # (N, out_row), IN
    norms,  # (N, norm_row), IN
    index,  # order, lengths, offsets and places, IN: see ragged.py
    resets,  # (T * B,) uint8, or (0,) for none, IN
    dy,  # (T * B, D * F), or (0, D * F) for zero, IN
    dh_n,  # (B, F), IN
    dc_n,  # (B, H), IN
    dx,  # (T * B, I), or (0, I) if it is not wanted, OUT
    dh0,  # (B, F), OUT
    dc0,  # (B, H), OUT
    dweight_ih,  # (4U, I), OUT
    dweight_hh,  # (4U, F), OUT
    dbias,  # (4U,), or (0,) for none, OUT
    down,  # (E, H), OUT
    dweight_hr,  # as weight_hr, OUT
    dgains,  # as gains, OUT
    dnorm_c,  # as norm_c, OUT
    dh_steps,  # (T * B, F) the gradients by h after each step, or (0, F), OUT
    dc_steps,  # (T * B, H), OUT
    scratch,  # one-dimensional
    settings,  # (SETTINGS,), IN
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Back-propagate through the recurrence."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    rows = rows_of(index, settings[BATCH], settings[STEPS], 0)
    numbers = hold(_Numbers(address(settings)))
    cell = hold(cell_of(numbers.numbers, ADDRESSES, own, numbers.units))
    masks = hold(Masks(offset(numbers.numbers, MASKS), address(rates)))
    layer = hold(_layer(
        numbers, cell, masks, address(scratch), thread, address(tape), address(c_rows), address(outs), address(norms),
        address(norm_c), address(resets), address(dy), address(dh_steps), address(dc_steps),
    ))  # fmt: skip
    sums = hold(_sums(
        numbers, address(scratch), address(x), address(h_rows), layer.outs, address(dweight_ih), address(dweight_hh),
        address(dweight_hr), address(down), down.size,
    ))  # fmt: skip
    _pack(layer, address(weight_ih), address(weight_hh), address(weight_hr), dx.size, team, thread)
    _begin(layer, rows, address(dh_n), address(dc_n), address(gains), sums, team, thread)
    barrier(team, thread)
    _run_chunks(layer, rows, sums, address(dx), dx.size, team, thread)
    _finish(layer, sums, rows, address(dbias), dbias.size, address(dgains), address(dnorm_c), team, thread)
    finish_states(layer, rows, address(dh0), address(dc0), team, thread)
    if thread == 0:
        dismiss(team)


@routine
def _pack(layer, weight_ih, weight_hh, weight_hr, size, team, thread):
    """Pack this thread's share of the weights; `size` is that of dx, which alone needs those of the input."""
    stay_outlined()
    units, blocks = layer.units, layer.blocks
    first, last = share(blocks, team, thread)
    if size:
        pack_backward(weight_ih, units, layer.inputs, layer.of_x, blocks, first, last)
    pack_backward(weight_hh, units, layer.features, layer.of_h, blocks, first, last)
    if layer.out_units:
        first, last = share(layer.out_blocks, team, thread)
        pack_backward(weight_hr, layer.out_units, units, layer.of_out, layer.out_blocks, first, last)


@routine
def _run_chunks(layer, rows, sums, dx, size, team, thread):
    """Back-propagate chunk by chunk."""
    stay_outlined()
    if layer.clear and size:
        clear_padding(dx, layer.inputs, layer.inputs, rows, layer.total, thread, threads_of(team, thread))
    first, last = share(layer.blocks, team, thread)
    out_first, out_last = share(layer.out_blocks, team, thread)
    chunk_last = rows.steps
    while chunk_last > 0:
        chunk_first = maximum(0, chunk_last - layer.chunk)
        low = rows.offsets[chunk_first]
        row_first, row_last = share_rows(rows, chunk_first, chunk_last, team, thread)
        for step in range(chunk_last - 1, chunk_first - 1, -1):
            _step_back(layer, rows, row_first, row_last, step, low)
        barrier(team, thread)
        add_weights(layer, layer.da_x, rows, sums.ih, chunk_first, chunk_last, first, last)
        add_weights(layer, layer.da_h, rows, sums.hh, chunk_first, chunk_last, first, last)
        if layer.out_units:
            add_weights(layer, layer.d_out, rows, sums.hr, chunk_first, chunk_last, out_first, out_last)
        add_others(layer, rows, sums, chunk_first, chunk_last, first, last)
        start, end = share(rows.offsets[chunk_last] - low, team, thread)
        if size:
            inputs_back(
                layer.da_x, start, end, offset(rows.places, low), layer.of_x, layer.inputs, layer.accumulate, dx,
                layer.panel,
            )  # fmt: skip
        barrier(team, thread)
        chunk_last = chunk_first


class _Sums(NamedTuple):
    """Gradients by parameters, summed over rows: a record to be held."""

    ih: Any  # Product
    hh: Any
    hr: Any  # of the projection
    bias: Any  # (Up/V, 4, V)
    gains: Any  # (2, Up/V, 4, V)
    c: Any  # (2, Up) gain and bias of c
    own: Any  # (E, H)
    own_size: Any


@routine(inline=True)
def _sums(numbers, work, x, h_rows, outs, dweight_ih, dweight_hh, dweight_hr, down, own_size):
    """Gather where gradients by parameters are summed."""
    units = numbers.units
    return _Sums(
        Product(x, numbers.inputs, numbers.inputs, offset(work, numbers.sums_ih), dweight_ih, units),
        Product(h_rows, numbers.h_row, numbers.features, offset(work, numbers.sums_hh), dweight_hh, units),
        Product(outs, numbers.out_row, units, offset(work, numbers.sums_out), dweight_hr, numbers.out_units),
        offset(work, numbers.sums_bias), offset(work, numbers.sums_gains), offset(work, numbers.sums_c), down, own_size,
    )  # fmt: skip


@routine(inline=True)
def _layer(numbers, cell, masks, work, thread, tape, c_rows, outs, norms, norm_c, resets, dy, dh_steps, dc_steps):
    """Gather what the parts of the driver work on."""
    tile_row = GATES * numbers.width
    depth, out_depth, chunk_rows = numbers.blocks * tile_row, numbers.out_blocks * tile_row, numbers.chunk_rows
    da = GateGradients(offset(work, numbers.da), chunk_rows, depth)
    da_x, da_h, dh_rows = da, da, offset(work, numbers.dh_rows)
    if numbers.normed:
        da_x = GateGradients(offset(work, numbers.da_x), chunk_rows, depth)
        da_h = GateGradients(offset(work, numbers.da_h), chunk_rows, depth)
    dout_rows = offset(work, numbers.dout_rows) if numbers.out_units else dh_rows
    return _Layer(
        numbers.numbers, cell, masks, tape, c_rows, outs, norms, norm_c, resets, offset(dy, numbers.column), dh_steps,
        dc_steps, offset(work, numbers.gains), da, da_x, da_h, offset(work, numbers.d_shown),
        GateGradients(offset(work, numbers.d_out), chunk_rows, out_depth), dh_rows, offset(work, numbers.dh_old),
        offset(work, numbers.dc_rows), dout_rows, offset(work, numbers.factors), offset(work, numbers.of_x),
        offset(work, numbers.of_h), offset(work, numbers.of_out),
        offset(work, numbers.d_row + thread * numbers.blocks * numbers.width),
        offset(work, numbers.panel + thread * PANEL_ROWS * NR * numbers.width),
    )  # fmt: skip


@routine
def _begin(layer, rows, dh_n, dc_n, gains, sums, team, thread):
    """Zero this thread's share of sums over rows, and put the final states' gradients in place."""
    stay_outlined()
    width, units, features, depth = layer.width, layer.units, layer.features, layer.da.depth
    clear(sums.bias, depth, team, thread)
    clear(sums.own, sums.own_size, team, thread)
    if layer.normed:
        clear(sums.gains, 2 * depth, team, thread)
        clear(sums.c, 2 * layer.blocks * width, team, thread)
        first, last = share(layer.blocks, team, thread)
        for number in range(2):
            for block in range(first, last):
                for gate in range(GATES):
                    here = minimum(width, units - block * width)
                    value = load_first(offset(gains, (number * GATES + gate) * units + block * width), here)
                    store(offset(layer.gains, number * depth + (block * GATES + gate) * width), value)
    first, last = share(rows.batch, team, thread)
    for row in range(first, last):
        sequence = rows.order[row]
        for k in range(0, layer.h_row, width):
            d = fill(dh_n, 0.0)
            if k < features:
                d = load_first(offset(dh_n, sequence * features + k), minimum(width, features - k))
            store(offset(layer.dh_rows, row * layer.h_row + k), d)
            if layer.masks.recurrent:
                factors = recurrent_mask(layer.masks, sequence * features + k)
                store(offset(layer.factors, row * layer.h_row + k), factors)
        for k in range(0, layer.blocks * width if layer.kind == LSTM else 0, width):
            d = load_first(offset(dc_n, sequence * units + k), minimum(width, units - k))
            store(offset(layer.dc_rows, row * layer.blocks * width + k), d)


@routine
def _step_back(layer, rows, row_first, row_last, step, low):
    """Take the gradients of this thread's rows back through one step of the chunk whose first row is `low`."""
    stay_outlined()
    here = rows.offsets[step]
    active = minimum(rows.offsets[step + 1] - here, row_last)
    if active <= row_first:
        return
    h_blocks = (layer.features + layer.width - 1) // layer.width
    states_back(layer, rows, here, row_first, active)
    if layer.out_units:
        gather(layer, here - low, row_first, active)
        _product_back(
            layer.d_out, here - low, row_first, active, layer.of_out, layer.blocks, layer.dout_rows, layer.dout_row,
            step & 1, layer.norms, 0,
        )  # fmt: skip
    if layer.kind != LSTM:
        rnn_back(layer, here, here - low, row_first, active)
    elif layer.normed:
        normed_rows_back(layer, rows, here, here - low, row_first, active)
    else:
        cells_back(layer, rows, here, here - low, row_first, active)
    if layer.truncated:
        for k in range(row_first * layer.h_row, active * layer.h_row, layer.width):
            store(offset(layer.dh_rows, k), fill(layer.dh_rows, 0.0))
    else:
        # What the step before has left, row after row, is prefetched while this step's product is computed.
        soon, row = (layer.norms, layer.norm_row) if layer.normed else (layer.tape, layer.blocks * TAPE * layer.width)
        before = rows.offsets[step - 1] if step else 0
        size = (active - row_first) * row if step and layer.kind == LSTM else 0
        _product_back(
            layer.da_h, here - low, row_first, active, layer.of_h, h_blocks, layer.dh_rows, layer.h_row, step & 1,
            offset(soon, (before + row_first) * row), size,
        )  # fmt: skip
    if layer.masks.recurrent or layer.masks.zone_h or layer.has_resets:
        end_step(layer, rows, here, row_first, active)


@routine
def _product_back(da, place, row_first, row_last, weights, blocks, out, out_row, backwards, soon, size):
    """Compute da @ weights for this thread's rows, the first of which stands at `place` of the chunk.

    Meanwhile the weights are prefetched or, if they fit the second-level cache, the `size` elements at `soon`.

    Parameters
    ----------
    da : GateGradients
    weights : pointer, IN
        (panels, depth, 4 * V): see ``weight_packing.pack_backward``.
    blocks : int
        Vectors of columns.
    out : pointer, OUT
        Rows of `out_row` numbers, from the first of all rows on.
    """
    stay_outlined()
    width, depth = lanes_of(out), da.depth
    columns, panels = NR * width, (blocks + NR - 1) // NR
    far = are_far(weights, blocks * depth * width)
    single = row_last - row_first == 1 and blocks % NR == 0  # as in sequence_backward.py
    together = ROW_BLOCKS if single else 1
    for turn in range(0, panels, together):
        count = minimum(together, panels - turn)
        panel = panels - count - turn if backwards else turn
        vectors = minimum(blocks, (panel + 1) * NR) - panel * NR
        of_panel = offset(weights, panel * depth * columns)
        for start in range(row_first, row_last, MC):
            target = offset(out, start * out_row + panel * columns)
            if single:
                long_row(count, da, place + start, of_panel, target)
            else:
                count_here = minimum(MC, row_last - start)
                part = size * count_here // (panels * (row_last - row_first))
                ahead, ahead_k = soon, (part + depth - 1) // depth
                soon = offset(soon, part)
                if far:
                    ahead, ahead_k = offset(of_panel, KC * columns), columns
                long_product(
                    count_here, vectors, da, place + start, of_panel, target, out_row, ahead, ahead_k, ahead_k * KC
                )


@routine
def _finish(layer, sums, rows, dbias, biases, dgains, dnorm_c, team, thread):
    """Write this thread's share of the gradients by parameters; there are so many `biases`, or none."""
    stay_outlined()
    first, last = share(layer.blocks, team, thread)
    depth = layer.da.depth
    finish_weights(sums.ih, depth, rows, first, last, team, thread)
    finish_weights(sums.hh, depth, rows, first, last, team, thread)
    if biases:
        finish_gates(layer, sums.bias, dbias, first, last)
    if layer.normed:
        finish_gates(layer, sums.gains, dgains, first, last)
        finish_gates(layer, offset(sums.gains, depth), offset(dgains, GATES * layer.units), first, last)
        finish_units(layer, sums.c, dnorm_c, first, last)
    if layer.out_units:
        first, last = share(layer.out_blocks, team, thread)
        finish_weights(sums.hr, layer.d_out.depth, rows, first, last, team, thread)
