r"""The LSTM in plain NumPy, one time step written like the equations.

This is the oracle: in float64 every other backend is compared with it, and its own gradients are proved
by complex-step differentiation. It also runs where Numba's compiler is switched off.

Forward, for one sequence (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000),
where :math:`a_t = W_{ih} x_t + W_{hh} h_{t-1} + b` holds the pre-activations of the four gates i, f, g, o:

.. math::

    i_t &= \sigma(a^i_t)  &  f_t &= \sigma(a^f_t)  &  g_t &= \tanh(a^g_t)  &  o_t &= \sigma(a^o_t) \\
    c_t &= f_t c_{t-1} + i_t g_t  &  h_t &= o_t \tanh(c_t)

Backward, where :math:`d\,v` is the derivative of the loss by :math:`v`. The state's gradient arrives from
above (:math:`dy_t`) and from the next time step (:math:`dh_t`, :math:`dc_t`):

.. math::

    dh_t &\mathrel{+}= dy_t  &  dc_t &\mathrel{+}= dh_t\, o_t\, (1 - \tanh^2 c_t) \\
    da^o_t &= dh_t \tanh(c_t)\; o_t (1 - o_t)  &  da^f_t &= dc_t\, c_{t-1}\; f_t (1 - f_t) \\
    da^i_t &= dc_t\, g_t\; i_t (1 - i_t)  &  da^g_t &= dc_t\, i_t\; (1 - g_t^2) \\
    dc_{t-1} &= dc_t\, f_t  &  dh_{t-1} &= W_{hh}^\top da_t  \qquad dx_t = W_{ih}^\top da_t \\
    dW_{ih} &= \sum_t da_t x_t^\top  &  dW_{hh} &= \sum_t da_t h_{t-1}^\top  \qquad db = \sum_t da_t

With peepholes (Gers, Schraudolph and Schmidhuber 2002), where each unit's weights :math:`p` are those of its own gates:

.. math::

    a^i_t &\mathrel{+}= p_i\, c_{t-1}  &  a^f_t &\mathrel{+}= p_f\, c_{t-1}  &  a^o_t &\mathrel{+}= p_o\, c_t \\
    dc_t &\mathrel{+}= da^o_t\, p_o  &  dc_{t-1} &\mathrel{+}= da^i_t\, p_i + da^f_t\, p_f \\
    dp_i &= \sum_t da^i_t\, c_{t-1}  &  dp_f &= \sum_t da^f_t\, c_{t-1}  &  dp_o &= \sum_t da^o_t\, c_t

Here :math:`da^o_t` comes first, since :math:`dc_t` takes its share of it before :math:`da^i_t`, :math:`da^f_t` and
:math:`da^g_t` are computed.

The slip found in common write-ups is in the derivatives of the activations. They are written here with
the *activated* values: at the candidate :math:`1 - g^2`, not :math:`1 - \tanh^2(g)`, which would apply
the tanh twice; and at each gate :math:`s (1 - s)` with :math:`s` the gate's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.layers import LayeredBackend, LayerGradients, LayerResult, Weights

__all__ = ["BACKEND", "ReferenceBackend"]


class Gates(NamedTuple):
    """The activated gates of one time step, (B, H) each."""

    i: Array
    f: Array
    g: Array
    o: Array


def sigmoid(a: Array) -> Array:
    """Return 1 / (1 + exp(-a)), written so that the exponential never overflows; complex `a` for the tests."""
    sign = np.where(a.real >= 0, 1, -1).astype(a.real.dtype)
    e = np.exp(-sign * a)
    return np.where(a.real >= 0, 1, e) / (1 + e)


def cell_forward(a: Array, c_prev: Array, peephole: Array | None) -> tuple[Array, Array, Gates]:
    """One time step: pre-activations (B, 4H) and the cell state before (B, H) to h, c (B, H) and the gates.

    `peephole` is (3, H), the weights of i, f and o.
    """
    a_i, a_f, a_g, a_o = np.split(a, 4, axis=1)
    if peephole is not None:
        a_i, a_f = a_i + peephole[0] * c_prev, a_f + peephole[1] * c_prev
    i, f, g = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g)
    c = f * c_prev + i * g
    if peephole is not None:
        a_o = a_o + peephole[2] * c
    o = sigmoid(a_o)
    return o * np.tanh(c), c, Gates(i, f, g, o)


def cell_backward(
    dh: Array, dc: Array, gates: Gates, c: Array, c_prev: Array, peephole: Array | None
) -> tuple[Array, Array]:
    """One time step back: gradients by h_t and c_t (B, H) to those by the pre-activations (B, 4H) and c_{t-1}."""
    i, f, g, o = gates
    tanh_c = np.tanh(c)
    da_o = dh * tanh_c * o * (1 - o)
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    if peephole is not None:
        dc = dc + da_o * peephole[2]
    da_i = dc * g * i * (1 - i)
    da_f = dc * c_prev * f * (1 - f)
    da_g = dc * i * (1 - g * g)
    dc_prev = dc * f
    if peephole is not None:
        dc_prev = dc_prev + da_i * peephole[0] + da_f * peephole[1]
    return np.concatenate([da_i, da_f, da_g, da_o], axis=1), dc_prev


def peephole_gradient(da: Array, c: Array, c_prev: Array) -> Array:
    """Sum one time step's gradients by the peephole weights over the batch: (3, H)."""
    da_i, da_f, _, da_o = np.split(da, 4, axis=1)
    return np.stack([(da_i * c_prev).sum(axis=0), (da_f * c_prev).sum(axis=0), (da_o * c).sum(axis=0)])


@dataclass(frozen=True)
class Step:
    """What one time step leaves on the tape."""

    t: int
    active: Array  # (B, 1) bool, the sequences that are long enough to have this step
    gates: Gates
    h_prev: Array  # (B, H)
    c_prev: Array  # (B, H)
    c: Array  # (B, H)


@dataclass(frozen=True)
class LayerTape:
    """What one layer leaves on the tape."""

    x: Array  # (T, B, I), zero past each length
    steps: list[list[Step]]  # one list per direction, in the order of computation


class ReferenceBackend(LayeredBackend):
    """Plain NumPy; see the module's docstring."""

    name = "reference"
    xp = np

    def layer_forward(
        self,
        weights: Sequence[Weights],
        x: Array,
        h0: Array,
        c0: Array,
        lengths: Array | None,
        keep_tape: bool,
        recompute: bool,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        batch = x.shape[1]
        lengths = np.full(batch, x.shape[0]) if lengths is None else lengths
        # Padding may hold anything, NaN too; zeroed, it cannot reach the weights' gradients through 0 * NaN.
        x = np.where(_active(x, lengths), x, 0)
        h0, c0 = np.array(h0), np.array(c0)  # the tape keeps them, and the caller may use theirs again
        with np.errstate(all="ignore"):
            results = [
                _direction_forward(w, x, h0[d], c0[d], lengths, reverse=d == 1, keep_tape=keep_tape)
                for d, w in enumerate(weights)
            ]
        y, h_n, c_n, steps = zip(*results, strict=True)
        tape = LayerTape(x, list(steps)) if keep_tape else None
        return LayerResult(np.concatenate(y, axis=2), np.stack(h_n), np.stack(c_n), tape)

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
        out: Sequence[Weights] | None = None,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        if dy is None:
            steps, batch, _ = tape.x.shape
            dy = np.zeros((steps, batch, sum(dh.shape[1] for dh in dh_n)), dh_n.dtype)
        with np.errstate(all="ignore"):
            results = [
                _direction_backward(w, tape.x, tape.steps[d], dy_d, dh_n[d], dc_n[d])
                for d, (w, dy_d) in enumerate(zip(weights, np.split(dy, len(weights), axis=2), strict=True))
            ]
        dx, dh0, dc0, dweights = zip(*results, strict=True)
        return LayerGradients(sum(dx[1:], dx[0]), np.stack(dh0), np.stack(dc0), dweights)


def _active(x: Array, lengths: Array) -> Array:
    """Mask (T, B, 1) of the positions that are no padding."""
    return (np.arange(x.shape[0])[:, None] < lengths)[..., None]


def _direction_forward(
    weights: Weights, x: Array, h: Array, c: Array, lengths: Array, *, reverse: bool, keep_tape: bool
) -> tuple[Array, Array, Array, list[Step]]:
    """Run one direction; y (T, B, H), the final states (B, H) and the steps' tape."""
    times = range(x.shape[0])
    y = np.zeros((*x.shape[:2], h.shape[1]), x.dtype)
    steps = []
    for t in reversed(times) if reverse else times:
        a = x[t] @ weights.weight_ih.T + h @ weights.weight_hh.T
        if weights.bias is not None:
            a = a + weights.bias
        h_new, c_new, gates = cell_forward(a, c, weights.weight_peephole)
        active = (t < lengths)[:, None]
        if keep_tape:
            steps.append(Step(t, active, gates, h, c, c_new))
        # A sequence past its end keeps its state: going backwards, that is the initial state until it begins.
        h, c = np.where(active, h_new, h), np.where(active, c_new, c)
        y[t] = np.where(active, h, 0)
    return y, h, c, steps


def _direction_backward(
    weights: Weights, x: Array, steps: list[Step], dy: Array, dh: Array, dc: Array
) -> tuple[Array, Array, Array, Weights]:
    """Back-propagate through one direction; dx (T, B, I), the initial states' and the parameters' gradients."""
    dx = np.zeros(x.shape, dy.dtype)
    dw_ih, dw_hh, db, dp = (None if w is None else np.zeros(w.shape, dy.dtype) for w in weights[:4])
    for step in reversed(steps):
        dh_t = np.where(step.active, dh + dy[step.t], 0)
        dc_t = np.where(step.active, dc, 0)
        da, dc_prev = cell_backward(dh_t, dc_t, step.gates, step.c, step.c_prev, weights.weight_peephole)
        da = np.where(step.active, da, 0)
        dx[step.t] = np.where(step.active, da @ weights.weight_ih, 0)
        dw_ih += da.T @ x[step.t]
        dw_hh += da.T @ np.where(step.active, step.h_prev, 0)
        if db is not None:
            db += da.sum(axis=0)
        if dp is not None:
            dp += peephole_gradient(da, np.where(step.active, step.c, 0), np.where(step.active, step.c_prev, 0))
        dh = np.where(step.active, da @ weights.weight_hh, dh)
        dc = np.where(step.active, dc_prev, dc)
    return dx, dh, dc, Weights(dw_ih, dw_hh, db, dp)


BACKEND: Any = ReferenceBackend()
