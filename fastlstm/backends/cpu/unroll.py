"""Closed loops on the CPU: packed weights and a tape, as two records that kernels read, and a run that calls them."""

from __future__ import annotations

import functools
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Dropout, Params
from fastlstm.backends.cpu.autotune import TRIALS
from fastlstm.backends.cpu.thread_pool import NO_TEAM, available, own_team, run_team
from fastlstm.backends.cpu.weights import Size, frozen_arrays, packed_model, size_of
from fastlstm.backends.cpu.workspace import one_block
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.backends.layers import dropout_mask
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.threads import get_num_threads
from fastlstm.cell import VARIANTS, Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu import unrolled_back as back
from fastlstm.kernels.cpu import unrolled_step as step
from fastlstm.kernels.cpu.cell_step import GATES, TAPE
from fastlstm.kernels.cpu.gemm_microkernel import NR
from fastlstm.kernels.cpu.jit import compile_once
from fastlstm.kernels.cpu.weight_gradients import PANEL_ROWS
from fastlstm.parameters import direction_names, shapes

__all__ = [
    "Kit", "Tape", "Unrolled", "can_unroll", "draw", "kit_of", "named_gradients", "new_masks", "size_of_gradients",
    "tape_of",
]  # fmt: skip

# Variants that the kernels of closed loops have: those that are in the cell step alone, or in the rows of parameters.
IN_THE_STEP = ("peephole", "activations", "clip", "cell_clip", "forget_gate", "coupled", "block_size", "truncated")

_PACKED_FOR_BACK = "packed for a loop's way back"
# Multiply-adds from which on threads share a step, and the weights' gradients. A barrier takes some microseconds a
# step.
_WORTH_A_TEAM, _FINISH_WORTH_A_TEAM = 1 << 20, 1 << 22


def can_unroll(cell: Cell) -> bool:
    """Say whether the kernels of closed loops have a cell's variants."""
    return not (cell.bidirectional or cell.sees_blocks) and all(
        name in IN_THE_STEP or getattr(cell, name) == plain for name, plain in VARIANTS.items()
    )


def address_of(array: Array) -> int:
    """Return where the elements of an array start."""
    found: int = array.__array_interface__["data"][0]
    return found


class Kit(NamedTuple):
    """The packed weights of a model, and the record of where they are."""

    record: Array  # (KIT,) int64
    kept: tuple[Array, ...]  # the memory that it refers to
    sizes: tuple[Size, ...]  # of each layer


class Tape(NamedTuple):
    """The memory of a run, and the record of where it is."""

    record: Array  # (TAPED,) int64
    h: Array  # (L, T + 1, B, H) before each step, and after the last
    c: Array  # (L, T + 1, B, H)
    dh: Array  # (L, B, H)
    dc: Array  # (L, B, H)
    kept: tuple[Array, ...]


def kit_of(cell: Cell, params: FrozenParams) -> Kit:
    """Pack a model's weights for both directions of time; once for a frozen model."""
    sizes = tuple(size_of(cell, layer) for layer in range(cell.num_layers))
    packed = packed_model(cell, params)
    for_back = params.kept.get(_PACKED_FOR_BACK)
    if for_back is None:
        for_back = params.kept.setdefault(_PACKED_FOR_BACK, _pack_for_back(cell, params, sizes))
    weights, bias, own = packed.weights[0], packed.bias[0], packed.own[0]
    record = np.zeros(step.KIT, np.int64)
    numbers = {
        step.INPUTS: cell.input_size, step.HIDDEN: cell.hidden_size, step.LAYERS: cell.num_layers,
        step.OWN: sizes[0].own, step.BIASED: cell.bias, step.BLOCKS: sizes[0].blocks,
        step.WEIGHTS: address_of(weights), step.BIAS: address_of(bias), step.OWN_PARAMETERS: address_of(own),
        step.BACK_WEIGHTS: address_of(for_back), step.TRUNCATED: cell.truncated,
    }  # fmt: skip
    for place, number in numbers.items():
        record[place] = number
    record[step.ADDRESSES : step.ADDRESSES + len(sizes[0].addresses)] = sizes[0].addresses
    return Kit(record, (weights, bias, own, for_back), sizes)


def _pack_for_back(cell: Cell, params: FrozenParams, sizes: tuple[Size, ...]) -> Array:
    counts = [_panels(size, size.inputs + size.hidden) for size in sizes]
    (memory,) = one_block(cell.dtype, (sum(counts),), lasting=True)
    arrays = frozen_arrays(cell, params)
    for layer, part in enumerate(np.split(memory, np.cumsum(counts)[:-1])):
        names = direction_names(cell, layer, 0)
        weights = [arrays[names[role]] for role in ("weight_hh", "weight_ih")]
        back.pack_for_back(np.concatenate(weights, axis=1), part)
    return memory


def _panels(size: Size, columns: int) -> int:
    """Return the numbers that a weight of so many columns, or the sums of its gradient, take in panels."""
    panel: int = NR * size.width
    gates: int = GATES
    return -(-columns // panel) * panel * gates * size.stride


def tape_of(
    cell: Cell,
    sizes: tuple[Size, ...],
    steps: int,
    batch: int,
    masks: Array | None = None,
    threads: int = 1,
    lasting: bool = False,
) -> Tape:
    """Allocate the memory of a run.

    Parameters
    ----------
    masks : (L - 1, T, B, H), optional
        Of dropout between the layers.
    threads : int
        Of a team that computes the weights' gradients.
    lasting : bool
        Whether it is kept for many runs.
    """
    size, layers = sizes[0], cell.num_layers
    # The gradients by the weights take so many rows at a time.
    chunk = max(1, min(steps, PANEL_ROWS // batch))
    cells = (layers, (-(-steps // chunk) + 1) * chunk, size.blocks, batch, TAPE, size.width)
    states, state = (layers, steps + 1, batch, size.hidden), (layers, batch, size.hidden)
    largest = max(size.inputs for size in sizes)
    arrays = one_block(
        cell.dtype, (steps, batch, size.inputs), states, states, cells, state, state, state[1:],
        () if masks is None else masks.shape, (_panels(size, largest),), (_panels(size, size.hidden),),
        (GATES * size.stride,), (threads, PANEL_ROWS, NR * size.width),
        lasting=lasting,
    )  # fmt: skip
    x, h, c, values, dh, dc, between, dropped, *work = arrays
    record = np.zeros(step.TAPED, np.int64)
    record[[step.STEPS, step.BATCH, step.LEFT, step.CHUNK]] = steps, batch, -1, chunk
    places = (step.X, step.H, step.C, step.CELLS, step.DH, step.DC, step.BETWEEN)
    record[list(places)] = [address_of(array) for array in (x, h, c, values, dh, dc, between)]
    if masks is not None:
        record[[step.MASKS, step.DROPPED]] = address_of(masks), address_of(dropped)
    record[[step.SUMS_IH, step.SUMS_HH, step.SUMS_BIAS, step.PANELS]] = [address_of(array) for array in work]
    return Tape(record, h, c, dh, dc, (*arrays, *(() if masks is None else (masks,))))


@functools.lru_cache(maxsize=64)
def gradient_shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the gradients that a kernel writes: those by parameters with rows for all gates."""
    return shapes(replace(cell, forget_gate=True, coupled=False, block_size=1) if is_folded(cell) else cell)


def size_of_gradients(cell: Cell) -> int:
    """Return how many numbers they are."""
    return sum(int(np.prod(shape)) for shape in gradient_shapes(cell).values())


def named_gradients(cell: Cell, flat: Array) -> dict[str, Array]:
    """Give the gradients that a kernel wrote one after the other the names of the parameters.

    They are views, unless the cell's parameters have not all the rows.
    """
    found, start = {}, 0
    for name, shape in gradient_shapes(cell).items():
        end = start + int(np.prod(shape))
        found[name] = flat[start:end].reshape(shape)
        start = end
    return Folding(cell).fold(found) if is_folded(cell) else found


def new_masks(cell: Cell, steps: int, batch: int) -> Array | None:
    """Allocate the masks between the layers, (L - 1, T, B, H); None if there are none."""
    if not cell.dropout or cell.num_layers == 1:
        return None
    return np.empty((cell.num_layers - 1, steps, batch, cell.hidden_size), cell.dtype)


def draw(masks: Array, dropout: Dropout) -> None:
    """Draw masks: those of a call for the whole sequence."""
    for number, mask in enumerate(masks):
        mask[:] = dropout_mask(np, dropout, number + 1, mask)


def prepare(functions: dict[Any, tuple[Any, ...]]) -> None:
    """Compile or load functions for the types of their arguments."""
    for function, signature in functions.items():
        compile_once(function, signature)


@functools.lru_cache(maxsize=64)
def _kinds(sizes: tuple[Size, ...], batch: int, threads: int) -> tuple[object, object]:
    """Return objects for a step and for a step back, under which the trials note their times."""
    return object(), object()


class Unrolled:
    """A run on the kernels (see ``base.Unrolled``)."""

    def __init__(
        self, cell: Cell, params: Params, steps: int, batch: int, h0: Array | None, c0: Array | None,
        dropout: Dropout | None,
    ) -> None:  # fmt: skip
        frozen = params if isinstance(params, FrozenParams) else FrozenParams(cell, params)
        prepare(step.signatures(cell.dtype, by_pointers=False) | back.signatures(cell.dtype, by_pointers=False))
        self._cell, self._batch = cell, batch
        self._kit = kit_of(cell, frozen)
        self._threads = get_num_threads()
        work = batch * sum(size.inputs + size.hidden for size in self._kit.sizes) * GATES * cell.hidden_size
        self._team = own_team(self._threads - 1) if self._threads > 1 and work >= _WORTH_A_TEAM else NO_TEAM
        self._kinds = _kinds(self._kit.sizes, batch, self._threads)
        masks = new_masks(cell, steps, batch)
        if masks is not None and dropout is not None:
            draw(masks, dropout)
        self._tape = tape_of(cell, self._kit.sizes, steps, batch, masks, self._threads)
        for states, given in ((self._tape.h, h0), (self._tape.c, c0)):
            states[:, 0] = 0 if given is None else given
        self._y_shape, self._x_shape = (batch, cell.hidden_size), (batch, cell.input_size)

    def _launch(self, kernel: Any, kind: object, given: Array, found: Array) -> None:
        """Launch a kernel with the team, or on one thread where that is faster, as on busy cores: autotuned."""
        if self._team is NO_TEAM:
            kernel(self._kit.record, self._tape.record, given, found, NO_TEAM, 0)
            return
        way = TRIALS.pick(kind, 2)
        start = time.perf_counter()
        kernel(self._kit.record, self._tape.record, given, found, NO_TEAM if way else self._team, 0)
        TRIALS.report(kind, way, time.perf_counter() - start)

    def step(self, x: Array) -> Array:
        """Run the next step (see ``base.Unrolled.step``)."""
        y = np.empty(self._y_shape, self._cell.dtype)
        if not x.flags.carray:
            x = as_plain(x)
        self._launch(step.unrolled_step_taped, self._kinds[0], x, y)
        return y

    def state(self) -> tuple[Array, Array]:
        """Return the state after the last step (see ``base.Unrolled.state``)."""
        taken = int(self._tape.record[step.TAKEN])
        return self._tape.h[:, taken].copy(), self._tape.c[:, taken].copy()

    def begin_back(self, dh: Array | None, dc: Array | None) -> None:
        """Start the way back (see ``base.Unrolled.begin_back``)."""
        self._tape.dh[...] = 0 if dh is None else dh
        self._tape.dc[...] = 0 if dc is None else dc
        self._tape.record[step.LEFT] = self._tape.record[step.TAKEN]

    def step_back(self, dh: Array | None) -> Array:
        """Take the gradients back through one step (see ``base.Unrolled.step_back``)."""
        dh = np.zeros(self._y_shape, self._cell.dtype) if dh is None else dh if dh.flags.carray else as_plain(dh)
        dx = np.empty(self._x_shape, self._cell.dtype)
        self._launch(back.unrolled_back, self._kinds[1], dh, dx)
        return dx

    def state_gradient(self) -> tuple[Array, Array]:
        """Return the gradients by the state before the last step taken back (see ``base.Unrolled.state_gradient``)."""
        return self._tape.dh.copy(), self._tape.dc.copy()

    def finish(self) -> dict[str, Array]:
        """Return the gradients by the parameters (see ``base.Unrolled.finish``)."""
        cell, record = self._cell, self._tape.record
        flat = np.empty(size_of_gradients(cell), cell.dtype)
        threads = min(self._threads, self._kit.sizes[0].blocks, get_num_threads())
        is_worth_it = threads > 1 and int(record[step.TAKEN]) * self._batch * flat.size >= _FINISH_WORTH_A_TEAM
        run_team(back.unrolled_finish, (self._kit.record, record, flat), available(threads - 1) if is_worth_it else 0)
        return named_gradients(cell, flat)
