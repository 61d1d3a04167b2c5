"""Peepholes of gates that a block of S units shares: their inputs are the cell states of the whole block.

The routines of ``cell_step.py`` have one vector of units, not a whole block. So the drivers of cells with phases add
the peephole inputs to the pre-activations before the cell step, and take their gradients after it. Every unit of a
block has a copy of its gate, with the same pre-activations; the gradient of the gate is the sum over the copies.

``phased_forward.py`` and ``phased_backward.py`` say what all shapes are, and what a `layer` is; ``layer.sees`` is S.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.cell_step import GATES, TAPE, backward, backward_normed, cell_at, update
from fastlstm.kernels.cpu.gate_gradients import strip
from fastlstm.kernels.cpu.jit import routine, stay_outlined
from fastlstm.kernels.cpu.vector import fill, lanes_of, load, maximum, minimum, offset, peek, poke, store

__all__ = ["add_seen", "seen", "seen_back", "seen_by_output_back"]

_I, _F, _O = 0, 1, 3  # gates, the third of which has the third row of weights


@routine
def seen(layer, c_prev, a, c):
    """Add the peephole inputs to the pre-activations of a row.

    Parameters
    ----------
    c_prev : pointer, IN
        (Up,) the cell states before the step.
    a : pointer, IN and OUT
        (Up/V, 4, V).
    c : pointer, OUT
        (Up,) the cell states after it, the peephole inputs of output gates.
    """
    stay_outlined()
    width, units = lanes_of(a), layer.units
    _add(layer, a, _I, 0, c_prev)
    _add(layer, a, _F, 1, c_prev)
    for block in range(layer.blocks):
        k = block * width
        cell, here = cell_at(layer.cell, k), offset(a, k * GATES)
        _, new = update(cell, here, minimum(width, units - k), load(offset(c_prev, k)), here, 0)
        store(offset(c, k), new)
    _add(layer, a, _O, 2, c)


@routine
def _add(layer, a, gate, number, c):
    """Add to the pre-activations of one gate its peephole input from `c`, by row `number` of the weights."""
    stay_outlined()
    width, weights = lanes_of(a), offset(layer.cell.own, number * layer.units)
    for first in range(0, layer.units, layer.sees):
        total = peek(offset(weights, first)) * peek(offset(c, first))
        for unit in range(first + 1, first + layer.sees):
            total += peek(offset(weights, unit)) * peek(offset(c, unit))
        for unit in range(first, first + layer.sees):
            place = offset(a, _column(width, gate, unit))
            poke(place, peek(place) + total)


@routine(inline=True)
def _column(width, gate, unit):
    """Return the place of a unit among the pre-activations of a row."""
    return (unit // width * GATES + gate) * width + unit % width


@routine(inline=True)
def _of_gate(da, row, gate, first, size):
    """Return the gradient by the gate of the block that begins at unit `first`: the sum over its copies."""
    width = lanes_of(da.start)
    part, part_row = strip(da, _column(width, gate, first))
    total = peek(offset(part, row * part_row))
    for unit in range(first + 1, first + size):
        part, part_row = strip(da, _column(width, gate, unit))
        total += peek(offset(part, row * part_row))
    return total


@routine
def seen_by_output_back(layer, here, place, row):
    """Add the gradient by c through the peepholes of output gates to ``layer.d_row``."""
    stay_outlined()
    width, units, weights = layer.width, layer.units, offset(layer.cell.own, 2 * layer.units)
    zero = fill(layer.d_row, 0.0)
    for block in range(layer.blocks):
        k, at = block * width, (here + row) * layer.blocks + block
        # The gradient by the output gate is all that is used of what this writes, and needs none by c.
        part, part_row = strip(layer.da, k * GATES)
        cell, inside, tape = cell_at(layer.cell, k), minimum(width, units - k), offset(layer.tape, at * TAPE * width)
        dh, c_prev = load(offset(layer.dout_rows, row * layer.dout_row + k)), load(offset(layer.c_rows, at * width))
        da = offset(part, (place + row) * part_row)
        if layer.normed:
            backward_normed(cell, dh, zero, tape, inside, c_prev, da)
        else:
            backward(cell, dh, zero, tape, inside, c_prev, da)
    for first in range(0, units, layer.sees):
        total = _of_gate(layer.da, place + row, _O, first, layer.sees)
        for unit in range(first, first + layer.sees):
            d = offset(layer.d_row, unit)
            poke(d, peek(d) + total * peek(offset(weights, unit)))


@routine
def seen_back(layer, place, row):
    """Add the gradient by the c before the step through the peepholes of input and forget gates."""
    stay_outlined()
    weights = layer.cell.own
    for first in range(0, layer.units, layer.sees):
        i = _of_gate(layer.da, place + row, _I, first, layer.sees)
        f = _of_gate(layer.da, place + row, _F, first, layer.sees)
        for unit in range(first, first + layer.sees):
            d = offset(layer.dc_rows, row * layer.blocks * layer.width + unit)
            seen_i, seen_f = peek(offset(weights, unit)), peek(offset(weights, layer.units + unit))
            poke(d, peek(d) + (i * seen_i + f * seen_f))


@routine
def add_seen(layer, own, low, high, first, last):
    """Add the gradients by the weights of a chunk's rows from `low` to `high`, for this thread's vectors of units."""
    stay_outlined()
    width, units, size = lanes_of(own), layer.units, layer.sees  # `width` is a constant: no divisions by it
    unit_first, unit_last = first * width, minimum(last * width, units)
    for row in range(low, high):
        for block_first in range(unit_first // size * size, unit_last, size):
            i = _of_gate(layer.da, row - low, _I, block_first, size)
            f = _of_gate(layer.da, row - low, _F, block_first, size)
            o = _of_gate(layer.da, row - low, _O, block_first, size)
            for unit in range(maximum(block_first, unit_first), minimum(block_first + size, unit_last)):
                block, lane = unit // width, unit % width
                at = row * layer.blocks + block
                c_prev = peek(offset(layer.c_rows, at * width + lane))
                c = peek(offset(layer.tape, (at * TAPE + TAPE - 1) * width + lane))
                _add_to(offset(own, unit), i * c_prev)
                _add_to(offset(own, units + unit), f * c_prev)
                _add_to(offset(own, 2 * units + unit), o * c)


@routine(inline=True)
def _add_to(place, value):
    """Add a value to the number at a place."""
    poke(place, peek(place) + value)
