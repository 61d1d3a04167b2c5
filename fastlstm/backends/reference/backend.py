"""The backend that runs the reference's cell over time, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Steps
from fastlstm.backends.layers import (
    RECURRENT,
    ZONEOUT_C,
    ZONEOUT_H,
    Given,
    LayeredBackend,
    LayerGradients,
    LayerResult,
    Weights,
    chosen,
    kept_mask,
    mask_key,
)  # fmt: skip
from fastlstm.backends.reference.cell import (
    ACTIVATIONS,
    OUTPUT,
    Gates,
    Norm,
    Step,
    cell_backward,
    cell_forward,
    joined,
    normalise,
    normalise_backward,
    split,
)  # fmt: skip
from fastlstm.cell import Cell

__all__ = ["BACKEND", "ReferenceBackend", "merged", "unmerged"]


@dataclass(frozen=True)
class LayerTape:
    """The tape of one layer."""

    given: Given
    x: Array  # (T, B, I), zero past each length
    steps: list[list[Any]]  # of Step or RnnStep, one list per direction, in the order of computation
    y: list[Array]  # one per direction, (T, B, P)


class ReferenceBackend(LayeredBackend):
    """Plain NumPy; see the module's docstring."""

    name = "reference"
    xp = np

    def layer_forward(self, weights: Sequence[Weights], x: Array, h0: Array, c0: Array, given: Given) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        batch = x.shape[1]
        lengths = np.full(batch, x.shape[0]) if given.lengths is None else given.lengths
        # Padding may hold anything, NaN too; zeroed, it cannot reach the weights' gradients through 0 * NaN.
        x = np.where(_active(x, lengths), x, 0)
        h0, c0 = np.array(h0), np.array(c0)  # the tape keeps them, and the caller may use theirs again
        run = _rnn_forward if given.cell.nonlinearity else _direction_forward
        with np.errstate(all="ignore"):
            results = [run(w, x, h0[d], c0[d], lengths, given, d) for d, w in enumerate(weights)]
            y, h_n, c_n, steps = zip(*results, strict=True)
            y_merged = merged(given.cell, y)
        tape = LayerTape(given, x, list(steps), list(y)) if given.keep_tape else None
        return LayerResult(y_merged, np.stack(h_n), np.stack(c_n), tape)

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
        keep_steps: bool = False,
        out: Sequence[Weights] | None = None,
        input_gradient: bool = True,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        cell, dtype = tape.given.cell, dh_n.dtype
        if dy is None:
            dy = np.zeros((*tape.x.shape[:2], cell.output_size), dtype)
        run = _rnn_backward if cell.nonlinearity else _direction_backward
        with np.errstate(all="ignore"):
            results = [
                run(w, tape, d, dy_d, dh_n[d], dc_n[d])
                for d, (w, dy_d) in enumerate(zip(weights, unmerged(cell, dy, tape.y), strict=True))
            ]
        dx, dh0, dc0, dweights, dh_steps, dc_steps = zip(*results, strict=True)
        steps = Steps(np.stack(dh_steps, axis=1), np.stack(dc_steps, axis=1)) if keep_steps else None
        by_x = sum(dx[1:], dx[0]) if input_gradient else None
        return LayerGradients(by_x, np.stack(dh0), np.stack(dc0), dweights, steps)


def merged(cell: Cell, y: Sequence[Array]) -> Array:
    """Put the outputs of the directions together, (T, B, D*H) or, merged, (T, B, H)."""
    if cell.merge == "concat":
        return np.concatenate(y, axis=2)
    return y[0] * y[1] if cell.merge == "product" else (y[0] + y[1]) * (0.5 if cell.merge == "mean" else 1)


def unmerged(cell: Cell, dy: Array, y: Sequence[Array]) -> list[Array]:
    """Take the gradient by the output to that by the output of each direction."""
    if cell.merge == "concat":
        return np.split(dy, len(y), axis=2)
    if cell.merge == "product":
        return [dy * y[1], dy * y[0]]
    return [dy * (0.5 if cell.merge == "mean" else 1)] * 2


def _active(x: Array, lengths: Array) -> Array:
    """Mask (T, B, 1) of the positions that are no padding."""
    return (np.arange(x.shape[0])[:, None] < lengths)[..., None]


def _times(given: Given, steps: int, direction: int) -> Sequence[int]:
    """Return the time steps in the order of computation."""
    return range(steps)[::-1] if direction == 1 or given.cell.reverse else range(steps)


def _kept(given: Given, t: int, batch: int) -> Array:
    """Mask (B, 1) of the sequences whose state is not reset before time step `t`."""
    return np.ones((batch, 1), bool) if given.resets is None else ~given.resets[t][:, None]


class _Draws(NamedTuple):
    """The random masks of one direction of a layer."""

    recurrent: Array | float  # (B, P), multiplies h before weight_hh
    zoneout: Callable[[int, int, Array, Array], Array]  # kind, t, old and new state, to the new one
    keeps: Callable[[int, int, Array], Array]  # kind, t, like, to the share that the old state has in the new one


def _draws(given: Given, direction: int, batch: int, dtype: Any) -> _Draws:
    """Draw the masks of one direction; none of them is kept, equal keys give equal masks."""
    cell, draws = given.cell, given.draws
    recurrent: Array | float = 1
    if draws and cell.recurrent_dropout:
        key = mask_key(given, direction, RECURRENT)
        recurrent = kept_mask(np, cell.recurrent_dropout, key, (batch, cell.h_size), dtype)

    def keeps(kind: int, t: int, like: Array) -> Array:
        probability = cell.zoneout[kind - ZONEOUT_C]
        if not draws:
            return np.full(like.shape, probability, dtype)
        key = mask_key(given, direction, kind)
        return chosen(np, probability, key, like.shape, (draws.steps + t) * like.size).astype(dtype)

    def zoneout(kind: int, t: int, old: Array, new: Array) -> Array:
        if not cell.zoneout[kind - ZONEOUT_C]:
            return new
        share = keeps(kind, t, new)
        # A unit that is not kept must not get a NaN from the old state, nor the other way round.
        return np.where(share == 0, new, np.where(share == 1, old, share * old + (1 - share) * new))

    return _Draws(recurrent, zoneout, keeps)


def _direction_forward(
    weights: Weights, x: Array, h: Array, c: Array, lengths: Array, given: Given, direction: int
) -> tuple[Array, Array, Array, list[Step]]:
    """Run one direction; y (T, B, P), the final states (B, P) and (B, H), and the steps' tape."""
    cell, batch = given.cell, x.shape[1]
    y = np.zeros((*x.shape[:2], h.shape[1]), x.dtype)
    draws = _draws(given, direction, batch, x.real.dtype)
    squash = OUTPUT[cell.activations[2]][0]
    steps = []
    for t in _times(given, x.shape[0], direction):
        active, kept = (t < lengths)[:, None], _kept(given, t, batch)
        h_start, c_start = np.where(kept, h, 0), np.where(kept, c, 0)
        h_prev = h_start * draws.recurrent
        a_x, a_h, norms = x[t] @ weights.weight_ih.T, h_prev @ weights.weight_hh.T, []
        if cell.layer_norm:
            a_x, norm_x = normalise(a_x, weights.ln_gain_ih)
            a_h, norm_h = normalise(a_h, weights.ln_gain_hh)
            norms = [norm_x, norm_h]
        a = a_x + a_h
        if weights.bias is not None:
            a = a + weights.bias
        gates, c_raw, c_new, seen = cell_forward(cell, split(cell, a), c_start, weights)
        shown = c_new
        if cell.layer_norm:
            shown, norm_c = normalise(c_new, weights.ln_gain_c)
            shown = shown + weights.ln_bias_c
            norms.append(norm_c)
        squashed = squash(shown)
        out = gates.o * squashed
        h_new = out if weights.weight_hr is None else out @ weights.weight_hr.T
        if given.keep_tape:
            steps.append(
                Step(t, active, kept, gates, seen, h_prev, c_start, c_raw, c_new, squashed, out,
                     (norms[0], norms[1], norms[2]) if norms else None)
            )  # fmt: skip
        h_new = draws.zoneout(ZONEOUT_H, t, h_start, h_new)
        c_new = draws.zoneout(ZONEOUT_C, t, c_start, c_new)
        # A sequence past its end keeps its state: going backwards, that is the initial state until it begins.
        h, c = np.where(active, h_new, h), np.where(active, c_new, c)
        y[t] = np.where(active, h, 0)
    return y, h, c, steps


def _direction_backward(
    weights: Weights, tape: LayerTape, direction: int, dy: Array, dh: Array, dc: Array
) -> tuple[Array, Array, Array, Weights, Array, Array]:
    """Back-propagate through one direction.

    Returns
    -------
    dx : array, (T, B, I)
    dh0, dc0 : array, (B, P) and (B, H)
    weights : Weights
        The gradients by the parameters.
    dh_steps, dc_steps : array, (T, B, P) and (T, B, H)
        The gradients by the states after each step.
    """
    cell, x, given = tape.given.cell, tape.x, tape.given
    dx = np.zeros(x.shape, dy.dtype)
    sums: dict[str, Any] = {role: np.zeros(w.shape, dy.dtype) for role, w in zip(Weights._fields, weights, strict=True)
            if role != "kept" and w is not None}  # fmt: skip
    draws = _draws(given, direction, x.shape[1], dy.real.dtype)
    slope = OUTPUT[cell.activations[2]][1]
    dh_steps, dc_steps = (np.zeros((*x.shape[:2], d.shape[1]), dy.dtype) for d in (dh, dc))
    for step in reversed(tape.steps[direction]):
        t, active = step.t, step.active
        dh_t, dc_t = np.where(active, dh + dy[t], 0), np.where(active, dc, 0)
        dh_steps[t], dc_steps[t] = dh_t, dc_t
        dh_old, dh_t = _through_zoneout(cell, draws, ZONEOUT_H, t, dh_t)
        dc_old, dc_t = _through_zoneout(cell, draws, ZONEOUT_C, t, dc_t)
        dout = dh_t
        if weights.weight_hr is not None:
            dout = dh_t @ weights.weight_hr
            sums["weight_hr"] += dh_t.T @ np.where(active, step.out, 0)

        def dc_squashed(d: Array, step: Step = step, active: Array = active) -> Array:
            d = d * slope(step.squashed)
            if step.norms is None:
                return d
            d = np.where(active, d, 0)
            sums["ln_gain_c"] += (d * np.where(active, step.norms[2].normalised, 0)).sum(axis=0)
            sums["ln_bias_c"] += d.sum(axis=0)
            return normalise_backward(d, step.norms[2], weights.ln_gain_c)

        zeroed = _without_padding(step)
        da_gates, dc_prev, dp = cell_backward(cell, zeroed, dout, dc_t, dc_squashed, weights)
        da = np.where(active, joined(cell, da_gates), 0)
        if dp is not None:
            sums["weight_peephole"] += dp
        if weights.bias is not None:
            sums["bias"] += da.sum(axis=0)
        da_x = da_h = da
        if zeroed.norms is not None:
            sums["ln_gain_ih"] += (da * zeroed.norms[0].normalised).sum(axis=0)
            sums["ln_gain_hh"] += (da * zeroed.norms[1].normalised).sum(axis=0)
            da_x = normalise_backward(da, zeroed.norms[0], weights.ln_gain_ih)
            da_h = normalise_backward(da, zeroed.norms[1], weights.ln_gain_hh)
        dx[t] = np.where(active, da_x @ weights.weight_ih, 0)
        sums["weight_ih"] += da_x.T @ x[t]
        sums["weight_hh"] += da_h.T @ zeroed.h_prev
        dh_prev = 0 * dh if cell.truncated else (da_h @ weights.weight_hh) * draws.recurrent + dh_old
        passed = active & step.kept
        dh = np.where(active, np.where(passed, dh_prev, 0), dh)
        dc = np.where(active, np.where(passed, dc_prev + dc_old, 0), dc)
    return dx, dh, dc, Weights(**sums), dh_steps, dc_steps


def _through_zoneout(cell: Cell, draws: _Draws, kind: int, t: int, d: Array) -> tuple[Array, Array]:
    """Divide the gradient by a state into those by the old and by the new one."""
    if not cell.zoneout[kind - ZONEOUT_C]:
        return 0 * d, d
    share = draws.keeps(kind, t, d)
    return share * d, (1 - share) * d


def _without_padding(step: Step) -> Step:
    """Return a step with zeros for the sequences that do not have it: 0 * NaN would reach the sums over the batch."""

    def zeroed(value: Any) -> Any:
        return np.where(step.active, value, 0)

    norms = None if step.norms is None else tuple(Norm(zeroed(n.normalised), zeroed(n.scale)) for n in step.norms)
    return Step(
        step.t, step.active, step.kept, Gates(*map(zeroed, step.gates)),
        {name: zeroed(value) for name, value in step.peeped.items()}, zeroed(step.h_prev), zeroed(step.c_prev),
        zeroed(step.c_raw), zeroed(step.c), zeroed(step.squashed), zeroed(step.out), norms,  # type: ignore[arg-type]
    )  # fmt: skip


@dataclass(frozen=True)
class RnnStep:
    """The tape of one time step of a plain RNN."""

    t: int
    active: Array  # (B, 1) bool
    kept: Array  # (B, 1) bool
    h_prev: Array  # (B, H)
    h: Array  # (B, H)


def _rnn_forward(
    weights: Weights, x: Array, h: Array, c: Array, lengths: Array, given: Given, direction: int
) -> tuple[Array, Array, Array, list[RnnStep]]:
    """Run one direction of a plain RNN; as :func:`_direction_forward`, c has no features."""
    y = np.zeros((*x.shape[:2], h.shape[1]), x.dtype)
    activation = ACTIVATIONS[str(given.cell.nonlinearity)][0]
    steps = []
    for t in _times(given, x.shape[0], direction):
        active, kept = (t < lengths)[:, None], _kept(given, t, x.shape[1])
        h_prev = np.where(kept, h, 0)
        a = x[t] @ weights.weight_ih.T + h_prev @ weights.weight_hh.T
        h_new = activation(a if weights.bias is None else a + weights.bias)
        if given.keep_tape:
            steps.append(RnnStep(t, active, kept, h_prev, h_new))
        h = np.where(active, h_new, h)
        y[t] = np.where(active, h, 0)
    return y, h, c, steps


def _rnn_backward(
    weights: Weights, tape: LayerTape, direction: int, dy: Array, dh: Array, dc: Array
) -> tuple[Array, Array, Array, Weights, Array, Array]:
    """Back-propagate through one direction of a plain RNN; as :func:`_direction_backward`."""
    x, dx = tape.x, np.zeros(tape.x.shape, dy.dtype)
    slope = ACTIVATIONS[str(tape.given.cell.nonlinearity)][1]
    dw_ih, dw_hh, db = (None if w is None else np.zeros(w.shape, dy.dtype) for w in weights[:3])
    dh_steps = np.zeros((*x.shape[:2], dh.shape[1]), dy.dtype)
    for step in reversed(tape.steps[direction]):
        dh_t = dh_steps[step.t] = np.where(step.active, dh + dy[step.t], 0)
        da = np.where(step.active, dh_t * slope(step.h), 0)
        dx[step.t] = np.where(step.active, da @ weights.weight_ih, 0)
        dw_ih += da.T @ x[step.t]
        dw_hh += da.T @ np.where(step.active, step.h_prev, 0)
        if db is not None:
            db += da.sum(axis=0)
        dh = np.where(step.active, np.where(step.kept, da @ weights.weight_hh, 0), dh)
    return dx, dh, dc, Weights(dw_ih, dw_hh, db), dh_steps, np.zeros((*x.shape[:2], 0), dy.dtype)


BACKEND = ReferenceBackend()
