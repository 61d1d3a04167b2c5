r"""The cell: one time step of one sequence and one vector of hidden units, forward and backward.

This file alone knows the gates, their activations and what a variant changes. The equations are those of
:mod:`fastlstm.backends.reference`, in the same symbols. Every driver (large batch, small batch, gates computed again)
calls the five routines below with a `cell`, the record :class:`Cell`, which says where a variant's routines are:

=====================  ==========================================================================================
:func:`update`         pre-activations to the new cell state; writes the tape
:func:`output`         what `update` left to do: the new hidden state, computed while another row's gates are
:func:`rebuild`        the tape once more, from pre-activations and the known cell states
:func:`backward`       gradients by h_t and c_t to those by the pre-activations and c_{t-1}
:func:`own_gradients`  gradients by a variant's own parameters
=====================  ==========================================================================================

The plain LSTM is compiled into the drivers. A variant is compiled by itself, in half a second, and called by its
address, which takes some nanoseconds for each call: drivers and products are compiled once for all variants, and the
plain LSTM pays nothing for the family.

On the tape, a vector of units keeps its five values side by side, :data:`TAPE` vectors: i, f, g, o and c. A variant's
own parameters are a matrix of E rows of H numbers (peepholes: i, f, o).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import from_dtype, types

from fastlstm.kernels.cpu.activations import sigmoid, tanh
from fastlstm.kernels.cpu.jit import address_of, by_address, caller, routine
from fastlstm.kernels.cpu.vector import Vector, address, lanes_of, load, load_first, offset, store, store_first
from fastlstm.kernels.cpu.vector_arithmetic import fma

__all__ = [
    "CELL", "GATES", "NORMED", "PEEPHOLE", "PLAIN", "TAPE", "Cell", "backward", "backward_normed", "cell_addresses",
    "cell_at", "cell_of", "output", "output_back", "own_gradients", "rebuild", "update",
]  # fmt: skip

GATES = 4  # i, f, g, o
TAPE = 5  # i, f, g, o, c
PLAIN, PEEPHOLE, NORMED = 0, 1, 2  # bits of a variant


class Cell(NamedTuple):
    """Where the routines of a variant are, 0 for the plain LSTM; and the variant's own parameters of one vector."""

    update: Any
    rebuild: Any
    backward: Any
    own_gradients: Any
    own: Any  # pointer, (E, H) from the vector's first unit on
    hidden: Any  # H


CELL = 4  # addresses that a driver is given for a cell


@routine(inline=True)
def _peephole(own, hidden, row, units):
    """Load the weights of one gate's peepholes."""
    return load_first(offset(own, row * hidden), units)


@routine(inline=True)
def _update(variant, a, units, c_prev, own, hidden, tape, kept):
    """Compute one step up to the cell state."""
    width = lanes_of(a)
    # Lanes beyond the units become harmless constants even if NaN arrives there.
    a_i, a_f = load_first(a, units), load_first(offset(a, width), units)
    a_g, a_o = load_first(offset(a, 2 * width), units), load_first(offset(a, 3 * width), units)
    if variant & PEEPHOLE:
        a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)
        a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)
    i, f, g = sigmoid(a_i), sigmoid(a_f), tanh(a_g)
    c = fma(f, c_prev, i * g)
    if variant & PEEPHOLE:
        a_o = fma(_peephole(own, hidden, 2, units), c, a_o)
    o = sigmoid(a_o)
    if kept:
        if kept == TAPE:
            store(tape, i)
            store(offset(tape, width), f)
            store(offset(tape, 2 * width), g)
            store(offset(tape, 3 * width), o)
        store(offset(tape, (kept - 1) * width), c)
    return o, c


@routine(inline=True)
def _rebuild(variant, a, units, c_prev, c, own, hidden, tape):
    """Activate pre-activations and put the known cell state beside them."""
    width = lanes_of(a)
    a_i, a_f = load_first(a, units), load_first(offset(a, width), units)
    a_g, a_o = load_first(offset(a, 2 * width), units), load_first(offset(a, 3 * width), units)
    if variant & PEEPHOLE:
        a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)
        a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)
        a_o = fma(_peephole(own, hidden, 2, units), c, a_o)
    store(tape, sigmoid(a_i))
    store(offset(tape, width), sigmoid(a_f))
    store(offset(tape, 2 * width), tanh(a_g))
    store(offset(tape, 3 * width), sigmoid(a_o))
    store(offset(tape, 4 * width), c)


@routine(inline=True)
def _backward(variant, dh, dc, tape, units, c_prev, own, hidden, da):
    """Take the gradients by h and c back through one step."""
    width = lanes_of(tape)
    i, f = load(tape), load(offset(tape, width))
    g, o = load(offset(tape, 2 * width)), load(offset(tape, 3 * width))
    tanh_c = tanh(load(offset(tape, 4 * width)))
    if variant & NORMED:  # o multiplies a normalised c: the driver has been there, and `dh` is the gradient by o
        da_o = dh * (o * (1.0 - o))
    else:
        da_o = dh * tanh_c * (o * (1.0 - o))
        dc = fma(dh * o, 1.0 - tanh_c * tanh_c, dc)
    if variant & PEEPHOLE:
        dc = fma(da_o, _peephole(own, hidden, 2, units), dc)
    da_i = dc * g * (i * (1.0 - i))
    da_f = dc * c_prev * (f * (1.0 - f))
    da_g = dc * i * (1.0 - g * g)
    dc = dc * f
    if variant & PEEPHOLE:
        dc = fma(da_i, _peephole(own, hidden, 0, units), dc)
        dc = fma(da_f, _peephole(own, hidden, 1, units), dc)
    store(da, da_i)
    store(offset(da, width), da_f)
    store(offset(da, 2 * width), da_g)
    store(offset(da, 3 * width), da_o)
    return dc


@routine(inline=True)
def _own_gradients(variant, da, units, c_prev, c, hidden, sums):
    """Add one step's gradients by a variant's own parameters to `sums`."""
    width = lanes_of(da)
    if variant & PEEPHOLE:
        p_i, p_f, p_o = sums, offset(sums, hidden), offset(sums, 2 * hidden)
        store_first(p_i, fma(load(da), c_prev, load_first(p_i, units)), units)
        store_first(p_f, fma(load(offset(da, width)), c_prev, load_first(p_f, units)), units)
        store_first(p_o, fma(load(offset(da, 3 * width)), c, load_first(p_o, units)), units)


_call_update = caller(lambda a, *_: types.UniTuple(Vector(a.dtype), 2))
_call_rebuild = caller(lambda *_: types.none)
_call_backward = caller(lambda dh, *_: dh)
_call_own_gradients = caller(lambda *_: types.none)


@routine(inline=True)
def update(cell, a, units, c_prev, tape, kept):
    """Take pre-activations and the cell state before the step to the one after it.

    Parameters
    ----------
    cell : Cell
    a : pointer, IN
        :data:`GATES` vectors, the pre-activations.
    units : int
        Lanes that are units.
    c_prev : Vector
        The cell state before.
    tape : pointer, OUT
        `kept` vectors: 0 for none, 1 for c alone, :data:`TAPE` for all.

    Returns
    -------
    tuple of Vector
        What :func:`output` needs to compute h; and c.
    """
    if cell.update:
        return _call_update(cell.update, (a, units, c_prev, cell.own, cell.hidden, tape, kept))
    return _update(PLAIN, a, units, c_prev, cell.own, cell.hidden, tape, kept)


@routine(inline=True)
def cell_at(cell, unit):
    """Return the record of the vector that starts at a unit, given that of the first one."""
    return Cell(cell.update, cell.rebuild, cell.backward, cell.own_gradients, offset(cell.own, unit), cell.hidden)


@routine(inline=True)
def cell_of(settings, first, own, hidden):
    """Read a record off the addresses that a driver is given, from number `first` of its settings on."""
    return Cell(settings[first], settings[first + 1], settings[first + 2], settings[first + 3], address(own), hidden)


@routine(inline=True)
def output(cell, held, c):
    """Return h, given what :func:`update` returned."""
    return held * tanh(c)


@routine(inline=True)
def output_back(cell, dh, o, c):
    """Take the gradient by h through :func:`output` where `c` is normalised: return those by o and by this c."""
    tanh_c = tanh(c)
    return dh * tanh_c, dh * o * (1.0 - tanh_c * tanh_c)


@routine(inline=True)
def rebuild(cell, a, units, c_prev, c, tape):
    """Write the tape of a step whose cell states, before and after, are known: bit-identical to :func:`update`'s."""
    if cell.rebuild:
        _call_rebuild(cell.rebuild, (a, units, c_prev, c, cell.own, cell.hidden, tape))
    else:
        _rebuild(PLAIN, a, units, c_prev, c, cell.own, cell.hidden, tape)


@routine(inline=True)
def backward(cell, dh, dc, tape, units, c_prev, da):
    """Take the gradients by h and c back through one step.

    Parameters
    ----------
    cell : Cell
    dh, dc : Vector
        The loss's gradients by h and c of this time step.
    tape : pointer, IN
        :data:`TAPE` vectors.
    units : int
        Lanes that are units.
    c_prev : Vector
        The cell state before.
    da : pointer, OUT
        :data:`GATES` vectors: the gradients by the pre-activations.

    Returns
    -------
    Vector
        The gradient by `c_prev`.
    """
    if cell.backward:
        return _call_backward(cell.backward, (dh, dc, tape, units, c_prev, cell.own, cell.hidden, da))
    return _backward(PLAIN, dh, dc, tape, units, c_prev, cell.own, cell.hidden, da)


@routine(inline=True)
def backward_normed(cell, do, dc, tape, units, c_prev, da):
    """Do as :func:`backward`, where c was normalised on its way to h: given the gradients by o, and by c in all."""
    if cell.backward:  # of a variant with the bit NORMED
        return _call_backward(cell.backward, (do, dc, tape, units, c_prev, cell.own, cell.hidden, da))
    return _backward(NORMED, do, dc, tape, units, c_prev, cell.own, cell.hidden, da)


@routine(inline=True)
def own_gradients(cell, da, units, c_prev, c, sums):
    """Add one step's gradients by the variant's own parameters to `sums`, (E, H) from the vector's first unit on."""
    if cell.own_gradients:
        _call_own_gradients(cell.own_gradients, (da, units, c_prev, c, cell.hidden, sums))


@functools.cache  # and so kept: their machine code is freed with them
def _routines(variant: int) -> tuple[Any, ...]:
    """Make a variant's routines, in the order of :class:`Cell`; each is a kernel of its own, cached like the others."""

    @by_address
    def variant_update(a, units, c_prev, own, hidden, tape, kept):
        return _update(variant, a, units, c_prev, own, hidden, tape, kept)

    @by_address
    def variant_rebuild(a, units, c_prev, c, own, hidden, tape):
        _rebuild(variant, a, units, c_prev, c, own, hidden, tape)

    @by_address
    def variant_backward(dh, dc, tape, units, c_prev, own, hidden, da):
        return _backward(variant, dh, dc, tape, units, c_prev, own, hidden, da)

    @by_address
    def variant_own_gradients(da, units, c_prev, c, hidden, sums):
        _own_gradients(variant, da, units, c_prev, c, hidden, sums)

    return variant_update, variant_rebuild, variant_backward, variant_own_gradients


@functools.cache
def cell_addresses(variant: int, dtype: Any) -> tuple[int, ...]:
    """Return the addresses of a variant's routines for a dtype, compiled now if need be; zeros if drivers have them."""
    if variant in (PLAIN, NORMED):
        return (0,) * CELL
    pointer, vector, number = types.CPointer(from_dtype(dtype)), Vector(from_dtype(dtype)), types.intp
    signatures = (
        (pointer, number, vector, pointer, number, pointer, number),
        (pointer, number, vector, vector, pointer, number, pointer),
        (vector, vector, pointer, number, vector, pointer, number, pointer),
        (pointer, number, vector, vector, number, pointer),
    )
    return tuple(
        address_of(function, signature) for function, signature in zip(_routines(variant), signatures, strict=True)
    )
