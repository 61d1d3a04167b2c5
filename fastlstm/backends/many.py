"""Calls of more than a few rows, on the kernels that divide a layer among threads: whole sequences."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from fastlstm.backends.base import Array
from fastlstm.backends.calls import (
    DirectionTape,
    LayerTape,
    Size,
    Way,
    Ways,
    bias_of,
    kind_of_calls,
    packed_of,
    run_call,
    size_of,
)
from fastlstm.backends.layers import Weights
from fastlstm.backends.memory import Workspace, is_to_be_cleared, new_array, one_block
from fastlstm.backends.packing import Packing, is_kept
from fastlstm.backends.plain_arrays import as_plain, is_native
from fastlstm.backends.plan import are_few
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import Cell
from fastlstm.kernels.cpu.backward import PANEL_ROWS, layer_backward
from fastlstm.kernels.cpu.forward import layer_forward
from fastlstm.kernels.cpu.gates import GATES, TAPE
from fastlstm.kernels.cpu.tile import GROUP, ROWS, VECTORS

__all__ = ["are_weights", "direction_backward", "direction_forward", "equal_rows", "fit"]

# Rows of a chunk of the backward pass, if a quarter of the steps has so many: below, fetching the weights and their
# gradients anew for each chunk would cost too much.
_CHUNK_ROWS = 256


def direction_forward(
    weights: Weights,
    x: Array,
    h0: Array,
    c0: Array,
    packing: Packing,
    direction: int,
    y: Array,
    h_n: Array,
    c_n: Array,
    keep_tape: bool,
    recompute: bool,
    threads: int,
) -> DirectionTape | None:
    """Run one direction; writes y, h_n and c_n."""
    dtype, reverse = x.dtype, direction == 1
    size = Size.of(weights.weight_ih)
    # What was computed on the weights as they lie could not be computed again to the same bits, and is little.
    recompute = recompute and not are_few(packing.rows, size.inputs, size.hidden, ROWS)
    rows, kept = packing.rows, 1 if recompute else TAPE
    shapes = (rows, size.blocks, kept, size.width), (rows, size.blocks * size.width)
    tape = one_block(dtype, *shapes) if keep_tape else []
    x_rows, places = packing.pack(x, reverse)
    arguments = (
        as_plain(weights.weight_ih), as_plain(weights.weight_hh), bias_of(weights), x_rows, h0, c0,
        packing.order, packing.lengths, packing.offsets, places,
        y, direction * size.hidden, packing.ragged and is_to_be_cleared(y), h_n, c_n, keep_tape, *tape,
    )  # fmt: skip

    packed = packed_of(weights)

    def ways(most: int) -> Ways:
        return _forward_ways(size, packing.rows, packing.order.size, keep_tape, bool(packed), most)

    run_call(layer_forward, arguments, ways, packing.rows, threads, packed)
    return DirectionTape(tape[0], tape[1], c0.copy()) if keep_tape else None


@functools.lru_cache(maxsize=256)
def _forward_ways(size: Size, rows: int, batch: int, training: bool, packed: bool, most: int) -> Ways:
    """Return the ways to run the forward kernel on at most so many threads, on weights that are packed or not.

    What is kept for a call depends on these numbers alone: a packing would be kept with its arrays.
    """
    _, _, width, blocks, dtype = size
    plans = size.plans(rows, batch, most, packed=packed)
    weights, bias = size.packed_shapes
    tape = () if training else ((0, blocks, TAPE, width), (2 * batch, blocks * width))
    ways = []
    for plan in plans:
        shapes = (
            *tape,
            (batch, blocks * width),
            (*((plan.ahead * batch, blocks) if plan.ahead else (plan.threads * GROUP, 1)), GATES, width),
            *(() if packed else ((0, *weights[1:]) if plan.as_they_lie else weights, bias)),
        )
        pack = not (packed or plan.as_they_lie)
        settings = pack, plan.ahead, plan.kind == "units"
        ways.append(Way(plan, Workspace(dtype, shapes), settings))
    kind = kind_of_calls(layer_forward, size, batch, rows.bit_length(), plans, packed) if len(plans) > 1 else None
    return Ways(tuple(ways), kind)


def are_weights(cell: Cell, weights: tuple[Any, Any, Any]) -> bool:
    """Say whether these are a layer's weights and its bias, which is empty for none."""
    hidden, dtype = cell.hidden_size, cell.dtype
    shapes = (4 * hidden, cell.input_size), (4 * hidden, hidden), (4 * hidden * cell.bias,)
    return all(is_native(array, dtype) and array.shape == shape for array, shape in zip(weights, shapes, strict=True))


def fit(cell: Cell, x: Any, h0: Any, c0: Any, state_shape: tuple[int, ...]) -> bool:
    """Say whether an input and the states before it are such as the cell takes."""
    dtype = cell.dtype
    return (
        (is_native(x, dtype) and x.shape[-1] == cell.input_size)
        and (is_native(h0, dtype) and h0.shape == state_shape)
        and (is_native(c0, dtype) and c0.shape == state_shape)
    )


def equal_rows(
    cell: Cell,
    weights: tuple[Array, Array, Array],  # as given, the bias empty for none
    packed: tuple[Array, ...],  # what was packed of weights that fit; () if nobody has looked at them
    x: Array,  # (T, B, I)
    h0: Array,
    c0: Array,
    y: Array,  # (T * B, H), OUT
    h_n: Array,  # OUT
    c_n: Array,  # OUT
) -> bool:
    """Run one layer over sequences of equal length; return False, with nothing done, if anything does not fit."""
    if not fit(cell, x, h0, c0, h_n.shape) or not (packed or are_weights(cell, weights)):
        return False
    weight_ih, weight_hh, bias = weights
    inputs, hidden, dtype, rows, batch = cell.input_size, cell.hidden_size, cell.dtype, len(y), x.shape[-2]
    steps = rows // batch
    call_of = _kept_equal_call if is_kept(steps, batch) else _make_equal_call
    where, ways = call_of(inputs, hidden, steps, batch, dtype, bool(packed))
    arguments = (
        as_plain(weight_ih), as_plain(weight_hh), as_plain(bias), as_plain(x).reshape(rows, inputs),
        as_plain(h0)[0], as_plain(c0)[0],
        *where, y, 0, False, h_n[0], c_n[0], False,
    )  # fmt: skip
    run_call(layer_forward, arguments, ways, rows, get_num_threads(), packed)
    return True


def _make_equal_call(
    inputs: int, hidden: int, steps: int, batch: int, dtype: Any, packed: bool
) -> tuple[tuple[Array, ...], Callable[[int], Ways]]:
    """Return what a call on sequences of equal length shares with others of its size: so much less to do for each.

    These are the kernel's arguments that say where the rows are, and the ways to run it.
    """
    size, packing = size_of(GATES * hidden, inputs, dtype), Packing.of(None, steps, batch)

    @functools.cache
    def ways(most: int) -> Ways:
        return _forward_ways(size, steps * batch, batch, False, packed, most)

    return (packing.order, packing.lengths, packing.offsets, packing.places(False)), ways


_kept_equal_call = functools.lru_cache(maxsize=16)(_make_equal_call)


def _chunk(packing: Packing) -> int:
    """Steps whose gate gradients, and with `recompute` their gates, are kept at a time."""
    steps = packing.offsets.size - 1
    chunk: int = max(1, -(-steps // 8), min(-(-steps // 4), -(-_CHUNK_ROWS // packing.order.size)))
    return chunk


def direction_backward(
    weights: Weights,
    layer: LayerTape,
    direction: int,
    dy: Array,
    dh_n: Array,
    dc_n: Array,
    dx: Array,
    dh0: Array,
    dc0: Array,
) -> Weights:
    """Back-propagate through one direction; writes dx, dh0 and dc0."""
    tape, packing = layer.directions[direction], layer.packing
    dtype, reverse = dx.dtype, direction == 1
    size = Size.of(weights.weight_ih)
    weight_ih, weight_hh, bias = as_plain(weights.weight_ih), as_plain(weights.weight_hh), bias_of(weights)
    grads = [new_array(array.shape, dtype) for array in (weight_ih, weight_hh, bias)]
    recompute = tape.gates.shape[2] < TAPE
    x_rows, places = packing.pack(layer.x, reverse)
    clear = packing.ragged and not reverse and is_to_be_cleared(dx)
    chunk = _chunk(packing)
    chunk_rows = packing.rows_of_chunk(chunk)
    arguments = (
        weight_ih, weight_hh, bias, x_rows, tape.gates, tape.h_rows, tape.c0,
        packing.order, packing.lengths, packing.offsets, places,
        dy, direction * size.hidden, dh_n, dc_n, reverse, dx, clear, dh0, dc0, *grads, chunk,
        *(() if recompute else (None, None, None)),
    )  # fmt: skip

    def ways(most: int) -> Ways:
        return _backward_ways(size, packing.rows, packing.order.size, chunk_rows, recompute, most)

    run_call(layer_backward, arguments, ways, packing.rows, get_num_threads())
    return Weights(grads[0], grads[1], None if weights.bias is None else grads[2])


@functools.lru_cache(maxsize=256)
def _backward_ways(size: Size, rows: int, batch: int, chunk_rows: int, recompute: bool, most: int) -> Ways:
    """Return the ways to run the backward kernel on at most so many threads; see :func:`_forward_ways`."""
    inputs, hidden, width, blocks, dtype = size
    plans = size.plans(rows, batch, most, backward=True)
    depth, panel = GATES * blocks * width, VECTORS * width
    again = (chunk_rows, blocks, TAPE, width), *size.packed_shapes
    ways = []
    for plan in plans:
        shapes = (
            *(again if recompute else ()),
            (chunk_rows, depth),
            (batch, blocks * width),
            (batch, blocks * width),
            (-(-inputs // panel), depth, panel),
            (-(-hidden // panel), depth, panel),
            (-(-inputs // panel), depth, panel),
            (-(-hidden // panel), depth, panel),
            (depth,),
            (plan.threads, PANEL_ROWS, panel),
        )
        ways.append(Way(plan, Workspace(dtype, shapes), (plan.kind == "units",)))
    kind = kind_of_calls(layer_backward, size, batch, rows.bit_length(), plans) if len(plans) > 1 else None
    return Ways(tuple(ways), kind)
