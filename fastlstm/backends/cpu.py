"""The CPU backend: sorts and packs the batch, provides memory and threads, and calls ``kernels/cpu``.

The kernels see the sequences sorted by length and their steps packed (``kernels/cpu/forward.py`` says
how). What a training call keeps are, for each layer and direction, six numbers a hidden unit and step: the
four gates, c, and the h before the step; the backward pass adds at most one for the gradients of the gates,
which are kept for an eighth to a quarter of the steps at a time. With `recompute` it keeps two, c and h, and
the backward pass computes the gates of these steps again, by one product, since the states are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fastlstm.backends import shortcuts
from fastlstm.backends.base import Array
from fastlstm.backends.calls import DirectionTape, LayerTape, Size, Together, plain, run_call
from fastlstm.backends.few import few_backward, few_forward, is_short_call
from fastlstm.backends.layers import LayeredBackend, LayerGradients, LayerResult, Weights
from fastlstm.backends.many import direction_backward, direction_forward
from fastlstm.backends.memory import new_array
from fastlstm.backends.packing import Packing
from fastlstm.backends.plan import choose
from fastlstm.backends.thread_pool import can_run_at_once
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import Cell
from fastlstm.kernels.cpu.simd import lanes
from fastlstm.kernels.cpu.tile import ROWS

__all__ = ["BACKEND", "CpuBackend"]


class CpuBackend(LayeredBackend):
    """NumPy arrays on compiled kernels; see the module's docstring."""

    name = "cpu"
    xp = np
    shortcut = staticmethod(shortcuts.infer)
    shortcut_forward = staticmethod(shortcuts.train_forward)
    shortcut_backward = staticmethod(shortcuts.train_backward)

    def layer_forward(
        self,
        weights: Sequence[Weights],
        x: Array,
        h0: Array,
        c0: Array,
        lengths: Array | None,
        keep_tape: bool,
        recompute: bool,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        x, h0, c0 = plain(x), plain(h0), plain(c0)
        steps, batch, _ = x.shape
        packing = Packing.of(lengths, steps, batch)
        y = new_array((steps * batch, len(weights) * h0.shape[2]), x.dtype, padded=packing.ragged)
        h_n, c_n = np.empty_like(h0), np.empty_like(c0)
        # What is kept of a frozen model is packed; taped, the few rows' kernel takes weights as they lie: other bits.
        if is_short_call(packing, weights) and not (keep_tape and weights[0].kept is not None):
            small = few_forward(weights[0], x, h0, c0, y, h_n, c_n, keep_tape)
            tape = LayerTape(x, packing, [small]) if small else None
            return LayerResult(y.reshape(steps, batch, y.shape[1]), h_n, c_n, tape)

        def run(d: int, threads: int, call: Callable[..., Any]) -> DirectionTape | None:
            return direction_forward(
                weights[d], x, h0[d], c0[d], packing, d, y, h_n[d], c_n[d], keep_tape, recompute, threads, call
            )

        tapes = _run_directions(run, Size.of(weights[0].weight_ih), len(weights), packing)
        tape = LayerTape(x, packing, tapes) if keep_tape else None
        return LayerResult(y.reshape(steps, batch, y.shape[1]), h_n, c_n, tape)

    def plan(self, cell: Cell, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run (see ``base.Backend.plan``)."""
        blocks, threads = -(-cell.hidden_size // lanes(cell.dtype)), get_num_threads()
        found = []
        for layer in range(cell.num_layers):
            inputs = cell.layer_input_size(layer)
            sizes = rows, batch, inputs, cell.hidden_size, blocks
            plans = choose(*sizes, ROWS, threads, cell.num_directions, packed=frozen)
            words = ", or ".join(map(str, plans))
            found.append(words + (": whichever proves faster" if len(plans) > 1 else ""))
        return found

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        directions, _, hidden = dh_n.shape
        columns = directions * hidden
        dy = np.empty((0, columns), dh_n.dtype) if dy is None else plain(dy).reshape(-1, columns)
        steps, batch, inputs = tape.x.shape
        dx = new_array((steps * batch, inputs), dh_n.dtype, padded=tape.packing.ragged)
        dh_n, dc_n = plain(dh_n), plain(dc_n)
        dh0, dc0 = np.empty_like(dh_n), np.empty_like(dc_n)
        if is_short_call(tape.packing, weights, backward=True):
            dweights = [few_backward(weights[0], tape, dy, dh_n, dc_n, dx, dh0, dc0)]
            return LayerGradients(dx.reshape(tape.x.shape), dh0, dc0, dweights)
        # One direction after the other: each adds to dx, and a second one would not fit into the memory promised.
        dweights = [
            direction_backward(w, tape, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d]) for d, w in enumerate(weights)
        ]
        return LayerGradients(dx.reshape(tape.x.shape), dh0, dc0, dweights)


def _run_directions(run: Callable[..., Any], size: Size, directions: int, packing: Packing) -> list[Any]:
    """Run a layer's directions forward, at once if that is better.

    `run` is given a direction, the most threads for it, and what calls its kernel.
    """
    most = get_num_threads()
    at_once = directions > 1 and size.plans(packing, most, directions=directions)[0].kind == "directions"
    if not (at_once and can_run_at_once(directions)):
        return [run(direction, most, run_call) for direction in range(directions)]
    together = Together(directions)
    found = [run(direction, 1, together.call) for direction in range(directions)]
    together.run()
    return found


BACKEND: Any = CpuBackend()
