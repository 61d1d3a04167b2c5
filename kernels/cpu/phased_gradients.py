"""Gradients by the parameters in the driver ``phased_backward.py``, which says what all shapes are: from a chunk's."""

from __future__ import annotations

from fastlstm.kernels.cpu.cell_step import GATES, TAPE, cell_at, own_gradients
from fastlstm.kernels.cpu.gate_gradients import strip
from fastlstm.kernels.cpu.jit import routine, stay_outlined
from fastlstm.kernels.cpu.phased_cells import LSTM
from fastlstm.kernels.cpu.shared_peepholes import add_seen
from fastlstm.kernels.cpu.thread_team import share
from fastlstm.kernels.cpu.vector import fill, lanes_of, load, minimum, offset, store, store_first
from fastlstm.kernels.cpu.vector_arithmetic import fma
from fastlstm.kernels.cpu.weight_gradients import PANEL_ROWS, add_bias, finish_edge, weights_back

__all__ = ["add_others", "add_weights", "clear", "finish_gates", "finish_states", "finish_units", "finish_weights"]

_ROWS = 8  # of which the gradients by gains are added at a time


@routine
def clear(start, size, team, thread):
    """Set this thread's share of some numbers to zero."""
    stay_outlined()
    first, last = share(size, team, thread)
    for n in range(first, last, lanes_of(start)):
        store_first(offset(start, n), fill(start, 0.0), last - n)


@routine
def add_weights(layer, da, rows, product, chunk_first, chunk_last, first, last):
    """Add a chunk's gradients by one matrix, for this thread's blocks of its rows."""
    stay_outlined()
    low, high = rows.offsets[chunk_first], rows.offsets[chunk_last]
    for start in range(low, high, PANEL_ROWS):
        count = minimum(PANEL_ROWS, high - start)
        add, finish = chunk_last < rows.steps or start > low, chunk_first == 0 and start + count == high
        weights_back(product, da, start - low, count, start, layer.panel, add, finish, first, last)


@routine
def add_others(layer, rows, sums, chunk_first, chunk_last, first, last):
    """Add a chunk's gradients by bias, gains and a variant's own parameters, for this thread's blocks."""
    stay_outlined()
    low, high, width = rows.offsets[chunk_first], rows.offsets[chunk_last], layer.width
    for start in range(low, high, PANEL_ROWS):
        add_bias(layer.da, start - low, minimum(PANEL_ROWS, high - start), sums.bias, first, last)
    if layer.normed:
        _add_norms(layer, sums, low, high, first, last)
    if layer.sees:
        add_seen(layer, sums.own, low, high, first, last)
        return
    for block in range(first, last if sums.own_size else first):
        part, part_row = strip(layer.da, block * GATES * width)
        cell, units = cell_at(layer.cell, block * width), minimum(width, layer.units - block * width)
        for row in range(low, high):
            at = row * layer.blocks + block
            own_gradients(
                cell, offset(part, (row - low) * part_row), units, load(offset(layer.c_rows, at * width)),
                load(offset(layer.tape, (at * TAPE + TAPE - 1) * width)), offset(sums.own, block * width),
            )  # fmt: skip


@routine
def _add_norms(layer, sums, low, high, first, last):
    """Add the gradients by the gains of layer norm, and by the bias of c, for this thread's blocks.

    A few rows at a time: all rows of a block would be as many pages of memory.
    """
    stay_outlined()
    width, size, stride = layer.width, layer.da.depth, layer.blocks * layer.width
    for start in range(low, high, _ROWS):
        end = minimum(start + _ROWS, high)
        for block in range(first, last):
            part, part_row = strip(layer.da, block * GATES * width)
            for gate in range(GATES):
                k = (block * GATES + gate) * width
                x, h = load(offset(sums.gains, k)), load(offset(sums.gains, size + k))
                for row in range(start, end):
                    norms = offset(layer.norms, row * layer.norm_row + k)
                    d = load(offset(part, (row - low) * part_row + gate * width))
                    x, h = fma(d, load(norms), x), fma(d, load(offset(norms, size)), h)
                store(offset(sums.gains, k), x)
                store(offset(sums.gains, size + k), h)
            k = block * width
            gain, bias = load(offset(sums.c, k)), load(offset(sums.c, stride + k))
            for row in range(start, end):
                d = load(offset(layer.d_shown, (row - low) * stride + k))
                gain, bias = fma(d, load(offset(layer.norms, row * layer.norm_row + 2 * size + k)), gain), bias + d
            store(offset(sums.c, k), gain)
            store(offset(sums.c, stride + k), bias)


@routine
def finish_weights(product, depth, rows, first, last, team, thread):
    """Write what is left of the gradient by a matrix; zeros, if there was no time step."""
    stay_outlined()
    if rows.steps == 0:
        clear(product.gradient, GATES * product.hidden * product.columns, team, thread)
    else:
        finish_edge(product, depth, first, last)


@routine
def finish_gates(layer, sums, gradient, first, last):
    """Write this thread's share of the gradient by numbers that each gate of each unit has, (4, U)."""
    stay_outlined()
    width = layer.width
    for block in range(first, last):
        for gate in range(GATES):
            total = load(offset(sums, (block * GATES + gate) * width))
            units = minimum(width, layer.units - block * width)
            store_first(offset(gradient, gate * layer.units + block * width), total, units)


@routine
def finish_units(layer, sums, gradient, first, last):
    """Write this thread's share of the gradient by gain and bias of c, (2, H)."""
    stay_outlined()
    for block in range(first, last):
        k = block * layer.width
        units = minimum(layer.width, layer.units - k)
        store_first(offset(gradient, k), load(offset(sums, k)), units)
        store_first(offset(gradient, layer.units + k), load(offset(sums, layer.blocks * layer.width + k)), units)


@routine
def finish_states(layer, rows, dh0, dc0, team, thread):
    """Write this thread's share of the gradients by the initial states."""
    stay_outlined()
    width, features, units = layer.width, layer.features, layer.units
    first, last = share(rows.batch, team, thread)
    for row in range(first, last):
        sequence = rows.order[row]
        for k in range(0, features, width):
            d = load(offset(layer.dh_rows, row * layer.h_row + k))
            store_first(offset(dh0, sequence * features + k), d, minimum(width, features - k))
        for k in range(0, layer.blocks * width if layer.kind == LSTM else 0, width):
            d = load(offset(layer.dc_rows, row * layer.blocks * width + k))
            store_first(offset(dc0, sequence * units + k), d, minimum(width, units - k))
