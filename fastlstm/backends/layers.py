"""Running a model layer by layer: dropout between layers, and zeros in place of None.

A backend that can run one layer inherits from :class:`LayeredBackend` and gets the rest from here. A
backend with a better plan for the whole stack overrides `forward`, `backward` or `step` instead.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import (
    Array,
    BackwardResult,
    Dropout,
    FlatArrays,
    ForwardResult,
    Params,
    Prepared,
    Signature,
    Steps,
    Unrolled,
)
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.parameters import direction_names

__all__ = ["Given", "LayerGradients", "LayerResult", "LayeredBackend", "Weights", "dropout_mask", "layer_weights"]


class Weights(NamedTuple):
    """The parameters of one layer in one direction, or their gradients: a field for each role of a parameter."""

    weight_ih: Array  # (4H, I)
    weight_hh: Array  # (4H, H)
    bias: Array | None = None  # (4H,)
    weight_peephole: Array | None = None  # (3, H)
    weight_hr: Array | None = None  # (P, H)
    ln_gain_ih: Array | None = None  # (4H,)
    ln_gain_hh: Array | None = None  # (4H,)
    ln_gain_c: Array | None = None  # (H,)
    ln_bias_c: Array | None = None  # (H,)
    kept: dict[Any, Any] | None = None  # where a backend may keep packed weights, if these never change


class Given(NamedTuple):
    """The arguments of a layer besides its arrays."""

    cell: Cell
    layer: int  # its number
    lengths: Array | None  # (B,) int64 on the host
    resets: Array | None  # (T, B) bool
    draws: Dropout | None  # where the masks of recurrent dropout and zoneout come from; None for inference
    keep_tape: bool
    recompute: bool  # see base.Prepared.forward


class LayerResult(NamedTuple):
    """The result of one layer's forward pass."""

    y: Array  # (T, B, D*H)
    h_n: Array  # (D, B, H), referred to by nothing else
    c_n: Array  # (D, B, H), referred to by nothing else
    tape: Any


class LayerGradients(NamedTuple):
    """The result of one layer's backward pass."""

    x: Array | None  # (T, B, I); None if it was not asked for
    h0: Array  # (D, B, H), referred to by nothing else
    c0: Array  # (D, B, H), referred to by nothing else
    weights: Sequence[Weights]  # one per direction
    steps: Steps | None = None  # (T, D, B, H) each, if they were asked for


class StackTape(NamedTuple):
    """The tapes of all layers, and the dropout masks between them."""

    shape: tuple[int, int]  # (T, B)
    layers: list[Any]
    masks: list[Array | None]  # masks[k] multiplied the input of layer k


class LayeredBackend(ABC):
    """A backend that runs a model layer by layer."""

    name: str
    xp: Any  # the array library's module

    @abstractmethod
    def layer_forward(
        self,
        weights: Sequence[Weights],  # one per direction
        x: Array,  # (T, B, I), T and B at least 1
        h0: Array,  # (D, B, H)
        c0: Array,  # (D, B, H)
        given: Given,
    ) -> LayerResult:
        """Run one layer, in all its directions."""

    @abstractmethod
    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: Any,
        dy: Array | None,  # (T, B, D*H)
        dh_n: Array,  # (D, B, H)
        dc_n: Array,  # (D, B, H)
        keep_steps: bool = False,
        out: Sequence[Weights] | None = None,  # where the weights' gradients go, if the backend has said where
        input_gradient: bool = True,
    ) -> LayerGradients:
        """Back-propagate through one layer, in all its directions."""

    def gradient_arrays(self, params: Params) -> FlatArrays | None:
        """Make the arrays that the weights' gradients are to be written to; None if each layer makes its own."""
        return None

    def forward(
        self,
        cell: Cell,
        params: Params,
        x: Array,
        h0: Array | None,
        c0: Array | None,
        lengths: Array | None,
        dropout: Dropout | None,
        keep_tape: bool,
        recompute: bool = False,
        resets: Array | None = None,
    ) -> ForwardResult:
        """Run the whole sequence through all layers (see ``base.Prepared.forward``)."""
        steps, batch = x.shape[:2]
        h0, c0 = self._states(cell, batch, x.dtype, h0, c0)
        if steps == 0 or batch == 0:
            y = self.xp.zeros((steps, batch, cell.output_size), x.dtype)
            tape = StackTape((steps, batch), [], []) if keep_tape else None
            return ForwardResult(y, self.xp.array(h0), self.xp.array(c0), tape)
        h_n, c_n = [], []
        stack = StackTape((steps, batch), [], [])
        for layer in range(cell.num_layers):
            mask = dropout_mask(self.xp, dropout, layer, x) if layer and dropout and dropout.probability else None
            if mask is not None:
                x = x * mask
            rows = _layer_rows(cell, layer)
            given = Given(cell, layer, lengths, resets, dropout, keep_tape, recompute)
            result = self.layer_forward(layer_weights(cell, params, layer), x, h0[rows], c0[rows], given)
            x = result.y
            h_n.append(result.h_n)
            c_n.append(result.c_n)
            stack.layers.append(result.tape)
            stack.masks.append(mask)
        return ForwardResult(x, self._joined(h_n), self._joined(c_n), stack if keep_tape else None)

    def backward(
        self,
        cell: Cell,
        params: Params,
        tape: StackTape,
        dy: Array | None,
        dh_n: Array | None,
        dc_n: Array | None,
        keep_steps: bool = False,
        input_gradient: bool = True,
    ) -> BackwardResult:
        """Back-propagate through all layers (see ``base.Prepared.backward``)."""
        steps, batch = tape.shape
        dh_n, dc_n = self._states(cell, batch, cell.dtype, dh_n, dc_n)
        if not tape.layers:
            dx = self.xp.zeros((steps, batch, cell.input_size), cell.dtype) if input_gradient else None
            zeros: dict[str, Array] | None = self.gradient_arrays(params)
            if zeros is None:
                zeros = {name: self.xp.empty(value.shape, cell.dtype) for name, value in params.items()}
            for value in zeros.values():
                value[...] = 0
            shapes = [(steps, *state.shape) for state in (dh_n, dc_n)]
            empty = Steps(*(self.xp.zeros(shape, cell.dtype) for shape in shapes)) if keep_steps else None
            return BackwardResult(dx, self.xp.array(dh_n), self.xp.array(dc_n), zeros, empty)
        dh0, dc0, of_steps = [], [], []
        found: dict[str, Array] = {}
        flat = self.gradient_arrays(params)
        for layer in reversed(range(cell.num_layers)):
            rows = _layer_rows(cell, layer)
            out = None if flat is None else layer_weights(cell, flat, layer)
            grads = self.layer_backward(
                layer_weights(cell, params, layer), tape.layers[layer], dy, dh_n[rows], dc_n[rows], keep_steps, out,
                input_gradient or layer > 0,
            )  # fmt: skip
            of_steps.append(grads.steps)
            dh0.append(grads.h0)
            dc0.append(grads.c0)
            for direction, weights in enumerate(grads.weights):
                for role, name in direction_names(cell, layer, direction).items():
                    found[name] = getattr(weights, role)
            mask = tape.masks[layer]
            dy = grads.x if mask is None else grads.x * mask
        by_name = {name: found[name] for name in params} if flat is None else flat
        return BackwardResult(
            dy, self._joined(dh0[::-1]), self._joined(dc0[::-1]), by_name,
            Steps(*map(self._joined_steps, zip(*of_steps[::-1], strict=True))) if keep_steps else None,
        )  # fmt: skip

    def step(
        self, cell: Cell, params: Params, x: Array, h: Array | None, c: Array | None
    ) -> tuple[Array, Array, Array]:
        """Advance one time step (see ``base.Prepared.step``)."""
        result = self.forward(cell, params, x[None], h, c, None, None, keep_tape=False)
        return result.h_n[-1].copy(), result.h_n, result.c_n

    def plan(self, cell: Cell, steps: int, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run (see ``base.Backend.plan``)."""
        return ["step after step"] * cell.num_layers

    def unroll(
        self, cell: Cell, params: Params, steps: int, batch: int, h0: Array | None, c0: Array | None,
        dropout: Dropout | None,
    ) -> Unrolled:  # fmt: skip
        """Begin a run of steps (see ``base.Backend.unroll``)."""
        from fastlstm.backends.stepwise import Stepwise  # which imports this module

        return Stepwise(self, self.xp, cell, params, steps, batch, h0, c0, dropout)

    def prepare(self, cell: Cell, signature: Signature) -> Prepared:
        """Prepare calls of a signature (see ``base.Backend.prepare``): here, nothing is decided ahead."""
        return _LayeredCall(self, cell, signature)

    def _states(self, cell: Cell, batch: int, dtype: Any, h: Array | None, c: Array | None) -> tuple[Array, Array]:
        rows = cell.num_layers * cell.num_directions
        h = self.xp.zeros((rows, batch, cell.h_size), dtype) if h is None else h
        return h, self.xp.zeros((rows, batch, cell.c_size), dtype) if c is None else c

    def _joined(self, layers: list[Array]) -> Array:
        """Join what belongs to the states of each layer, (D, B, H), to one array."""
        return layers[0] if len(layers) == 1 else self.xp.concatenate(layers)

    def _joined_steps(self, layers: tuple[Array, ...]) -> Array:
        """Join what belongs to the steps of each layer, (T, D, B, H), to one array."""
        return layers[0] if len(layers) == 1 else self.xp.concatenate(layers, axis=1)


class _LayeredCall:
    """A prepared call of a backend that decides nothing ahead."""

    checks_itself = False

    def __init__(self, backend: LayeredBackend, cell: Cell, signature: Signature) -> None:
        self._backend, self._cell, self._signature = backend, cell, signature

    def forward(
        self,
        params: Params,
        x: Array,
        h0: Array | None,
        c0: Array | None,
        lengths: Array | None,
        dropout: Dropout | None,
        recompute: bool,
        resets: Array | None = None,
    ) -> ForwardResult:
        """Run the whole sequence (see ``base.Prepared.forward``)."""
        keep_tape = self._signature.keep_tape
        return self._backend.forward(self._cell, params, x, h0, c0, lengths, dropout, keep_tape, recompute, resets)

    def step(self, params: Params, x: Array, h0: Array | None, c0: Array | None) -> tuple[Array, Array, Array]:
        """Advance one time step (see ``base.Prepared.step``)."""
        return self._backend.step(self._cell, params, x, h0, c0)

    def backward(
        self,
        params: Params,
        tape: Any,
        dy: Array | None,
        dh_n: Array | None,
        dc_n: Array | None,
        keep_steps: bool = False,
        input_gradient: bool = True,
    ) -> BackwardResult:
        """Back-propagate (see ``base.Prepared.backward``)."""
        return self._backend.backward(self._cell, params, tape, dy, dh_n, dc_n, keep_steps, input_gradient)


def _layer_rows(cell: Cell, layer: int) -> slice:
    """Rows of the state arrays that belong to one layer, all its directions."""
    return slice(layer * cell.num_directions, (layer + 1) * cell.num_directions)


def layer_weights(cell: Cell, params: Mapping[str, Array], layer: int) -> list[Weights]:
    """Return the parameters of one layer, one entry per direction."""
    found = []
    arrays, all_kept = (params.arrays, params.kept) if isinstance(params, FrozenParams) else (params, None)
    for direction in range(cell.num_directions):
        names = direction_names(cell, layer, direction)
        kept = None if all_kept is None else all_kept.setdefault((layer, direction), {})
        found.append(Weights(**{role: arrays[name] for role, name in names.items()}, kept=kept))
    return found


def dropout_mask(xp: Any, dropout: Dropout, layer: int, like: Array) -> Array:
    """Draw the inverted-dropout mask for the input of `layer`: 0 or 1/(1-p), shaped and typed as `like`."""
    return kept_mask(xp, dropout.probability, [dropout.key, layer], like.shape, like.dtype)


# The purpose of a mask inside a layer: the last number of its key.
RECURRENT, ZONEOUT_C, ZONEOUT_H = 1, 2, 3

_GOLDEN = 0x9E3779B97F4A7C15  # by which the state of the generator grows with each output


def kept_mask(xp: Any, probability: float, key: list[int], shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw an inverted-dropout mask: 0 with this probability, else 1/(1-p)."""
    scale = np.dtype(dtype).type(1.0 / (1.0 - probability))
    return (~chosen(xp, probability, key, shape) * scale).astype(dtype)


def chosen(xp: Any, probability: float, key: list[int], shape: tuple[int, ...], first: int = 0) -> Array:
    """Choose elements at random, each with this probability: a mask of booleans.

    The draws are those of the SplitMix64 generator (Steele, Lea and Flood 2014), taken by position in
    place of one after the other: element number k of the mask is decided by output number k. A mask
    therefore depends only on key and shape, and is the same on every array library.

    Parameters
    ----------
    xp : module
        The array library.
    probability : float
    key : list of int
        ``[key, layer]`` for dropout between layers; ``[key, layer, direction, kind]`` inside a layer, where `kind` is
        :data:`RECURRENT` with shape (B, H), or :data:`ZONEOUT_C` or :data:`ZONEOUT_H` with shape (T, B, H).
    shape : tuple of int
    first : int
        The position of the first element, to draw a part of a mask.
    """
    size = math.prod(shape)
    bits = xp.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + mask_start(key, first)
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    uniform = ((bits ^ (bits >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
    return (uniform < probability).reshape(shape)


def mask_start(key: list[int], first: int = 0) -> np.uint64:
    """Return the state of the generator before an output, for the key of a mask."""
    start = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return np.uint64((start + first * _GOLDEN) % 2**64)


def mask_key(given: Given, direction: int, kind: int) -> list[int]:
    """Return the key of a mask inside a layer."""
    assert given.draws is not None
    return [given.draws.key, given.draws.layer + given.layer, direction, kind]
