"""class RNN(Recurrent): a plain recurrent network, whose state is h alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, shown
from fastlstm.functional import Gradients, Tape
from fastlstm.recurrent import Recurrent
from fastlstm.unroll import Run

__all__ = ["RNN"]


class RNN(Recurrent):
    r"""A plain recurrent network over NumPy or CuPy arrays, with the calls of :class:`fastlstm.LSTM`.

    .. math:: h_t = \phi(W_{ih} x_t + W_{hh} h_{t-1} + b)

    with tanh or relu for :math:`\phi` (Elman 1990). Where an LSTM takes and returns a pair (h, c), it takes and returns
    h alone: ``y, h_n = rnn(x, h0)``, ``grads.state``, `dstate`, and ``run.state`` of :meth:`unroll`.

    Parameters
    ----------
    input_size : int
        Number of input features I.
    hidden_size : int
        Number of hidden units H.
    num_layers : int
        Number of stacked layers L.
    nonlinearity : str
        "tanh" or "relu".
    bias, batch_first, dropout, bidirectional, reverse, merge, dtype, precision, seed
        As for :class:`fastlstm.LSTM`.

    Attributes
    ----------
    params : dict of str to array
        The live parameters: ``weight_ih_l0`` (H, I), ``weight_hh_l0`` (H, H), ``bias_l0`` (H,).
    cell : Cell
        Sizes, dtype and variant of the model.
    batch_first : bool
        As given.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import RNN
    >>> rnn = RNN(input_size=3, hidden_size=8, seed=0)
    >>> y, h_n = rnn(np.ones((5, 2, 3), np.float32))
    >>> y.shape, h_n.shape
    ((5, 2, 8), (1, 2, 8))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reverse: bool = False,
        merge: str = "concat",
        dtype: Any = np.float32,
        precision: str = "float32",
        seed: Any = None,
    ) -> None:
        if nonlinearity is None:
            raise ArgumentError("nonlinearity must be one of tanh, relu, got None")
        cell = Cell(
            input_size, hidden_size, num_layers, bias, dropout, bidirectional, dtype, reverse=reverse, merge=merge,
            nonlinearity=nonlinearity, precision=precision,
        )  # fmt: skip
        self._initialise(cell, batch_first, seed)

    def __call__(
        self, x: Array, state: Array | None = None, lengths: Any = None, resets: Any = None
    ) -> tuple[Array, Any]:
        """Run the model for inference: see :meth:`fastlstm.LSTM.__call__`; the state is h alone."""
        y, (h_n, _) = super().__call__(x, self._pair("state", state), lengths, resets)
        return y, h_n

    def forward(
        self,
        x: Array,
        state: Array | None = None,
        lengths: Any = None,
        resets: Any = None,
        *,
        recompute: bool = False,
    ) -> tuple[Array, Array, Tape]:
        """Run the model for training: see :meth:`fastlstm.LSTM.forward`; the state is h alone."""
        y, (h_n, _), tape = super().forward(x, self._pair("state", state), lengths, resets, recompute=recompute)
        return y, h_n, tape

    def backward(
        self,
        tape: Tape,
        dy: Array | None,
        dstate: Array | None = None,
        *,
        keep_state_gradients: bool = False,
        input_gradient: bool = True,
    ) -> Gradients:
        """Back-propagate: see :meth:`fastlstm.LSTM.backward`; all gradients of states are by h."""
        pair = None if dstate is None else (checks.h_alone("dstate", dstate), None)
        grads = super().backward(
            tape, dy, pair, keep_state_gradients=keep_state_gradients, input_gradient=input_gradient
        )
        steps: Any = grads.steps and grads.steps.h
        state: Any = grads.state[0]
        return Gradients(grads.x, state, grads.params, steps)

    def step(self, x_t: Array, state: Array | None = None) -> tuple[Array, Any]:
        """Advance by one time step: see :meth:`fastlstm.LSTM.step`; the state is h alone."""
        h, (h_n, _) = super().step(x_t, self._pair("state", state))
        return h, h_n

    def unroll(self, state: Array | None = None, *, steps: int, batch: int) -> Run:
        """Begin a closed loop: see :meth:`fastlstm.LSTM.unroll`; each state, and each gradient by one, is h alone."""
        return super().unroll(self._pair("state", state), steps=steps, batch=batch)

    def _pair(self, name: str, h: Any) -> tuple[Array, Array] | None:
        """Return a state with a c that has no features, as the backends take it."""
        if h is None:
            return None
        h = checks.h_alone(name, h)
        shape = getattr(h, "shape", None)
        if not shape:
            raise ArgumentError(f"{name} of a plain RNN must be an array, got {shown(h)}")
        return h, h[..., :0]
