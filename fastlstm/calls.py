"""Prepared calls: decisions that are made once for all calls with the same signature, at the level of the API.

The signature of a call is the model, the kind and shape of x, its layout, whether a tape is kept, and whether the model
is frozen. What a caller can change between two calls with the same signature is checked in each (:meth:`Call.takes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastlstm import checks, dispatch, parameters
from fastlstm.backends.base import Array, Prepared, Signature, State
from fastlstm.cell import Cell
from fastlstm.dispatch import forced
from fastlstm.frozen import FrozenParams

__all__ = ["STEP", "Call", "Layout", "cell_of", "checked", "mode"]

# What a call is for: a step, or a sum of flags.
STEP, _BATCH_FIRST, _KEEP_TAPE = -8, 1, 2
_MOST_CALLS, _MOST_CELLS = 64, 64  # that are kept: calls of a cell, and cells of the functions


class Layout(NamedTuple):
    """The layout of the caller's arrays: `batched` with a batch axis, `batch_first` with it before time."""

    batched: bool
    batch_first: bool
    steps: int  # T
    batch: int  # B, 1 for unbatched input

    @classmethod
    def of(cls, shape: tuple[int, ...], batch_first: bool) -> Layout:
        """Read the layout off the shape of an input that has been checked."""
        if len(shape) == 2:
            return cls(False, False, shape[0], 1)
        first, second, _ = shape
        return cls(True, batch_first, *((second, first) if batch_first else (first, second)))

    @property
    def is_direct(self) -> bool:
        """Whether the caller's layout is that of the backends."""
        return self.batched and not self.batch_first

    @property
    def state_batch(self) -> int | None:
        """B, or None if the states have no batch axis."""
        return self.batch if self.batched else None

    def sequence_shape(self, features: int) -> tuple[int, ...]:
        """Shape of a sequence in the caller's layout."""
        if not self.batched:
            return (self.steps, features)
        return (self.batch, self.steps, features) if self.batch_first else (self.steps, self.batch, features)

    def to_backend(self, sequence: Array) -> Array:
        """View a sequence in the caller's layout as (T, B, features)."""
        if not self.batched:
            return sequence[:, None]
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def to_caller(self, sequence: Array) -> Array:
        """View a sequence (T, B, features) in the caller's layout."""
        if not self.batched:
            return sequence[:, 0]
        return sequence.swapaxes(0, 1) if self.batch_first else sequence

    def state_to_backend(self, state: Array | None) -> Array | None:
        """View a state in the caller's layout as (L*D, B, H)."""
        return state if self.batched or state is None else state[:, None]

    def state_to_caller(self, h: Array, c: Array) -> State:
        """View states (L*D, B, H) in the caller's layout."""
        return (h, c) if self.batched else (h[:, 0], c[:, 0])

    @property
    def axes(self) -> str:
        """The axes of a sequence, for messages."""
        return "(T, features)" if not self.batched else "(B, T, features)" if self.batch_first else "(T, B, features)"


class Call:
    """A prepared call: made by :func:`checked`, and looked up in ``cell.calls``."""

    __slots__ = (
        "backend",
        "batched",
        "c_shape",
        "cell",
        "checks_itself",
        "dtype",
        "forced",
        "frozen",
        "h_shape",
        "is_direct",
        "kind",
        "layout",
        "on_host",
        "params",
        "prepared",
        "x_shape",
        "y_shape",
    )  # fmt: skip

    def __init__(self, cell: Cell, x: Array, layout: Layout, signature: Signature) -> None:
        self.forced, backend = forced(), dispatch.backend_for(x)
        states = cell.num_layers * cell.num_directions
        self.cell, self.layout, self.backend = cell, layout, backend.name
        self.batched = layout.batched
        self.prepared: Prepared = backend.prepare(cell, signature)
        self.is_direct = layout.is_direct
        # Of a batch with lengths or resets, other kernels are run, which check nothing.
        self.checks_itself = self.prepared.checks_itself and layout.batched
        self.kind, self.dtype, self.frozen = type(x), cell.dtype, signature.frozen
        self.on_host = dispatch.kind_of("x", x).library == "numpy"
        self.params = tuple(parameters.shapes(cell).items())
        self.x_shape, self.y_shape = x.shape, layout.sequence_shape(cell.output_size)
        rows = (states, layout.batch) if layout.batched else (states,)
        self.h_shape, self.c_shape = (*rows, cell.h_size), (*rows, cell.c_size)

    def takes(self, array: Any, shape: tuple[int, ...]) -> bool:
        """Say whether an argument is an array of this shape, and of the call's type, dtype and byte order."""
        # Identity first: NumPy has one object for each native dtype, except in arrays and models that were unpickled.
        return (
            type(array) is self.kind
            and array.shape == shape
            and (array.dtype is self.dtype or array.dtype == self.dtype)
        )

    def takes_gradients(self, params: Mapping[str, Any], dy: Any, dstate: Any) -> bool:
        """Say whether the parameters and the arguments of a backward pass are as this call needs them."""
        if not self.takes_params(params) or (dy is None and dstate is None):
            return False
        if dy is not None and not self.takes(dy, self.y_shape):
            return False
        if dstate is None:
            return True
        if type(dstate) is not tuple or len(dstate) != 2:
            return False
        dh_n, dc_n = dstate
        if not (dh_n is None or self.takes(dh_n, self.h_shape)) or not (dc_n is None or self.takes(dc_n, self.c_shape)):
            return False
        return self.on_host or all(d is None or d.device == params["weight_hh_l0"].device for d in dstate)

    def takes_params(self, params: Mapping[str, Any]) -> bool:
        """Say whether the parameters are as this call needs them."""
        if self.frozen:
            return type(params) is FrozenParams and (params.cell is self.cell or params.cell == self.cell)
        kind, dtype, get = self.kind, self.dtype, params.get
        if len(params) != len(self.params):
            return False
        for name, shape in self.params:
            array: Any = get(name)
            if type(array) is not kind or array.shape != shape:
                return False
            if array.dtype is not dtype and array.dtype != dtype:
                return False
        return self.on_host or len({array.device for array in params.values()}) == 1

    def takes_all(self, params: Any, x: Any, state: Any, is_plain: bool = True) -> bool:  # noqa: PLR0911  # the fastest
        """Say whether parameters, input and state are as this call needs them: what :meth:`takes` says of each.

        What the prepared call checks itself if there are neither lengths nor resets (`is_plain`) is left to it.
        """
        kind, dtype = self.kind, self.dtype
        compares = not (is_plain and self.checks_itself)
        if self.forced != forced() or type(x) is not kind or x.shape != self.x_shape:
            return False
        if x.dtype is not dtype and x.dtype != dtype:
            return False
        if state is not None:
            if type(state) is not tuple or len(state) != 2:
                return False
            h, c = state
            if not type(h) is type(c) is kind:
                return False
            if compares and not (h.shape == self.h_shape and c.shape == self.c_shape):
                return False
            if not (h.dtype is dtype is c.dtype or h.dtype == dtype == c.dtype):
                return False
        if (compares or type(params) is not dict) and not self.takes_params(params):
            return False
        return self.on_host or all(array.device == params["weight_hh_l0"].device for array in (x, *(state or ())))


_cells: dict[Any, Cell] = {}


def mode(batch_first: Any, keep_tape: bool) -> int:
    """Return the purpose of a call on whole sequences."""
    return (_BATCH_FIRST if batch_first else 0) + (_KEEP_TAPE if keep_tape else 0)


def checked(
    cell: Cell,
    params: Mapping[str, Any],
    x: Any,
    state: Any,
    mode: int,
) -> tuple[Call, dict[str, Array], Array, State | None]:
    """Check the arguments of a call, and return its prepared call and what it takes in their place.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError, BackendError
        If an argument does not fit.
    """
    is_step, batch_first = mode == STEP, bool(mode & _BATCH_FIRST)
    if is_step:
        checks.direction(cell)
    params = checks.params(cell, params)
    like = params["weight_hh_l0"]
    unbatched = getattr(x, "ndim", 3) == (1 if is_step else 2)
    shape: tuple[int | None, ...] = (cell.input_size,) if unbatched else (None, cell.input_size)
    axes = "(I,)" if unbatched else "(B, I)"
    if not is_step:
        shape = (None, *shape)
        axes = "(T, I)" if unbatched else "(B, T, I)" if batch_first else "(T, B, I)"
    x = checks.array("x" if not is_step else "x_t", x, like, shape, axes)
    if is_step:
        layout = Layout(not unbatched, False, 1, 1 if unbatched else x.shape[0])
    else:
        layout = Layout.of(x.shape, batch_first)
    state = None if state is None else checks.state(cell, state, layout.state_batch, like)
    key = x.shape, mode, isinstance(params, FrozenParams)
    call = cell.calls.get(key)
    if call is None or not call.takes_all(params, x, state):  # for another backend that was forced, say
        signature = Signature(layout.steps, layout.batch, bool(mode & _KEEP_TAPE), key[-1])
        call = Call(cell, x, layout, signature)
        if len(cell.calls) >= _MOST_CALLS:
            cell.calls.clear()
        cell.calls[key] = call
    return call, params, x, state


def cell_of(params: Any, dropout: Any) -> Cell:
    """Work out the description of the model whose parameters these are: see :func:`fastlstm.parameters.cell_of`."""
    try:
        first, second = params["weight_ih_l0"], params["weight_hh_l0"]
        key = (tuple(params), first.shape, second.shape, first.dtype, dropout, type(dropout))
        found = _cells.get(key)
    except (AttributeError, KeyError, TypeError):  # which the checks say better
        return parameters.cell_of(params, dropout)
    if found is None:
        found = parameters.cell_of(params, dropout)
        if len(_cells) >= _MOST_CELLS:
            _cells.clear()
        _cells[key] = found
    return found
