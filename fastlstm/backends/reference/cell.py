"""The cell of the reference: one time step, forward and backward, as the equations in ``__init__.py`` have it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.layers import Weights
from fastlstm.cell import Cell
from fastlstm.parameters import peepholes

__all__ = [
    "ACTIVATIONS", "OUTPUT", "Gates", "Norm", "Step", "cell_backward", "cell_forward", "joined", "normalise",
    "normalise_backward", "split",
]  # fmt: skip

EPSILON = 1e-5  # of layer norm, as in torch.nn.LayerNorm


class Gates(NamedTuple):
    """The activated gates of one time step, (B, H) each; f is 1 without a forget gate."""

    i: Array
    f: Array
    g: Array
    o: Array


class Norm(NamedTuple):
    """The tape of a layer norm."""

    normalised: Array  # (B, R)
    scale: Array  # (B, 1), one over the standard deviation


def sigmoid(a: Array) -> Array:
    """Return 1 / (1 + exp(-a)), written so that the exponential never overflows; complex `a` for the tests."""
    sign = np.where(a.real >= 0, 1, -1).astype(a.real.dtype)
    e = np.exp(-sign * a)
    return np.where(a.real >= 0, 1, e) / (1 + e)


def clipped(a: Array, bound: float | None) -> Array:
    """Clip to [-bound, bound], by the real part for the tests."""
    if bound is None:
        return a
    return np.where(abs(a.real) < bound, a, np.clip(a.real, -bound, bound).astype(a.dtype))


def passes(a: Array, bound: float | None) -> Array | bool:
    """Return where values are not clipped, so that the gradient passes."""
    return True if bound is None else abs(a.real) < bound


# Each activation and its derivative, in terms of the activated value s.
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "sigmoid": (sigmoid, lambda s: s * (1 - s)),
    "tanh": (np.tanh, lambda s: 1 - s * s),
    "relu": (lambda a: np.where(a.real > 0, a, 0 * a), lambda s: (s.real > 0).astype(s.dtype)),
    "hard_sigmoid": (
        lambda a: np.where(a.real < -2.5, 0 * a, np.where(a.real > 2.5, 0 * a + 1, 0.2 * a + 0.5)),
        lambda s: np.where((s.real > 0) & (s.real < 1), 0.2, 0.0).astype(s.dtype),
    ),
    "softsign": (lambda a: a / (1 + np.where(a.real >= 0, a, -a)), lambda s: (1 - np.where(s.real >= 0, s, -s)) ** 2),
    "identity": (lambda a: a, np.ones_like),
}
# The squashing functions of 1997: 4 sigmoid(a) - 2 of the candidate, 2 sigmoid(c) - 1 of the output.
CANDIDATE = ACTIVATIONS | {"1997": (lambda a: 2 * np.tanh(a / 2), lambda s: (2 - s) * (2 + s) / 4)}
OUTPUT = ACTIVATIONS | {"1997": (lambda c: np.tanh(c / 2), lambda s: (1 - s * s) / 2)}


def split(cell: Cell, a: Array) -> dict[str, Array]:
    """Split pre-activations (B, R) into the gates that have rows, each repeated over the units of its block."""
    found, start = {}, 0
    for gate in cell.gates:
        size = cell.gate_size(gate)
        found[gate] = np.repeat(a[:, start : start + size], cell.hidden_size // size, axis=1)
        start += size
    return found


def joined(cell: Cell, da: dict[str, Array]) -> Array:
    """Join gradients by the gates of all units to those by the pre-activations (B, R); summed over a block."""
    parts = []
    for gate in cell.gates:
        size = cell.gate_size(gate)
        parts.append(da[gate].reshape(len(da[gate]), size, cell.hidden_size // size).sum(axis=2))
    return np.concatenate(parts, axis=1)


def _over_blocks(cell: Cell, v: Array) -> Array:
    """Return for each unit the sum of `v` (B, H) over the units of its block."""
    size, blocks = cell.block_size, cell.hidden_size // cell.block_size
    return v if size == 1 else np.repeat(v.reshape(len(v), blocks, size).sum(axis=2), size, axis=1)


def normalise(v: Array, gain: Array) -> tuple[Array, Norm]:
    """Normalise rows: (v - mean) / sqrt(variance + EPSILON) * gain, with the biased variance."""
    centred = v - v.mean(axis=1, keepdims=True)
    scale = 1 / np.sqrt((centred * centred).mean(axis=1, keepdims=True) + EPSILON)
    return centred * scale * gain, Norm(centred * scale, scale)


def normalise_backward(d: Array, norm: Norm, gain: Array) -> Array:
    """Take the gradient by normalised rows back to that by the rows."""
    d, n = d * gain, norm.normalised
    return norm.scale * (d - d.mean(axis=1, keepdims=True) - n * (d * n).mean(axis=1, keepdims=True))


@dataclass(frozen=True)
class Step:
    """The tape of one time step."""

    t: int
    active: Array  # (B, 1) bool, the sequences that are long enough to have this step
    kept: Array  # (B, 1) bool, those whose state is not reset before it
    gates: Gates
    peeped: dict[str, Array]  # the pre-activations that clip has seen, by gate
    h_prev: Array  # (B, P) as multiplied with weight_hh: after recurrent dropout
    c_prev: Array  # (B, H)
    c_raw: Array  # (B, H) before cell_clip
    c: Array  # (B, H) after it, before zoneout
    squashed: Array  # (B, H) the output activation of c
    out: Array  # (B, H) the output before a projection
    norms: tuple[Norm, Norm, Norm] | None  # of input products, recurrent products and c


def cell_forward(
    cell: Cell, a: dict[str, Array], c_prev: Array, weights: Weights
) -> tuple[Gates, Array, Array, dict[str, Array]]:
    """One time step: pre-activations (B, H) of each gate and the cell state before, to gates and c.

    Returns
    -------
    gates : Gates
    c_raw, c : array, (B, H)
        The cell state before and after its clip.
    seen : dict of str to array
        The pre-activations that the clip has seen.
    """
    gate, candidate = ACTIVATIONS[cell.activations[0]][0], CANDIDATE[cell.activations[1]][0]
    p = {} if weights.weight_peephole is None else dict(zip(peepholes(cell), weights.weight_peephole, strict=True))
    seen = {name: a[name] + _over_blocks(cell, p[name] * c_prev) if name in p else a[name]
            for name in cell.gates if name != "o"}  # fmt: skip
    i = gate(clipped(seen["i"], cell.clip))
    g = candidate(clipped(seen["g"], cell.clip))
    f = 1 - i if cell.coupled else gate(clipped(seen["f"], cell.clip)) if cell.forget_gate else np.ones_like(i)
    c_raw = f * c_prev + i * g
    c = clipped(c_raw, cell.cell_clip)
    seen["o"] = a["o"] + _over_blocks(cell, p["o"] * c) if p else a["o"]
    o = gate(clipped(seen["o"], cell.clip))
    return Gates(i, f, g, o), c_raw, c, seen


def cell_backward(
    cell: Cell, step: Step, dout: Array, dc: Array, dc_squashed: Callable[[Array], Array], weights: Weights
) -> tuple[dict[str, Array], Array, Array]:
    """One time step back: gradients by the output and c (B, H) to those by each gate's pre-activations and c_{t-1}.

    `dc_squashed` takes the gradient by the output activation back to c. Also returns the gradients by the peepholes.
    """
    i, f, g, o = step.gates
    slope, slope_g = ACTIVATIONS[cell.activations[0]][1], CANDIDATE[cell.activations[1]][1]
    p = {} if weights.weight_peephole is None else dict(zip(peepholes(cell), weights.weight_peephole, strict=True))
    da = {"o": dout * step.squashed * slope(o) * passes(step.peeped["o"], cell.clip)}
    dc = dc + dc_squashed(dout * o)
    if p:
        dc = dc + _over_blocks(cell, da["o"]) * p["o"]
    dc = dc * passes(step.c_raw, cell.cell_clip)
    df = dc * step.c_prev
    di = dc * g - df if cell.coupled else dc * g
    da["i"] = di * slope(i) * passes(step.peeped["i"], cell.clip)
    if "f" in cell.gates:
        da["f"] = df * slope(f) * passes(step.peeped["f"], cell.clip)
    da["g"] = dc * i * slope_g(g) * passes(step.peeped["g"], cell.clip)
    dc_prev = dc * f
    dp = []
    for name in p:
        of_gate = _over_blocks(cell, da[name])
        if name != "o":
            dc_prev = dc_prev + of_gate * p[name]
        dp.append((of_gate * (step.c if name == "o" else step.c_prev)).sum(axis=0))
    return da, dc_prev, np.stack(dp) if p else None
