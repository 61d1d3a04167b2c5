r"""The cell: one time step of one sequence and one vector of hidden units, forward and backward.

This file alone knows the gates, their activations and what a variant changes; but what gates see of other units, by
the peepholes of shared gates, is in ``shared_peepholes.py``. The equations are those of
:mod:`fastlstm.backends.reference`, in the same symbols. Every driver (large batch, small batch, gates computed again)
calls the routines below with a `cell`, the record :class:`Cell`, which says where a variant's routines are:

=====================  ==========================================================================================
:func:`update`         pre-activations to the new cell state; writes the tape
:func:`output`         what `update` left to do: the new hidden state, computed while another row's gates are
:func:`rebuild`        the tape once more, from pre-activations and the known cell states
:func:`backward`       gradients by h_t and c_t to those by the pre-activations and c_{t-1}
:func:`own_gradients`  gradients by a variant's own parameters
=====================  ==========================================================================================

Where c is normalised on its way to h, :func:`output_back` and :func:`backward_normed` stand for :func:`backward`.

The plain LSTM is compiled into the drivers. A variant is compiled by itself, in half a second, and called by its
address, which takes some nanoseconds for each call: drivers and products are compiled once for all variants, and the
plain LSTM pays nothing for the family. What a variant changes are constants of its routines, which functions such as
:func:`_update_of` make: a forget gate that is 1 - i or 1, peepholes, activations (``gate_activations.py``), and clips,
with a gradient of zero for clipped values.

On the tape, a vector of units keeps its five values side by side, :data:`TAPE` vectors: i, f, g, o and c. A variant's
own parameters are a matrix of E rows of H numbers (peepholes: i, f, o). A gate that does not exist has pre-activations
and gradients nonetheless: the former are not read, the latter zero.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from numba import from_dtype, types

from fastlstm.kernels.cpu.activations import tanh
from fastlstm.kernels.cpu.gate_activations import activation, clamped, like
from fastlstm.kernels.cpu.jit import address_of, by_address, caller, routine
from fastlstm.kernels.cpu.vector import Vector, address, lanes_of, load, load_first, offset, store, store_first
from fastlstm.kernels.cpu.vector_arithmetic import fma, select

__all__ = [
    "CELL", "COUPLED", "GATES", "NONE", "NORMED", "OWN", "PEEPHOLE", "PLAIN", "TAPE", "Cell", "Variant", "backward",
    "backward_normed", "cell_addresses", "cell_at", "cell_of", "output", "output_back", "own_gradients", "rebuild",
    "update",
]  # fmt: skip

GATES = 4  # i, f, g, o
TAPE = 5  # i, f, g, o, c
OWN, COUPLED, NONE = 0, 1, 2  # forget gates: with rows of its own, 1 - i, or 1


class Variant(NamedTuple):
    """The properties that the routines of a cell are compiled for."""

    peephole: bool = False
    forget: int = OWN
    activations: tuple[str, str, str] = ("sigmoid", "tanh", "tanh")
    clip: float | None = None
    cell_clip: float | None = None
    normed: bool = False  # whether c is normalised on its way to h


PLAIN, PEEPHOLE, NORMED = Variant(), Variant(peephole=True), Variant(normed=True)


class Cell(NamedTuple):
    """Where the routines of a variant are, 0 for those that drivers have; and the own parameters of one vector."""

    update: Any
    rebuild: Any
    backward: Any
    own_gradients: Any
    output: Any
    output_back: Any
    own: Any  # pointer, (E, H) from the vector's first unit on
    hidden: Any  # H


CELL = 6  # addresses that a driver is given for a cell


def _activations(variant):
    """Return those of the gates, the candidate and the output."""
    gate, candidate, output = variant.activations
    return activation(gate, variant.clip), activation(candidate, variant.clip), activation(output, of_output=True)


@routine(inline=True)
def _peephole(own, hidden, row, units):
    """Load the weights of one gate's peepholes."""
    return load_first(offset(own, row * hidden), units)


def _update_of(variant):
    """Make the routine that computes one step up to the cell state."""
    (gate, note_gate, _), (candidate, note_candidate, _), _ = _activations(variant)
    peephole, forget, cell_clip = variant.peephole, variant.forget, variant.cell_clip or 0.0

    @routine(inline=True)
    def update(a, units, c_prev, own, hidden, tape, kept):
        width = lanes_of(a)
        # Lanes beyond the units become harmless constants even if NaN arrives there.
        a_i, a_f = load_first(a, units), load_first(offset(a, width), units)
        a_g, a_o = load_first(offset(a, 2 * width), units), load_first(offset(a, 3 * width), units)
        if peephole:
            a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)
            a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)
        i = gate(a_i)
        if forget == OWN:
            f = gate(a_f)
        elif forget == COUPLED:
            f = 1.0 - i
        else:
            f = like(i, 1.0)
        g = candidate(a_g)
        c = fma(f, c_prev, i * g)
        if cell_clip:
            c = clamped(c, cell_clip)
        if peephole:
            a_o = fma(_peephole(own, hidden, 2, units), c, a_o)
        o = gate(a_o)
        if kept:
            if kept == TAPE:
                store(tape, note_gate(a_i, i))
                store(offset(tape, width), note_gate(a_f, f) if forget == OWN else f)
                store(offset(tape, 2 * width), note_candidate(a_g, g))
                store(offset(tape, 3 * width), note_gate(a_o, o))
            store(offset(tape, (kept - 1) * width), c)
        return o, c

    return update


def _rebuild_of(variant):
    """Make the routine that activates pre-activations and puts the known cell state beside them."""
    (gate, note_gate, _), (candidate, note_candidate, _), _ = _activations(variant)
    peephole, forget = variant.peephole, variant.forget

    @routine(inline=True)
    def rebuild(a, units, c_prev, c, own, hidden, tape):
        width = lanes_of(a)
        a_i, a_f = load_first(a, units), load_first(offset(a, width), units)
        a_g, a_o = load_first(offset(a, 2 * width), units), load_first(offset(a, 3 * width), units)
        if peephole:
            a_i = fma(_peephole(own, hidden, 0, units), c_prev, a_i)
            a_f = fma(_peephole(own, hidden, 1, units), c_prev, a_f)
            a_o = fma(_peephole(own, hidden, 2, units), c, a_o)
        i = gate(a_i)
        store(tape, note_gate(a_i, i))
        if forget == OWN:
            f = note_gate(a_f, gate(a_f))
        elif forget == COUPLED:
            f = 1.0 - i
        else:
            f = like(i, 1.0)
        store(offset(tape, width), f)
        store(offset(tape, 2 * width), note_candidate(a_g, candidate(a_g)))
        store(offset(tape, 3 * width), note_gate(a_o, gate(a_o)))
        store(offset(tape, 4 * width), c)

    return rebuild


def _backward_of(variant):
    """Make the routine that takes the gradients by h and c back through one step."""
    (_, _, slope), (_, _, slope_of_g), (squash, _, slope_of_squashed) = _activations(variant)
    peephole, forget, cell_clip = variant.peephole, variant.forget, variant.cell_clip or 0.0
    normed = variant.normed

    @routine(inline=True)
    def backward(dh, dc, tape, units, c_prev, own, hidden, da):
        width = lanes_of(tape)
        i, f = load(tape), load(offset(tape, width))
        g, o = load(offset(tape, 2 * width)), load(offset(tape, 3 * width))
        c = load(offset(tape, 4 * width))
        if normed:  # `dh` is the gradient by o, and `dc` has its share already: the driver has been at the output
            da_o = dh * slope(o)
        else:
            squashed = squash(c)
            da_o = dh * squashed * slope(o)
            dc = fma(dh * o, slope_of_squashed(squashed), dc)
        if peephole:
            dc = fma(da_o, _peephole(own, hidden, 2, units), dc)
        if cell_clip:
            dc = select(abs(c) < cell_clip, dc, 0.0)
        da_i = (dc * (g - c_prev) if forget == COUPLED else dc * g) * slope(i)
        da_f = dc * c_prev * slope(f) if forget == OWN else like(i, 0.0)
        da_g = dc * i * slope_of_g(g)
        dc = dc * f
        if peephole:
            dc = fma(da_i, _peephole(own, hidden, 0, units), dc)
            if forget == OWN:
                dc = fma(da_f, _peephole(own, hidden, 1, units), dc)
        store(da, da_i)
        store(offset(da, width), da_f)
        store(offset(da, 2 * width), da_g)
        store(offset(da, 3 * width), da_o)
        return dc

    return backward


def _output_back_of(variant):
    """Make the routine that takes the gradient by h back through the output, where c is normalised on its way there."""
    squash, _, slope = _activations(variant)[2]

    @routine(inline=True)
    def output_back(dh, o, c):
        squashed = squash(c)
        return dh * squashed, dh * o * slope(squashed)

    return output_back


@routine(inline=True)
def _add_peepholes(da, units, c_prev, c, hidden, sums):
    """Add one step's gradients by the peepholes to `sums`."""
    width = lanes_of(da)
    p_i, p_f, p_o = sums, offset(sums, hidden), offset(sums, 2 * hidden)
    store_first(p_i, fma(load(da), c_prev, load_first(p_i, units)), units)
    store_first(p_f, fma(load(offset(da, width)), c_prev, load_first(p_f, units)), units)
    store_first(p_o, fma(load(offset(da, 3 * width)), c, load_first(p_o, units)), units)


_update, _rebuild, _backward = _update_of(PLAIN), _rebuild_of(PLAIN), _backward_of(PLAIN)
_backward_normed, _output_back = _backward_of(NORMED), _output_back_of(NORMED)

_call_update = caller(lambda a, *_: types.UniTuple(Vector(a.dtype), 2))
_call_rebuild = caller(lambda *_: types.none)
_call_backward = caller(lambda dh, *_: dh)
_call_own_gradients = caller(lambda *_: types.none)
_call_output = caller(lambda held, _: held)
_call_output_back = caller(lambda dh, *_: types.UniTuple(dh, 2))


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
    return _update(a, units, c_prev, cell.own, cell.hidden, tape, kept)


@routine(inline=True)
def cell_at(cell, unit):
    """Return the record of the vector that starts at a unit, given that of the first one."""
    return Cell(
        cell.update, cell.rebuild, cell.backward, cell.own_gradients, cell.output, cell.output_back,
        offset(cell.own, unit), cell.hidden,
    )  # fmt: skip


@routine(inline=True)
def cell_of(settings, first, own, hidden):
    """Read a record off the addresses that a driver is given, from number `first` of its settings on."""
    return Cell(
        settings[first], settings[first + 1], settings[first + 2], settings[first + 3], settings[first + 4],
        settings[first + 5], address(own), hidden,
    )  # fmt: skip


@routine(inline=True)
def output(cell, held, c):
    """Return h, given what :func:`update` returned."""
    if cell.output:
        return _call_output(cell.output, (held, c))
    return held * tanh(c)


@routine(inline=True)
def output_back(cell, dh, o, c):
    """Take the gradient by h through :func:`output` where `c` is normalised: return those by o and by this c."""
    if cell.output_back:
        return _call_output_back(cell.output_back, (dh, o, c))
    return _output_back(dh, o, c)


@routine(inline=True)
def rebuild(cell, a, units, c_prev, c, tape):
    """Write the tape of a step whose cell states, before and after, are known: bit-identical to :func:`update`'s."""
    if cell.rebuild:
        _call_rebuild(cell.rebuild, (a, units, c_prev, c, cell.own, cell.hidden, tape))
    else:
        _rebuild(a, units, c_prev, c, cell.own, cell.hidden, tape)


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
    return _backward(dh, dc, tape, units, c_prev, cell.own, cell.hidden, da)


@routine(inline=True)
def backward_normed(cell, do, dc, tape, units, c_prev, da):
    """Do as :func:`backward` where c is normalised on its way to h: given the gradients by o, and by c in all."""
    if cell.backward:
        return _call_backward(cell.backward, (do, dc, tape, units, c_prev, cell.own, cell.hidden, da))
    return _backward_normed(do, dc, tape, units, c_prev, cell.own, cell.hidden, da)


@routine(inline=True)
def own_gradients(cell, da, units, c_prev, c, sums):
    """Add one step's gradients by the variant's own parameters to `sums`, (E, H) from the vector's first unit on."""
    if cell.own_gradients:
        _call_own_gradients(cell.own_gradients, (da, units, c_prev, c, cell.hidden, sums))


@functools.cache  # and so kept: their machine code is freed with them
def _routines(variant: Variant) -> tuple[Any, ...]:
    """Make a variant's routines, in the order of :class:`Cell`; each is a kernel of its own, cached like the others."""
    update, rebuild, backward = _update_of(variant), _rebuild_of(variant), _backward_of(variant)
    squash, back_through_output = _activations(variant)[2].value, _output_back_of(variant)

    def variant_update(a, units, c_prev, own, hidden, tape, kept):
        return update(a, units, c_prev, own, hidden, tape, kept)

    def variant_rebuild(a, units, c_prev, c, own, hidden, tape):
        rebuild(a, units, c_prev, c, own, hidden, tape)

    def variant_backward(dh, dc, tape, units, c_prev, own, hidden, da):
        return backward(dh, dc, tape, units, c_prev, own, hidden, da)

    def variant_own_gradients(da, units, c_prev, c, hidden, sums):
        _add_peepholes(da, units, c_prev, c, hidden, sums)

    def variant_output(held, c):
        return held * squash(c)

    def variant_output_back(dh, o, c):
        return back_through_output(dh, o, c)

    found = variant_update, variant_rebuild, variant_backward, variant_own_gradients, variant_output
    return tuple(by_address(function, *variant) for function in (*found, variant_output_back))


@functools.cache
def cell_addresses(variant: Variant, dtype: Any) -> tuple[int, ...]:
    """Return the addresses of a variant's routines for a dtype, compiled now if need be; 0 for those in the drivers."""
    if variant in (PLAIN, NORMED):
        return (0,) * CELL
    pointer, vector, number = types.CPointer(from_dtype(dtype)), Vector(from_dtype(dtype)), types.intp
    signatures = (
        (pointer, number, vector, pointer, number, pointer, number),
        (pointer, number, vector, vector, pointer, number, pointer),
        (vector, vector, pointer, number, vector, pointer, number, pointer),
        (pointer, number, vector, vector, number, pointer),
        (vector, vector),
        (vector, vector, vector),
    )
    has_output = variant.activations[2] != PLAIN.activations[2]
    needed = True, True, True, variant.peephole, has_output, has_output and variant.normed
    return tuple(
        address_of(function, signature) if is_needed else 0
        for function, signature, is_needed in zip(_routines(variant), signatures, needed, strict=True)
    )
