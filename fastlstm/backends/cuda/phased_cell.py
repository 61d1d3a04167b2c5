"""One time step of any cell of the family, in operations on whole arrays of the device.

The equations are those of :mod:`fastlstm.backends.reference`, in the same symbols. `xp` is the array library.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.layers import Weights
from fastlstm.cell import Cell
from fastlstm.parameters import gate_rows, peepholes

__all__ = ["Norm", "StepTape", "activate", "cell_backward", "cell_forward", "normalise", "normalise_backward", "slope"]

EPSILON = 1e-5  # of layer norm, as in torch.nn.LayerNorm


class Norm(NamedTuple):
    """The tape of a layer norm."""

    normalised: Array  # (..., R)
    scale: Array  # (..., 1), one over the standard deviation


class StepTape(NamedTuple):
    """The tape of the cell of one time step; (B, H) each."""

    gates: dict[str, Array]  # activated: i, f, g, o; f is missing where it is 1
    seen: dict[str, Array]  # the pre-activations that the clip has seen, if there is one
    c_prev: Array
    c: Array  # after its clip, before zoneout


def activate(xp: Any, name: str, a: Array, *, of_output: bool = False) -> Array:
    """Return an activation of the candidate or a gate, or of the output."""
    if name == "sigmoid":
        e = xp.exp(-abs(a))  # cannot overflow
        return xp.where(a >= 0, 1, e) / (1 + e)
    if name == "relu":
        return xp.where(a < 0, 0, a)  # NaN stays NaN
    if name == "hard_sigmoid":
        return xp.where(a < -2.5, 0, xp.where(a > 2.5, 1, 0.2 * a + 0.5))
    if name == "softsign":
        return a / (1 + abs(a))
    if name == "1997":
        return xp.tanh(0.5 * a) if of_output else 2 * xp.tanh(0.5 * a)
    return a if name == "identity" else xp.tanh(a)


def slope(xp: Any, name: str, s: Array, *, of_output: bool = False) -> Array:
    """Return the derivative of an activation as a function of the activated value."""
    if name == "sigmoid":
        return s * (1 - s)
    if name == "relu":
        return (s > 0).astype(s.dtype)
    if name == "hard_sigmoid":
        return ((s > 0) & (s < 1)).astype(s.dtype) * 0.2
    if name == "softsign":
        return (1 - abs(s)) ** 2
    if name == "1997":
        return (1 - s * s) * 0.5 if of_output else (2 - s) * (2 + s) * 0.25
    return xp.ones_like(s) if name == "identity" else 1 - s * s


def normalise(xp: Any, v: Array, gain: Array) -> tuple[Array, Norm]:
    """Normalise rows: (v - mean) / sqrt(variance + EPSILON) * gain, with the biased variance."""
    centred = v - v.mean(axis=-1, keepdims=True)
    scale = 1 / xp.sqrt((centred * centred).mean(axis=-1, keepdims=True) + EPSILON)
    normalised = centred * scale
    return normalised * gain, Norm(normalised, scale)


def normalise_backward(d: Array, norm: Norm, gain: Array) -> Array:
    """Take the gradient by normalised rows back to that by the rows."""
    d, n = d * gain, norm.normalised
    return norm.scale * (d - d.mean(axis=-1, keepdims=True) - n * (d * n).mean(axis=-1, keepdims=True))


def cell_forward(xp: Any, cell: Cell, a: Array, c_prev: Array, weights: Weights) -> StepTape:
    """Take pre-activations (B, R) and the cell state before a step to gates and the cell state after it."""
    parts, p = _split(xp, cell, a), _peepholes(cell, weights)
    of_gates, of_candidate, _ = cell.activations
    clip, cell_clip = _bound(cell, cell.clip), _bound(cell, cell.cell_clip)
    seen: dict[str, Array] = {}
    gates: dict[str, Array] = {}

    def activated(gate: str, a: Array, function: str) -> Array:
        if clip is not None:
            seen[gate], a = a, xp.clip(a, -clip, clip)
        gates[gate] = activate(xp, function, a)
        return gates[gate]

    i = activated("i", parts["i"] + _over_blocks(xp, cell, p["i"] * c_prev) if "i" in p else parts["i"], of_gates)
    g = activated("g", parts["g"], of_candidate)
    c = c_prev
    if cell.coupled:
        gates["f"] = 1 - i
        c = gates["f"] * c_prev
    elif cell.forget_gate:
        a_f = parts["f"] + _over_blocks(xp, cell, p["f"] * c_prev) if "f" in p else parts["f"]
        c = activated("f", a_f, of_gates) * c_prev
    c = c + i * g
    if cell_clip is not None:
        c = xp.clip(c, -cell_clip, cell_clip)
    activated("o", parts["o"] + _over_blocks(xp, cell, p["o"] * c) if "o" in p else parts["o"], of_gates)
    return StepTape(gates, seen, c_prev, c)


def cell_backward(
    xp: Any, cell: Cell, step: StepTape, da_o: Array, dc: Array, weights: Weights
) -> tuple[Array, Array, Array | None]:
    """Take gradients by o and by c (B, H), that through the output in it, back through one step.

    Returns
    -------
    da : array, (B, R)
        The gradient by the pre-activations.
    dc_prev : array, (B, H)
    dp : array, (3, H), or None
        This step's gradients by the peepholes, summed over the batch.
    """
    of_gates, of_candidate, _ = cell.activations
    clip, cell_clip = _bound(cell, cell.clip), _bound(cell, cell.cell_clip)
    p, gates = _peepholes(cell, weights), step.gates

    def back(gate: str, d: Array, function: str) -> Array:
        d = d * slope(xp, function, gates[gate])
        return d if clip is None else xp.where(abs(step.seen[gate]) < clip, d, 0)

    da = {"o": back("o", da_o, of_gates)}
    if p:
        dc = dc + _over_blocks(xp, cell, da["o"]) * p["o"]
    if cell_clip is not None:
        dc = xp.where(abs(step.c) < cell_clip, dc, 0)
    da["i"] = back("i", dc * (gates["g"] - step.c_prev) if cell.coupled else dc * gates["g"], of_gates)
    if "f" in cell.gates:
        da["f"] = back("f", dc * step.c_prev, of_gates)
    da["g"] = back("g", dc * gates["i"], of_candidate)
    dc_prev = dc * gates["f"] if "f" in gates else dc
    dp = []
    for gate in p:
        of_gate = _over_blocks(xp, cell, da[gate])
        if gate != "o":
            dc_prev = dc_prev + of_gate * p[gate]
        dp.append((of_gate * (step.c if gate == "o" else step.c_prev)).sum(axis=0))
    return _joined(xp, cell, da), dc_prev, xp.stack(dp) if dp else None


def _peepholes(cell: Cell, weights: Weights) -> dict[str, Array]:
    if weights.weight_peephole is None:
        return {}
    return {gate: weights.weight_peephole[row] for row, gate in enumerate(peepholes(cell))}


def _over_blocks(xp: Any, cell: Cell, v: Array) -> Array:
    """Return for each unit the sum of `v` (B, H) over the units of its block."""
    size = cell.block_size
    return v if size == 1 else xp.repeat(v.reshape(v.shape[0], -1, size).sum(axis=2), size, axis=1)


def _bound(cell: Cell, bound: float | None) -> float | None:
    """Return a bound; one that is no number of the dtype bounds nothing."""
    return None if bound is None or bound > float(np.finfo(cell.dtype).max) else bound


def _split(xp: Any, cell: Cell, a: Array) -> dict[str, Array]:
    """Split pre-activations (B, R) by gates, each repeated over the units of its block."""
    found = {gate: a[:, gate_rows(cell, gate)] for gate in cell.gates}
    if cell.block_size == 1:
        return found
    return {gate: part if gate == "g" else xp.repeat(part, cell.block_size, axis=1) for gate, part in found.items()}


def _joined(xp: Any, cell: Cell, da: dict[str, Array]) -> Array:
    """Join gradients by the gates of all units to those by the pre-activations (B, R), summed over a block."""
    parts = [da[gate] for gate in cell.gates]
    if cell.block_size > 1:
        parts = [
            part if gate == "g" else part.reshape(part.shape[0], -1, cell.block_size).sum(axis=2)
            for gate, part in zip(cell.gates, parts, strict=True)
        ]
    return xp.concatenate(parts, axis=1)
