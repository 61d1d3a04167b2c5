"""Calls of one layer on arguments that nobody has checked: for those that take little more time than the checks.

Whether arrays are such as kernels take is checked at each call (``plain_arrays.py``); in short calls, the kernels check
the shapes. What does not fit is found before anything is done; then there is no result, and the long way says what is
wrong, or does what these cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, ForwardResult, State
from fastlstm.backends.calls import PACKED, DirectionTape, LayerTape, size_of
from fastlstm.backends.few import few_gradients, few_rows, few_rows_packed, most_short, new_tape
from fastlstm.backends.layers import StackTape, Weights
from fastlstm.backends.many import are_weights, direction_backward, direction_forward, equal_rows, fit
from fastlstm.backends.memory import new_array
from fastlstm.backends.packing import Packing
from fastlstm.backends.plain_arrays import are_native, as_plain, is_native
from fastlstm.backends.plan import FEW_ROWS, LEAST_TO_SHARE, is_short
from fastlstm.backends.threads import get_num_threads
from fastlstm.backends.workers import NO_TEAM
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.small import small_forward, small_forward_packed, small_forward_taped

__all__ = ["infer", "train_backward", "train_forward"]


def infer(  # noqa: PLR0912, calls of Python functions would take a step some percent more
    cell: Cell, params: Mapping[str, Any], x: Any, state: Any
) -> tuple[Array, State] | None:
    """Run a call for inference (see ``base.Backend.shortcut``)."""
    if cell.num_layers != 1 or cell.bidirectional or len(params) != 2 + cell.bias:
        return None
    inputs, hidden, dtype, packed = cell.input_size, cell.hidden_size, cell.dtype, ()
    try:
        if type(params) is FrozenParams:
            if params.cell is not cell and params.cell != cell:
                return None
            packed = params.kept[0, 0][PACKED]
        rows, state_shape, y_shape, short = _call_of(x.shape, inputs, hidden, bool(packed))
        weights = () if packed and short else _weights(cell, params)
        if state is None:
            h0 = c0 = np.zeros(state_shape, dtype)
        else:
            h0, c0 = state if type(state) is tuple else ()
    except (
        KeyError,
        ValueError,
    ):  # no such parameter; a frozen model's first call, before which none is packed; no pair
        return None
    if not rows or not are_native(dtype, x, h0, c0) or not (packed or are_native(dtype, *weights)):
        return None
    h_n, c_n = np.empty(state_shape, dtype), np.empty(state_shape, dtype)
    if short is None:
        y = new_array((rows, hidden), dtype)
        fits = equal_rows(cell, weights, packed, x, h0, c0, y, h_n, c_n)
    else:
        y = np.empty((rows, hidden), dtype)
        x = x if x.flags.carray else as_plain(x)  # a part of another array, or read-only
        if x.ndim == 3:
            x = x.reshape(rows, inputs)
        try:
            if packed:
                fits = short(packed[0], packed[1], x, h0, c0, y, h_n, c_n, inputs, hidden, NO_TEAM, 0)
            else:
                weight_ih, weight_hh, bias = weights
                fits = short(weight_ih, weight_hh, bias, x, h0, c0, y, h_n, c_n, inputs, hidden, cell.bias, NO_TEAM, 0)
        except TypeError:  # Numba's type of an array is another; or the long way is to compile the kernel
            fits = False
    if not fits:
        return None
    return (y if len(y_shape) == 2 else y.reshape(y_shape)), (h_n, c_n)


@functools.lru_cache(maxsize=256)
def _call_of(
    shape: tuple[int, ...], inputs: int, hidden: int, packed: bool
) -> tuple[int, tuple[int, ...], tuple[int, ...], Callable[..., bool] | None]:
    """Return the number of rows, the shapes of a state and of y, and what runs a call, if it is a short one.

    `shape` is that of x, (B, I) or (T, B, I). No rows stand for one that does not fit the model.
    """
    steps, batch = shape[:-1] if len(shape) == 3 else (1, *shape[:-1])
    rows = steps * batch if shape[-1] == inputs else 0
    one_thread = rows <= FEW_ROWS and hidden * (inputs + hidden) < LEAST_TO_SHARE
    run: Callable[..., bool] | None = None
    if one_thread or is_short(rows, inputs, hidden, most=most_short(steps) if packed else FEW_ROWS):
        kernels = (small_forward_packed, few_rows_packed) if packed else (small_forward, few_rows)
        run = kernels[0 if one_thread else 1]
    return rows, (1, batch, hidden), (*shape[:-1], hidden), run


def _weights(cell: Cell, params: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return the weights and the bias, for none an empty one, as given; KeyError if there is none of such a name."""
    given = params.arrays if type(params) is FrozenParams else params
    bias = given["bias_l0"] if cell.bias else np.empty(0, cell.dtype)
    return given["weight_ih_l0"], given["weight_hh_l0"], bias


def train_forward(cell: Cell, params: Mapping[str, Any], x: Any, state: Any) -> ForwardResult | None:
    """Run a call that keeps a tape (see ``base.Backend.shortcut_forward``)."""
    # Of a frozen model, what is packed has to be used: other sums, to the last bit.
    if cell.num_layers != 1 or cell.bidirectional or len(params) != 2 + cell.bias or type(params) is FrozenParams:
        return None
    (steps, batch, inputs), hidden, dtype = x.shape, cell.hidden_size, cell.dtype
    rows, state_shape = steps * batch, (1, batch, hidden)
    try:
        weights = _weights(cell, params)
        if state is None:
            h0 = c0 = np.zeros(state_shape, dtype)
        else:
            h0, c0 = state if type(state) is tuple else ()
    except (KeyError, ValueError):  # as in infer
        return None
    if not rows or inputs != cell.input_size or not are_native(dtype, x, h0, c0) or not are_native(dtype, *weights):
        return None
    x, packing, tape = x if x.flags.carray else as_plain(x), Packing.of(None, steps, batch), None
    h_n, c_n = np.empty(state_shape, dtype), np.empty(state_shape, dtype)
    if is_short(rows, inputs, hidden):
        y, kept = np.empty((rows, hidden), dtype), new_tape(rows, size_of(4 * hidden, inputs, dtype))
        given, sizes = (*weights, x.reshape(rows, inputs), h0, c0), (inputs, hidden, cell.bias)
        try:
            fits = small_forward_taped(*given, y, h_n, c_n, *kept, *sizes, NO_TEAM)
        except TypeError:  # as in infer
            fits = False
        tape = DirectionTape(*kept, c0[0].copy()) if fits else None
    elif fit(cell, x, h0, c0, state_shape) and are_weights(cell, weights):
        y = new_array((rows, hidden), dtype)
        tape = direction_forward(
            Weights(*weights), x, as_plain(h0)[0], as_plain(c0)[0], packing, 0, y, h_n[0], c_n[0], True, False,
            get_num_threads(),
        )  # fmt: skip
    if tape is None:
        return None
    layer = LayerTape(x, packing, [tape])
    return ForwardResult(y.reshape(steps, batch, hidden), h_n, c_n, StackTape((steps, batch), [layer], [None]))


def train_backward(cell: Cell, params: Mapping[str, Any], tape: StackTape, dy: Any) -> BackwardResult | None:
    """Run a backward pass (see ``base.Backend.shortcut_backward``)."""
    if len(tape.layers) != 1 or tape.layers[0].packing.ragged or cell.bidirectional or len(params) != 2 + cell.bias:
        return None
    layer, hidden, dtype = tape.layers[0], cell.hidden_size, cell.dtype
    steps, batch, inputs = layer.x.shape
    rows, state_shape = steps * batch, (1, batch, hidden)
    short = is_short(rows, inputs, hidden, backward=True)
    try:
        weights = _weights(cell, params)
    except KeyError:
        return None
    if (
        not is_native(dy, dtype)
        or dy.shape != (steps, batch, hidden)
        or not (are_native(dtype, *weights) if short else are_weights(cell, weights))
    ):
        return None
    dx, dy = new_array((rows, inputs), dtype), (dy if dy.flags.carray else as_plain(dy)).reshape(rows, hidden)
    dh0, dc0 = np.empty(state_shape, dtype), np.empty(state_shape, dtype)
    found: Weights | None
    if short:
        zero = np.empty((0, batch, hidden), dtype)
        try:
            found = few_gradients(weights, cell.bias, layer, dy, zero, zero, dx, dh0, dc0)
        except TypeError:  # as in infer
            found = None
    else:
        zeros = np.zeros((batch, hidden), dtype)
        found = direction_backward(Weights(*weights), layer, 0, dy, zeros, zeros, dx, dh0[0], dc0[0])
    if found is None:
        return None
    grads = {"weight_ih_l0": found.weight_ih, "weight_hh_l0": found.weight_hh}
    if cell.bias:
        grads["bias_l0"] = found.bias
    return BackwardResult(dx.reshape(layer.x.shape), dh0, dc0, grads)
