"""Prepared inference of cells with phases: each layer is one launch on one thread, whose settings are made once.

For a short call: allocating what a tape would hold, and working out settings and candidates, take 25 us, a step of
(B, I, H) = (1, 32, 64) takes 1.2 to 3.7. As in ``prepared_call.py``, strides, alignment and writeability are checked in
each call where an array goes to a kernel (``as_plain``).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, Dropout, ForwardResult, Params, Signature
from fastlstm.backends.cpu.launch import Candidate
from fastlstm.backends.cpu.phased_sizes import (
    PACKED,
    Arguments,
    arguments_of,
    forward_candidates,
    mask_numbers,
    packed_workspace,
    rates_of,
    size_of,
    unfolded,
)  # fmt: skip
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.thread_pool import NO_TEAM
from fastlstm.backends.cpu.weights import again
from fastlstm.backends.cpu.workspace import SCRATCH
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.backends.layers import Given, LayeredBackend, Weights
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.cell import Cell
from fastlstm.kernels.cpu import phased_forward as forth
from fastlstm.kernels.cpu.jit import VECTOR_BYTES
from fastlstm.parameters import direction_names

__all__ = ["PhasedCall", "can_prepare"]

_READY = "as prepared calls of the phased kernels take them"
_MOST_ROWS = 512  # T * B: a longer call takes hundreds of microseconds, and a call keeps its index, 16 bytes a row


def can_prepare(cell: Cell, signature: Signature) -> bool:
    """Say whether calls of a signature are for inference, short, in the order of time, and never on several threads."""
    steps, batch, keep_tape, _ = signature
    return (
        not keep_tape
        and 0 < steps * batch <= _MOST_ROWS
        and cell.num_directions == 1
        and not (cell.reverse and steps > 1)
        and all(_candidate(cell, layer, steps, batch).schedule.threads == 1 for layer in range(cell.num_layers))
    )


def _candidate(cell: Cell, layer: int, steps: int, batch: int) -> Candidate:
    """Return the only candidate for a layer's launch, for any limit of the threads."""
    size, zone_h = size_of(cell, layer), cell.zoneout[1] > 0
    return forward_candidates(size, steps, batch, False, False, zone_h, sys.maxsize).candidates[0]


class _LayerCall:
    """What the launch of one layer takes besides its parameters and its rows."""

    __slots__ = ("_names", "of_packed", "scratch", "settings", "size", "tape", "y_shape")

    def __init__(self, cell: Cell, layer: int, signature: Signature) -> None:
        steps, batch, _, frozen = signature
        size, chosen = size_of(cell, layer), _candidate(cell, layer, steps, batch)
        given = Given(cell, layer, None, None, None, False, False)
        self.size, self.of_packed, self.y_shape = size, packed_workspace(size), (steps * batch, size.features)
        self.scratch: Any = chosen.workspaces[0]
        self.settings = chosen.settings.copy()
        numbers = {forth.PACK: not frozen, forth.Y_ROW: size.features} | mask_numbers(forth.MASKS, given, 0, batch)
        for place, number in numbers.items():
            self.settings[place] = number
        names = direction_names(cell, layer, 0)
        self._names = [names.get(role) for role in Weights._fields]
        # A tape of no rows.
        width, h_row, out_row, norm_row = size.width, size.h_row, size.out_row, size.norm_row
        shapes = (0, size.blocks, 0, width), (0, h_row), (0, size.blocks * width), (0, out_row), (0, norm_row)
        self.tape = tuple(np.empty(shape, size.dtype) for shape in shapes)

    def arguments(self, params: Params) -> Arguments:
        """Return the layer's parameters as the kernel takes them."""
        return arguments_of(self.size, Weights(*[name and params[name] for name in self._names]))  # type: ignore[arg-type]


class PhasedCall:
    """A call for inference of a model with phases (see ``base.Prepared``).

    Parameters
    ----------
    backend : LayeredBackend
        Runs what is not prepared: calls with lengths, resets or dropout, and the first call of a frozen model, in
        which its weights are packed.
    cell : Cell
        The model.
    signature : Signature
        What its calls have in common; :func:`can_prepare` holds for it.
    """

    checks_itself = False

    def __init__(self, backend: LayeredBackend, cell: Cell, signature: Signature) -> None:
        self._backend, self._cell, self._signature, self._frozen = backend, cell, signature, signature.frozen
        self._layers = [_LayerCall(cell, layer, signature) for layer in range(cell.num_layers)]
        self._h_shape, self._c_shape = ((cell.num_layers, signature.batch, n) for n in (cell.h_size, cell.c_size))
        self._x_shape = signature.steps * signature.batch, cell.input_size
        self._sequence_shape = signature.steps, signature.batch, cell.output_size
        self._index = Rows(None, signature.steps, signature.batch).index(False)
        self._folding = Folding(cell) if is_folded(cell) else None
        self._rates, self._dtype, self._no_resets = rates_of(cell), cell.dtype, np.empty(0, np.uint8)

    def __reduce__(self) -> Any:
        return again, (VECTOR_BYTES, PhasedCall, self._backend, self._cell, self._signature)

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
        given = None if not (lengths is None is dropout and resets is None) else self._parameters(params)
        if given is None:
            return self._backend.forward(self._cell, params, x, h0, c0, lengths, dropout, False, recompute, resets)
        y, h_n, c_n = self._run(given, as_plain(x).reshape(self._x_shape), h0, c0)
        return ForwardResult(y.reshape(self._sequence_shape), h_n, c_n, None)

    def step(self, params: Params, x: Array, h0: Array | None, c0: Array | None) -> tuple[Array, Array, Array]:
        """Advance one time step (see ``base.Prepared.step``)."""
        given = self._parameters(params)
        if given is None:
            return self._backend.step(self._cell, params, x, h0, c0)
        return self._run(given, as_plain(x), h0, c0)

    def backward(self, *given: Any, **options: Any) -> BackwardResult:
        """Raise: calls for inference leave no tape."""
        raise AssertionError("a call for inference has no backward pass")

    def _parameters(self, params: Any) -> list[tuple[Arguments, Array | None]] | None:
        """Return each layer's parameters and packed weights; None at the first call of a frozen model.

        The packed weights of a model that is not frozen are None: they are packed in the call.
        """
        if not self._frozen:
            arrays = params if self._folding is None else self._folding.unfold(params)
            return [(layer.arguments(arrays), None) for layer in self._layers]
        ready: list[tuple[Arguments, Array | None]] | None = params.kept.get(_READY)
        if ready is None:
            of_layers = unfolded(self._cell, params).kept  # type: ignore[attr-defined]  # they are frozen, too
            kept = [of_layers.get((layer, 0), {}).get(PACKED) for layer in range(len(self._layers))]
            if all(kept):
                ready = params.kept.setdefault(_READY, kept)
        return ready

    def _run(
        self, given: list[tuple[Arguments, Array | None]], x: Array, h0: Array | None, c0: Array | None
    ) -> tuple[Array, Array, Array]:
        """Run all layers over x (T * B, I): the output (T * B, F) and the states after it."""
        dtype, index, resets, rates = self._dtype, self._index, self._no_resets, self._rates
        h0 = np.zeros(self._h_shape, dtype) if h0 is None else as_plain(h0)
        c0 = np.zeros(self._c_shape, dtype) if c0 is None else as_plain(c0)
        h_n, c_n = np.empty(self._h_shape, dtype), np.empty(self._c_shape, dtype)
        borrow, give_back = SCRATCH.borrow, SCRATCH.give_back
        for number, layer in enumerate(self._layers):
            parameters, kept = given[number]
            packed = borrow(layer.of_packed) if kept is None else kept
            scratch, y = borrow(layer.scratch), np.empty(layer.y_shape, dtype)
            forth.phased_forward(
                *parameters, rates, x, h0[number], c0[number], index, resets, y, h_n[number], c_n[number], *layer.tape,
                packed, scratch, layer.settings, NO_TEAM, 0,
            )  # fmt: skip
            give_back(layer.scratch, scratch)
            if kept is None:
                give_back(layer.of_packed, packed)
            x = y
        return x, h_n, c_n
