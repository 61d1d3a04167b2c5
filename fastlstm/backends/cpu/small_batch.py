"""The arguments of the kernels for small batches: short calls, streaming, and training on them."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from fastlstm.backends.base import Array, RefusedError
from fastlstm.backends.cpu.launch import Candidate, Candidates, launch, settings_of
from fastlstm.backends.cpu.schedule import FEW_ROWS, LEAST_TO_SHARE, Schedule, are_few, is_short, most_threads
from fastlstm.backends.cpu.sequence import DirectionTape, schedules
from fastlstm.backends.cpu.thread_pool import NO_TEAM
from fastlstm.backends.cpu.weights import Size
from fastlstm.backends.cpu.workspace import Pool, new_array
from fastlstm.backends.plain_arrays import as_plain
from fastlstm.backends.threads import get_num_threads
from fastlstm.kernels.cpu import small_batch as small
from fastlstm.kernels.cpu.cell_step import GATES, TAPE
from fastlstm.kernels.cpu.gemm_microkernel import MC, MR

__all__ = ["Inference", "Training", "is_small", "layer_settings"]


def is_small(size: Size, steps: int, batch: int, *, packed: bool = False, backward: bool = False) -> bool:
    """Say whether a layer of one direction and without padding is run by these kernels.

    On packed weights, a single step may have as many rows as the packed weights serve at a time.
    """
    most = MC if packed and steps == 1 else FEW_ROWS
    return is_short(steps * batch, size.inputs, size.hidden, backward, most)


@functools.lru_cache(maxsize=256)
def layer_settings(size: Size, layers: int = 1) -> Array:
    """Return the kernels' numbers; a caller keeps them, since to find them again takes most of a microsecond."""
    numbers = {
        small.INPUTS: size.inputs, small.HIDDEN: size.hidden, small.BIASED: size.biased, small.LAYERS: layers,
        small.OWN: size.own, small.TRUNCATED: size.truncated,
    }  # fmt: skip
    return settings_of(small.SETTINGS, numbers, size.addresses)


class Inference:
    """Launches a kernel for inference, given its arguments up to c_n; made before the first call, since it compiles.

    A caller may call the kernel itself as long as it is `direct`, with `settings`, NO_TEAM and 0 as the last arguments,
    and launches if the kernel does not return True; that saves 0.1 us, 4 % of a step.

    Parameters
    ----------
    kernel : callable
        ``small_forward``, or ``small_forward_packed`` of as many `layers`.
    size : Size
        Of the first layer.
    layers, steps, batch : int
        L, T and B.

    Attributes
    ----------
    direct : bool
        Whether every call runs on this thread, and none was refused.
    careful : bool
        Whether arrays are looked at before a launch. They are once the kernel refused one: Numba takes hundreds of
        microseconds for that, a step takes six.
    """

    __slots__ = ("candidates", "careful", "direct", "kernel", "rows", "settings")

    def __init__(self, kernel: Any, size: Size, layers: int, steps: int, batch: int) -> None:
        small.prepare(kernel, size.dtype)
        self.kernel, self.settings, self.rows = kernel, layer_settings(size, layers), steps * batch
        self.candidates: Any = None
        self.careful = False
        if self.rows > FEW_ROWS or size.hidden * (size.inputs + size.hidden) >= LEAST_TO_SHARE:
            self.candidates = _candidates(kernel, size, layers, self.rows, batch)
        self.direct = self.candidates is None

    def __call__(self, *arguments: Array) -> None:
        """Launch the kernel; arrays of a layout that it refuses are copied."""
        alone = self.candidates is None or get_num_threads() == 1
        try:
            if alone and not self.careful and self.kernel(*arguments, self.settings, NO_TEAM, 0):
                return
        except TypeError:  # Numba's: an array is not contiguous, or read-only, or of another rank
            self.careful, self.direct = True, False
        if not self._launch_plain(alone, tuple(map(as_plain, arguments))):
            raise RefusedError

    def _launch_plain(self, alone: bool, arguments: tuple[Array, ...]) -> bool:
        """Launch with arrays whose layout is known to fit; say whether the shapes did, too."""
        try:
            if alone:
                return bool(self.kernel(*arguments, self.settings, NO_TEAM, 0))
            return bool(launch(self.kernel, arguments, self.candidates, self.rows, get_num_threads()))
        except TypeError:  # of another rank
            return False


def _candidates(kernel: Any, size: Size, layers: int, rows: int, batch: int) -> Any:
    """Return a function from the thread limit to candidate schedules; None if the call is too small for a team."""
    few = are_few(rows, size.inputs, size.hidden, MR)
    if most_threads(rows, size.inputs, size.hidden, few) == 1:
        return None

    @functools.cache
    def candidates(threads: int) -> Candidates:
        chosen = schedules(size, rows, batch, threads, packed=kernel is small.small_forward_packed)
        chosen = tuple({each.threads: each for each in chosen[::-1]}.values())[::-1]  # a team always divides the units
        return Candidates(
            tuple(Candidate(schedule, (), layer_settings(size, layers)) for schedule in chosen),
            _kind(kernel, size, layers, rows, batch, chosen) if len(chosen) > 1 else None,
        )

    return candidates


@functools.lru_cache(maxsize=256)
def _kind(kernel: Any, size: Size, layers: int, rows: int, batch: int, chosen: tuple[Schedule, ...]) -> object:
    """Return an object for each kind of call, under which the trials note its times."""
    return object()


class Training:
    """Launches the kernels for training one layer on a small batch.

    All shapes are worked out before: the kernels take 2 to 3 us for a step, and NumPy 0.1 us for each attribute.
    Arrays are allocated one by one: for so few rows, alignment would take longer than it saves.

    Parameters
    ----------
    size : Size
        Of the layer.
    rows : int
        T * B.
    """

    __slots__ = ("dtype", "h_rows", "outputs", "settings", "tape", "without_dx", "y")

    def __init__(self, size: Size, rows: int) -> None:
        self.dtype, self.settings = size.dtype, layer_settings(size)
        self.y, self.h_rows = (rows, size.hidden), (rows, size.stride)
        self.tape = rows, size.blocks, TAPE, size.width
        gates = GATES * size.hidden
        shapes = (rows, size.inputs), (rows, gates), (gates, size.inputs), (gates, size.hidden), (gates * size.biased,)
        self.outputs = [
            (np.empty if math.prod(shape) * size.dtype.itemsize < Pool.LEAST else new_array, shape)
            for shape in (*shapes, (size.own, size.hidden))
        ]
        self.without_dx = [(np.empty, (0, size.inputs)), *self.outputs[1:]]

    def forward(
        self, weights: tuple[Array, ...], x: Array, h0: Array, c0: Array, h_n: Array, c_n: Array
    ) -> tuple[Array, DirectionTape]:
        """Run the layer over x (T * B, I); write h_n and c_n (1, B, H), and return y (T * B, H) and the tape.

        The tape keeps the gates even with `recompute`.
        """
        dtype, empty = self.dtype, np.empty
        small.prepare(small.small_forward_taped, dtype)
        y, tape, h_rows = empty(self.y, dtype), empty(self.tape, dtype), empty(self.h_rows, dtype)
        done = small.small_forward_taped(*weights, x, h0, c0, y, h_n, c_n, tape, h_rows, self.settings, NO_TEAM)
        assert done
        return y, DirectionTape(tape, h_rows, c0[0].copy())

    def backward(
        self,
        weights: tuple[Array, Array, Array, Array],
        x: Array,  # (T * B, I)
        tape: DirectionTape,
        dy: Array,  # (T * B, H), or (0, H) for zero
        dh_n: Array,  # (1, B, H), or (0, B, H) for zero
        dc_n: Array,  # likewise
        dh0: Array,  # (1, B, H), OUT
        dc0: Array,  # (1, B, H), OUT
        input_gradient: bool,
    ) -> tuple[Array, list[Array]]:
        """Back-propagate through the layer; return dx (T * B, I), or (0, I), and the gradients by its parameters."""
        dtype = self.dtype
        small.prepare(small.small_backward, dtype)
        weight_ih, weight_hh, _, own = weights
        dx, da, *grads = [new(shape, dtype) for new, shape in (self.outputs if input_gradient else self.without_dx)]
        done = small.small_backward(
            weight_ih, weight_hh, own, x, *tape, dy, dh_n, dc_n, dx, dh0, dc0, *grads, da, self.settings
        )
        assert done
        return dx, grads
