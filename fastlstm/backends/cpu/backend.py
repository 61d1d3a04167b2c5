"""The CPU backend: sorts and packs the batch, provides memory and threads, and calls ``kernels/cpu``.

The kernels see the sequences sorted by length and their steps packed (``kernels/cpu/ragged.py`` says
how). What a training call keeps are, for each layer and direction, six numbers a hidden unit and step: the
four gates, c, and the h before the step; the backward pass adds at most one for the gradients of the gates,
which are kept for an eighth to a quarter of the steps at a time. With `recompute` it keeps two, c and h, and
the backward pass computes the gates of these steps again, by one product, since the states are known.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.backends.base import Array, Dropout, Params, Prepared, Signature
from fastlstm.backends.base import Unrolled as AnyUnrolled
from fastlstm.backends.cpu.phased import PHASED, is_phased
from fastlstm.backends.cpu.prepared_call import PreparedCall
from fastlstm.backends.cpu.sequence import schedules
from fastlstm.backends.cpu.unroll import Unrolled, can_unroll
from fastlstm.backends.cpu.weights import size_of
from fastlstm.backends.stepwise import Stepwise
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import Cell

__all__ = ["BACKEND", "CpuBackend"]


class CpuBackend:
    """NumPy arrays on compiled kernels; see the module's docstring."""

    name = "cpu"

    def prepare(self, cell: Cell, signature: Signature) -> Prepared:
        """Prepare calls of a signature (see ``base.Backend.prepare``)."""
        if not signature.keep_tape:
            cell = cell.in_inference
        if is_phased(cell):
            return PHASED.prepare(cell, signature)
        return PreparedCall(cell, signature)

    def unroll(
        self, cell: Cell, params: Params, steps: int, batch: int, h0: Array | None, c0: Array | None,
        dropout: Dropout | None,
    ) -> AnyUnrolled:  # fmt: skip
        """Begin a run of steps (see ``base.Backend.unroll``)."""
        if can_unroll(cell):
            return Unrolled(cell, params, steps, batch, h0, c0, dropout)
        return Stepwise(self, np, cell, params, steps, batch, h0, c0, dropout)

    def plan(self, cell: Cell, steps: int, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run in inference (see ``base.Backend.plan``)."""
        cell = cell.in_inference
        if is_phased(cell):
            return PHASED.plan(cell, steps, rows, batch, frozen)
        found: list[str] = []
        for layer in range(cell.num_layers):
            size, threads = size_of(cell, layer), get_num_threads()
            chosen = schedules(size, rows, batch, threads, directions=cell.num_directions, packed=frozen)
            words = ", or ".join(map(str, chosen))
            found.append(words + (" (autotuned)" if len(chosen) > 1 else ""))
        return found


BACKEND: Any = CpuBackend()
