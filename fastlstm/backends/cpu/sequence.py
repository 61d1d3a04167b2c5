"""The arguments of the kernels for large batches, ``sequence_forward`` and ``sequence_backward``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy import ndarray  # a global name is looked up faster than an attribute

from fastlstm.backends.base import Array, Params, Signature
from fastlstm.backends.cpu.autotune import Trials
from fastlstm.backends.cpu.launch import Candidate, Candidates, launch, settings_of
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.schedule import Schedule, are_few, choose
from fastlstm.backends.cpu.weights import Size
from fastlstm.backends.cpu.workspace import Workspace, is_to_be_cleared, new_array, one_block
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.threads import get_num_threads
from fastlstm.kernels.cpu import sequence_backward as back
from fastlstm.kernels.cpu import sequence_forward as forth
from fastlstm.kernels.cpu.cell_step import GATES, TAPE
from fastlstm.kernels.cpu.gemm_microkernel import MC, MR, NR

__all__ = ["DirectionCall", "DirectionTape", "chunk_of", "schedules"]

# Rows of a chunk of the backward pass, if a quarter of the steps has so many: with smaller chunks, reading the weights
# and their gradients again for each chunk takes too long.
_CHUNK_ROWS = 256
_MOST_FOUND = 64
# Numbers of rows from here on are rounded up, so that a ragged batch finds the schedule of others of about its size.
_EXACT_ROWS = 1024


class DirectionTape(NamedTuple):
    """The tape of one direction."""

    gates: Array  # (N, Hp/V, 5, V): i, f, g, o, c; or (N, Hp/V, 1, V): c alone
    h_rows: Array  # (N, Hp): the h before each row's step
    c0: Array  # (B, H)


class DirectionCall:
    """One direction of one layer of a prepared call.

    Parameters
    ----------
    size : Size
        Of the layer.
    names : dict of str to str
        The parameters' names, by their roles.
    direction : int
        0 forward, 1 reverse.
    signature : Signature
        What the calls have in common.
    """

    def __init__(self, size: Size, names: dict[str, str], direction: int, signature: Signature) -> None:
        self.size, self.direction, self.keep_tape = size, direction, signature.keep_tape
        self.reverse = direction == 1 or size.reverse
        self.names = tuple(names.get(role) for role in ("weight_ih", "weight_hh", "bias", "weight_peephole"))
        self.steps, self.batch, self.packed = signature.steps, signature.batch, signature.frozen
        self._nothing = _nothing(size)
        self._found: dict[Any, Candidates] = {}
        self._equal_forward = functools.partial(self._forward_candidates, None)

    def arguments(self, arrays: Params) -> tuple[Array, Array, Array, Array]:
        """Return weights, bias and a variant's own parameters as the kernels take them; empty for none."""
        ih, hh, bias, own = self.names
        w, u = arrays[ih], arrays[hh]  # type: ignore[index]
        b = self._nothing.bias if bias is None else arrays[bias]
        p = self._nothing.own if own is None else arrays[own]
        return (
            w if type(w) is ndarray and w.flags.carray else as_plain(w),
            u if type(u) is ndarray and u.flags.carray else as_plain(u),
            b if type(b) is ndarray and b.flags.carray else as_plain(b),
            p if type(p) is ndarray and p.flags.carray else as_plain(p),
        )

    def given(self, arrays: Params) -> tuple[Any, Any, Any, Any]:
        """Return the same as they are, None if one is missing, for kernels that refuse what they do not take."""
        (ih, hh, bias, own), get, nothing = self.names, arrays.get, self._nothing
        return (
            get(ih),  # type: ignore[arg-type]
            get(hh),  # type: ignore[arg-type]
            nothing.bias if bias is None else get(bias),
            nothing.own if own is None else get(own),
        )

    def named(self, grads: Sequence[Array]) -> dict[str, Array]:
        """Return gradients, in the order of :meth:`arguments`, under the parameters' names."""
        found: dict[Any, Array] = dict(zip(self.names, grads, strict=True))
        found.pop(None, None)  # what there is none of; to pass over it takes longer
        return found

    def forward(
        self,
        arrays: Params,
        packed: tuple[Array, Array] | None,
        x: Array,
        h0: Array,
        c0: Array,
        rows: Rows,
        y: Array,
        h_n: Array,
        c_n: Array,
        recompute: bool,
        threads: int,
        launch: Any = launch,
    ) -> DirectionTape | None:
        """Run the direction; writes y, h_n and c_n. `launch` launches the kernel; it may be that of ``AtOnce``."""
        size, reverse = self.size, self.reverse
        tape, h_rows = self._nothing.tape, self._nothing.h_rows
        if self.keep_tape:
            # Gates from unpacked weights could not be recomputed bit-identically, and take little memory.
            kept = 1 if recompute and not self._are_few(rows) else TAPE
            shapes = (rows.count, size.blocks, kept, size.width), (rows.count, size.stride)
            tape, h_rows = one_block(size.dtype, *shapes)
        arguments = (
            *self.arguments(arrays), rows.pack(x, reverse), h0, c0, rows.index(reverse), y, h_n, c_n, tape, h_rows,
            *(packed or self._nothing.packed),
        )  # fmt: skip
        numbers, candidates = None, self._equal_forward
        if rows.ragged:
            clear = int(is_to_be_cleared(y))
            numbers = {forth.STEPS: rows.longest, forth.TOTAL: rows.steps, forth.CLEAR: clear}
            candidates = functools.partial(self._forward_candidates, (_rounded(rows.count), self._are_few(rows)))
        if rows.resets is not None:
            numbers = (numbers or {}) | {forth.RESETS: 1}
        launch(forth.sequence_forward, arguments, candidates, rows.count, threads, numbers)
        return DirectionTape(tape, h_rows, c0.copy()) if self.keep_tape else None

    def _are_few(self, rows: Rows) -> bool:
        """Say whether there are too few rows for packing the weights."""
        return are_few(rows.count, self.size.inputs, self.size.hidden, MR)

    def _forward_candidates(self, kind: Any, threads: int) -> Candidates:
        """Return candidates for the forward kernel; `kind` is None, or rows and ``few`` of a ragged batch."""
        found = self._found.get((kind, threads))
        if found is None:
            count, few = kind or (self.steps * self.batch, None)
            few = are_few(count, self.size.inputs, self.size.hidden, MR) if few is None else few
            self._forget()
            found = self._found[kind, threads] = _forward_candidates(
                self.size, 0 if kind else self.steps, self.batch, count, few, self.keep_tape, self.packed,
                self.direction * self.size.hidden, threads,
            )  # fmt: skip
        return found

    def backward(
        self,
        arrays: Params,
        x: Array,
        tape: DirectionTape,
        rows: Rows,
        dy: Array,
        dh_n: Array,
        dc_n: Array,
        dx: Array,
        dh0: Array,
        dc0: Array,
    ) -> list[Array]:
        """Back-propagate; writes dx, unless it is empty, dh0 and dc0.

        Returns the gradients in the order of :meth:`arguments`.
        """
        recompute = tape.gates.shape[2] < TAPE
        given = self.arguments(arrays)
        grads = [new_array(array.shape, self.size.dtype) for array in given]
        arguments = (
            *given, rows.pack(x, self.reverse), *tape, rows.index(self.reverse), dy, dh_n, dc_n, dx, dh0, dc0, *grads,
        )  # fmt: skip
        numbers, count = None, 0
        if rows.ragged:
            clear, chunk = int(self.direction == 0 and is_to_be_cleared(dx)), chunk_of(rows.longest, rows.batch)
            numbers = {back.STEPS: rows.longest, back.CLEAR: clear, back.CHUNK: chunk}
            count = _rounded(rows.count)
        if rows.resets is not None:
            numbers = (numbers or {}) | {back.RESETS: 1}
        finder = functools.partial(self._backward_candidates, ("back", count, recompute))
        launch(back.sequence_backward, arguments, finder, rows.count, get_num_threads(), numbers)
        return grads

    def _backward_candidates(self, kind: Any, threads: int) -> Candidates:
        """Return candidates for the backward kernel; `kind` has the rows of a ragged batch, and `recompute`."""
        found = self._found.get((kind, threads))
        if found is None:
            _, count, recompute = kind
            self._forget()
            found = self._found[kind, threads] = _backward_candidates(
                self.size, self.steps, self.batch, count or self.steps * self.batch, recompute, self.direction, threads
            )
        return found

    def _forget(self) -> None:
        """Keep candidates for so many kinds of ragged batches, and no more."""
        if len(self._found) >= _MOST_FOUND:
            self._found.clear()


class _Nothing(NamedTuple):
    """Arrays that stand for what a layer does not have."""

    tape: Array
    h_rows: Array
    packed: tuple[Array, Array]
    bias: Array
    own: Array


@functools.lru_cache(maxsize=64)
def _nothing(size: Size) -> _Nothing:
    def empty(*shape: int) -> Array:
        return np.empty(shape, size.dtype)

    packed = empty(0, GATES, size.width), empty(2, 0, GATES, size.width)
    return _Nothing(
        empty(0, size.blocks, 0, size.width), empty(0, size.stride), packed, empty(0), empty(0, size.hidden)
    )


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


def _forward_candidates(
    size: Size, steps: int, batch: int, rows: int, few: bool, training: bool, packed: bool, column: int, threads: int
) -> Candidates:
    """Return candidates for the forward kernel; `steps` is T, or 0 for a ragged batch."""
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


def chunk_of(steps: int, batch: int) -> int:
    """Steps whose gate gradients, and with `recompute` their gates, are kept at a time."""
    return max(1, -(-steps // 8), min(-(-steps // 4), -(-_CHUNK_ROWS // batch)))


def _backward_candidates(
    size: Size, steps: int, batch: int, rows: int, recompute: bool, direction: int, threads: int
) -> Candidates:
    """Return candidates for the backward kernel; `steps` is T."""
    chosen = schedules(size, rows, batch, threads, backward=True)
    chunk = chunk_of(steps, batch)
    chunk_rows, depth, panel = chunk * batch, GATES * size.stride, NR * size.width
    of_x, of_h = ((-(-columns // panel), depth, panel) for columns in (size.inputs, size.hidden))
    again = None
    numbers = {
        back.BATCH: batch, back.STEPS: steps, back.TOTAL: steps, back.COLUMN: direction * size.hidden,
        back.ACCUMULATE: direction, back.CHUNK: chunk, back.CHUNK_ROWS: chunk_rows, back.TRUNCATED: size.truncated,
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
