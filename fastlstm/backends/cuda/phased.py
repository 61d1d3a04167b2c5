"""Cells whose time step has several phases, on the device: plain RNN, projection, layer norm, zoneout, and so on.

These run step after step in operations on whole arrays (``phased_cell.py``), with cuBLAS's products: right, and not
fast, since a step is some tens of launches. As on the kernels' path, the inputs' share of all steps is one product
before the loop, and the gradients by weights and input are one each after it. Padding is computed and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Steps
from fastlstm.backends.cuda.device import Device
from fastlstm.backends.cuda.phased_cell import (
    Norm,
    StepTape,
    activate,
    cell_backward,
    cell_forward,
    normalise,
    normalise_backward,
    slope,
)
from fastlstm.backends.layers import (
    RECURRENT,
    ZONEOUT_C,
    ZONEOUT_H,
    Given,
    LayerGradients,
    LayerResult,
    Weights,
    chosen,
    kept_mask,
    mask_key,
)
from fastlstm.backends.reference.backend import merged, unmerged
from fastlstm.cell import VARIANTS, Cell

__all__ = ["PhasedTape", "is_phased", "phased_backward", "phased_forward", "phases_of"]

_PHASES = ("proj_size", "layer_norm", "recurrent_dropout", "zoneout", "nonlinearity")


@lru_cache(maxsize=256)
def phases_of(cell: Cell) -> tuple[str, ...]:
    """Return the fields of a cell that make a phase that the kernels' time step has not."""
    found = tuple(name for name in _PHASES if getattr(cell, name) != VARIANTS[name])
    return (*found, "peephole with block_size") if cell.sees_blocks else found


def is_phased(cell: Cell) -> bool:
    """Say whether a cell has a phase that the kernels' time step has not."""
    return bool(phases_of(cell))


class OneStep(NamedTuple):
    """The tape of one time step, beside the rows of all steps."""

    cell: StepTape | None  # None of a plain RNN
    squashed: Array  # (B, H): the activated c; h of a plain RNN
    norm_c: Norm | None


@dataclass(frozen=True)
class DirectionTape:
    """The tape of one direction."""

    steps: dict[int, OneStep]  # by time
    h_rows: Array  # (T, B, P): the h before each step, as it is multiplied
    outs: Array | None  # (T, B, H): the output before a projection
    norm_x: Norm | None
    norm_h: Norm | None


@dataclass(frozen=True)
class PhasedTape:
    """The tape of one layer."""

    given: Given
    x: Array  # (T, B, I), zero in the padding
    active: Array | None  # (T, B, 1) bool: what is no padding; None for equal lengths
    directions: list[DirectionTape]
    y: list[Array]  # one per direction, if they are merged by a product


class _Run:
    """One direction of a layer: products, masks and what is left out."""

    def __init__(self, device: Device, given: Given, active: Array | None, direction: int, batch: int) -> None:
        self.device, self.xp, self.given, self.cell = device, device.xp, given, given.cell
        self.active, self.direction, self.batch = active, direction, batch
        self.kept = None if given.resets is None else ~given.resets[:, :, None]  # (T, B, 1)
        self.recurrent: Array | None = None  # (B, P), multiplies h before weight_hh
        if given.draws and self.cell.recurrent_dropout:
            self.recurrent = kept_mask(
                self.xp, self.cell.recurrent_dropout, mask_key(given, direction, RECURRENT),
                (batch, self.cell.h_size), self.cell.dtype,
            )  # fmt: skip

    def times(self, steps: int) -> Sequence[int]:
        """Return the time steps in the order of computation."""
        return range(steps)[::-1] if self.direction == 1 or self.cell.reverse else range(steps)

    def product(self, a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False) -> Array:
        """Multiply two matrices, or the rows of all steps with one."""
        flat = a.reshape(-1, a.shape[-1])
        rows, columns = flat.shape[1 if transpose_a else 0], b.shape[0 if transpose_b else 1]
        out, contiguous = self.xp.empty((rows, columns), a.dtype), self.xp.ascontiguousarray
        self.device.product(
            contiguous(flat), contiguous(b), out,
            transpose_a=transpose_a, transpose_b=transpose_b, precision=self.cell.precision,
        )()  # fmt: skip
        return out if transpose_a else out.reshape(*a.shape[:-1], columns)

    def live(self, t: int, value: Array) -> Array:
        """Put zeros where sequences do not have the step."""
        return value if self.active is None else self.xp.where(self.active[t], value, 0)

    def going_on(self, t: int, new: Array, old: Array) -> Array:
        """Keep what was before, of sequences that do not have the step."""
        return new if self.active is None else self.xp.where(self.active[t], new, old)

    def unreset(self, t: int, value: Array) -> Array:
        """Put zeros where the state is reset before the step."""
        return value if self.kept is None else self.xp.where(self.kept[t], value, 0)

    def zoneout(self, kind: int, t: int, old: Array, new: Array) -> Array:
        """Let units keep their old value, or in inference a share of it."""
        probability = self.cell.zoneout[kind - ZONEOUT_C]
        if not probability:
            return new
        if not self.given.draws:
            return probability * old + (1 - probability) * new
        return self.xp.where(self._chosen(kind, t, new.shape), old, new)

    def through_zoneout(self, kind: int, t: int, d: Array) -> tuple[Array | None, Array]:
        """Divide the gradient by a state into those by the old and by the new one."""
        probability = self.cell.zoneout[kind - ZONEOUT_C]
        if not probability:
            return None, d
        share: Any = probability
        if self.given.draws:
            share = self._chosen(kind, t, d.shape).astype(d.dtype)
        return share * d, (1 - share) * d

    def _chosen(self, kind: int, t: int, shape: tuple[int, ...]) -> Array:
        probability, size = self.cell.zoneout[kind - ZONEOUT_C], shape[0] * shape[1]
        assert self.given.draws is not None
        first = (self.given.draws.steps + t) * size
        return chosen(self.xp, probability, mask_key(self.given, self.direction, kind), shape, first)


def phased_forward(
    device: Device, weights: Sequence[Weights], x: Array, h0: Array, c0: Array, given: Given
) -> LayerResult:
    """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
    xp, (steps, batch), active = device.xp, x.shape[:2], None
    x = xp.ascontiguousarray(x)
    if given.lengths is not None and (given.lengths < steps).any():
        active = device.upload((np.arange(steps)[:, None] < given.lengths)[:, :, None])
        x = xp.where(active, x, 0)  # padding may hold NaN, which would reach the weights' gradients
    y, h_n, c_n, tapes = [], [], [], []
    for d, w in enumerate(weights):
        run = _Run(device, given, active, d, batch)
        y_d, h, c, tape = _direction_forward(run, w, x, h0[d], c0[d])
        y.append(y_d)
        h_n.append(h)
        c_n.append(c)
        tapes.append(tape)
    if given.cell.merge == "concat":
        result, parts = y[0] if len(y) == 1 else xp.concatenate(y, axis=2), []
    else:
        result, parts = merged(given.cell, y), y
    kept = PhasedTape(given, x, active, tapes, parts) if given.keep_tape else None
    return LayerResult(result, xp.stack(h_n), xp.stack(c_n), kept)


def _direction_forward(
    run: _Run, w: Weights, x: Array, h: Array, c: Array
) -> tuple[Array, Array, Array, DirectionTape]:
    """Run one direction: y (T, B, P), the final states, and the tape."""
    xp, cell, (steps, batch) = run.xp, run.cell, x.shape[:2]
    keep, dtype = run.given.keep_tape, x.dtype
    a_x, norm_x, found = run.product(x, w.weight_ih, transpose_b=True), None, {}
    if cell.layer_norm:
        a_x, norm_x = normalise(xp, a_x, w.ln_gain_ih)
    if w.bias is not None:
        a_x = a_x + w.bias
    y = xp.empty((steps, batch, cell.h_size), dtype)
    h_rows = xp.empty(y.shape if keep else (0, 0, 0), dtype)
    outs = xp.empty((steps, batch, cell.hidden_size), dtype) if keep and cell.proj_size else None
    norm_h = Norm(xp.empty(a_x.shape, dtype), xp.empty((steps, batch, 1), dtype)) if keep and cell.layer_norm else None
    for t in run.times(steps):
        h_start, c_start = run.unreset(t, h), run.unreset(t, c)
        h_prev = h_start if run.recurrent is None else h_start * run.recurrent
        a_h = run.product(h_prev, w.weight_hh, transpose_b=True)
        if cell.layer_norm:
            a_h, norm = normalise(xp, a_h, w.ln_gain_hh)
            if norm_h is not None:
                norm_h.normalised[t], norm_h.scale[t] = run.live(t, norm.normalised), run.live(t, norm.scale)
        if cell.nonlinearity:
            out = activate(xp, cell.nonlinearity, a_x[t] + a_h)
            h_new, c_new, one = out, c_start, OneStep(None, out, None)
        else:
            step = cell_forward(xp, cell, a_x[t] + a_h, c_start, w)
            shown, norm_c = step.c, None
            if cell.layer_norm:
                shown, norm_c = normalise(xp, step.c, w.ln_gain_c)
                shown = shown + w.ln_bias_c
            squashed = activate(xp, cell.activations[2], shown, of_output=True)
            out = step.gates["o"] * squashed
            h_new = run.product(out, w.weight_hr, transpose_b=True) if cell.proj_size else out
            h_new = run.zoneout(ZONEOUT_H, t, h_start, h_new)
            c_new, one = run.zoneout(ZONEOUT_C, t, c_start, step.c), OneStep(step, squashed, norm_c)
        if keep:
            found[t], h_rows[t] = one, run.live(t, h_prev)
            if outs is not None:
                outs[t] = run.live(t, out)
        h, c = run.going_on(t, h_new, h), run.going_on(t, c_new, c)
        y[t] = run.live(t, h)
    return y, h, c, DirectionTape(found, h_rows, outs, norm_x, norm_h)


def phased_backward(
    device: Device,
    weights: Sequence[Weights],
    tape: PhasedTape,
    dy: Array | None,
    dh_n: Array,
    dc_n: Array,
    keep_steps: bool,
    out: Sequence[Weights],
    input_gradient: bool,
) -> LayerGradients:
    """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
    xp, cell, directions, features = device.xp, tape.given.cell, len(weights), tape.given.cell.h_size
    parts: list[Array | None] = [None] * directions
    if dy is not None:
        one_by_one = [dy[:, :, d * features : (d + 1) * features] for d in range(directions)]
        parts = list(one_by_one if cell.merge == "concat" else unmerged(cell, dy, tape.y))
    shapes = [(tape.x.shape[0], *d.shape) for d in (dh_n, dc_n)]
    steps = Steps(*(xp.zeros(shape, dh_n.dtype) for shape in shapes)) if keep_steps else None
    dx, dh0, dc0 = None, [], []
    for d, w in enumerate(weights):
        run = _Run(device, tape.given, tape.active, d, dh_n.shape[1])
        da_x, by_h, by_c = _direction_backward(run, w, tape, parts[d], dh_n[d], dc_n[d], steps, out[d])
        if input_gradient:
            by_x = run.product(da_x, w.weight_ih)
            dx = by_x if dx is None else dx + by_x
        dh0.append(by_h)
        dc0.append(by_c)
    return LayerGradients(dx, xp.stack(dh0), xp.stack(dc0), out, steps)


def _direction_backward(
    run: _Run,
    w: Weights,
    layer: PhasedTape,
    dy: Array | None,  # (T, B, P)
    dh: Array,
    dc: Array,
    steps: Steps | None,  # OUT
    out: Weights,  # the gradients by the weights, OUT
) -> tuple[Array, Array, Array]:
    """Back-propagate through one direction; the gradients by its products with x and by the initial state."""
    xp, cell, tape, dtype = run.xp, run.cell, layer.directions[run.direction], dh.dtype
    count, batch = layer.x.shape[:2]
    da = xp.empty((count, batch, cell.rows), dtype)
    dh_rows = xp.empty((count, batch, cell.h_size), dtype) if cell.proj_size else None  # by each projection
    sums = {role: array for role, array in out._asdict().items() if array is not None}
    for role in ("weight_peephole", "ln_gain_c", "ln_bias_c"):  # those that gain something at each step
        if role in sums:
            sums[role][...] = 0
    da_h_rows = xp.empty(da.shape, dtype) if cell.layer_norm else da
    for t in run.times(count)[::-1]:
        dh_t, dc_t = run.live(t, dh if dy is None else dh + dy[t]), run.live(t, dc)
        if steps is not None:
            steps.h[t, run.direction], steps.c[t, run.direction] = dh_t, dc_t
        dh_old, dh_t = run.through_zoneout(ZONEOUT_H, t, dh_t)
        dc_old, dc_t = run.through_zoneout(ZONEOUT_C, t, dc_t)
        if dh_rows is not None:
            dh_rows[t], dh_t = dh_t, run.product(dh_t, w.weight_hr)
        da_t, dc_prev = _through_cell(run, w, tape.steps[t], t, dh_t, dc_t, sums)
        da[t] = da_t
        if tape.norm_h is not None:
            norm = Norm(tape.norm_h.normalised[t], tape.norm_h.scale[t])
            da_t = da_h_rows[t] = normalise_backward(da[t], norm, w.ln_gain_hh)
        if cell.truncated:
            dh_prev = xp.zeros_like(dh)
        else:
            dh_prev = run.product(da_t, w.weight_hh)
            if run.recurrent is not None:
                dh_prev = dh_prev * run.recurrent
            dh_prev = dh_prev if dh_old is None else dh_prev + dh_old
        dc_prev = dc_prev if dc_old is None else dc_prev + dc_old
        dh = run.going_on(t, run.unreset(t, dh_prev), dh)
        dc = run.going_on(t, run.unreset(t, dc_prev), dc)
    return _weight_gradients(run, w, layer.x, tape, da, da_h_rows, dh_rows, sums), dh, dc


def _through_cell(
    run: _Run, w: Weights, one: OneStep, t: int, dout: Array, dc: Array, sums: dict[str, Any]
) -> tuple[Array, Array]:
    """Take the gradients by the output before a projection and by c back to those by pre-activations and c_{t-1}."""
    xp, cell, step = run.xp, run.cell, one.cell
    if step is None:
        return run.live(t, dout * slope(xp, str(cell.nonlinearity), one.squashed)), dc
    d_shown = run.live(t, dout * step.gates["o"] * slope(xp, cell.activations[2], one.squashed, of_output=True))
    if one.norm_c is not None:
        sums["ln_gain_c"][...] += (d_shown * run.live(t, one.norm_c.normalised)).sum(axis=0)
        sums["ln_bias_c"][...] += d_shown.sum(axis=0)
        d_shown = run.live(t, normalise_backward(d_shown, one.norm_c, w.ln_gain_c))
    if run.active is not None:  # 0 * NaN would reach the sums over the batch
        step = StepTape(
            {gate: run.live(t, value) for gate, value in step.gates.items()}, step.seen, run.live(t, step.c_prev),
            run.live(t, step.c),
        )  # fmt: skip
    da, dc_prev, dp = cell_backward(xp, cell, step, dout * run.live(t, one.squashed), dc + d_shown, w)
    if dp is not None:
        sums["weight_peephole"][...] += dp
    return run.live(t, da), dc_prev


def _weight_gradients(
    run: _Run,
    w: Weights,
    x: Array,
    tape: DirectionTape,
    da: Array,
    da_h: Array,
    dh_rows: Array | None,
    sums: dict[str, Any],  # OUT
) -> Array:
    """Write the gradients by the weights, each a sum over all steps; return that by the products with x."""
    xp, da_x = run.xp, da
    if "bias" in sums:
        sums["bias"][...] = da.sum(axis=(0, 1))
    if tape.norm_x is not None and tape.norm_h is not None:
        sums["ln_gain_ih"][...] = (da * tape.norm_x.normalised).sum(axis=(0, 1))
        sums["ln_gain_hh"][...] = (da * tape.norm_h.normalised).sum(axis=(0, 1))
        da_x = normalise_backward(da, tape.norm_x, w.ln_gain_ih)
    sums["weight_ih"][...] = run.product(_flat(xp, da_x), _flat(xp, x), transpose_a=True)
    sums["weight_hh"][...] = run.product(_flat(xp, da_h), _flat(xp, tape.h_rows), transpose_a=True)
    if dh_rows is not None and tape.outs is not None:
        sums["weight_hr"][...] = run.product(_flat(xp, dh_rows), _flat(xp, tape.outs), transpose_a=True)
    return da_x


def _flat(xp: Any, rows: Array) -> Array:
    """Return the rows of all steps (T, B, K) as a matrix (T * B, K)."""
    return xp.ascontiguousarray(rows).reshape(-1, rows.shape[2])
