"""Cells whose time step has several phases, on the kernels ``phased_forward`` and ``phased_backward``.

These are cells with layer norm, a projection, zoneout, recurrent dropout or peepholes of shared gates, and the plain
RNN. What a training call keeps for each layer and direction says ``kernels/cpu/phased_forward.py``: seven numbers a
hidden unit and step, with a projection eight, with layer norm nine more; of a plain RNN two. The backward pass adds at
most one, with layer norm three. None is saved by `recompute`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, BackwardResult, Dropout, ForwardResult, Params, Prepared, Signature, Steps
from fastlstm.backends.cpu.launch import launch
from fastlstm.backends.cpu.phased_call import PhasedCall, can_prepare
from fastlstm.backends.cpu.phased_sizes import (
    PACKED,
    Arguments,
    Size,
    arguments_of,
    backward_candidates,
    chunk_of_size,
    forward_candidates,
    gradients_of,
    mask_numbers,
    packed_workspace,
    rates_of,
    schedule_of,
    size_of,
    unfolded,
)  # fmt: skip
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.weights import again
from fastlstm.backends.cpu.workspace import SCRATCH, is_to_be_cleared, new_array, one_block
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.backends.layers import Given, LayeredBackend, LayerGradients, LayerResult, StackTape, Weights
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.reference.backend import merged, unmerged
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import VARIANTS, Cell
from fastlstm.kernels.cpu import phased_backward as back
from fastlstm.kernels.cpu import phased_forward as forth
from fastlstm.kernels.cpu import state_masks
from fastlstm.kernels.cpu.cell_step import TAPE
from fastlstm.kernels.cpu.jit import VECTOR_BYTES

__all__ = ["PHASED", "PhasedBackend", "is_phased"]

# Fields of a cell that make a phase of their own, and the others that these kernels have.
_PHASES = ("proj_size", "layer_norm", "recurrent_dropout", "zoneout", "nonlinearity")
_OTHERS = (
    "peephole", "truncated", "reverse", "merge", "activations", "clip", "cell_clip", "forget_gate", "coupled",
    "block_size",
)  # fmt: skip


def is_phased(cell: Cell) -> bool:
    """Say whether a cell has a phase of its own, and these kernels have all its fields."""
    fields = [name for name, plain in VARIANTS.items() if getattr(cell, name) != plain]
    has_phase = cell.sees_blocks or any(name in _PHASES for name in fields)
    return has_phase and all(name in _PHASES + _OTHERS for name in fields)


class DirectionTape(NamedTuple):
    """The tape of one direction."""

    gates: Array  # (N, Up/V, 5, V): i, f, g, o, c; of a plain RNN (0, Up/V, 0, V)
    h_rows: Array  # (N, h_row): the h before each row's step, as it is multiplied
    c_rows: Array  # (N, Up): the c before each row's step
    outs: Array  # (N, out_row): the output of the cell, if there is a projection, and of a plain RNN
    norms: Array  # (N, norm_row): normalised rows and their scales


class LayerTape(NamedTuple):
    """The tape of one layer."""

    given: Given
    x: Array  # (T, B, I)
    rows: Rows
    resets: Array  # (T * B,) uint8, or (0,) for none
    directions: list[DirectionTape]
    y: list[Array]  # one per direction, (T, B, F), if they are merged by a product


class PhasedBackend(LayeredBackend):
    """NumPy arrays on the kernels of cells with phases; see the module's docstring."""

    name = "cpu"
    xp = np

    def __reduce__(self) -> Any:
        return again, (VECTOR_BYTES, PhasedBackend)

    def prepare(self, cell: Cell, signature: Signature) -> Prepared:
        """Prepare calls of a signature (see ``base.Backend.prepare``)."""
        if can_prepare(cell, signature):
            return PhasedCall(self, cell, signature)
        return super().prepare(cell, signature)

    def plan(self, cell: Cell, steps: int, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run (see ``base.Backend.plan``)."""
        found = []
        for layer in range(cell.num_layers):
            size = size_of(cell, layer)
            if not steps or not batch:
                found.append(str(schedule_of(1, 0)))
                continue
            masks = cell.recurrent_dropout > 0, cell.zoneout[1] > 0
            chosen = forward_candidates(size, steps, batch, False, *masks, get_num_threads())
            found.append(str(chosen.candidates[0].schedule))
        return found

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
        params = unfolded(cell, params)
        return super().forward(cell, params, x, h0, c0, lengths, dropout, keep_tape, recompute, resets)

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
        arrays = unfolded(cell, params)
        result = super().backward(cell, arrays, tape, dy, dh_n, dc_n, keep_steps, input_gradient)
        return result._replace(params=Folding(cell).fold(result.params)) if is_folded(cell) else result

    def layer_forward(self, weights: Sequence[Weights], x: Array, h0: Array, c0: Array, given: Given) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        cell, (steps, batch) = given.cell, x.shape[:2]
        size, rows = size_of(cell, given.layer), Rows(given.lengths, steps, batch)
        x, h0, c0 = as_plain(x), as_plain(h0), as_plain(c0)
        resets = np.empty(0, np.uint8) if given.resets is None else as_plain(given.resets).view(np.uint8).reshape(-1)
        y = new_array((steps * batch, len(weights) * size.features), size.dtype, padded=rows.ragged)
        h_n, c_n = np.empty(h0.shape, size.dtype), np.empty(c0.shape, size.dtype)
        tapes = [
            _forward(size, weights[d], x, h0[d], c0[d], given, d, rows, resets, y, h_n[d], c_n[d])
            for d in range(len(weights))
        ]
        y = y.reshape(steps, batch, y.shape[1])
        parts = np.split(y, len(weights), axis=2)
        result = y if cell.merge == "concat" else merged(cell, parts)
        tape = LayerTape(given, x, rows, resets, tapes, parts) if given.keep_tape else None
        return LayerResult(result, h_n, c_n, tape)

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
        cell, size, rows = tape.given.cell, size_of(tape.given.cell, tape.given.layer), tape.rows
        steps, batch = rows.steps, rows.batch
        if dy is None:
            dy = np.empty((0, len(weights) * size.features), size.dtype)
        elif cell.merge != "concat":
            dy = np.concatenate(unmerged(cell, dy, tape.y), axis=2)
        dy = as_plain(dy).reshape(-1, len(weights) * size.features)
        dh_n, dc_n = as_plain(dh_n), as_plain(dc_n)
        dh0, dc0 = np.empty(dh_n.shape, size.dtype), np.empty(dc_n.shape, size.dtype)
        count = steps * batch if input_gradient else 0
        dx = new_array((count, size.inputs), size.dtype, padded=rows.ragged)
        found, of_steps = [], []
        for d in range(len(weights)):
            by_steps = [np.zeros((steps * batch if keep_steps else 0, s.shape[2]), size.dtype) for s in (dh_n, dc_n)]
            of_steps.append(by_steps)
            found.append(_backward(size, weights[d], tape, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d], by_steps))
        of_states = None
        if keep_steps:
            of_states = Steps(*(np.stack(by, axis=1).reshape(steps, batch, len(weights), -1).swapaxes(1, 2)
                                for by in zip(*of_steps, strict=True)))  # fmt: skip
        return LayerGradients(dx.reshape(tape.x.shape) if input_gradient else None, dh0, dc0, found, of_states)


def _forward(
    size: Size,
    weights: Weights,
    x: Array,  # (T, B, I)
    h0: Array,  # (B, F)
    c0: Array,
    given: Given,
    direction: int,
    rows: Rows,
    resets: Array,
    y: Array,  # (T * B, D * F), OUT
    h_n: Array,  # (B, F), OUT
    c_n: Array,
) -> Any:
    """Run one direction; return its tape."""
    cell, training = given.cell, given.keep_tape
    reverse = direction == 1 or cell.reverse
    count = rows.count if training else 0
    shapes = (
        (count if size.is_lstm else 0, size.blocks, TAPE if training and size.is_lstm else 0, size.width),
        (count, size.h_row), (count if size.is_lstm else 0, size.blocks * size.width),
        (count if size.keeps_outs else 0, size.out_row), (count if size.normed else 0, size.norm_row),
    )  # fmt: skip
    tape = DirectionTape(*one_block(size.dtype, *shapes))
    numbers = {
        forth.STEPS: rows.longest, forth.TOTAL: rows.steps, forth.COLUMN: direction * size.features,
        forth.CLEAR: int(rows.ragged and is_to_be_cleared(y)), forth.PACK: 1, forth.Y_ROW: y.shape[1],
        forth.HAS_RESETS: int(resets.size > 0),
    } | mask_numbers(forth.MASKS, given, direction, rows.batch)  # fmt: skip
    kept = weights.kept
    found = None if kept is None else kept.get(PACKED)
    workspace = packed_workspace(size)
    if found is None:
        parameters = arguments_of(size, weights)
        packed = (
            SCRATCH.borrow(workspace) if kept is None else one_block(size.dtype, (workspace.size,), lasting=True)[0]
        )
    else:
        (parameters, packed), numbers[forth.PACK] = found, 0
    arguments = (
        *parameters, rates_of(cell), rows.pack(x, reverse), h0, c0, rows.index(reverse), resets, y, h_n, c_n, *tape,
        packed,
    )  # fmt: skip
    masks = numbers.get(forth.MASKS + state_masks.RECURRENT, 0) > 0, cell.zoneout[1] > 0
    candidates = functools.partial(forward_candidates, size, rows.steps, rows.batch, training, *masks)
    launch(forth.phased_forward, arguments, candidates, rows.count, get_num_threads(), numbers)
    if kept is None:
        SCRATCH.give_back(workspace, packed)
    elif found is None:
        kept.setdefault(PACKED, (parameters, packed))
    return tape if training else None


def _backward(
    size: Size,
    weights: Weights,
    tape: LayerTape,
    direction: int,
    dy: Array,  # (T * B, D * F), or (0, D * F) for zero
    dh_n: Array,  # (B, F)
    dc_n: Array,
    dx: Array,  # (T * B, I), or (0, I) if it is not wanted, OUT
    dh0: Array,  # (B, F), OUT
    dc0: Array,
    by_steps: list[Array],  # (T * B, F) and (T * B, H), or empty, OUT
) -> Weights:
    """Back-propagate through one direction."""
    given, rows = tape.given, tape.rows
    reverse = direction == 1 or given.cell.reverse
    found = None if weights.kept is None else weights.kept.get(PACKED)
    parameters = found[0] if found else arguments_of(size, weights)
    grads = Arguments(*(new_array(array.shape, size.dtype) for array in parameters))
    numbers = {
        back.STEPS: rows.longest, back.TOTAL: rows.steps, back.COLUMN: direction * size.features,
        back.CLEAR: int(rows.ragged and not direction and is_to_be_cleared(dx)), back.ACCUMULATE: direction,
        back.CHUNK: chunk_of_size(size, rows.longest, rows.batch), back.DY_ROW: dy.shape[1],
        back.HAS_DY: int(dy.size > 0), back.HAS_STEPS: int(by_steps[0].size > 0),
        back.HAS_RESETS: int(tape.resets.size > 0),
    } | mask_numbers(back.MASKS, given, direction, rows.batch)  # fmt: skip
    p = parameters
    arguments = (
        p.weight_ih, p.weight_hh, p.own, p.weight_hr, p.gains, p.norm_c, rates_of(given.cell),
        rows.pack(tape.x, reverse), *tape.directions[direction], rows.index(reverse), tape.resets, dy, dh_n, dc_n, dx,
        dh0, dc0, *grads, *by_steps,
    )  # fmt: skip
    masks = numbers.get(back.MASKS + state_masks.RECURRENT, 0) > 0, given.cell.zoneout[1] > 0, given.cell.truncated
    candidates = functools.partial(backward_candidates, size, rows.steps, rows.batch, *masks)
    launch(back.phased_backward, arguments, candidates, rows.count, get_num_threads(), numbers)
    return gradients_of(size, weights, grads)


PHASED = PhasedBackend()
