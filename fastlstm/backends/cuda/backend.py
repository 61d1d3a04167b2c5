"""The CUDA backend: whole models and layers, on the kernels in ``kernels/cuda`` and on cuBLAS's matrix products.

All work goes to the caller's current stream on the arrays' device, and nothing waits for it. Persistent kernels
(``plans.py``) whose groups are several blocks, but no clusters, run one at a time on a device: such a launch waits, on
the GPU, for the one before on another stream. Both directions of a layer are one launch if the device holds the groups
of both at once. A CUDA graph can capture `step` of a cell that the kernels run, which calls no cuBLAS; CuPy refuses
cuBLAS in a capture.

Only the packing of a ragged batch comes from the host, copied once before the steps. Memory is CuPy's; a training call
keeps six numbers for each hidden unit and step (the four gates, c, and the h before), and the backward pass takes four
more while it runs, for each direction that runs at once. Cells whose time step has more phases, such as layer norm, run
in array operations (``phased.py``). Parameters without the rows of some gates get rows for all (``folding.py``), but in
`step`, whose kernel reads them as they are. When memory runs out, CuPy's ``OutOfMemoryError``, a :class:`MemoryError`,
passes through, and the caller's arrays are unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastlstm.backends.base import (
    Array,
    BackwardResult,
    Dropout,
    FlatArrays,
    ForwardResult,
    Params,
    Steps,
)
from fastlstm.backends.base import Unrolled as AnyUnrolled
from fastlstm.backends.cuda.device import Device
from fastlstm.backends.cuda.direction import DirectionsTape, directions_backward, directions_forward
from fastlstm.backends.cuda.launch import single_step
from fastlstm.backends.cuda.persistent import choice_of
from fastlstm.backends.cuda.phased import PhasedTape, is_phased, phased_backward, phased_forward, phases_of
from fastlstm.backends.cuda.plans import describe, describe_products
from fastlstm.backends.cuda.rows import Rows
from fastlstm.backends.cuda.unroll import OnDevice, Unrolled
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.backends.layers import (
    Given,
    LayeredBackend,
    LayerGradients,
    LayerResult,
    StackTape,
    Weights,
    layer_weights,
)
from fastlstm.backends.ragged import Packing
from fastlstm.backends.reference.backend import merged, unmerged
from fastlstm.cell import Cell
from fastlstm.errors import BackendError

__all__ = ["MOST_ROWS_OF_A_STEP", "CudaBackend"]

# Above it, the products of a single step go to cuBLAS: the kernel reads the weights once for every four sequences, so
# that its time grows with the batch. Not measured.
MOST_ROWS_OF_A_STEP = 64


@dataclass(frozen=True)
class LayerTape:
    """The tape of one layer."""

    x: Array  # (T, B, I), the input itself
    rows: Rows
    directions: list[DirectionsTape]  # of those that ran at once
    y: list[Array]  # one per direction, (T, B, H), if they are merged by a product


class CudaBackend(LayeredBackend):
    """CuPy arrays on kernels of our own; see the module's docstring."""

    name = "cuda"

    def __init__(self, device: Device) -> None:
        self.device = device
        self.xp = device.xp

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
        """Run the whole sequence through all layers, on the device of `x` (see ``base.Prepared.forward``)."""
        if dropout is None and not keep_tape:
            cell = cell.in_inference
        with self.device.of(x):
            params = self._unfolded(cell, params)
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
        """Back-propagate through all layers, on the device of the parameters (see ``base.Prepared.backward``)."""
        with self.device.of(params["weight_hh_l0"]):
            unfolded = self._unfolded(cell, params)
            result = super().backward(cell, unfolded, tape, dy, dh_n, dc_n, keep_steps, input_gradient)
            if is_phased(cell) or not is_folded(cell):
                return result
            return result._replace(params=self._folded(cell, params, result.params))

    def unroll(
        self, cell: Cell, params: Params, steps: int, batch: int, h0: Array | None, c0: Array | None,
        dropout: Dropout | None,
    ) -> AnyUnrolled:  # fmt: skip
        """Begin a run of steps (see ``base.Backend.unroll``)."""
        if is_phased(cell):
            stepwise = functools.partial(super().unroll, cell, params, steps, batch, h0, c0, dropout)
            return OnDevice(self.device, params["weight_hh_l0"], stepwise)
        with self.device.of(params["weight_hh_l0"]):
            unfolded = self._unfolded(cell, params)
            layers = range(cell.num_layers)
            weights = [self._contiguous(layer_weights(cell, unfolded, layer)[0]) for layer in layers]

            def gradients(write: Callable[[Sequence[Weights]], None]) -> Params:
                found = self.gradient_arrays(unfolded)
                write([layer_weights(cell, found, layer)[0] for layer in layers])
                return self._folded(cell, params, found) if is_folded(cell) else found

            return Unrolled(self.device, cell, weights, gradients, steps, batch, h0, c0, dropout)

    def step(
        self, cell: Cell, params: Params, x: Array, h: Array | None, c: Array | None
    ) -> tuple[Array, Array, Array]:
        """Advance one time step (see ``base.Prepared.step``): one launch for each layer.

        Beyond :data:`MOST_ROWS_OF_A_STEP` sequences cuBLAS's products are faster. A CUDA graph cannot capture these, so
        a stream that is being captured gets the kernel whatever the batch is; a cell with phases is refused there.
        """
        cell = cell.in_inference
        with self.device.of(x):
            batch = x.shape[0]
            if batch and is_phased(cell) and self.device.capturing():
                fields = ", ".join(phases_of(cell))
                raise BackendError(f"a CUDA graph cannot capture a step of a model with {fields}: it calls cuBLAS")
            if not batch or is_phased(cell) or (batch > MOST_ROWS_OF_A_STEP and not self.device.capturing()):
                return super().step(cell, params, x, h, c)
            h_n, c_n = (self.xp.empty((cell.num_layers, batch, cell.hidden_size), x.dtype) for _ in range(2))
            y = self.xp.empty((batch, cell.hidden_size), x.dtype)
            x, h, c = (None if array is None else self.xp.ascontiguousarray(array) for array in (x, h, c))
            for layer in range(cell.num_layers):
                single_step(
                    self.device, cell, self._contiguous(layer_weights(cell, params, layer)[0]), x,
                    None if h is None else h[layer], None if c is None else c[layer],
                    h_n[layer], c_n[layer], y if layer == cell.num_layers - 1 else None,
                )  # fmt: skip
                x = h_n[layer]
            return y, h_n, c_n

    def plan(self, cell: Cell, steps: int, rows: int, batch: int, frozen: bool) -> list[str]:
        """Say in words how each layer would be run on the current device (see ``base.Backend.plan``)."""
        products = describe_products(self.device.limits(), cell.precision)
        by_arrays, inference = "array operations step after step, for ", cell.in_inference
        if not rows:
            words = "nothing to launch: there is no time step" if batch else "nothing to launch: the batch is empty"
        elif is_phased(inference):
            words = by_arrays + ", ".join(phases_of(inference))
        else:
            words, reset = (
                describe(choice_of(self.device, cell, steps, batch, resets=resets), cell.num_directions)
                for resets in (False, True)
            )
            if reset != words:  # whose kernel was refused
                words += f"; with resets, {reset}"
            if is_phased(cell):
                words += f"; in training, {by_arrays}{', '.join(phases_of(cell))}"
        return [words + products] * cell.num_layers

    def layer_forward(
        self,
        weights: Sequence[Weights],
        x: Array,
        h0: Array,
        c0: Array,
        given: Given,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        if is_phased(given.cell):
            return phased_forward(self.device, weights, x, h0, c0, given)
        steps, batch = x.shape[:2]
        directions, _, hidden = h0.shape
        x, h0, c0 = (self.xp.ascontiguousarray(array) for array in (x, h0, c0))
        rows = Rows(self.device, Packing.of(given.lengths, steps, batch), given.cell, given.resets)
        y = (self.xp.zeros if rows.packing.ragged else self.xp.empty)((steps, batch, directions, hidden), x.dtype)
        if rows.packing.lengths[-1]:  # the shortest
            h_n, c_n = self.xp.empty_like(h0), self.xp.empty_like(c0)
        else:  # a length of 0 returns the initial state
            h_n, c_n = h0.copy(), c0.copy()
        weights = [self._contiguous(w) for w in weights]
        tapes = directions_forward(weights, x, h0, c0, rows, y, h_n, c_n, given.keep_tape)
        parts, result = [], y.reshape(steps, batch, directions * hidden)
        if given.cell.merge != "concat":
            parts = [y[:, :, d] for d in range(directions)]
            result = merged(given.cell, parts)
        tape = LayerTape(x, rows, tapes, parts) if given.keep_tape else None
        return LayerResult(result, h_n, c_n, tape)

    def layer_backward(
        self,
        weights: Sequence[Weights],
        tape: LayerTape | PhasedTape,
        dy: Array | None,
        dh_n: Array,
        dc_n: Array,
        keep_steps: bool = False,
        out: Sequence[Weights] | None = None,
        input_gradient: bool = True,
    ) -> LayerGradients:
        """Back-propagate through one layer (see ``layers.LayeredBackend.layer_backward``)."""
        assert out is not None  # from `gradient_arrays`
        if isinstance(tape, PhasedTape):
            return phased_backward(self.device, weights, tape, dy, dh_n, dc_n, keep_steps, out, input_gradient)
        cell = tape.rows.cell
        dh_n, dc_n = self.xp.ascontiguousarray(dh_n), self.xp.ascontiguousarray(dc_n)
        if dy is not None:
            parts = [dy] if cell.merge == "concat" else unmerged(cell, dy, tape.y)
            dy = self.xp.ascontiguousarray(parts[0]) if len(parts) == 1 else self.xp.concatenate(parts, axis=2)
        by_states = None
        if keep_steps:  # zero in the padding
            shape = (tape.x.shape[0], *dh_n.shape)
            by_states = Steps(*(self.xp.zeros(shape, dh_n.dtype) for _ in range(2)))
        dx = self.xp.empty(tape.x.shape, dh_n.dtype) if input_gradient else None
        dh0, dc0 = self.xp.empty_like(dh_n), self.xp.empty_like(dc_n)
        weights = [self._contiguous(w) for w in weights]
        directions_backward(weights, tape.directions, tape.x, tape.rows, dy, dh_n, dc_n, dx, dh0, dc0, out, by_states)
        return LayerGradients(dx, dh0, dc0, out, by_states)

    def gradient_arrays(self, params: Params) -> FlatArrays:
        """Make one array for the gradients of all parameters, in their order, and views of it."""
        flat = self.xp.empty(sum(value.size for value in params.values()), params["weight_hh_l0"].dtype)
        arrays, start = {}, 0
        for name, value in params.items():
            arrays[name] = flat[start : start + value.size].reshape(value.shape)
            start += value.size
        return FlatArrays(arrays, flat)

    def _folded(self, cell: Cell, params: Params, found: dict[str, Array]) -> FlatArrays:
        """Return the gradients by the parameters that there are, from those with rows for all gates and units."""
        own = self.gradient_arrays(params)
        for name, gradient in Folding(cell, self.xp).fold(found, own).items():
            if gradient is not own[name]:
                own[name][...] = gradient
        return own

    def _unfolded(self, cell: Cell, params: Params) -> Params:
        """Return the parameters with rows for all gates and units."""
        return Folding(cell, self.xp).unfold(params) if is_folded(cell) and not is_phased(cell) else params

    def _contiguous(self, weights: Weights) -> Weights:
        """Return the parameters as the kernels and products take them."""
        return Weights(*(None if w is None else self.xp.ascontiguousarray(w) for w in weights[:4]))

    def _states(self, cell: Cell, batch: int, dtype: Any, h: Array | None, c: Array | None) -> tuple[Array, Array]:
        """Fill in zeros for None, the same for both: states that are given are never written."""
        if is_phased(cell):
            return super()._states(cell, batch, dtype, h, c)
        if h is None or c is None:
            zeros = self.xp.zeros((cell.num_layers * cell.num_directions, batch, cell.hidden_size), dtype)
            h, c = (zeros if state is None else state for state in (h, c))
        return h, c
