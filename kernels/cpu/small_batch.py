"""One layer over a small batch, forward and backward: the driver for short calls and streaming.

It uses unpacked weights, because packing them takes longer than a step, or the packed weights of a frozen model.
Training, forward and backward, is for one step or a few, as in online learning. Inference may have a team, each of
whose threads computes some of the hidden units, with a barrier after each step.

The shapes of arrays are checked here, because a step takes less time than their checks in Python would: a kernel
returns False, with nothing written, if one does not fit.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype, types

from fastlstm.kernels.cpu.cell_step import (
    CELL,
    GATES,
    TAPE,
    backward,
    cell_at,
    cell_of,
    output,
    own_gradients,
    update,
)
from fastlstm.kernels.cpu.gemm_microkernel import ROW_BLOCKS, are_far
from fastlstm.kernels.cpu.gemv import Unpacked, gate_dots
from fastlstm.kernels.cpu.jit import compile_once, kernel, refuse_others, routine
from fastlstm.kernels.cpu.pre_activations import pre_activations
from fastlstm.kernels.cpu.room import MOST_ROWS, make_room
from fastlstm.kernels.cpu.small_products import clear, copy_or_clear, product
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, share, summon
from fastlstm.kernels.cpu.vector import (
    address,
    is_aligned,
    lanes_of,
    load,
    load_first,
    minimum,
    offset,
    store,
    store_first,
)
from fastlstm.kernels.cpu.weight_packing import is_at_rest, packed_at
from fastlstm.kernels.cpu.worker import this_call

__all__ = [
    "SETTINGS", "prepare", "small_backward", "small_forward", "small_forward_packed", "small_forward_taped",
]  # fmt: skip

# The numbers in a call's `settings`, one int64 array: I, H, whether there is a bias, the number of layers and of a
# variant's own rows of parameters, whether the gradient by the h of the step before is taken for zero, and the
# addresses of the variant's routines.
INPUTS, HIDDEN, BIASED, LAYERS, OWN, TRUNCATED, ADDRESSES = range(7)
SETTINGS = ADDRESSES + CELL


class _Layer(NamedTuple):
    """The arguments of the parts of the driver: sizes, and pointers to rows."""

    cell: Any  # of the first block
    inputs: Any  # I
    hidden: Any  # H
    blocks: Any  # Hp/V
    batch: Any  # B
    rows: Any  # T * B
    x: Any  # (T * B, I)
    h0: Any  # (B, H)
    c0: Any  # (B, H)
    y: Any  # (T * B, H)
    h_n: Any  # (B, H)
    c_n: Any  # (B, H)
    tape: Any  # (T * B, Hp/V, 5, V)
    h_rows: Any  # (T * B, Hp) the state before each row
    kept: Any  # vectors a block of units leaves on the tape, 0 for none
    a: Any  # room for pre-activations


@kernel
def small_forward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    own,  # (E, H) the variant's own parameters, IN
    x,  # (T * B, I), IN
    h0,  # (1, B, H), IN
    c0,  # (1, B, H), IN
    y,  # (T * B, H), OUT
    h_n,  # (1, B, H), OUT
    c_n,  # (1, B, H), OUT
    settings,  # (SETTINGS,), IN
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Run one layer over a small batch, on unpacked weights."""
    if not (_are_weights(weight_ih, weight_hh, bias, own, settings) and _fit(x, h0, c0, y, h_n, c_n, settings)):
        return False
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    layer = _layer(own, x, h0, c0, y, h_n, c_n, settings, 0, address(y), address(y), 0, make_room(address(y)))
    _run(_unpacked(weight_ih, weight_hh, bias), None, layer, team, thread)
    if thread == 0:
        dismiss(team)
    return True


@kernel
def small_forward_packed(
    packed,  # one-dimensional: the packed weights of all layers, one after the other, IN
    packed_bias,  # one-dimensional: likewise, IN
    own,  # (L * E, H) the variant's own parameters, IN
    x,  # (T * B, I), IN
    h0,  # (L, B, H), IN
    c0,  # (L, B, H), IN
    y,  # (T * B, H), OUT
    h_n,  # (L, B, H), OUT
    c_n,  # (L, B, H), OUT
    settings,  # (SETTINGS,), IN
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Run one layer over a small batch, or several layers over one step, on packed weights."""
    layers = settings[LAYERS]
    if not _fit(x, h0, c0, y, h_n, c_n, settings) or (layers > 1 and x.shape[0] != h0.shape[1]):
        return False
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    weights, bias, room = address(packed), address(packed_bias), make_room(address(y))
    for number in range(layers):
        layer = _layer(own, x, h0, c0, y, h_n, c_n, settings, number, address(y), address(y), 0, room)
        block_row = GATES * lanes_of(weights)
        _run(None, packed_at(weights, bias, layer.inputs, layer.hidden, layer.blocks), layer, team, thread)
        weights = offset(weights, layer.blocks * (layer.inputs + layer.hidden) * block_row)
        bias = offset(bias, 2 * layer.blocks * block_row)
        if number + 1 < layers:
            barrier(team, thread)  # the next layer reads the h of all units
    if thread == 0:
        dismiss(team)
    return True


@kernel
def small_forward_taped(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    own,  # (E, H) the variant's own parameters, IN
    x,  # (T * B, I), IN
    h0,  # (1, B, H), IN
    c0,  # (1, B, H), IN
    y,  # (T * B, H), OUT
    h_n,  # (1, B, H), OUT
    c_n,  # (1, B, H), OUT
    tape,  # (T * B, Hp/V, 5, V), OUT
    h_rows,  # (T * B, Hp) the state before each row, OUT
    settings,  # (SETTINGS,), IN
    team,  # (2, 8), of one thread
):
    """Run one layer over a small batch, as :func:`small_forward` does, and keep what the backward pass needs."""
    if not (_are_weights(weight_ih, weight_hh, bias, own, settings) and _fit(x, h0, c0, y, h_n, c_n, settings)):
        return False
    layer = _layer(
        own, x, h0, c0, y, h_n, c_n, settings, 0, address(tape), address(h_rows), TAPE, make_room(address(y))
    )
    _run(_unpacked(weight_ih, weight_hh, bias), None, layer, team, 0)
    return True


@routine(inline=True)
def _unpacked(weight_ih, weight_hh, bias):
    """Gather the weights as given."""
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    return Unpacked(address(weight_ih), address(weight_hh), address(bias), inputs, hidden, bias.size > 0)


@routine(inline=True)
def _are_weights(weight_ih, weight_hh, bias, own, settings):
    """Say whether the weights are aligned and have the shapes that belong to I and H."""
    inputs, hidden = settings[INPUTS], settings[HIDDEN]
    return (
        (weight_ih.shape == (GATES * hidden, inputs) and weight_hh.shape == (GATES * hidden, hidden))
        and bias.size == (GATES * hidden if settings[BIASED] else 0)
        and own.shape == (settings[OWN], hidden)
        and (is_aligned(weight_ih) and is_aligned(weight_hh) and is_aligned(bias) and is_aligned(own))
    )


@routine(inline=True)
def _fit(x, h0, c0, y, h_n, c_n, settings):
    """Say whether a call's arrays are aligned and fit each other, and are as few rows as there is room for."""
    hidden, batch, rows = settings[HIDDEN], h0.shape[1], x.shape[0]
    return (
        (0 < batch <= MOST_ROWS and rows % batch == 0 and x.shape[1] == settings[INPUTS] and y.shape == (rows, hidden))
        and (h0.shape == (settings[LAYERS], batch, hidden) and c0.shape == h0.shape and h_n.shape == h0.shape)
        and c_n.shape == h0.shape
        and (is_aligned(x) and is_aligned(h0) and is_aligned(c0))
    )


@routine(inline=True)
def _layer(own, x, h0, c0, y, h_n, c_n, settings, number, tape, h_rows, kept, room):
    """Gather what the parts of the driver work on, for one of the layers; each reads h_n of the one below."""
    hidden, batch, width = settings[HIDDEN], h0.shape[1], lanes_of(tape)
    state, last = number * batch * hidden, number + 1 == settings[LAYERS]
    cell = cell_at(cell_of(settings, ADDRESSES, own, hidden), number * settings[OWN] * hidden)
    return _Layer(
        cell, hidden if number else settings[INPUTS], hidden, (hidden + width - 1) // width, batch, x.shape[0],
        offset(address(h_n), state - batch * hidden) if number else address(x),
        offset(address(h0), state), offset(address(c0), state), address(y) if last else offset(address(h_n), state),
        offset(address(h_n), state), offset(address(c_n), state), tape, h_rows, kept, room,
    )  # fmt: skip


@routine(inline=True)
def _run(unpacked, packed, layer, team, thread):
    """Run the recurrence, either on unpacked weights or on packed ones: the others are None."""
    batch, hidden, width = layer.batch, layer.hidden, lanes_of(layer.a)
    first_block, last_block = share(layer.blocks, team, thread)
    for low in range(0, layer.rows, batch):
        h_prev = offset(layer.y, (low - batch) * hidden) if low else layer.h0
        if unpacked is not None:  # Numba leaves out what belongs to a None
            x = offset(layer.x, low * layer.inputs)
            for block in range(first_block, last_block):
                gate_dots(batch, block, unpacked, x, h_prev, hidden, layer.a, GATES * width, False)
                _cells(layer, low, block, layer.a, h_prev)
        if packed is not None:
            together = ROW_BLOCKS if batch == 1 else 1
            # The product with an h0 of zeros is left out.
            depth = 0 if low == 0 and is_at_rest(layer.h0, batch * hidden, packed) else hidden
            for block in range(first_block, last_block, together):
                count = minimum(together, last_block - block)
                _packed_products(layer, packed, low, block, count, h_prev, depth)
                for further in range(count):  # one, if there are several rows
                    _cells(layer, low, block + further, offset(layer.a, further * GATES * width), h_prev)
        if low + batch < layer.rows:
            barrier(team, thread)  # the next step reads the h of all units


@routine(inline=True)
def _packed_products(layer, packed, low, block, blocks, h_prev, depth):
    """Compute the pre-activations of some rows and one block of units, or of one row and several, side by side."""
    inputs, hidden, tile_row = layer.inputs, layer.hidden, GATES * lanes_of(layer.a)
    of_x = offset(packed.of_x, block * inputs * tile_row)
    pre_activations(
        layer.batch, blocks, offset(layer.x, low * inputs), inputs, of_x, h_prev, depth, hidden,
        offset(packed.of_h, block * hidden * tile_row), offset(packed.bias, block * tile_row), 0, layer.a, tile_row,
        are_far(layer.a, layer.blocks * (inputs + hidden) * tile_row), offset(of_x, blocks * inputs * tile_row),
    )  # fmt: skip


@routine(inline=True)
def _cells(layer, low, block, a, h_prev):
    """Run the cell step for all sequences of one block of units."""
    width, hidden = lanes_of(a), layer.hidden
    unit = block * width
    units, cell = minimum(width, hidden - unit), cell_at(layer.cell, unit)
    for n in range(layer.batch):
        own, row = n * hidden + unit, low + n
        c_prev = load_first(offset(layer.c_n if low else layer.c0, own), units)
        tape = offset(layer.tape, (row * layer.blocks + block) * layer.kept * width)
        held, c = update(cell, offset(a, n * GATES * width), units, c_prev, tape, layer.kept)
        h = output(cell, held, c)
        store_first(offset(layer.c_n, own), c, units)
        store_first(offset(layer.y, row * hidden + unit), h, units)
        if low + layer.batch == layer.rows:
            store_first(offset(layer.h_n, own), h, units)
        if layer.kept:
            store(offset(layer.h_rows, (row * layer.blocks + block) * width), load_first(offset(h_prev, own), units))


@kernel
def small_backward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    own,  # (E, H) the variant's own parameters, IN
    x,  # (T * B, I), IN
    tape,  # (T * B, Hp/V, 5, V), IN
    h_rows,  # (T * B, Hp), IN
    c0,  # (B, H), IN
    dy,  # (T * B, H), or (0, H) for zero, IN
    dh_n,  # (1, B, H), or (0, B, H) for zero, IN
    dc_n,  # (1, B, H), or (0, B, H) for zero, IN
    dx,  # (T * B, I), or (0, I) if it is not wanted, OUT
    dh0,  # (1, B, H), OUT; and before that the gradient by the h of the step
    dc0,  # (1, B, H), OUT; likewise
    dweight_ih,  # (4H, I), OUT
    dweight_hh,  # (4H, H), OUT
    dbias,  # (4H,), or (0,) for none, OUT
    down,  # (E, H), OUT
    da,  # (T * B, 4H) scratch
    settings,  # (SETTINGS,), IN
):
    """Back-propagate through one layer over a small batch.

    Weights are checked as in the forward pass; all else is as that, or the caller in Python, has made it.
    """
    (rows, inputs), (_, batch, hidden) = x.shape, dh0.shape
    if not _are_weights(weight_ih, weight_hh, dbias, own, settings):
        return False
    gates = GATES * hidden
    copy_or_clear(dh_n, address(dh0), batch * hidden)
    copy_or_clear(dc_n, address(dc0), batch * hidden)
    down[:] = 0.0
    cell = cell_of(settings, ADDRESSES, own, hidden)
    for low in range(rows - batch, -1, -batch):
        for sequence in range(batch):
            _cells_back(cell, tape, c0, dy, dh0, dc0, down, da, low, sequence)
        if settings[TRUNCATED]:
            clear(address(dh0), batch * hidden)
        else:
            step = offset(address(da), low * gates)
            product(batch, gates, hidden, step, gates, 1, address(weight_hh), hidden, address(dh0))
    all_da, h_row = address(da), h_rows.shape[1]
    if dx.size:
        product(rows, gates, inputs, all_da, gates, 1, address(weight_ih), inputs, address(dx))
    product(gates, rows, inputs, all_da, 1, gates, address(x), inputs, address(dweight_ih))
    product(gates, rows, hidden, all_da, 1, gates, address(h_rows), h_row, address(dweight_hh))
    for gate_unit in range(dbias.size):
        total = da[0, gate_unit]
        for row in range(1, rows):
            total += da[row, gate_unit]
        dbias[gate_unit] = total
    return True


@routine(inline=True)
def _cells_back(cell, tape, c0, dy, dh0, dc0, down, da, low, sequence):
    """Take the gradients of one sequence back through the cell step, for all units."""
    blocks, width, (_, batch, hidden), row = tape.shape[1], tape.shape[3], dh0.shape, low + sequence
    gate_gradients = make_room(address(da))
    for block in range(blocks):
        unit = block * width
        units, here, state = minimum(width, hidden - unit), cell_at(cell, unit), sequence * hidden + unit
        dh, dc = load_first(offset(address(dh0), state), units), load_first(offset(address(dc0), state), units)
        if dy.size:
            dh = dh + load_first(offset(address(dy), row * hidden + unit), units)
        kept = offset(address(tape), (row * blocks + block) * TAPE * width)
        if low:
            c_prev = load(offset(kept, (TAPE - 1 - batch * blocks * TAPE) * width))
        else:
            c_prev = load_first(offset(address(c0), state), units)
        dc_prev = backward(here, dh, dc, kept, units, c_prev, gate_gradients)
        for gate in range(GATES):
            target = offset(address(da), (row * GATES + gate) * hidden + unit)
            store_first(target, load(offset(gate_gradients, gate * width)), units)
        store_first(offset(address(dc0), state), dc_prev, units)
        c = load(offset(kept, (TAPE - 1) * width))
        own_gradients(here, gate_gradients, units, c_prev, c, offset(address(down), unit))


_prepared: set[tuple[Any, np.dtype[Any]]] = set()


def _signatures(dtype: np.dtype[Any]) -> dict[Any, tuple[Any, ...]]:
    """Return the types of each kernel's arguments, all arrays being of a dtype, C-contiguous and writeable."""
    vector, matrix, state, four = (types.Array(from_dtype(dtype), ndim, "C") for ndim in (1, 2, 3, 4))
    settings, team = types.Array(types.int64, 1, "C"), types.Array(types.int64, 2, "C")
    weights, rows = (matrix, matrix, vector), (matrix, state, state, matrix, state, state)
    back = (state, state, matrix, state, state)  # gradients by the states after, by x, and by the states before
    return {
        small_forward: (*weights, matrix, *rows, settings, team, types.intp),
        small_forward_packed: (vector, vector, matrix, *rows, settings, team, types.intp),
        small_forward_taped: (*weights, matrix, *rows, four, matrix, settings, team),
        small_backward: (matrix, matrix, matrix, matrix, four, matrix, matrix, matrix, *back, *weights, matrix, matrix,
                         settings),
    }  # fmt: skip


def prepare(kernel: Any, dtype: np.dtype[Any]) -> None:
    """Compile one of the kernels for arrays of a dtype, C-contiguous and writeable; others then raise TypeError."""
    if (kernel, dtype) not in _prepared:
        compile_once(kernel, _signatures(dtype)[kernel])
        _prepared.add((kernel, dtype))


for _kernel in (small_forward, small_forward_packed, small_forward_taped, small_backward):
    refuse_others(_kernel)
