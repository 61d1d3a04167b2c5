"""The LSTM as functions, for pipelines that hold their own arrays; :class:`fastlstm.LSTM` is a thin holder over them.

Here the arguments are checked, brought to the layout of the backends (time first, always a batch), sent
to the backend that the array's type selects, and brought back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastlstm import checks, dispatch, parameters
from fastlstm.backends.base import Array, Dropout, Params, State
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError
from fastlstm.frozen import FrozenParams

__all__ = ["Gradients", "Tape", "lstm_backward", "lstm_forward"]


@dataclass(frozen=True, repr=False, eq=False)
class Tape:
    """What a forward pass leaves for its backward pass; opaque, and unchanged by it."""

    cell: Cell
    backend: str
    layout: Layout
    record: Any

    def __repr__(self) -> str:
        return f"<Tape of T={self.layout.steps}, B={self.layout.batch} on the {self.backend} backend>"


@dataclass(frozen=True, repr=False, eq=False)
class Gradients:
    """The gradients of the loss.

    Attributes
    ----------
    x : array
        By the input, shaped as it; zero past each sequence's length.
    state : tuple of array
        ``(dh0, dc0)``, by the initial states, shaped as these.
    params : dict of str to array
        By each parameter, under its name.
    """

    x: Array
    state: State
    params: Params

    def __repr__(self) -> str:
        return f"<Gradients by x {tuple(self.x.shape)}, the initial state and {len(self.params)} parameters>"


class Layout(NamedTuple):
    """How the caller's arrays lie: `batched` with a batch axis, `batch_first` with it before time."""

    batched: bool
    batch_first: bool
    steps: int  # T
    batch: int  # B, 1 for unbatched input

    @classmethod
    def of(cls, x: Array, batch_first: bool) -> Layout:
        """Read the layout off an input that has been checked."""
        if x.ndim == 2:
            return cls(False, False, x.shape[0], 1)
        first, second, _ = x.shape
        return cls(True, batch_first, *((second, first) if batch_first else (first, second)))

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

    def state_to_caller(self, h: Array, c: Array) -> State:
        """View states (L*D, B, H) in the caller's layout."""
        return (h, c) if self.batched else (h[:, 0], c[:, 0])

    @property
    def axes(self) -> str:
        """The axes of a sequence, for messages."""
        return "(T, features)" if not self.batched else "(B, T, features)" if self.batch_first else "(T, B, features)"


def lstm_forward(
    params: Mapping[str, Array],
    x: Array,
    state: State | None = None,
    lengths: Any = None,
    *,
    batch_first: bool = False,
    dropout: float = 0.0,
    dropout_seed: int = 0,
    recompute: bool = False,
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
    dropout_seed : int
        Determines the dropout masks.
    recompute : bool
        Save memory: see :meth:`fastlstm.LSTM.forward`.

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
    cell = parameters.cell_of(params, dropout)
    source = Dropout(cell.dropout, checks.dropout_seed(dropout_seed)) if cell.dropout else None
    y, state, tape = run(
        cell, params, x, state, lengths, batch_first=batch_first, dropout=source, keep_tape=True, recompute=recompute
    )
    assert tape is not None
    return y, state, tape


def lstm_backward(
    params: Mapping[str, Array],
    tape: Tape,
    dy: Array | None,
    dstate: tuple[Array | None, Array | None] | None = None,
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
    cell, layout, backend = tape.cell, tape.layout, dispatch.backend_named(tape.backend)
    if dstate is None and layout.batched and not layout.batch_first:
        done = backend.shortcut_backward(cell, params, tape.record, dy)
        if done:
            return Gradients(done.x, (done.h0, done.c0), done.params)
    params = checks.params(cell, params)
    like = params["weight_hh_l0"]
    if dy is None and dstate is None:
        raise ArgumentError("backward needs dy or dstate: without either, every gradient is zero")
    if dy is not None:
        dy = layout.to_backend(checks.array("dy", dy, like, layout.sequence_shape(cell.output_size), layout.axes))
    dh_n, dc_n = checks.state_gradient(cell, dstate, layout.state_batch, like)
    result = backend.backward(cell, params, tape.record, dy, dh_n, dc_n)
    return Gradients(layout.to_caller(result.x), layout.state_to_caller(result.h0, result.c0), result.params)


def run(
    cell: Cell,
    params: Mapping[str, Array],
    x: Array,
    state: State | None,
    lengths: Any,
    *,
    batch_first: bool,
    dropout: Dropout | None,
    keep_tape: bool,
    recompute: bool = False,
) -> tuple[Array, State, Tape | None]:
    """Check the arguments, run the backend's forward pass, and bring the result to the caller's layout."""
    if not (batch_first or lengths is not None) and (backend := dispatch.backend_at_hand(x)) and x.ndim == 3:
        if not keep_tape:
            if quick := backend.shortcut(cell, params, x, state):
                return quick[0], quick[1], None
        elif recompute is False and (done := backend.shortcut_forward(cell, params, x, state)):
            layout = Layout(True, False, x.shape[0], x.shape[1])
            return done.y, (done.h_n, done.c_n), Tape(cell, backend.name, layout, done.tape)
    params = checks.params(cell, params)
    like = params["weight_hh_l0"]
    x, layout = _layout(cell, x, like, batch_first)
    h0, c0 = checks.state(cell, state, layout.state_batch, like)
    lengths = checks.lengths(lengths, layout.steps, layout.state_batch)
    backend = dispatch.backend_for(x)
    result = backend.forward(
        cell, params, layout.to_backend(x), h0, c0, lengths, dropout, keep_tape, checks.flag("recompute", recompute)
    )
    tape = Tape(cell, backend.name, layout, result.tape) if keep_tape else None
    return layout.to_caller(result.y), layout.state_to_caller(result.h_n, result.c_n), tape


def plan(cell: Cell, params: Mapping[str, Array], x: Array, lengths: Any, *, batch_first: bool) -> str:
    """Say in words how a call would be run; see ``LSTM.plan``."""
    params = checks.params(cell, params)
    like = params["weight_hh_l0"]
    layout = _layout(cell, x, like, batch_first)[1]
    lengths = checks.lengths(lengths, layout.steps, layout.state_batch)
    rows = layout.steps * layout.batch if lengths is None else int(lengths.sum())
    backend = dispatch.backend_for(x)
    layers = enumerate(backend.plan(cell, rows, layout.batch, isinstance(params, FrozenParams)))
    return "\n".join([f"{backend.name} backend", *(f"layer {number}: {words}" for number, words in layers)])


def _layout(cell: Cell, x: Array, like: Array, batch_first: bool) -> tuple[Array, Layout]:
    """Check an input, and read its layout off it."""
    unbatched = getattr(x, "ndim", 3) == 2
    axes = "(T, I)" if unbatched else "(B, T, I)" if batch_first else "(T, B, I)"
    x = checks.array("x", x, like, (None, cell.input_size) if unbatched else (None, None, cell.input_size), axes)
    return x, Layout.of(x, batch_first)


def step(cell: Cell, params: Mapping[str, Array], x: Array, state: State | None) -> tuple[Array, State]:
    """Check the arguments and advance the model by one time step; see ``LSTM.step``."""
    backend = dispatch.backend_at_hand(x)
    if backend and x.ndim == 2 and (quick := backend.shortcut(cell, params, x, state)):
        return quick
    if cell.bidirectional:
        raise ArgumentError("a bidirectional LSTM cannot step: its reverse direction starts at the sequence's end")
    params = checks.params(cell, params)
    like = params["weight_hh_l0"]
    unbatched = getattr(x, "ndim", 2) == 1
    shape, axes = ((cell.input_size,), "(I,)") if unbatched else ((None, cell.input_size), "(B, I)")
    x = checks.array("x_t", x, like, shape, axes)
    layout = Layout(not unbatched, False, 1, 1 if unbatched else x.shape[0])
    h, c = checks.state(cell, state, layout.state_batch, like)
    h, c = dispatch.backend_for(x).step(cell, params, x[None] if unbatched else x, h, c)
    h, c = layout.state_to_caller(h, c)
    # A copy: a caller who works on the output in place must not change the state with it.
    return h[-1].copy(), (h, c)
