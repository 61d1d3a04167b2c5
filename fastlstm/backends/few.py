"""Calls of a few rows, on the kernels that have few arguments and hardly anything to prepare: streaming."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

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
)
from fastlstm.backends.layers import Weights
from fastlstm.backends.memory import Workspace, new_array, new_like
from fastlstm.backends.packing import Packing
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.plan import FEW_ROWS, are_few, choose, is_short, most_threads
from fastlstm.backends.threads import get_num_threads
from fastlstm.backends.workers import NO_TEAM
from fastlstm.kernels.cpu.gates import TAPE
from fastlstm.kernels.cpu.simd import lanes
from fastlstm.kernels.cpu.small import (
    prepare,
    small_backward,
    small_forward,
    small_forward_packed,
    small_forward_taped,
)
from fastlstm.kernels.cpu.tile import GROUP, ROWS

__all__ = [
    "few_backward", "few_forward", "few_gradients", "few_rows", "few_rows_packed", "is_short_call",
    "most_short", "new_tape",
]  # fmt: skip


def is_short_call(packing: Packing, weights: Sequence[Weights], backward: bool = False) -> bool:
    """Say whether a layer is run by the kernels for a few rows, on the weights as they lie."""
    if len(weights) > 1 or packing.ragged:
        return False
    hidden, inputs = weights[0].weight_hh.shape[1], weights[0].weight_ih.shape[1]
    most = FEW_ROWS if backward or weights[0].kept is None else most_short(packing.steps)
    return is_short(packing.rows, inputs, hidden, backward, most)


def most_short(steps: int) -> int:
    """Return how many rows a short call may have on packed weights: a single step as many as a tile's weights serve."""
    return GROUP if steps == 1 else FEW_ROWS


def few_rows(*arguments: Any) -> bool:
    """Call :func:`small_forward`, for one thread, with a team if that is better."""
    return _with_team(small_forward, arguments, *arguments[3:5], *arguments[9:11])


def few_rows_packed(*arguments: Any) -> bool:
    """Call :func:`small_forward_packed`, for one thread, with a team if that is better."""
    return _with_team(small_forward_packed, arguments, *arguments[2:4], *arguments[8:10])


def _with_team(kernel: Any, arguments: tuple[Any, ...], x: Array, h0: Array, inputs: int, hidden: int) -> bool:
    rows = len(x)
    ways = _short_ways(kernel, rows, h0.shape[1], inputs, hidden, x.dtype)
    if ways is None or (threads := get_num_threads()) == 1:
        return bool(kernel(*arguments))
    return bool(run_call(kernel, arguments[:-2], ways, rows, threads))


@functools.lru_cache(maxsize=64)
def _short_ways(
    kernel: Any, rows: int, batch: int, inputs: int, hidden: int, dtype: Any
) -> Callable[[int], Ways] | None:
    """Return what returns the ways to run a short call on at most so many threads; None if one is enough for it."""
    if most_threads(rows, inputs, hidden, are_few(rows, inputs, hidden, ROWS)) == 1:
        return None
    packed = kernel is small_forward_packed

    @functools.cache
    def ways(most: int) -> Ways:
        plans = choose(rows, batch, inputs, hidden, -(-hidden // lanes(dtype)), ROWS, most, packed=packed)
        plans = tuple({plan.threads: plan for plan in plans[::-1]}.values())[::-1]  # a team always divides the units
        kind = kind_of_calls(kernel, rows, batch, inputs, hidden, dtype, plans) if len(plans) > 1 else None
        return Ways(tuple(Way(plan, Workspace(dtype, ()), ()) for plan in plans), kind)

    return ways


def few_forward(
    weights: Weights, x: Array, h0: Array, c0: Array, y: Array, h_n: Array, c_n: Array, keep_tape: bool
) -> DirectionTape | None:
    """Run one layer over a few rows; writes y, h_n and c_n. The tape keeps the gates even with `recompute`."""
    rows, inputs, hidden = len(y), x.shape[2], h0.shape[2]
    weight_ih, weight_hh, bias = as_plain(weights.weight_ih), as_plain(weights.weight_hh), bias_of(weights)
    x = x.reshape(rows, inputs)
    biased, given = weights.bias is not None, (weight_ih, weight_hh, bias, x, h0, c0, y, h_n, c_n)
    if keep_tape:
        prepare(small_forward_taped, x.dtype)
        kept = new_tape(rows, Size.of(weight_ih))
        fits = small_forward_taped(*given, *kept, inputs, hidden, biased, NO_TEAM)
    elif packed := packed_of(weights):
        prepare(small_forward_packed, x.dtype)
        fits = few_rows_packed(*packed, *given[3:], inputs, hidden, NO_TEAM, 0)
    else:
        prepare(small_forward, x.dtype)
        fits = few_rows(*given, inputs, hidden, biased, NO_TEAM, 0)
    assert fits
    return DirectionTape(*kept, c0[0].copy()) if keep_tape else None


def new_tape(rows: int, size: Size) -> tuple[Array, Array]:
    """Allocate what a tape keeps: each by itself, for so few rows need not be aligned; that would take longer."""
    tape = np.empty((rows, size.blocks, TAPE, size.width), size.dtype)
    return tape, np.empty((rows, size.blocks * size.width), size.dtype)


def few_backward(
    weights: Weights, layer: LayerTape, dy: Array, dh_n: Array, dc_n: Array, dx: Array, dh0: Array, dc0: Array
) -> Weights:
    """Back-propagate through one layer over a few rows; writes dx, dh0 and dc0."""
    prepare(small_backward, dx.dtype)
    given = as_plain(weights.weight_ih), as_plain(weights.weight_hh), bias_of(weights)
    grads = few_gradients(given, weights.bias is not None, layer, dy, dh_n, dc_n, dx, dh0, dc0)
    assert grads
    return grads


def few_gradients(
    weights: tuple[Array, Array, Array],  # as the kernel takes them
    biased: bool,
    layer: LayerTape,
    dy: Array,  # (T * B, H), or (0, H) for zero
    dh_n: Array,  # (1, B, H), or (0, B, H) for zero
    dc_n: Array,
    dx: Array,  # (T * B, I), OUT
    dh0: Array,  # (1, B, H), OUT
    dc0: Array,
) -> Weights | None:
    """Do so, and return the gradients by the weights and the bias; None, with nothing done, if these do not fit."""
    tape, grads = layer.directions[0], [new_like(array) for array in weights]
    da = new_array((len(dx), len(weights[0])), dx.dtype)
    fits = small_backward(
        weights[0], weights[1], layer.x.reshape(dx.shape), *tape, dy, dh_n, dc_n, dx, dh0, dc0, *grads, da, biased
    )
    return Weights(grads[0], grads[1], grads[2] if biased else None) if fits else None
