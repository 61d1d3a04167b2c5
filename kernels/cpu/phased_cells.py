"""The cells of the driver ``phased_forward.py``: from pre-activations to the states before the next step.

A `layer` is the driver's record, which says what all shapes are. `low` is the first row of a step.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.activations import tanh
from fastlstm.kernels.cpu.cell_step import GATES, cell_at, output, update
from fastlstm.kernels.cpu.jit import routine, stay_outlined
from fastlstm.kernels.cpu.layer_norm import normalise_gates, normalise_units
from fastlstm.kernels.cpu.shared_peepholes import seen
from fastlstm.kernels.cpu.state_masks import SHARES, zoned
from fastlstm.kernels.cpu.vector import fill, lanes_of, load, load_first, minimum, offset, peek, store, store_first
from fastlstm.kernels.cpu.vector_arithmetic import fma, select

__all__ = [
    "LSTM",
    "NORM_VECTORS",
    "RELU",
    "TANH",
    "block_of_cells",
    "c_before",
    "hand_on",
    "keep_h",
    "normed_rows",
    "rows_at",
    "spread",
]

LSTM, TANH, RELU = range(3)  # kinds of cells
NORM_VECTORS = 3  # after the normalised row of a step come the three scales, a vector each


@routine(inline=True)
def rows_at(layer, low):
    """Return where the states before the step begin whose rows begin at `low`: inference has but one step's."""
    return low if layer.training else 0


@routine(inline=True)
def c_before(layer, low, row):
    """Return where the cell states of a row before the step begin."""
    return offset(layer.c_rows, (rows_at(layer, low) + row) * layer.blocks * layer.width)


@routine(inline=True)
def block_of_cells(layer, rows, step, low, start, count, block, a, outs):
    """Run the cell step for some rows of a block.

    While one row's gates are computed, so is the output of the row before, as in ``sequence_forward.py``.
    """
    if layer.kind != LSTM:
        spread(count, a, layer.a_row, layer.units, block, layer.kind, outs, layer.out_row)
        return
    cell, target = cell_at(layer.cell, block * layer.width), offset(outs, block * layer.width)
    held, c = _update(layer, cell, rows, step, low, start, block, a)
    for n in range(1, count):
        held_next, c_next = _update(layer, cell, rows, step, low, start + n, block, offset(a, n * layer.a_row))
        store(offset(target, (n - 1) * layer.out_row), output(cell, held, c))
        held, c = held_next, c_next
    store(offset(target, (count - 1) * layer.out_row), output(cell, held, c))


@routine(inline=True)
def _update(layer, cell, rows, step, low, row, block, a):
    """Update the cell state of a row of a block; write the tape."""
    width = lanes_of(a)
    units = minimum(width, layer.units - block * width)
    c_prev = load(offset(layer.c_rows, ((rows_at(layer, low) + row) * layer.blocks + block) * width))
    tape = offset(layer.tape, ((low + row) * layer.blocks + block) * layer.kept * width)
    held, c = update(cell, a, units, c_prev, tape, layer.kept)
    _keep_c(layer, rows, step, low, row, block, units, c_prev, c)
    return held, c


@routine(inline=True)
def _keep_c(layer, rows, step, low, row, block, units, c_prev, c):
    """Write c of a row of a block for the next step or, where the sequence ends, to the final states."""
    width, masks = lanes_of(layer.y), layer.masks
    if masks.zone_c:
        position = rows.places[low + row] * layer.units + block * width
        c = zoned(masks.zone_c, masks.start_c, position, masks.threshold_c, masks.rates, c_prev, c)
    if step + 1 < rows.lengths[row]:
        following = rows.offsets[step + 1] + row
        if layer.has_resets and peek(offset(layer.resets, rows.places[following])) != 0:
            c = fill(layer.y, 0.0)
        at = following if layer.training else row
        store(offset(layer.c_rows, (at * layer.blocks + block) * width), c)
    else:
        store_first(offset(layer.c_n, rows.order[row] * layer.units + block * width), c, units)


@routine
def normed_rows(layer, rows, step, low, start, count, a, outs):
    """Normalise the products of some rows, and run their cells."""
    stay_outlined()
    width, blocks, units = layer.width, layer.blocks, layer.units
    for n in range(count):
        row, a_x, out = start + n, offset(a, n * layer.a_row), offset(outs, n * layer.out_row)
        norms = offset(layer.norms, (low + row) * layer.norm_row if layer.keeps_norms else 0)
        n_c = offset(norms, 2 * blocks * GATES * width)
        scales = offset(n_c, blocks * width)
        normalise_gates(
            a_x, offset(layer.a_h, n * layer.a_row), norms, scales, layer.gains, layer.bias,
            offset(layer.masks.rates, SHARES), units, blocks, layer.keeps_norms,
        )  # fmt: skip
        if layer.sees:
            seen(layer, c_before(layer, low, row), a_x, out)
        for block in range(blocks):
            k = block * width
            held, c = _update(layer, cell_at(layer.cell, k), rows, step, low, row, block, offset(a_x, k * GATES))
            store(offset(out, k), held)
            store(offset(n_c, k), c)
        store(offset(scales, 2 * width), normalise_units(n_c, units, blocks))
        for block in range(blocks):
            k = block * width
            here = minimum(width, units - k)
            gain, bias = load_first(offset(layer.norm_c, k), here), load_first(offset(layer.norm_c, units + k), here)
            shown = fma(load(offset(n_c, k)), gain, bias)
            store(offset(out, k), output(cell_at(layer.cell, k), load(offset(out, k)), shown))


@routine
def spread(count, a, a_row, units, block, kind, target, target_row):
    """Bring the four vectors of a block to their places among the features, activated if they are a plain RNN's."""
    stay_outlined()
    width = lanes_of(a)
    here = minimum(width, units - block * width)
    for n in range(count):
        for gate in range(GATES):
            value = load(offset(a, n * a_row + gate * width))
            if kind == TANH:
                value = tanh(value)
            elif kind == RELU:
                value = select(value < 0.0, 0.0, value)  # NaN stays NaN
            store_first(offset(target, n * target_row + gate * units + block * width), value, here)


@routine
def hand_on(layer, rows, step, low, start, count, h_new, new_row):
    """Write the new h of some rows to y, and for the next step or, where a sequence ends, to the final states."""
    stay_outlined()
    width, features, masks = layer.width, layer.features, layer.masks
    for n in range(count):
        row = start + n
        place, goes_on = rows.places[low + row], step + 1 < rows.lengths[row]
        following = rows.offsets[step + 1] + row if goes_on else 0
        gone = layer.has_resets and goes_on and peek(offset(layer.resets, rows.places[following])) != 0
        for k in range(0, features, width):
            units, h = minimum(width, features - k), load(offset(h_new, n * new_row + k))
            if masks.zone_h:
                old = load(offset(layer.h_state, row * layer.h_row + k))
                position, rate = place * features + k, offset(masks.rates, 1)
                h = zoned(masks.zone_h, masks.start_h, position, masks.threshold_h, rate, old, h)
            store_first(offset(layer.y, place * layer.y_row + k), h, units)
            if goes_on:
                at = following if layer.training else row
                keep_h(layer, row, at, k, fill(layer.y, 0.0) if gone else h)
            else:
                store_first(offset(layer.h_n, rows.order[row] * features + k), h, units)


@routine(inline=True)
def keep_h(layer, row, at, k, h):
    """Write h of a row, from feature k on, for the next step: to place `at`, after recurrent dropout."""
    if layer.masks.zone_h:
        store(offset(layer.h_state, row * layer.h_row + k), h)
    if layer.masks.recurrent:
        h = h * load(offset(layer.factors, row * layer.h_row + k))
    store(offset(layer.h_rows, at * layer.h_row + k), h)
