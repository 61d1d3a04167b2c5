"""Calls of one layer on arguments that nobody has checked: for those that take little more time than the checks.

In short calls the kernels look at the shapes themselves, and Numba at the dtypes; for longer ones both are compared
here. What does not fit raises, or is found, before anything is done; then there is no result, and the long way says
what is wrong, or does what these cannot.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, ForwardResult, State
from fastlstm.backends.calls import PACKED, DirectionTape, LayerTape, as_rows, plain, size_of
from fastlstm.backends.few import few_gradients, few_rows, few_rows_packed, most_short, new_tape
from fastlstm.backends.layers import StackTape, Weights
from fastlstm.backends.many import are_weights, direction_backward, direction_forward, equal_rows, fit
from fastlstm.backends.memory import new_array
from fastlstm.backends.packing import Packing
from fastlstm.backends.plan import FEW_ROWS, LEAST_TO_SHARE, is_short
from fastlstm.backends.thread_pool import NO_TEAM
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.small_batch import small_forward, small_forward_packed, small_forward_taped

__all__ = ["infer", "train_backward", "train_forward"]


def infer(cell: Cell, params: Mapping[str, Any], x: Any, state: Any) -> tuple[Array, State] | None:
    """Run a call for inference (see ``base.Backend.shortcut``)."""
    if cell.num_layers != 1 or cell.bidirectional or len(params) != 2 + cell.bias:
        return None
    try:
        inputs, hidden, dtype, packed = cell.input_size, cell.hidden_size, cell.dtype, ()
        if type(params) is FrozenParams:
            if params.cell is not cell and params.cell != cell:
                return None
            packed = params.kept[0, 0][PACKED]  # KeyError before the first call
        rows, state_shape, y_shape, short = _call_of(x.shape, inputs, hidden, bool(packed))
        h0, c0 = _states(state, state_shape, dtype)
        if not (rows and type(x) is type(h0) is type(c0) is np.ndarray):
            return None
        h_n, c_n = np.empty(state_shape, dtype), np.empty(state_shape, dtype)
        if short is None:
            y = new_array((rows, hidden), dtype)
            fits = equal_rows(cell, _weights(cell, params), packed, x, h0, c0, y, h_n, c_n)
        else:
            y, flat = np.empty((rows, hidden), dtype), as_rows(x, rows, inputs)
            if packed:
                fits = short(*packed, flat, h0, c0, y, h_n, c_n, inputs, hidden, NO_TEAM, 0)
            else:
                weights = _weights(cell, params)
                fits = short(*weights, flat, h0, c0, y, h_n, c_n, inputs, hidden, cell.bias, NO_TEAM, 0)
        if not fits:
            return None
    except Exception:  # an argument is not as it should be: the checks will tell
        return None
    return (y if len(y_shape) == 2 else y.reshape(y_shape)), (h_n, c_n)


@functools.lru_cache(maxsize=256)
def _call_of(
    shape: tuple[int, ...], inputs: int, hidden: int, packed: bool
) -> tuple[int, tuple[int, ...], tuple[int, ...], Callable[..., bool] | None]:
    """Return the number of rows, the shapes of a state and of y, and what runs a call, if it is a short one.

    `shape` is that of x, (B, I) or (T, B, I); ValueError for others.
    """
    steps, batch = shape[:-1] if len(shape) == 3 else (1, *shape[:-1])
    rows = steps * batch
    one_thread = rows <= FEW_ROWS and hidden * (inputs + hidden) < LEAST_TO_SHARE
    run: Callable[..., bool] | None = None
    if one_thread or is_short(rows, inputs, hidden, most=most_short(steps) if packed else FEW_ROWS):
        kernels = (small_forward_packed, few_rows_packed) if packed else (small_forward, few_rows)
        run = kernels[0 if one_thread else 1]
    return rows, (1, batch, hidden), (*shape[:-1], hidden), run


def _states(state: Any, shape: tuple[int, ...], dtype: Any) -> tuple[Any, Any]:
    """Return h0 and c0 as given, or zeros for both; ValueError if they are no pair."""
    if state is None:
        zeros = np.zeros(shape, dtype)
        return zeros, zeros
    h0, c0 = state if type(state) is tuple else ()
    return h0, c0


def _weights(cell: Cell, params: Mapping[str, Any]) -> tuple[Array, Array, Array]:
    """Return the weights and the bias, for none an empty one, as given: plain arrays, or TypeError."""
    given = params.arrays if type(params) is FrozenParams else params
    bias = given["bias_l0"] if cell.bias else np.empty(0, cell.dtype)
    weight_ih, weight_hh = given["weight_ih_l0"], given["weight_hh_l0"]
    # Numba takes a masked array for a plain one; no subclass is known to be harmless here.
    if not type(bias) is type(weight_ih) is type(weight_hh) is np.ndarray:
        raise TypeError("which the checks say better")
    return weight_ih, weight_hh, bias


def train_forward(cell: Cell, params: Mapping[str, Any], x: Any, state: Any) -> ForwardResult | None:
    """Run a call that keeps a tape (see ``base.Backend.shortcut_forward``)."""
    # Of a frozen model, what is packed has to be used: other sums, to the last bit.
    if cell.num_layers != 1 or cell.bidirectional or len(params) != 2 + cell.bias or type(params) is FrozenParams:
        return None
    try:
        (steps, batch, inputs), hidden, dtype = x.shape, cell.hidden_size, cell.dtype
        weights, rows, state_shape = _weights(cell, params), steps * batch, (1, batch, hidden)
        h0, c0 = _states(state, state_shape, dtype)
        if not (rows and type(x) is type(h0) is type(c0) is np.ndarray):
            return None
        x, packing, tape = plain(x), Packing.of(None, steps, batch), None
        h_n, c_n = np.empty(state_shape, dtype), np.empty(state_shape, dtype)
        if is_short(rows, inputs, hidden):
            y, kept = np.empty((rows, hidden), dtype), new_tape(rows, size_of(4 * hidden, inputs, dtype))
            given, sizes = (*weights, x.reshape(rows, inputs), h0, c0), (cell.input_size, hidden, cell.bias)
            fits = small_forward_taped(*given, y, h_n, c_n, *kept, *sizes, NO_TEAM)
            tape = DirectionTape(*kept, c0[0].copy()) if fits else None
        elif fit(cell, x, h0, c0, state_shape) and are_weights(cell, weights):
            y = new_array((rows, hidden), dtype)
            tape = direction_forward(
                Weights(*weights), x, plain(h0)[0], plain(c0)[0], packing, 0, y, h_n[0], c_n[0], True, False,
                get_num_threads(),
            )  # fmt: skip
        if tape is None:
            return None
    except Exception:  # as above
        return None
    layer = LayerTape(x, packing, [tape])
    return ForwardResult(y.reshape(steps, batch, hidden), h_n, c_n, StackTape((steps, batch), [layer], [None]))


def train_backward(cell: Cell, params: Mapping[str, Any], tape: StackTape, dy: Any) -> BackwardResult | None:
    """Run a backward pass (see ``base.Backend.shortcut_backward``)."""
    if len(tape.layers) != 1 or tape.layers[0].packing.ragged or cell.bidirectional or len(params) != 2 + cell.bias:
        return None
    layer, hidden, dtype, found = tape.layers[0], cell.hidden_size, cell.dtype, None
    steps, batch, inputs = layer.x.shape
    rows, state_shape = steps * batch, (1, batch, hidden)
    try:
        weights = _weights(cell, params)
        if type(dy) is not np.ndarray or dy.shape != (steps, batch, hidden):
            return None
        dx, dy = new_array((rows, inputs), dtype), as_rows(dy, rows, hidden)
        dh0, dc0 = np.empty(state_shape, dtype), np.empty(state_shape, dtype)
        if is_short(rows, inputs, hidden, backward=True):
            zero = np.empty((0, batch, hidden), dtype)
            found = few_gradients(weights, cell.bias, layer, dy, zero, zero, dx, dh0, dc0)
        elif dy.dtype == dtype and are_weights(cell, weights):
            zeros = np.zeros((batch, hidden), dtype)
            found = direction_backward(Weights(*weights), layer, 0, dy, zeros, zeros, dx, dh0[0], dc0[0])
        if found is None:
            return None
    except Exception:  # as above
        return None
    grads = {"weight_ih_l0": found.weight_ih, "weight_hh_l0": found.weight_hh}
    if cell.bias:
        grads["bias_l0"] = found.bias
    return BackwardResult(dx.reshape(layer.x.shape), dh0, dc0, grads)
