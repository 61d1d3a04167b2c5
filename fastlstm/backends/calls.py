"""How the CPU backend calls a kernel: with a plan, workers, working arrays, and weights that may be packed already.

Where several plans may be the fastest, calls are run in all ways, and what they take is noted (``plan.Trials``).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.layers import Weights
from fastlstm.backends.memory import SCRATCH, Workspace, one_block
from fastlstm.backends.packing import Packing
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.plan import TRIALS, Plan, Trials, choose
from fastlstm.backends.workers import NO_TEAM, release, reserve, run_team
from fastlstm.kernels.cpu.compile import compile_for
from fastlstm.kernels.cpu.gates import GATES
from fastlstm.kernels.cpu.pack import pack_weights
from fastlstm.kernels.cpu.simd import lanes
from fastlstm.kernels.cpu.tile import ROWS

__all__ = [
    "PACKED", "DirectionTape", "LayerTape", "Size", "Way", "Ways", "bias_of", "kind_of_calls", "packed_of",
    "run_call", "size_of",
]  # fmt: skip

PACKED = "packed for the CPU backend"  # where they are kept among what is made of weights that never change


class DirectionTape(NamedTuple):
    """What one direction leaves on the tape."""

    gates: Array  # (N, Hp/V, 5, V): i, f, g, o, c; or (N, Hp/V, 1, V): c alone
    h_rows: Array  # (N, Hp): the h before each row's step
    c0: Array  # (B, H)


class LayerTape(NamedTuple):
    """What one layer leaves on the tape."""

    x: Array  # (T, B, I), the input itself
    packing: Packing
    directions: list[DirectionTape]


def bias_of(weights: Weights) -> Array:
    """Return the bias, or an empty array for none, so that the kernels have one signature."""
    return np.empty(0, weights.weight_hh.dtype) if weights.bias is None else as_plain(weights.bias)


def packed_of(weights: Weights) -> tuple[Array, ...]:
    """Return weights that never change in the order of the kernels, brought there at the first call; () for others."""
    if weights.kept is None:
        return ()
    found: tuple[Array, ...] | None = weights.kept.get(PACKED)
    if found is None:
        size = Size.of(weights.weight_ih)
        found = tuple(one_block(size.dtype, *size.packed_shapes, lasting=True))
        pack_weights(weights.weight_ih, weights.weight_hh, bias_of(weights), *found)
        found = weights.kept.setdefault(PACKED, found)  # another thread may have been faster
    return found


class Size(NamedTuple):
    """Of one layer in one direction."""

    inputs: int  # I
    hidden: int  # H
    width: int  # V, lanes of a vector
    blocks: int  # vectors that H takes
    dtype: Any

    @classmethod
    def of(cls, weight_ih: Array) -> Size:
        """Read it off the weights."""
        return size_of(*weight_ih.shape, weight_ih.dtype)

    @property
    def packed_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the packed weights and the packed bias."""
        return (self.blocks * (self.inputs + self.hidden), GATES, self.width), (2, self.blocks, GATES, self.width)

    def plans(
        self, rows: int, batch: int, threads: int, directions: int = 1, backward: bool = False, packed: bool = False
    ) -> tuple[Plan, ...]:
        """Choose a plan for the layer or for one direction of it, or several to try."""
        sizes = rows, batch, self.inputs, self.hidden, self.blocks
        return choose(*sizes, ROWS, threads, directions, backward, packed)


@functools.lru_cache(maxsize=64)
def size_of(columns: int, inputs: int, dtype: Any) -> Size:
    """Return the size of a layer by the shape of its weight_ih, (4H, I)."""
    hidden, width = columns // GATES, lanes(dtype)
    return Size(inputs, hidden, width, -(-hidden // width), dtype)


class Way(NamedTuple):
    """One way to run a kernel: by a plan, and with what follows from it."""

    plan: Plan
    workspace: Workspace
    settings: tuple[Any, ...]  # the kernel's arguments after its arrays, up to the team


class Ways(NamedTuple):
    """The ways of which one may be the fastest, the most promising first."""

    ways: tuple[Way, ...]
    kind: object  # of calls, for the trials which is the fastest; None if there is but one


@functools.lru_cache(maxsize=Trials.KINDS)
def kind_of_calls(*_: Any) -> object:
    """Return an object for each kind of call, found faster than what it stands for."""
    return object()


_compiled: set[Any] = set()  # kernel, dtype and number of arrays to work with: what makes one of its signatures


def run_call(
    kernel: Any,
    arguments: tuple[Any, ...],
    ways_for: Callable[[int], Ways],
    rows: int,
    most: int,
    kept: tuple[Array, ...] = (),
) -> Any:
    """Run a kernel over so many rows, on at most so many threads; return what it returns, False if it did nothing.

    `ways_for` returns the ways for a number of threads, with the arguments that come after those that are given: arrays
    to work with, and settings. Between these come the arrays that are `kept`.
    """
    ways, kind = ways_for(most)
    number = TRIALS.pick(kind, len(ways)) if kind else 0
    way = ways[number]
    if way.plan.threads == 1 and not way.workspace.shapes:  # nothing to prepare: what follows would take a tenth more
        start = time.perf_counter()
        result = kernel(*arguments, *kept, *way.settings, NO_TEAM, 0)
        if kind and result is not False:
            TRIALS.report(kind, number, time.perf_counter() - start, rows)
        return result
    signature = kernel, way.workspace.dtype, len(way.workspace.shapes)
    if way.plan.threads > 1 and signature not in _compiled:
        # Not with workers, who would wait awake all the time, on a core and for the interpreter.
        like_scratch = (np.empty((0,) * len(shape), way.workspace.dtype) for shape in way.workspace.shapes)
        compile_for(kernel, (*arguments, *like_scratch, *kept, *way.settings, NO_TEAM, 0))
        _compiled.add(signature)
    start = time.perf_counter()  # to have workers is a part of what a team takes
    workers = reserve(way.plan.threads - 1) if way.plan.threads > 1 else []
    try:
        as_planned = 1 + len(workers) == way.plan.threads
        if not as_planned:  # other calls have the workers
            way = ways_for(1 + len(workers)).ways[0]
        scratch = SCRATCH.borrow(way.workspace) if way.workspace.shapes else []
        result = run_team(kernel, (*arguments, *scratch, *kept, *way.settings), workers[: way.plan.threads - 1])
    finally:
        if workers:
            release(workers)
    if kind and as_planned and result is not False:
        TRIALS.report(kind, number, time.perf_counter() - start, rows)
    if scratch:
        SCRATCH.give_back(way.workspace, scratch)
    return result
