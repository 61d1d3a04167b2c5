"""The cells of the driver ``phased_backward.py``: from the gradients by the states to those by the pre-activations.

A `layer` is the driver's record, which says what all shapes are. `here` is the first row of a step, and `place` where
that row stands in the chunk.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.cell_step import GATES, TAPE, backward, backward_normed, cell_at, output_back
from fastlstm.kernels.cpu.gate_gradients import strip
from fastlstm.kernels.cpu.jit import routine, stay_outlined
from fastlstm.kernels.cpu.layer_norm import normalise_gates_back, normalise_units_back
from fastlstm.kernels.cpu.phased_cells import LSTM, TANH
from fastlstm.kernels.cpu.shared_peepholes import seen_back, seen_by_output_back
from fastlstm.kernels.cpu.state_masks import SHARES, through
from fastlstm.kernels.cpu.vector import fill, load, load_first, minimum, offset, peek, prefetch, store, store_first
from fastlstm.kernels.cpu.vector_arithmetic import fma, select

__all__ = ["cells_back", "end_step", "gather", "normed_rows_back", "rnn_back", "states_back"]


@routine
def states_back(layer, rows, here, row_first, row_last):
    """Add the gradient by y to that by h; note both states' gradients; take that by h through zoneout."""
    stay_outlined()
    width, features, masks = layer.width, layer.features, layer.masks
    end = rows.offsets[rows.steps] - 1
    for row in range(row_first, row_last):
        place = rows.places[here + row]
        # The rows of dy lie in another order where the sequences were sorted, which no processor could foresee.
        soon = rows.places[minimum(here + row + 2, end)]
        for k in range(0, features, width):
            units, at = minimum(width, features - k), offset(layer.dh_rows, row * layer.h_row + k)
            dh = load(at)
            if layer.has_dy:
                prefetch(offset(layer.dy, soon * layer.dy_row + k))
                dh = dh + load_first(offset(layer.dy, place * layer.dy_row + k), units)
            if layer.has_steps:
                store_first(offset(layer.dh_steps, place * features + k), dh, units)
            if masks.zone_h:
                position, rate = place * features + k, offset(masks.rates, 1)
                old, dh = through(masks.zone_h, masks.start_h, position, masks.threshold_h, rate, dh)
                store(offset(layer.dh_old, row * layer.h_row + k), old)
            store(at, dh)
        for block in range(layer.blocks if layer.has_steps and layer.kind == LSTM else 0):
            k = block * width
            dc = load(offset(layer.dc_rows, row * layer.blocks * width + k))
            store_first(offset(layer.dc_steps, place * layer.units + k), dc, minimum(width, layer.units - k))


@routine
def gather(layer, place, row_first, row_last):
    """Bring the gradients by h, features in their order, to where the projection's rows are packed as gates."""
    stay_outlined()
    width = layer.width
    for block in range(layer.out_blocks):
        part, part_row = strip(layer.d_out, block * GATES * width)
        units = minimum(width, layer.out_units - block * width)
        for row in range(row_first, row_last):
            for gate in range(GATES):
                k = gate * layer.out_units + block * width
                d = load_first(offset(layer.dh_rows, row * layer.h_row + k), units)
                store(offset(part, (place + row) * part_row + gate * width), d)


@routine
def rnn_back(layer, here, place, row_first, row_last):
    """Take the gradients by h of a plain RNN to those by its pre-activations."""
    stay_outlined()
    width = layer.width
    for block in range(layer.blocks):
        part, part_row = strip(layer.da, block * GATES * width)
        units = minimum(width, layer.units - block * width)
        for row in range(row_first, row_last):
            for gate in range(GATES):
                k = gate * layer.units + block * width
                dh = load_first(offset(layer.dh_rows, row * layer.h_row + k), units)
                h = load_first(offset(layer.outs, (here + row) * layer.out_row + k), units)
                da = dh * (1.0 - h * h) if layer.kind == TANH else select(-h < 0.0, dh, 0.0)
                store(offset(part, (place + row) * part_row + gate * width), da)


@routine
def cells_back(layer, rows, here, place, row_first, row_last):
    """Take one step's gradients through the cells: dc in place, the gate gradients to da."""
    stay_outlined()
    width, zero = layer.width, fill(layer.dy, 0.0)
    for row in range(row_first, row_last):
        if layer.sees:
            for k in range(0, layer.blocks * width, width):
                store(offset(layer.d_row, k), zero)
            seen_by_output_back(layer, here, place, row)
        for block in range(layer.blocks):
            dh = load(offset(layer.dout_rows, row * layer.dout_row + block * width))
            more = load(offset(layer.d_row, block * width)) if layer.sees else zero
            _cell_back(layer, rows, here, place, row, block, dh, more)
        if layer.sees:
            seen_back(layer, place, row)


@routine(inline=True)
def _cell_back(layer, rows, here, place, row, block, dh, more):
    """Take the gradients of one row and block through the cell step; `more` is a gradient by c that comes to it."""
    width, masks = layer.width, layer.masks
    k = block * width
    units, at = minimum(width, layer.units - k), (here + row) * layer.blocks + block
    state = offset(layer.dc_rows, row * layer.blocks * width + k)
    dc, old = load(state), fill(state, 0.0)
    if masks.zone_c:
        position = rows.places[here + row] * layer.units + k
        old, dc = through(masks.zone_c, masks.start_c, position, masks.threshold_c, masks.rates, dc)
    part, part_row = strip(layer.da, k * GATES)
    cell, c_prev, da = (
        cell_at(layer.cell, k),
        load(offset(layer.c_rows, at * width)),
        offset(part, (place + row) * part_row),
    )
    tape = offset(layer.tape, at * TAPE * width)
    if layer.normed:
        dc = backward_normed(cell, dh, dc + more, tape, units, c_prev, da)
    else:
        if layer.sees:
            dc = dc + more
        dc = backward(cell, dh, dc, tape, units, c_prev, da)
    store(state, dc + old)


@routine
def normed_rows_back(layer, rows, here, place, row_first, row_last):
    """Take the gradients of some rows through the normalised c, the cells, and the normalised products."""
    stay_outlined()
    width, units, blocks = layer.width, layer.units, layer.blocks
    for row in range(row_first, row_last):
        norms = offset(layer.norms, (here + row) * layer.norm_row)
        n_c = offset(norms, 2 * blocks * GATES * width)
        scales = offset(n_c, blocks * width)
        d_shown, dout = (
            offset(layer.d_shown, (place + row) * blocks * width),
            offset(layer.dout_rows, row * layer.dout_row),
        )
        for block in range(blocks):
            k = block * width
            inside = minimum(width, units - k)
            gain, bias = (
                load_first(offset(layer.norm_c, k), inside),
                load_first(offset(layer.norm_c, units + k), inside),
            )
            o = load(offset(layer.tape, (((here + row) * blocks + block) * TAPE + 3) * width))
            shown = fma(load(offset(n_c, k)), gain, bias)
            d_o, d = output_back(cell_at(layer.cell, k), load(offset(dout, k)), o, shown)
            store(offset(dout, k), d_o)
            store(offset(d_shown, k), d)
            store(offset(layer.d_row, k), d)
        normalise_units_back(layer.d_row, n_c, layer.norm_c, load(offset(scales, 2 * width)), units, blocks)
        if layer.sees:
            seen_by_output_back(layer, here, place, row)
        for block in range(blocks):
            k = block * width
            _cell_back(layer, rows, here, place, row, block, load(offset(dout, k)), load(offset(layer.d_row, k)))
        if layer.sees:
            seen_back(layer, place, row)
        shares = offset(layer.masks.rates, SHARES)
        normalise_gates_back(layer.da, layer.da_x, layer.da_h, place + row, norms, layer.gains, scales, shares, blocks)


@routine
def end_step(layer, rows, here, row_first, row_last):
    """Take the gradients by h through recurrent dropout, add what went past by zoneout, and end them at resets."""
    stay_outlined()
    width = layer.width
    for row in range(row_first, row_last):
        gone = layer.has_resets and peek(offset(layer.resets, rows.places[here + row])) != 0
        for k in range(0, layer.features, width):
            at = offset(layer.dh_rows, row * layer.h_row + k)
            dh = load(at)
            if layer.masks.recurrent:
                dh = dh * load(offset(layer.factors, row * layer.h_row + k))
            if layer.masks.zone_h and not layer.truncated:
                dh = dh + load(offset(layer.dh_old, row * layer.h_row + k))
            store(at, fill(at, 0.0) if gone else dh)
        if gone and layer.kind == LSTM:
            for k in range(0, layer.blocks * width, width):
                store(offset(layer.dc_rows, row * layer.blocks * width + k), fill(layer.dc_rows, 0.0))
