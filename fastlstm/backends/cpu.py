"""The CPU backend: sorts and packs the batch, provides memory and threads, and calls ``kernels/cpu``.

The kernels see the sequences sorted by length and their steps packed (``kernels/cpu/sequence.py`` says
how). What a training call keeps are, for each layer and direction, six numbers a hidden unit and step: the
four gates, c, and the h before the step; the backward pass adds one for the gradients of the gates, which
are kept for a quarter of the steps at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.layers import LayeredBackend, LayerGradients, LayerResult, Weights
from fastlstm.backends.threads import get_num_threads, run_team
from fastlstm.kernels.cpu.gates import GATES, TAPE
from fastlstm.kernels.cpu.sequence import layer_backward, layer_forward
from fastlstm.kernels.cpu.simd import lanes
from fastlstm.kernels.cpu.tile import ROWS

__all__ = ["BACKEND", "CpuBackend"]

# Waking a worker takes some 20 microseconds, in which one core does about this many operations.
_OPERATIONS_WORTH_A_THREAD = 4_000_000


@dataclass(frozen=True)
class Packing:
    """How the steps of a ragged batch are packed: the longest sequence first, step by step, without padding."""

    steps: int  # T
    order: Array  # (B,) the sequence at each row
    lengths: Array  # (B,) in that order, descending
    offsets: Array  # (S + 1,) first row of each step
    ragged: bool

    @classmethod
    def of(cls, lengths: Array | None, steps: int, batch: int) -> Packing:
        """Work out the packing of a batch; None stands for equal lengths."""
        if lengths is None or (lengths == steps).all():
            offsets = np.arange(steps + 1, dtype=np.int64) * batch
            return cls(steps, np.arange(batch), np.full(batch, steps, np.int64), offsets, False)
        order = np.argsort(-lengths, kind="stable")
        sorted_lengths = lengths[order]
        active = batch - np.searchsorted(sorted_lengths[::-1], np.arange(sorted_lengths[0]), side="right")
        offsets = np.zeros(active.size + 1, np.int64)
        np.cumsum(active, out=offsets[1:])
        return cls(steps, order, sorted_lengths, offsets, True)

    @property
    def rows(self) -> int:
        """N, the number of steps of all sequences."""
        return int(self.offsets[-1])

    def pack(self, x: Array, reverse: bool, width: int) -> Array:
        """Pack a sequence (T, B, I) into (N, I padded to a multiple of `width`)."""
        batch, inputs = x.shape[1:]
        padded = -(-inputs // width) * width
        flat = x.reshape(-1, inputs)
        if not self.ragged and not reverse:
            source: Any = slice(None)
            if padded == inputs:
                return flat
        else:
            step = np.repeat(np.arange(self.offsets.size - 1), np.diff(self.offsets))
            row = np.arange(self.rows) - self.offsets[step]
            source = (self.lengths[row] - 1 - step if reverse else step) * batch + self.order[row]
        if padded == inputs:
            return flat[source]
        packed = np.zeros((self.rows, padded), x.dtype)
        packed[:, :inputs] = flat[source]
        return packed

    def rows_of_chunk(self, chunk: int) -> int:
        """Return the most rows that `chunk` successive steps have; the chunks are counted from the last step."""
        firsts = self.offsets[::-1][::chunk]
        return int(max(-np.diff(firsts, append=0), default=0))

    def bounds(self, threads: int) -> Array:
        """Divide the rows among threads, equal in steps: (threads + 1,)."""
        work = np.cumsum(self.lengths)
        shares = work[-1] * np.arange(1, threads) / threads
        return np.concatenate([[0], np.searchsorted(work, shares, side="left") + 1, [self.order.size]])


@dataclass(frozen=True)
class DirectionTape:
    """What one direction leaves on the tape."""

    gates: Array  # (N, Hp/V, 5, V): i, f, g, o, c
    h_rows: Array  # (N, Hp): the h before each row's step
    c0: Array  # (B, H)


@dataclass(frozen=True)
class LayerTape:
    """What one layer leaves on the tape."""

    x: Array  # (T, B, I), the input itself
    packing: Packing
    directions: list[DirectionTape]


class CpuBackend(LayeredBackend):
    """NumPy arrays on compiled kernels; see the module's docstring."""

    name = "cpu"
    xp = np

    def layer_forward(
        self,
        weights: Sequence[Weights],
        x: Array,
        h0: Array,
        c0: Array,
        lengths: Array | None,
        keep_tape: bool,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        x, h0, c0 = _plain(x), _plain(h0), _plain(c0)
        steps, batch, _ = x.shape
        packing = Packing.of(lengths, steps, batch)
        allocate = np.zeros if packing.ragged else np.empty
        y = allocate((steps, batch, len(weights), h0.shape[2]), x.dtype)
        h_n, c_n = np.empty_like(h0), np.empty_like(c0)
        tapes = [
            _direction_forward(w, x, h0[d], c0[d], packing, d, y, h_n[d], c_n[d], keep_tape)
            for d, w in enumerate(weights)
        ]
        tape = LayerTape(x, packing, tapes) if keep_tape else None
        return LayerResult(y.reshape(steps, batch, -1), h_n, c_n, tape)

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        directions, batch, hidden = dh_n.shape
        shape = (tape.packing.steps, batch, directions, hidden)
        dy = np.empty((0, *shape[1:]), dh_n.dtype) if dy is None else _plain(dy).reshape(shape)
        dx = (np.zeros if tape.packing.ragged else np.empty)(tape.x.shape, dh_n.dtype)
        dh_n, dc_n = _plain(dh_n), _plain(dc_n)
        dh0, dc0 = np.empty_like(dh_n), np.empty_like(dc_n)
        dweights = [
            _direction_backward(w, tape, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d]) for d, w in enumerate(weights)
        ]
        return LayerGradients(dx, dh0, dc0, dweights)


def _plain(array: Array) -> Array:
    """Return an array that the kernels take without another compilation: C-contiguous, aligned and writeable."""
    return array if array.flags.carray else np.array(array, order="C")


def _bias(weights: Weights) -> Array:
    """Return the bias, or an empty array for none, so that the kernels have one signature."""
    return np.empty(0, weights.weight_hh.dtype) if weights.bias is None else _plain(weights.bias)


def _threads_of_use(packing: Packing, inputs: int, hidden: int, passes: int) -> int:
    """How many threads are worth their while: by the number of sequences and of operations."""
    operations = 2 * passes * packing.rows * GATES * hidden * (inputs + hidden)
    return int(min(packing.order.size, 1 + operations // _OPERATIONS_WORTH_A_THREAD, get_num_threads()))


def _direction_forward(
    weights: Weights,
    x: Array,
    h0: Array,
    c0: Array,
    packing: Packing,
    direction: int,
    y: Array,
    h_n: Array,
    c_n: Array,
    keep_tape: bool,
) -> DirectionTape:
    """Run one direction; writes y, h_n and c_n."""
    dtype, batch, inputs = x.dtype, x.shape[1], x.shape[2]
    hidden, width = h0.shape[1], lanes(x.dtype)
    blocks = -(-hidden // width)
    rows = packing.rows
    tape = np.empty((rows if keep_tape else 0, blocks, TAPE, width), dtype)
    h_rows = np.empty((rows if keep_tape else 2 * batch, blocks * width), dtype)
    arguments = (
        _plain(weights.weight_ih), _plain(weights.weight_hh), _bias(weights),
        packing.pack(x, direction == 1, 1), h0, c0, packing.order, packing.lengths, packing.offsets, direction == 1,
        y, direction, h_n, c_n, keep_tape, tape, h_rows,
        np.empty((batch, blocks * width), dtype),
        np.empty((blocks, inputs + hidden, GATES, width), dtype),
        np.empty((blocks, GATES, width), dtype),
    )  # fmt: skip
    run_team(
        lambda threads: (*arguments, np.empty((threads, ROWS, GATES, width), dtype), packing.bounds(threads)),
        layer_forward,
        _threads_of_use(packing, inputs, hidden, passes=1),
    )
    return DirectionTape(tape, h_rows, c0.copy())


def _direction_backward(
    weights: Weights,
    layer: LayerTape,
    direction: int,
    dy: Array,
    dh_n: Array,
    dc_n: Array,
    dx: Array,
    dh0: Array,
    dc0: Array,
) -> Weights:
    """Back-propagate through one direction; writes dx, dh0 and dc0."""
    tape, packing = layer.directions[direction], layer.packing
    dtype, batch, inputs = dx.dtype, dx.shape[1], dx.shape[2]
    hidden, width = dh_n.shape[1], lanes(dtype)
    blocks = -(-hidden // width)
    weight_ih, weight_hh = _plain(weights.weight_ih), _plain(weights.weight_hh)
    bias = _bias(weights)
    grads = np.empty_like(weight_ih), np.empty_like(weight_hh), np.empty_like(bias)
    x = packing.pack(layer.x, direction == 1, width)
    chunk = max(1, -(-(packing.offsets.size - 1) // 4))
    packed_ih = np.empty((2, blocks, GATES, width, x.shape[1]), dtype)
    packed_hh = np.empty((2, blocks, GATES, width, blocks * width), dtype)
    arguments = (
        weight_ih, weight_hh, x, tape.gates, tape.h_rows, tape.c0,
        packing.order, packing.lengths, packing.offsets, direction == 1,
        dy, direction, dh_n, dc_n, direction == 1, dx, dh0, dc0, *grads, chunk,
        np.empty((packing.rows_of_chunk(chunk), GATES * blocks * width), dtype),
        np.empty((batch, blocks * width), dtype),
        np.empty((batch, blocks * width), dtype),
        packed_ih[0], packed_hh[0], packed_ih[1], packed_hh[1],
        np.empty((blocks, GATES, width), dtype),
    )  # fmt: skip
    run_team(
        lambda threads: (*arguments, np.empty((threads, ROWS, GATES, width), dtype), packing.bounds(threads)),
        layer_backward,
        _threads_of_use(packing, inputs, hidden, passes=2),
    )
    return Weights(grads[0], grads[1], None if weights.bias is None else grads[2])


BACKEND: Any = CpuBackend()
