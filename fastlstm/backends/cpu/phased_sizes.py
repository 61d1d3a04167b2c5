"""Cells with phases: sizes, parameters and settings as the kernels take them, and candidate schedules."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Params
from fastlstm.backends.cpu.launch import Candidate, Candidates, settings_of
from fastlstm.backends.cpu.schedule import Schedule
from fastlstm.backends.cpu.sequence import chunk_of
from fastlstm.backends.cpu.weights import variant_of
from fastlstm.backends.cpu.workspace import Workspace
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.backends.layers import RECURRENT, ZONEOUT_C, ZONEOUT_H, Given, Weights, mask_key, mask_start
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu import phased_backward as back
from fastlstm.kernels.cpu import phased_cells, state_masks
from fastlstm.kernels.cpu import phased_forward as forth
from fastlstm.kernels.cpu.cell_step import GATES, TAPE, cell_addresses
from fastlstm.kernels.cpu.gemm_microkernel import MC, MR, NR
from fastlstm.kernels.cpu.vector import lanes
from fastlstm.kernels.cpu.weight_gradients import PANEL_ROWS
from fastlstm.parameters import GATES as GATE_NAMES

__all__ = [
    "PACKED", "Arguments", "Size", "arguments_of", "backward_candidates", "chunk_of_size", "forward_candidates",
    "gradients_of", "mask_numbers", "packed_workspace", "rates_of", "schedule_of", "size_of", "unfolded",
]  # fmt: skip

# Under these keys they are kept with weights that never change.
PACKED, _UNFOLDED = "packed for the phased kernels", "with rows for all gates, for the phased kernels"

# Rows of input products that are computed together where each step has few, and work that is worth a thread: as in
# ``schedule.py``.
_ROWS_AHEAD, _OPERATIONS_WORTH_A_THREAD = 48, 2_000_000


class Size(NamedTuple):
    """One layer in one direction: its sizes, and what its step has."""

    inputs: int  # I
    features: int  # F, of h
    units: int  # U
    out_units: int  # U of the projection, 0 for none
    width: int  # V, lanes of a vector
    kind: int  # of cell
    normed: bool
    own: int  # rows of a variant's own parameters, E
    sees: int  # S of the blocks that gates see, 0 for none
    dtype: Any
    addresses: tuple[int, ...]  # of the variant's routines

    @property
    def blocks(self) -> int:
        """Vectors that U takes."""
        return -(-self.units // self.width)

    @property
    def out_blocks(self) -> int:
        """Vectors that U of the projection takes."""
        return -(-self.out_units // self.width)

    @property
    def is_lstm(self) -> bool:
        """Whether it has gates and a cell state."""
        return bool(self.kind == phased_cells.LSTM)

    @property
    def h_row(self) -> int:
        """Numbers of a row of h: room for what is spread from four vectors."""
        features = self.features if self.is_lstm and not self.out_units else GATES * (self.out_units or self.units)
        return -(-features // self.width) * self.width

    @property
    def out_row(self) -> int:
        """Numbers of a row of the cell's output."""
        return self.blocks * self.width if self.is_lstm else self.h_row

    @property
    def norm_row(self) -> int:
        """Numbers of what layer norm leaves for a row."""
        vectors = (2 * GATES + 1) * self.blocks + phased_cells.NORM_VECTORS
        return int(vectors * self.width) if self.normed else 0

    @property
    def gates_row(self) -> int:
        """Numbers of a row of pre-activations."""
        return int(self.blocks * GATES * self.width)

    @property
    def keeps_outs(self) -> bool:
        """Whether the output of the cell is kept for the backward pass."""
        return self.out_units > 0 or not self.is_lstm


@functools.lru_cache(maxsize=256)
def size_of(cell: Cell, layer: int) -> Size:
    """Return the size of one layer of a model; compiles the routines of its variant, if it has any."""
    kind = {None: phased_cells.LSTM, "tanh": phased_cells.TANH, "relu": phased_cells.RELU}[cell.nonlinearity]
    variant = variant_of(cell)._replace(normed=cell.layer_norm)
    units = cell.hidden_size if kind == phased_cells.LSTM else -(-cell.hidden_size // GATES)
    return Size(
        cell.layer_input_size(layer), cell.h_size, units, -(-cell.proj_size // GATES), lanes(cell.dtype), kind,
        cell.layer_norm, 3 if cell.peephole else 0, cell.block_size if cell.sees_blocks else 0, cell.dtype,
        cell_addresses(variant, cell.dtype),
    )  # fmt: skip


class Arguments(NamedTuple):
    """The parameters of one layer in one direction, as the kernels take them."""

    weight_ih: Array  # (4U, I)
    weight_hh: Array  # (4U, F)
    bias: Array  # (4U,) or (0,)
    own: Array  # (E, H)
    weight_hr: Array  # (4U of the projection, H) or (0, H)
    gains: Array  # (2, 4U) or (0, 4U)
    norm_c: Array  # (2, H) or (0, H)


def arguments_of(size: Size, weights: Weights) -> Arguments:
    """Return the parameters of a direction as the kernels take them."""
    rows, units = GATES * size.units, size.units

    def padded(array: Array | None, rows: int, *nothing: int) -> Array:
        """Return an array with rows of zeros, to a multiple of four."""
        if array is None:
            return np.empty(nothing, size.dtype)
        if len(array) == rows:
            return as_plain(array)
        found = np.zeros((rows, *array.shape[1:]), size.dtype)
        found[: len(array)] = array
        return found

    gains, norm_c = np.empty((0, rows), size.dtype), np.empty((0, units), size.dtype)
    if size.normed:
        # np.stack takes 3 us.
        gains = np.concatenate((weights.ln_gain_ih, weights.ln_gain_hh)).reshape(2, rows)  # type: ignore[arg-type]
        norm_c = np.concatenate((weights.ln_gain_c, weights.ln_bias_c)).reshape(2, units)  # type: ignore[arg-type]
    return Arguments(
        padded(weights.weight_ih, rows), padded(weights.weight_hh, rows), padded(weights.bias, rows, 0),
        padded(weights.weight_peephole, size.own, 0, units),
        padded(weights.weight_hr, GATES * size.out_units, 0, units), gains, norm_c,
    )  # fmt: skip


def gradients_of(size: Size, weights: Weights, grads: Arguments) -> Weights:
    """Return gradients under the parameters' names, without the rows that were added."""

    def cut(like: Array | None, array: Array) -> Array | None:
        return None if like is None else array if len(array) == len(like) else array[: len(like)].copy()

    norms = (*grads.gains, *grads.norm_c) if size.normed else (None,) * 4
    return Weights(
        cut(weights.weight_ih, grads.weight_ih), cut(weights.weight_hh, grads.weight_hh), cut(weights.bias, grads.bias),
        cut(weights.weight_peephole, grads.own), cut(weights.weight_hr, grads.weight_hr), *map(_own_memory, norms),
    )  # fmt: skip


def _own_memory(array: Array | None) -> Array | None:
    return None if array is None else array.copy()


@functools.lru_cache(maxsize=256)
def packed_workspace(size: Size) -> Workspace:
    """Return where the packed weights lie."""
    tile_row = GATES * size.width
    return Workspace(
        size.dtype, (size.blocks * size.inputs, tile_row), (size.blocks * size.features, tile_row), (size.gates_row,),
        (2 * size.gates_row if size.normed else 0,), (size.out_blocks * size.units, tile_row),
    )  # fmt: skip


def _threads(size: Size, rows: int, batch: int, threads: int) -> int:
    """Choose a number of threads, each of which has its own sequences."""
    operations = 8 * rows * size.units * (size.inputs + size.features)
    return max(1, min(threads, 1 + operations // _OPERATIONS_WORTH_A_THREAD, int(batch // (2 * MR))))


def schedule_of(threads: int, ahead: int) -> Schedule:
    """Return the schedule of so many threads."""
    return Schedule("rows" if threads > 1 else "serial", threads, ahead)


@functools.lru_cache(maxsize=256)
def forward_candidates(
    size: Size, steps: int, batch: int, training: bool, recurrent: bool, zone_h: bool, most: int
) -> Candidates:
    """Return the way to launch the forward kernel on at most so many threads."""
    threads = _threads(size, steps * batch, batch, most)
    few = batch < 2 * MR
    ahead = min(steps, -(-_ROWS_AHEAD // batch)) if few and steps > 1 else 0
    whole = few or size.normed or size.sees > 0
    a_row = size.gates_row if whole else GATES * size.width
    room = threads * MC
    keeps = 0 if training else batch
    workspace = Workspace(
        size.dtype, (keeps, size.h_row), (keeps * size.is_lstm, size.blocks * size.width),
        (batch * zone_h, size.h_row), (batch * recurrent, size.h_row), (ahead * batch if ahead else room, a_row),
        (room * (size.normed or size.out_units > 0), size.gates_row),
        (0 if training and size.keeps_outs else room, size.out_row), (room * (size.out_units > 0), size.h_row),
        (0 if training else threads, size.norm_row),
    )  # fmt: skip
    numbers = {
        forth.BATCH: batch, forth.STEPS: steps, forth.TOTAL: steps, forth.TRAINING: training, forth.AHEAD: ahead,
        forth.WHOLE: whole, forth.A_ROW: a_row, forth.KEPT: TAPE if training and size.is_lstm else 0,
        forth.KEEPS_OUTS: training and size.keeps_outs,
    } | _numbers_of(forth, size)  # fmt: skip
    places = (forth.H_ROWS, forth.C_ROWS, forth.H_STATE, forth.FACTORS, forth.A, forth.A_H, forth.OUTS, forth.H_NEW,
              forth.NORMS)  # fmt: skip
    of_packed = forth.OF_X, forth.OF_H, forth.BIAS, forth.GAINS, forth.OF_OUT
    numbers |= dict(zip(places, workspace.starts, strict=True))
    numbers |= dict(zip(of_packed, packed_workspace(size).starts, strict=True))
    settings = settings_of(forth.SETTINGS, numbers, size.addresses)
    return Candidates((Candidate(schedule_of(threads, ahead), (workspace,), settings),), None)


def _numbers_of(kernel: Any, size: Size) -> dict[int, int]:
    """Return the numbers that both kernels take of a size."""
    return {
        kernel.NORMED: size.normed, kernel.KIND: size.kind, kernel.INPUTS: size.inputs, kernel.UNITS: size.units,
        kernel.OUT_UNITS: size.out_units, kernel.FEATURES: size.features, kernel.BLOCKS: size.blocks,
        kernel.WIDTH: size.width, kernel.H_ROW: size.h_row, kernel.OUT_ROW: size.out_row,
        kernel.NORM_ROW: size.norm_row, kernel.SEES: size.sees,
    }  # fmt: skip


def chunk_of_size(size: Size, steps: int, batch: int) -> int:
    """Return for how many steps gate gradients are kept: with layer norm, which has them thrice, for half as many."""
    chunk = chunk_of(steps, batch)
    return -(-chunk // 2) if size.normed else chunk


@functools.lru_cache(maxsize=256)
def backward_candidates(
    size: Size, steps: int, batch: int, recurrent: bool, zone_h: bool, truncated: bool, most: int
) -> Candidates:
    """Return the way to launch the backward kernel on at most so many threads."""
    threads, chunk_rows = _threads(size, steps * batch, batch, most), chunk_of_size(size, steps, batch) * batch
    width, depth, stride = size.width, size.gates_row, size.blocks * size.width
    panel, out_depth = NR * width, size.out_blocks * GATES * width

    def panels(columns: int, depth: int) -> tuple[int, ...]:
        return -(-columns // panel), depth, panel

    of_x, of_h, of_out = (
        panels(columns, rows)
        for columns, rows in ((size.inputs, depth), (size.features, depth), (size.units, out_depth))
    )
    normed = int(size.normed)
    shapes = {
        back.DA: (chunk_rows, depth), back.DA_X: (chunk_rows * normed, depth), back.DA_H: (chunk_rows * normed, depth),
        back.D_SHOWN: (chunk_rows * normed, stride), back.D_OUT: (chunk_rows, out_depth),
        back.DH_ROWS: (batch, size.h_row), back.DH_OLD: (batch * zone_h, size.h_row),
        back.DC_ROWS: (batch * size.is_lstm, stride), back.DOUT_ROWS: (batch * (size.out_units > 0), stride),
        back.FACTORS: (batch * recurrent, size.h_row), back.OF_X: of_x, back.OF_H: of_h, back.OF_OUT: of_out,
        back.SUMS_IH: of_x, back.SUMS_HH: of_h, back.SUMS_OUT: of_out, back.SUMS_BIAS: (depth,),
        back.SUMS_GAINS: (2 * depth * normed,), back.SUMS_C: (2 * stride * normed,), back.GAINS: (2 * depth * normed,),
        back.D_ROW: (threads * (size.normed or size.sees > 0), stride), back.PANEL: (threads, PANEL_ROWS, panel),
    }  # fmt: skip
    workspace = Workspace(size.dtype, *shapes.values())
    numbers = {
        back.BATCH: batch, back.STEPS: steps, back.TOTAL: steps, back.CHUNK_ROWS: chunk_rows, back.TRUNCATED: truncated,
        back.OUT_BLOCKS: size.out_blocks, back.DOUT_ROW: stride if size.out_units else size.h_row,
    } | _numbers_of(back, size) | dict(zip(shapes, workspace.starts, strict=True))  # fmt: skip
    settings = settings_of(back.SETTINGS, numbers, size.addresses)
    return Candidates((Candidate(schedule_of(threads, 0), (workspace,), settings),), None)


def mask_numbers(first: int, given: Given, direction: int, batch: int) -> dict[int, int]:
    """Return the numbers that determine the masks, by their places in the settings, of which they begin at `first`."""
    cell, draws = given.cell, given.draws
    found: dict[int, int] = {}
    # The last is the mask's numbers a step.
    kinds = (
        (ZONEOUT_C, state_masks.ZONE_C, state_masks.START_C, state_masks.THRESHOLD_C, cell.zoneout[0],
         batch * cell.c_size),
        (ZONEOUT_H, state_masks.ZONE_H, state_masks.START_H, state_masks.THRESHOLD_H, cell.zoneout[1],
         batch * cell.h_size),
        (RECURRENT, state_masks.RECURRENT, state_masks.START_R, state_masks.THRESHOLD_R, cell.recurrent_dropout, 0),
    )  # fmt: skip
    for kind, what, start, threshold, probability, a_step in kinds:
        if probability and draws:
            key = mask_start(mask_key(given, direction, kind), draws.steps * a_step)
            found |= {
                first + what: state_masks.DRAWN, first + start: int(key.astype(np.int64)),
                first + threshold: math.ceil(probability * 2**53),
            }  # fmt: skip
        elif probability and kind != RECURRENT:
            found[first + what] = state_masks.EXPECTED
    return found


@functools.lru_cache(maxsize=256)
def rates_of(cell: Cell) -> Array:
    """Return the numbers of a cell that the kernels take, see ``state_masks.Masks``."""
    shares = [cell.gate_size(gate) / cell.hidden_size if gate in cell.gates else 0.0 for gate in GATE_NAMES]
    return np.array([*cell.zoneout, 1.0 / (1.0 - cell.recurrent_dropout), *shares, cell.rows], cell.dtype)


def unfolded(cell: Cell, params: Params) -> Params:
    """Return the parameters as the kernels take them, with rows for all gates."""
    if not is_folded(cell):
        return params
    if not isinstance(params, FrozenParams):
        return Folding(cell).unfold(params)
    found: FrozenParams | None = params.kept.get(_UNFOLDED)
    if found is None:
        # Frozen as well, so that packed weights are kept with them.
        found = params.kept.setdefault(_UNFOLDED, FrozenParams(cell, Folding(cell).unfold(params.arrays)))
    return found
