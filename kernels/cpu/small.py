"""Calls of a few rows, with few arguments: streaming.

They use the weights as they lie, for packing them would cost more than a step; but those of a frozen model are packed
already. Training has the same in both directions of time: a step or a few, as in learning online. Inference may have a
team, each of whose threads computes some of the hidden units; they meet after each step.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numba.np.numpy_support import from_dtype

from fastlstm.kernels.cpu.activations import tanh
from fastlstm.kernels.cpu.compile import compile_once, kernel, refuse_others, routine
from fastlstm.kernels.cpu.dots import gate_dots
from fastlstm.kernels.cpu.forward import pre_activations
from fastlstm.kernels.cpu.gates import GATES, TAPE, gates_backward, gates_forward
from fastlstm.kernels.cpu.pack import is_at_rest, packed_weights
from fastlstm.kernels.cpu.simd import (
    address,
    fma,
    is_aligned,
    lanes_of,
    llvm_vector,
    load,
    load_first,
    minimum,
    offset,
    splat,
    store,
    store_first,
)
from fastlstm.kernels.cpu.team import barrier, dismiss, share, summon, this_call
from fastlstm.kernels.cpu.tile import GROUP, ROW_BLOCKS, are_far

__all__ = ["prepare", "small_backward", "small_forward", "small_forward_packed", "small_forward_taped"]

_ROWS = GROUP  # the most sequences: `plan.is_short`


@intrinsic
def _room(typingctx, pointer):
    """Return a pointer to room for the gates of :data:`_ROWS` rows, a vector each, until the kernel ends."""

    def codegen(context, builder, signature, args):
        with builder.goto_entry_block():
            room = builder.alloca(llvm_vector(pointer.dtype), _ROWS * GATES)
        return builder.bitcast(room, args[0].type)

    return pointer(pointer), codegen


@kernel
def small_forward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    x,  # (T * B, I), IN
    h0,  # (1, B, H), IN
    c0,  # (1, B, H), IN
    y,  # (T * B, H), OUT
    h_n,  # (1, B, H), OUT
    c_n,  # (1, B, H), OUT
    inputs,  # I
    hidden,  # H
    biased,  # whether there is a bias
    team,  # (1 + threads, 8), IN and OUT: see team.py
    thread,
):
    """Run one layer over a few rows; return False, with nothing written, if a shape or an alignment does not fit.

    Both are checked here, because a step takes less time than their checks in Python would.
    """
    weights_fit = _are_weights(weight_ih, weight_hh, bias, inputs, hidden, biased)
    if not (weights_fit and _fit(x, h0, c0, y, h_n, c_n, inputs, hidden)):
        return False
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    nowhere = address(y)
    _run(
        weight_ih, weight_hh, bias, None, None, x, h0, c0, y, h_n, c_n, inputs, hidden, False, nowhere, nowhere,
        team, thread,
    )  # fmt: skip
    if thread == 0:
        dismiss(team)
    return True


@kernel
def small_forward_packed(
    packed,  # (Hp/V * (I + H), 4, V), IN
    packed_bias,  # (2, Hp/V, 4, V), IN
    x,  # (T * B, I), IN
    h0,  # (1, B, H), IN
    c0,  # (1, B, H), IN
    y,  # (T * B, H), OUT
    h_n,  # (1, B, H), OUT
    c_n,  # (1, B, H), OUT
    inputs,  # I
    hidden,  # H
    team,  # (1 + threads, 8), IN and OUT: see team.py
    thread,
):
    """Run one layer over a few rows on packed weights, otherwise as :func:`small_forward` does."""
    if not _fit(x, h0, c0, y, h_n, c_n, inputs, hidden):
        return False
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    nowhere = address(y)
    _run(
        None, None, None, packed, packed_bias, x, h0, c0, y, h_n, c_n, inputs, hidden, False, nowhere, nowhere,
        team, thread,
    )  # fmt: skip
    if thread == 0:
        dismiss(team)
    return True


@kernel
def small_forward_taped(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    x,  # (T * B, I), IN
    h0,  # (1, B, H), IN
    c0,  # (1, B, H), IN
    y,  # (T * B, H), OUT
    h_n,  # (1, B, H), OUT
    c_n,  # (1, B, H), OUT
    tape,  # (T * B, Hp/V, 5, V), OUT
    h_rows,  # (T * B, Hp) the state before each row, OUT
    inputs,  # I
    hidden,  # H
    biased,  # whether there is a bias
    team,  # (2, 8), of one thread
):
    """Run one layer over a few rows, as :func:`small_forward` does, and keep what the backward pass needs."""
    weights_fit = _are_weights(weight_ih, weight_hh, bias, inputs, hidden, biased)
    if not (weights_fit and _fit(x, h0, c0, y, h_n, c_n, inputs, hidden)):
        return False
    left, before = address(tape), address(h_rows)
    _run(
        weight_ih, weight_hh, bias, None, None, x, h0, c0, y, h_n, c_n, inputs, hidden, True, left, before, team, 0
    )  # fmt: skip
    return True


@routine(inline=True)
def _are_weights(weight_ih, weight_hh, bias, inputs, hidden, biased):
    """Say whether the weights are aligned and have the shapes that belong to I and H."""
    return (
        (weight_ih.shape == (4 * hidden, inputs) and weight_hh.shape == (4 * hidden, hidden))
        and bias.size == (4 * hidden if biased else 0)
        and (is_aligned(weight_ih) and is_aligned(weight_hh) and is_aligned(bias))
    )


@routine(inline=True)
def _fit(x, h0, c0, y, h_n, c_n, inputs, hidden):
    """Say whether a call's arrays are aligned and fit each other, and are as few rows as there is room for."""
    batch, rows = h0.shape[1], x.shape[0]
    return (
        (0 < batch <= _ROWS and rows % batch == 0 and x.shape[1] == inputs and y.shape == (rows, hidden))
        and (h0.shape == (1, batch, hidden) and c0.shape == h0.shape and h_n.shape == h0.shape)
        and c_n.shape == h0.shape
        and (is_aligned(x) and is_aligned(h0) and is_aligned(c0))
    )


@routine(inline=True)
def _run(
    weight_ih, weight_hh, bias, packed, packed_bias, x, h0, c0, y, h_n, c_n, inputs, hidden, training, tape, h_rows,
    team, thread,
):  # fmt: skip
    """Run the recurrence, either on the weights as they lie or on packed ones: the others are None.

    `tape` and `h_rows` are pointers, which only training uses.
    """
    batch, rows, width = h0.shape[1], x.shape[0], lanes_of(tape)
    blocks = (hidden + width - 1) // width
    block_first, block_last = share(blocks, team, thread)
    a = _room(tape)
    for low in range(0, rows, batch):
        first, last = low == 0, low + batch == rows
        x_step, y_step = offset(address(x), low * inputs), offset(address(y), low * hidden)
        h_step = address(h0) if first else offset(address(y), (low - batch) * hidden)
        c_step = address(c0) if first else address(c_n)
        if weight_ih is not None:  # Numba leaves out what belongs to a None
            for block in range(block_first, block_last):
                gate_dots(
                    batch, block, weight_ih, weight_hh, bias, x_step, inputs, h_step, hidden, a, GATES * width, False
                )
                for n in range(batch):
                    _cell(
                        block, n, offset(a, n * GATES * width), low, last, h_step, c_step, y_step, h_n, c_n, hidden,
                        training, tape, h_rows,
                    )  # fmt: skip
        if packed is not None:
            together = ROW_BLOCKS if batch == 1 else 1
            depth = 0 if first and is_at_rest(h0, packed_bias) else hidden  # of the products with h
            for first_block in range(block_first, block_last, together):
                number = minimum(together, block_last - first_block)
                _packed_products(
                    batch, first_block, number, packed, packed_bias, x_step, inputs, h_step, depth, hidden, a
                )
                for further in range(number):
                    for n in range(batch):  # one, if there are several blocks
                        _cell(
                            first_block + further, n, offset(a, (further + n) * GATES * width), low, last,
                            h_step, c_step, y_step, h_n, c_n, hidden, training, tape, h_rows,
                        )  # fmt: skip
        if not last:
            barrier(team, thread)  # the next step reads the h of all units


@routine(inline=True)
def _packed_products(batch, block, blocks, packed, packed_bias, x, inputs, h, depth, hidden, a):
    """Compute the pre-activations of some rows and one block of units, or of one row and several, side by side."""
    tile_row = GATES * lanes_of(a)
    of_x, of_h = packed_weights(packed, inputs, hidden, block)
    after, _ = packed_weights(packed, inputs, hidden, block + blocks)
    pre_activations(
        batch, blocks, x, inputs, inputs, of_x, h, depth, hidden, of_h, offset(address(packed_bias), block * tile_row),
        0, a, tile_row, are_far(a, packed.size), after,
    )  # fmt: skip


@routine(inline=True)
def _cell(block, n, a, low, last, h_step, c_step, y_step, h_n, c_n, hidden, training, tape, h_rows):
    """Take a block of units of one sequence from its pre-activations to c and h."""
    width = lanes_of(a)
    unit = block * width
    units, own = minimum(width, hidden - unit), n * hidden + unit
    # Lanes beyond the units become harmless constants.
    i, f, g, o, c = gates_forward(
        load_first(a, units),
        load_first(offset(a, width), units),
        load_first(offset(a, 2 * width), units),
        load_first(offset(a, 3 * width), units),
        load_first(offset(c_step, own), units),
    )
    h = o * tanh(c)
    store_first(offset(address(c_n), own), c, units)
    store_first(offset(y_step, own), h, units)
    if last:
        store_first(offset(address(h_n), own), h, units)
    if training:
        row, blocks = low + n, (hidden + width - 1) // width
        left = offset(tape, (row * blocks + block) * TAPE * width)
        store(left, i)
        store(offset(left, width), f)
        store(offset(left, 2 * width), g)
        store(offset(left, 3 * width), o)
        store(offset(left, 4 * width), c)
        store(offset(h_rows, row * blocks * width + unit), load_first(offset(h_step, own), units))


@kernel
def small_backward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    x,  # (T * B, I), IN
    tape,  # (T * B, Hp/V, 5, V), IN
    h_rows,  # (T * B, Hp), IN
    c0,  # (B, H), IN
    dy,  # (T * B, H), or (0, H) for zero, IN
    dh_n,  # (1, B, H), or (0, B, H) for zero, IN
    dc_n,  # (1, B, H), or (0, B, H) for zero, IN
    dx,  # (T * B, I), OUT
    dh0,  # (1, B, H), OUT; and before that the gradient by the h of the step
    dc0,  # (1, B, H), OUT; likewise
    dweight_ih,  # (4H, I), OUT
    dweight_hh,  # (4H, H), OUT
    dbias,  # (4H,), or (0,) for none, OUT
    da,  # (T * B, 4H) scratch
    biased,  # whether there is a bias
):
    """Back-propagate through one layer over a few rows; return False, with nothing written, if a weight does not fit.

    All else is as the forward pass, or the caller in Python, has made it.
    """
    (rows, inputs), (_, batch, hidden) = x.shape, dh0.shape
    if not _are_weights(weight_ih, weight_hh, dbias, inputs, hidden, biased):
        return False
    blocks, width, gates = tape.shape[1], tape.shape[3], GATES * hidden
    _copy_or_clear(dh_n, address(dh0), batch * hidden)
    _copy_or_clear(dc_n, address(dc0), batch * hidden)
    for low in range(rows - batch, -1, -batch):
        for sequence in range(batch):
            row = low + sequence
            dh_row, dc_row = offset(address(dh0), sequence * hidden), offset(address(dc0), sequence * hidden)
            da_row = offset(address(da), row * gates)
            for block in range(blocks):
                unit = block * width
                units = minimum(width, hidden - unit)
                dh, dc = load_first(offset(dh_row, unit), units), load_first(offset(dc_row, unit), units)
                if dy.size:
                    dh = dh + load_first(offset(address(dy), row * hidden + unit), units)
                if low:
                    c_prev = load(offset(address(tape), ((row - batch) * blocks + block + 1) * TAPE * width - width))
                else:
                    c_prev = load_first(offset(address(c0), sequence * hidden + unit), units)
                kept = offset(address(tape), (row * blocks + block) * TAPE * width)
                da_i, da_f, da_g, da_o, dc = gates_backward(dh, dc, kept, width, c_prev)
                store_first(offset(da_row, unit), da_i, units)
                store_first(offset(da_row, hidden + unit), da_f, units)
                store_first(offset(da_row, 2 * hidden + unit), da_g, units)
                store_first(offset(da_row, 3 * hidden + unit), da_o, units)
                store_first(offset(dc_row, unit), dc, units)
        step = offset(address(da), low * gates)
        _product(batch, gates, hidden, step, gates, 1, address(weight_hh), hidden, address(dh0))
    all_da, h_row = address(da), h_rows.shape[1]
    _product(rows, gates, inputs, all_da, gates, 1, address(weight_ih), inputs, address(dx))
    _product(gates, rows, inputs, all_da, 1, gates, address(x), inputs, address(dweight_ih))
    _product(gates, rows, hidden, all_da, 1, gates, address(h_rows), h_row, address(dweight_hh))
    for gate_unit in range(dbias.size):
        total = da[0, gate_unit]
        for row in range(1, rows):
            total += da[row, gate_unit]
        dbias[gate_unit] = total
    return True


@routine
def _copy_or_clear(source, target, size):
    """Copy an array of so many elements; one of none stands for zeros."""
    for n in range(0, size, lanes_of(target)):
        left = size - n
        store_first(offset(target, n), load_first(offset(address(source), n), left if source.size else 0), left)


_TOGETHER = 4  # rows of B that are read side by side


@routine
def _product(m, k, n, a, a_row, a_k, b, b_row, c):
    """Compute C = A @ B, (m, k) times (k, n), on matrices as they lie: B, if large, is read once from end to end.

    Parameters
    ----------
    m, k, n : int
        Sizes, at least 1.
    a : pointer, IN
        Element (i, j) of A is ``a[i * a_row + j * a_k]``.
    b : pointer, IN
        Row j of B starts at ``b[j * b_row]``.
    c : pointer, OUT
        C, without padding.
    """
    together = k // _TOGETHER * _TOGETHER
    for j in range(0, together, _TOGETHER):
        for i in range(m):
            _four_rows(n, offset(a, i * a_row + j * a_k), a_k, offset(b, j * b_row), b_row, offset(c, i * n), j > 0)
    for j in range(together, k):
        for i in range(m):
            _one_row(n, splat(offset(a, i * a_row + j * a_k)), offset(b, j * b_row), offset(c, i * n), j > 0)


@routine(inline=True)
def _four_rows(n, a, a_k, b, b_row, c, add):
    """Compute a[0] b[0] + ... + a[3] b[3] for rows of n elements; add it to c, or store it there."""
    width = lanes_of(c)
    f0, f1, f2, f3 = splat(a), splat(offset(a, a_k)), splat(offset(a, 2 * a_k)), splat(offset(a, 3 * a_k))
    b1, b2, b3 = offset(b, b_row), offset(b, 2 * b_row), offset(b, 3 * b_row)
    whole = n // width * width
    for column in range(0, whole, width):
        total = f0 * load(offset(b, column))
        total = fma(f1, load(offset(b1, column)), total)
        total = fma(f2, load(offset(b2, column)), total)
        total = fma(f3, load(offset(b3, column)), total)
        here = offset(c, column)
        store(here, total + load(here) if add else total)
    if whole < n:
        rest = n - whole
        total = f0 * load_first(offset(b, whole), rest)
        total = fma(f1, load_first(offset(b1, whole), rest), total)
        total = fma(f2, load_first(offset(b2, whole), rest), total)
        total = fma(f3, load_first(offset(b3, whole), rest), total)
        here = offset(c, whole)
        store_first(here, total + load_first(here, rest) if add else total, rest)


@routine(inline=True)
def _one_row(n, factor, b, c, add):
    """Compute factor times a row of n elements; add it to c, or store it there."""
    width = lanes_of(c)
    whole = n // width * width
    for column in range(0, whole, width):
        product, here = factor * load(offset(b, column)), offset(c, column)
        store(here, product + load(here) if add else product)
    if whole < n:
        rest, here = n - whole, offset(c, whole)
        product = factor * load_first(offset(b, whole), rest)
        store_first(here, product + load_first(here, rest) if add else product, rest)


_lock = threading.Lock()
_prepared: set[tuple[Any, np.dtype[Any]]] = set()


def _signatures(dtype: np.dtype[Any]) -> dict[Any, tuple[Any, ...]]:
    """Return the types of each kernel's arguments, all arrays being of a dtype, C-contiguous and writeable."""
    vector, matrix, state, four = (types.Array(from_dtype(dtype), ndim, "C") for ndim in (1, 2, 3, 4))
    team, number, truth = types.Array(types.int64, 2, "C"), types.intp, types.boolean
    weights, packed = (matrix, matrix, vector), (state, four)
    rows, sizes = (matrix, state, state, matrix, state, state), (number, number, truth)
    back = (state, state, matrix, state, state)  # gradients by the states after, by x, and by the states before
    return {
        small_forward: (*weights, *rows, *sizes, team, number),
        small_forward_packed: (*packed, *rows, number, number, team, number),
        small_forward_taped: (*weights, *rows, four, matrix, *sizes, team),
        small_backward: (matrix, matrix, matrix, four, matrix, matrix, matrix, *back, *weights, matrix, truth),
    }


def prepare(kernel: Any, dtype: np.dtype[Any]) -> None:
    """Compile one of the kernels for arrays of a dtype, C-contiguous and writeable; others then raise TypeError."""
    if (kernel, dtype) in _prepared:
        return
    with _lock:
        if (kernel, dtype) not in _prepared:
            compile_once(kernel, _signatures(dtype)[kernel])
            _prepared.add((kernel, dtype))


for _kernel in (small_forward, small_forward_packed, small_forward_taped, small_backward):
    refuse_others(_kernel)
