"""The LSTM as functions, for pipelines that hold their own arrays; :class:`fastlstm.LSTM` is a thin class over them.

Every call takes one path: the prepared call of its signature is found (``calls.py``) or made, the arguments are checked
by it or, if they are not as it knows them, by ``checks.py``, and brought to the layout of the backends (time first,
always a batch).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastlstm import calls, checks, dispatch, parameters
from fastlstm.backends.base import Array, Dropout, Params, RefusedError, State, Steps
from fastlstm.calls import STEP, Call
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError
from fastlstm.frozen import FrozenParams
from fastlstm.mask_keys import new_key

__all__ = ["Gradients", "Tape", "lstm_backward", "lstm_forward"]


@dataclass(frozen=True, repr=False, eq=False)
class Tape:
    """The tape of a forward pass, for its backward pass, which does not change it; opaque."""

    call: Call
    record: Any

    @property
    def cell(self) -> Cell:
        """The model's description."""
        return self.call.cell

    @property
    def backend(self) -> str:
        """Name of the backend that made it."""
        return self.call.backend

    def __repr__(self) -> str:
        layout = self.call.layout
        return f"<Tape of T={layout.steps}, B={layout.batch} on the {self.backend} backend>"


@dataclass(frozen=True, repr=False, eq=False)
class Gradients:
    """The gradients of the loss.

    Attributes
    ----------
    x : array or None
        By the input, shaped as it; zero past each sequence's length. None with ``input_gradient=False``.
    state : tuple of array
        ``(dh0, dc0)``, by the initial states, shaped as these.
    params : dict of str to array
        By each parameter, under its name.
    steps : Steps or None
        ``(h, c)``, by the states after each time step, (T, L*D, B, H) each and zero past each sequence's length; with
        ``keep_state_gradients=True``. For unbatched input without the axis of the batch.
    flat : array or None
        From the CUDA backend: the gradients by all parameters, one after the other, in one array (n,) that those in
        `params` are views of. One all-reduce of NCCL, in place, is enough for all of them.
    """

    x: Array  # or None
    state: State
    params: Params
    steps: Steps | None = None

    @property
    def flat(self) -> Array | None:
        """The array that all gradients of `params` are views of, or None."""
        return getattr(self.params, "flat", None)

    def __repr__(self) -> str:
        by_x = "" if self.x is None else f"x {tuple(self.x.shape)}, "
        return f"<Gradients by {by_x}the initial state and {len(self.params)} parameters>"


def lstm_forward(
    params: Mapping[str, Array],
    x: Array,
    state: State | None = None,
    lengths: Any = None,
    *,
    batch_first: bool = False,
    dropout: float = 0.0,
    dropout_seed: int | None = None,
    recompute: bool = False,
    resets: Array | None = None,
    cell: Cell | None = None,
) -> tuple[Array, State, Tape]:
    """Run an LSTM over whole sequences and keep what the backward pass needs.

    Parameters
    ----------
    params : mapping of str to array
        The parameters, named and shaped as :mod:`fastlstm.parameters` says. Layers, directions, sizes and
        dtype (float32 or float64) are read off them.
    x : array, (T, B, I), (B, T, I) with `batch_first`, or (T, I)
        The input: T time steps of B sequences with I features; of the parameters' library and dtype.
    state : tuple of array, optional
        ``(h0, c0)``, each (L*D, B, H), or (L*D, H) for unbatched input; zeros by default. Rows are ordered
        layer by layer, within a layer forward then reverse.
    lengths : (B,) integers, optional
        The length of each sequence, in 0..T, in any order; all T by default.
    batch_first : bool
        Whether `x` and the output have the batch axis first.
    dropout : float
        Probability of dropping an output of every layer but the last.
    dropout_seed : int, optional
        Determines the dropout masks: give another one at each step of a training. By default each call draws others,
        as the calls of an :class:`fastlstm.LSTM` do.
    recompute : bool
        Save memory: see :meth:`fastlstm.LSTM.forward`.
    resets : array of bool, (T, B), (B, T) with `batch_first`, or (T,), optional
        Where the state of a sequence is zero before a time step.
    cell : Cell, optional
        The model, if it is one that the parameters do not show: activations, clips, a plain RNN, and so on. Its
        dropout then holds.

    Returns
    -------
    y : array, (T, B, D*H), (B, T, D*H) or (T, D*H)
        The hidden states of the last layer, forward and reverse side by side; zero past each length.
    state : tuple of array
        ``(h_n, c_n)``, shaped as `state`: each sequence's state at its own end (for the reverse direction,
        at its beginning).
    tape : Tape
        For :func:`lstm_backward`. It refers to `x`, which must not be changed before that.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError, BackendError
        Before any work, if an argument does not fit.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm.cell import Cell
    >>> from fastlstm.parameters import initialise
    >>> params = initialise(Cell(input_size=3, hidden_size=2), seed=0)
    >>> y, (h_n, c_n), tape = lstm_forward(params, np.ones((5, 4, 3), np.float32))
    >>> y.shape, h_n.shape
    ((5, 4, 2), (1, 4, 2))
    >>> grads = lstm_backward(params, tape, np.ones_like(y))
    >>> grads.x.shape, sorted(grads.params)
    ((5, 4, 3), ['bias_l0', 'weight_hh_l0', 'weight_ih_l0'])
    """
    if cell is None:
        cell = calls.cell_of(params, dropout)
    elif not isinstance(cell, Cell):
        raise ArgumentError(f"cell must be a Cell, got {type(cell).__qualname__}")
    source = None
    if cell.draws:
        seed = new_key(parameters.generator(None)) if dropout_seed is None else checks.dropout_seed(dropout_seed)
        source = Dropout(cell.dropout, seed)
    y, state, tape = run(
        cell, params, x, state, lengths, resets,
        batch_first=batch_first, dropout=source, keep_tape=True, recompute=recompute,
    )  # fmt: skip
    assert tape is not None
    return y, state, tape


def lstm_backward(
    params: Mapping[str, Array],
    tape: Tape,
    dy: Array | None,
    dstate: tuple[Array | None, Array | None] | None = None,
    *,
    keep_state_gradients: bool = False,
    input_gradient: bool = True,
) -> Gradients:
    """Back-propagate through the forward pass that left `tape`.

    Parameters
    ----------
    params : mapping of str to array
        The parameters of the forward pass, unchanged since.
    tape : Tape
        From :func:`lstm_forward`. It stays valid: a second call gives the same result.
    dy : array or None
        The loss's gradient by the output `y`, shaped as it; ignored past each length. None for zero.
    dstate : tuple of array, optional
        ``(dh_n, dc_n)``, the loss's gradients by the final states, shaped as these; either may be None.
    keep_state_gradients : bool
        Whether to return the gradients by the states after each step too.
    input_gradient : bool
        Whether to compute the gradient by the input: see :meth:`fastlstm.LSTM.backward`.

    Returns
    -------
    Gradients
        By the input, the initial states and every parameter.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit or the tape is of another model.
    """
    if not isinstance(tape, Tape):
        raise ArgumentError(f"tape must come from a forward pass, got {type(tape).__qualname__}")
    call = tape.call
    layout, dh_n, dc_n = call.layout, None, None
    if keep_state_gradients is not False:
        keep_state_gradients = checks.flag("keep_state_gradients", keep_state_gradients)
    if input_gradient is not True:
        input_gradient = checks.flag("input_gradient", input_gradient)
    if not call.takes_gradients(params, dy, dstate):
        params = checks.params(call.cell, params)
        like = params["weight_hh_l0"]
        if dy is None and dstate is None:
            raise ArgumentError("backward needs dy or dstate: without either, every gradient is zero")
        if dy is not None:
            dy = checks.array("dy", dy, like, call.y_shape, layout.axes)
        dstate = checks.state_gradient(call.cell, dstate, layout.state_batch, like)
    if dstate is not None:
        dh_n, dc_n = map(layout.state_to_backend, dstate)
    dy = None if dy is None else layout.to_backend(dy)
    result = call.prepared.backward(params, tape.record, dy, dh_n, dc_n, keep_state_gradients, input_gradient)
    dx, steps = None if result.x is None else layout.to_caller(result.x), result.steps
    if steps is not None and not layout.batched:
        steps = Steps(*(d[:, :, 0] for d in steps))
    return Gradients(dx, layout.state_to_caller(result.h0, result.c0), result.params, steps)


def run(
    cell: Cell,
    params: Mapping[str, Array],
    x: Array,
    state: State | None,
    lengths: Any,
    resets: Any = None,
    *,
    batch_first: bool,
    dropout: Dropout | None,
    keep_tape: bool,
    recompute: bool = False,
) -> tuple[Array, State, Tape | None]:
    """Run a forward pass: find the prepared call, check the rest, and return the result in the caller's layout."""
    mode = calls.mode(batch_first, keep_tape)
    try:
        call = cell.calls.get((x.shape, mode, type(params) is FrozenParams))
    except (AttributeError, TypeError):  # x is no array, or has an odd shape: the checks say so
        call = None
    if call is None or not call.takes_all(params, x, state, lengths is None and resets is None):
        call, params, x, state = calls.checked(cell, params, x, state, mode)
    layout = call.layout
    if lengths is not None:
        lengths = checks.lengths(lengths, layout.steps, layout.state_batch)
    if recompute is not False:
        recompute = checks.flag("recompute", recompute)
    if resets is not None:
        resets = checks.resets(resets, params["weight_hh_l0"], layout.sequence_shape(0)[:-1])
        resets = layout.to_backend(resets)
    h0, c0 = (None, None) if state is None else state
    try:
        if call.is_direct:
            y, h_n, c_n, record = call.prepared.forward(params, x, h0, c0, lengths, dropout, recompute, resets)
        else:
            h0, c0, rows = layout.state_to_backend(h0), layout.state_to_backend(c0), layout.to_backend(x)
            y, h_n, c_n, record = call.prepared.forward(params, rows, h0, c0, lengths, dropout, recompute, resets)
    except RefusedError:  # by a call with a batch, without lengths or resets
        call, params, x, state = calls.checked(cell, params, x, state, mode)  # raises, or brings them to what is taken
        h0, c0 = state or (None, None)
        y, h_n, c_n, record = call.prepared.forward(params, layout.to_backend(x), h0, c0, None, dropout, recompute)
    tape = Tape(call, record) if keep_tape else None
    if call.is_direct:
        return y, (h_n, c_n), tape
    return layout.to_caller(y), layout.state_to_caller(h_n, c_n), tape


def plan(cell: Cell, params: Mapping[str, Array], x: Array, lengths: Any, *, batch_first: bool) -> str:
    """Say in words how a call would be run; see ``LSTM.plan``."""
    call, params, x, _ = calls.checked(cell, params, x, None, calls.mode(batch_first, False))
    layout = call.layout
    lengths = checks.lengths(lengths, layout.steps, layout.state_batch)
    rows = layout.steps * layout.batch if lengths is None else int(lengths.sum())
    backend = dispatch.backend_for(x)
    layers = enumerate(backend.plan(cell, layout.steps, rows, layout.batch, isinstance(params, FrozenParams)))
    return "\n".join([f"{backend.name} backend", *(f"layer {number}: {words}" for number, words in layers)])


def step(cell: Cell, params: Mapping[str, Array], x_t: Array, state: State | None) -> tuple[Array, State]:
    """Advance by one time step; see ``LSTM.step``."""
    try:
        call = cell.calls.get((x_t.shape, STEP, type(params) is FrozenParams))
    except (AttributeError, TypeError):  # as in `run`
        call = None
    if call is None or not call.takes_all(params, x_t, state):
        call, params, x_t, state = calls.checked(cell, params, x_t, state, STEP)
    h0, c0 = (None, None) if state is None else state
    if call.batched:
        try:
            y, h_n, c_n = call.prepared.step(params, x_t, h0, c0)
        except RefusedError:
            call, params, x_t, state = calls.checked(cell, params, x_t, state, STEP)  # raises, or as in `run`
            y, h_n, c_n = call.prepared.step(params, x_t, *(state or (None, None)))
        return y, (h_n, c_n)
    h0, c0 = call.layout.state_to_backend(h0), call.layout.state_to_backend(c0)
    y, h_n, c_n = call.prepared.step(params, x_t[None], h0, c0)
    return y[0], (h_n[:, 0], c_n[:, 0])
