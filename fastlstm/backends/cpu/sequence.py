"""The arguments of the kernels for large batches, ``sequence_forward`` and ``sequence_backward``."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.cpu.autotune import Trials
from fastlstm.backends.cpu.launch import Candidate, Candidates, launch, settings_of
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.schedule import Schedule, are_few, choose
from fastlstm.backends.cpu.weights import Size, arguments_of
from fastlstm.backends.cpu.workspace import Workspace, is_to_be_cleared, new_array, one_block
from fastlstm.backends.layers import Weights
from fastlstm.backends.threads import get_num_threads
from fastlstm.kernels.cpu import sequence_backward as back
from fastlstm.kernels.cpu import sequence_forward as forth
from fastlstm.kernels.cpu.cell_step import GATES, TAPE
from fastlstm.kernels.cpu.gemm_microkernel import MC, MR, NR

__all__ = ["DirectionTape", "direction_backward", "direction_forward", "schedules"]

# Rows of a chunk of the backward pass, if a quarter of the steps has so many: below, fetching the weights and their
# gradients anew for each chunk would cost too much.
_CHUNK_ROWS = 256
# Numbers of rows from here on are rounded up, so that a ragged batch finds the schedule of others of about its size.
_EXACT_ROWS = 1024


class DirectionTape(NamedTuple):
    """What one direction leaves on the tape."""

    gates: Array  # (N, Hp/V, 5, V): i, f, g, o, c; or (N, Hp/V, 1, V): c alone
    h_rows: Array  # (N, Hp): the h before each row's step
    c0: Array  # (B, H)


def direction_forward(
    size: Size,
    weights: Weights,
    packed: tuple[Array, Array] | None,
    x: Array,
    h0: Array,
    c0: Array,
    rows: Rows,
    direction: int,
    y: Array,
    h_n: Array,
    c_n: Array,
    keep_tape: bool,
    recompute: bool,
    threads: int,
    launch: Any = launch,
) -> DirectionTape | None:
    """Run one direction; writes y, h_n and c_n. The kernel is launched by `launch`, which may be that of ``AtOnce``."""
    few, dtype = are_few(rows.count, size.inputs, size.hidden, MR), size.dtype
    # What the unpacked weights gave could not be computed again to the same bits, and is little.
    recompute = recompute and not few
    kept = 1 if recompute else TAPE
    if keep_tape:
        tape, h_rows = one_block(dtype, (rows.count, size.blocks, kept, size.width), (rows.count, size.stride))
    else:
        tape, h_rows = _nothing(size)[:2]
    arguments = (
        *arguments_of(weights, size), rows.pack(x, direction == 1), h0, c0, rows.index(direction == 1), y, h_n, c_n,
        tape, h_rows, *(packed or _nothing(size)[2:]),
    )  # fmt: skip
    steps = 0 if rows.ragged else rows.steps
    numbers = None
    if rows.ragged:
        numbers = {forth.STEPS: rows.longest, forth.TOTAL: rows.steps, forth.CLEAR: int(is_to_be_cleared(y))}
    candidates = functools.partial(
        _forward_candidates, size, steps, rows.batch, _rounded(rows.count), few, keep_tape, packed is not None,
        direction * size.hidden,
    )  # fmt: skip
    launch(forth.sequence_forward, arguments, candidates, rows.count, threads, numbers)
    return DirectionTape(tape, h_rows, c0.copy()) if keep_tape else None


@functools.lru_cache(maxsize=64)
def _nothing(size: Size) -> tuple[Array, ...]:
    """Return what stands for no tape, no rows of h, and no packed weights."""
    shapes = (0, size.blocks, 0, size.width), (0, size.stride), (0, GATES, size.width), (2, 0, GATES, size.width)
    return tuple(np.empty(shape, size.dtype) for shape in shapes)


def _rounded(rows: int) -> int:
    """Round a large number of rows up, to its five leading bits."""
    if rows < _EXACT_ROWS:
        return rows
    unit = 1 << (rows.bit_length() - 5)
    return -(-rows // unit) * unit


def schedules(
    size: Size, rows: int, batch: int, threads: int, *, few: bool | None = None, directions: int = 1,
    backward: bool = False, packed: bool = False,
) -> tuple[Schedule, ...]:  # fmt: skip
    """Choose a schedule for the layer or for one direction of it, or several to try."""
    few = are_few(rows, size.inputs, size.hidden, MR) if few is None else few
    sizes = rows, batch, size.inputs, size.hidden, size.blocks
    return choose(*sizes, MR, threads, few=few, directions=directions, backward=backward, packed=packed)


@functools.lru_cache(maxsize=Trials.KINDS)
def _kind(*_: Any) -> object:
    """Return an object for each kind of call, found faster than what it stands for."""
    return object()


@functools.lru_cache(maxsize=256)
def _forward_candidates(
    size: Size, steps: int, batch: int, rows: int, few: bool, training: bool, packed: bool, column: int, threads: int
) -> Candidates:
    """Return the ways to launch the forward kernel; `steps` is T, or 0 for a ragged batch."""
    chosen = schedules(size, rows, batch, threads, few=few, packed=packed)
    found = []
    for schedule in chosen:
        pack = not (packed or schedule.unpacked)
        ahead, block_row = schedule.ahead, GATES * size.width
        a_row = size.blocks * block_row if ahead else block_row
        workspace = Workspace(
            size.dtype, (0 if training else 2 * batch, size.stride), (batch, size.stride),
            (ahead * batch if ahead else schedule.threads * MC, a_row), *(size.packed_shapes if pack else ((0,), (0,))),
        )  # fmt: skip
        starts = dict(
            zip((forth.H_ROWS, forth.C_ROWS, forth.A, forth.WEIGHTS, forth.BIAS), workspace.starts, strict=True)
        )
        numbers = {
            forth.BATCH: batch, forth.STEPS: steps, forth.TOTAL: steps, forth.COLUMN: column, forth.TRAINING: training,
            forth.PACK: pack, forth.IS_PACKED: pack or packed, forth.AHEAD: ahead,
            forth.DIVIDED: schedule.kind == "units", forth.A_ROW: a_row,
        }  # fmt: skip
        settings = settings_of(forth.SETTINGS, numbers | starts, size.addresses)
        found.append(Candidate(schedule, (workspace,), settings))
    kind = _kind(forth, size, batch, rows.bit_length(), chosen, packed) if len(chosen) > 1 else None
    return Candidates(tuple(found), kind)


def _chunk(steps: int, batch: int) -> int:
    """Steps whose gate gradients, and with `recompute` their gates, are kept at a time."""
    return max(1, -(-steps // 8), min(-(-steps // 4), -(-_CHUNK_ROWS // batch)))


def direction_backward(
    size: Size,
    weights: Weights,
    x: Array,
    tape: DirectionTape,
    rows: Rows,
    direction: int,
    dy: Array,
    dh_n: Array,
    dc_n: Array,
    dx: Array,
    dh0: Array,
    dc0: Array,
) -> Weights:
    """Back-propagate through one direction; writes dx, dh0 and dc0."""
    reverse, recompute = direction == 1, tape.gates.shape[2] < TAPE
    given = arguments_of(weights, size)
    grads = [new_array(array.shape, size.dtype) for array in given]
    arguments = (
        *given, rows.pack(x, reverse), *tape, rows.index(reverse), dy, dh_n, dc_n, dx, dh0, dc0, *grads,
    )  # fmt: skip
    numbers = None
    if rows.ragged:
        clear = int(not reverse and is_to_be_cleared(dx))
        chunk = _chunk(rows.longest, rows.batch)
        numbers = {back.STEPS: rows.longest, back.CLEAR: clear, back.CHUNK: chunk}
    candidates = functools.partial(
        _backward_candidates, size, rows.steps, rows.batch, _rounded(rows.count), recompute, direction,
    )  # fmt: skip
    launch(back.sequence_backward, arguments, candidates, rows.count, get_num_threads(), numbers)
    return Weights(
        grads[0], grads[1], None if weights.bias is None else grads[2],
        None if weights.weight_peephole is None else grads[3],
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _backward_candidates(
    size: Size, steps: int, batch: int, rows: int, recompute: bool, direction: int, threads: int
) -> Candidates:
    """Return the ways to launch the backward kernel; `steps` is T."""
    chosen = schedules(size, rows, batch, threads, backward=True)
    chunk = _chunk(steps, batch)
    chunk_rows, depth, panel = chunk * batch, GATES * size.stride, NR * size.width
    of_x, of_h = ((-(-columns // panel), depth, panel) for columns in (size.inputs, size.hidden))
    again = None
    numbers = {
        back.BATCH: batch, back.STEPS: steps, back.TOTAL: steps, back.COLUMN: direction * size.hidden,
        back.ACCUMULATE: direction, back.CHUNK: chunk, back.CHUNK_ROWS: chunk_rows,
    }  # fmt: skip
    if recompute:
        again = Workspace(size.dtype, (chunk_rows, size.blocks, TAPE, size.width), *size.packed_shapes)
        numbers |= dict(zip((back.GATE_ROWS, back.WEIGHTS, back.BIAS), again.starts, strict=True))
    found = []
    for schedule in chosen:
        states, panels = (batch, size.stride), (schedule.threads, back.PANEL_ROWS, panel)
        workspace = Workspace(
            size.dtype, (chunk_rows, depth), states, states, of_x, of_h, of_x, of_h, (depth,), panels
        )  # fmt: skip
        places = (back.DA, back.DH_ROWS, back.DC_ROWS, back.OF_X, back.OF_H, back.SUMS_IH, back.SUMS_HH, back.SUMS_BIAS,
                  back.PANEL)  # fmt: skip
        starts = dict(zip(places, workspace.starts, strict=True))
        settings = settings_of(
            back.SETTINGS, numbers | starts | {back.DIVIDED: schedule.kind == "units"}, size.addresses
        )
        found.append(Candidate(schedule, (workspace, again), settings))
    kind = _kind(back, size, batch, rows.bit_length(), chosen) if len(chosen) > 1 else None
    return Candidates(tuple(found), kind)
