"""The CPU backend: sorts and packs the batch, provides memory and threads, and calls ``kernels/cpu``.

The kernels see the sequences sorted by length and their steps packed (``kernels/cpu/forward.py`` says
how). What a training call keeps are, for each layer and direction, six numbers a hidden unit and step: the
four gates, c, and the h before the step; the backward pass adds at most one for the gradients of the gates,
which are kept for an eighth to a quarter of the steps at a time. With `recompute` it keeps two, c and h, and
the backward pass computes the gates of these steps again, by one product, since the states are known.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.calls import (
    PACKED,
    DirectionTape,
    LayerTape,
    Size,
    Way,
    Ways,
    bias_of,
    kind_of_calls,
    packed_of,
    plain,
    run_call,
    size_of,
)
from fastlstm.backends.few import (
    as_rows,
    few_backward,
    few_forward,
    few_rows,
    few_rows_packed,
    is_short_call,
    most_short,
)
from fastlstm.backends.layers import LayeredBackend, LayerGradients, LayerResult, Weights, layer_weights
from fastlstm.backends.memory import Workspace, new_array, one_block
from fastlstm.backends.packing import Packing
from fastlstm.backends.plan import FEW_ROWS, LEAST_TO_SHARE, are_few, choose, is_short
from fastlstm.backends.threads import get_num_threads
from fastlstm.backends.workers import NO_TEAM, run_each
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.backward import PANEL_ROWS, layer_backward
from fastlstm.kernels.cpu.forward import layer_forward
from fastlstm.kernels.cpu.gates import GATES, TAPE
from fastlstm.kernels.cpu.simd import lanes
from fastlstm.kernels.cpu.small import ready, ready_packed, small_forward, small_forward_packed
from fastlstm.kernels.cpu.tile import GROUP, ROWS, VECTORS

__all__ = ["BACKEND", "CpuBackend"]


# Rows of a chunk of the backward pass, if a quarter of the steps has so many: below, fetching the weights and their
# gradients anew for each chunk would cost too much.
_CHUNK_ROWS = 256


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
        recompute: bool,
    ) -> LayerResult:
        """Run one layer (see ``layers.LayeredBackend.layer_forward``)."""
        x, h0, c0 = plain(x), plain(h0), plain(c0)
        steps, batch, _ = x.shape
        packing = Packing.of(lengths, steps, batch)
        y = new_array((steps * batch, len(weights) * h0.shape[2]), x.dtype, zero=packing.ragged)
        h_n, c_n = np.empty_like(h0), np.empty_like(c0)
        # What is kept of a frozen model is packed; taped, the few rows' kernel takes weights as they lie: other bits.
        if is_short_call(packing, weights) and not (keep_tape and weights[0].kept is not None):
            small = few_forward(weights[0], x, h0, c0, y, h_n, c_n, keep_tape)
            tape = LayerTape(x, packing, [small]) if small else None
            return LayerResult(y.reshape(steps, batch, y.shape[1]), h_n, c_n, tape)

        def run(d: int, threads: int) -> DirectionTape | None:
            return _direction_forward(
                weights[d], x, h0[d], c0[d], packing, d, y, h_n[d], c_n[d], keep_tape, recompute, threads
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

    def shortcut(self, cell: Cell, params: Mapping[str, Any], x: Any, state: Any) -> tuple[Array, Array, Array] | None:
        """Run a call of one layer with few checks, or none, in Python (see ``base.Backend.shortcut``)."""
        if cell.num_layers != 1 or cell.bidirectional or len(params) != 2 + cell.bias:
            return None
        try:
            shape, hidden, dtype = x.shape, cell.hidden_size, cell.dtype
            steps, batch = shape[:-1] if len(shape) == 3 else (1, shape[0])
            if state is None:
                h0 = c0 = np.zeros((1, batch, hidden), dtype)
            else:
                h0, c0 = state if type(state) is tuple else ()  # which raises, and is caught below
            # Numba takes a masked array for a plain one; no subclass is known to be harmless here.
            if not (type(x) is type(h0) is type(c0) is np.ndarray):
                return None
            h_n, c_n = np.empty((1, batch, hidden), dtype), np.empty((1, batch, hidden), dtype)
            infer: Callable[..., Any] = _infer_frozen if type(params) is FrozenParams else _infer
            y = infer(cell, params, x, h0, c0, h_n, c_n, steps, batch)
            if y is None:
                return None
        except Exception:  # an argument is not as it should be: the checks will tell
            return None
        return (y if len(shape) == 2 else y.reshape(steps, batch, hidden)), h_n, c_n

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
        dx = new_array((steps * batch, inputs), dh_n.dtype, zero=tape.packing.ragged)
        dh_n, dc_n = plain(dh_n), plain(dc_n)
        dh0, dc0 = np.empty_like(dh_n), np.empty_like(dc_n)
        if is_short_call(tape.packing, weights, backward=True):
            dweights = [few_backward(weights[0], tape, dy, dh_n[0], dc_n[0], dx, dh0[0], dc0[0])]
            return LayerGradients(dx.reshape(tape.x.shape), dh0, dc0, dweights)
        # One direction after the other: each adds to dx, and a second one would not fit into the memory promised.
        dweights = [
            _direction_backward(w, tape, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d]) for d, w in enumerate(weights)
        ]
        return LayerGradients(dx.reshape(tape.x.shape), dh0, dc0, dweights)


def _infer(
    cell: Cell,
    params: Any,
    x: Array,  # (T, B, I) or, for one step, (B, I)
    h0: Array,
    c0: Array,
    h_n: Array,  # OUT
    c_n: Array,  # OUT
    steps: int,
    batch: int,
) -> Array | None:
    """Run one layer on arguments that nobody has checked; return y (T * B, H), or None at the least doubt."""
    inputs, hidden, dtype, rows = cell.input_size, cell.hidden_size, cell.dtype, steps * batch
    bias = params["bias_l0"] if cell.bias else np.empty(0, dtype)
    weight_ih, weight_hh = params["weight_ih_l0"], params["weight_hh_l0"]
    # Numba takes a masked array for a plain one; no subclass is known to be harmless here.
    if not (type(bias) is type(weight_ih) is type(weight_hh) is np.ndarray and rows):
        return None
    small = rows <= FEW_ROWS and hidden * (inputs + hidden) < LEAST_TO_SHARE
    if small or is_short(rows, inputs, hidden):
        y = np.empty((rows, hidden), dtype)
        run = small_forward if small else few_rows
        fits = dtype in ready and run(
            weight_ih, weight_hh, bias, as_rows(x, rows, inputs), h0, c0, y, h_n, c_n,
            inputs, hidden, cell.bias, NO_TEAM, 0,
        )  # fmt: skip
    else:
        y = new_array((rows, hidden), dtype)
        fits = _many_rows(cell, Weights(weight_ih, weight_hh, bias), x, h0, c0, y, h_n, c_n)
    return y if fits else None


def _infer_frozen(
    cell: Cell,
    params: FrozenParams,
    x: Array,
    h0: Array,
    c0: Array,
    h_n: Array,
    c_n: Array,
    steps: int,
    batch: int,
) -> Array | None:
    """Do as :func:`_infer` does for a frozen model, whose parameters are as they should be."""
    inputs, hidden, dtype, rows = cell.input_size, cell.hidden_size, cell.dtype, steps * batch
    if (params.cell is not cell and params.cell != cell) or not rows:
        return None
    packed, packed_bias = params.kept[0, 0][PACKED]  # which raises before the first call has packed them
    small = rows <= FEW_ROWS and hidden * (inputs + hidden) < LEAST_TO_SHARE
    if small or is_short(rows, inputs, hidden, most=most_short(steps)):
        y = np.empty((rows, hidden), dtype)
        run = small_forward_packed if small else few_rows_packed
        fits = dtype in ready_packed and run(
            packed, packed_bias, as_rows(x, rows, inputs), h0, c0, y, h_n, c_n,
            inputs, hidden, NO_TEAM, 0,
        )  # fmt: skip
    else:
        y = new_array((rows, hidden), dtype)
        fits = _many_rows(cell, layer_weights(cell, params, 0)[0], x, h0, c0, y, h_n, c_n)
    return y if fits else None


def _many_rows(cell: Cell, weights: Weights, x: Array, h0: Array, c0: Array, y: Array, h_n: Array, c_n: Array) -> bool:
    """Run one layer over x (T, B, I); return False, with nothing done, if anything does not fit."""
    inputs, hidden, dtype = cell.input_size, cell.hidden_size, cell.dtype
    weight_ih, weight_hh, bias = weights.weight_ih, weights.weight_hh, bias_of(weights)
    if not (
        (weight_ih.shape == (4 * hidden, inputs) and weight_hh.shape == (4 * hidden, hidden))
        and (bias.shape == (4 * hidden * cell.bias,) and x.shape[-1] == inputs)
        and (h0.shape == c0.shape == h_n.shape and h0.dtype == c0.dtype == x.dtype == dtype)
        and (weight_ih.dtype == weight_hh.dtype == bias.dtype == dtype)
    ):
        return False
    batch, packed = x.shape[-2], packed_of(weights)
    where, ways = _equal_call(weight_ih.shape, len(y) // batch, batch, dtype, bool(packed))
    arguments = (
        plain(weight_ih), plain(weight_hh), plain(bias), plain(x).reshape(-1, inputs), plain(h0)[0], plain(c0)[0],
        *where, y, 0, h_n[0], c_n[0], False,
    )  # fmt: skip
    run_call(layer_forward, arguments, ways, len(y), get_num_threads(), packed)
    return True


def _run_directions(run: Callable[[int, int], Any], size: Size, directions: int, packing: Packing) -> list[Any]:
    """Run a layer's directions forward, at once if that is better; `run` is given one, and the most threads for it."""
    most = get_num_threads()
    if directions == 1 or size.plans(packing, most, directions=directions)[0].kind != "directions":
        return [run(direction, most) for direction in range(directions)]
    return run_each(lambda direction: run(direction, 1), directions)


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
    recompute: bool,
    threads: int,
) -> DirectionTape | None:
    """Run one direction; writes y, h_n and c_n."""
    dtype, reverse = x.dtype, direction == 1
    size = Size.of(weights.weight_ih)
    # What was computed on the weights as they lie could not be computed again to the same bits, and is little.
    recompute = recompute and not are_few(packing.rows, size.inputs, size.hidden, ROWS)
    rows, kept = packing.rows, 1 if recompute else TAPE
    shapes = (rows, size.blocks, kept, size.width), (rows, size.blocks * size.width)
    tape = one_block(dtype, *shapes) if keep_tape else []
    arguments = (
        plain(weights.weight_ih), plain(weights.weight_hh), bias_of(weights), packing.pack(x, reverse),
        h0, c0, packing.order, packing.lengths, packing.offsets, packing.places(reverse),
        y, direction * size.hidden, h_n, c_n, keep_tape, *tape,
    )  # fmt: skip

    packed = packed_of(weights)

    def ways(most: int) -> Ways:
        return _forward_ways(size, packing, keep_tape, bool(packed), most)

    run_call(layer_forward, arguments, ways, packing.rows, threads, packed)
    return DirectionTape(tape[0], tape[1], c0.copy()) if keep_tape else None


@functools.lru_cache(maxsize=256)
def _forward_ways(size: Size, packing: Packing, training: bool, packed: bool, most: int) -> Ways:
    """Return the ways to run the forward kernel on at most so many threads, on weights that are packed or not."""
    _, _, width, blocks, dtype = size
    batch, plans = packing.order.size, size.plans(packing, most, packed=packed)
    weights, bias = size.packed_shapes
    tape = () if training else ((0, blocks, TAPE, width), (2 * batch, blocks * width))
    ways = []
    for plan in plans:
        shapes = (
            *tape,
            (batch, blocks * width),
            (*((plan.ahead * batch, blocks) if plan.ahead else (plan.threads * GROUP, 1)), GATES, width),
            *(() if packed else ((0, *weights[1:]) if plan.as_they_lie else weights, bias)),
        )
        pack = not (packed or plan.as_they_lie)
        settings = pack, plan.ahead, plan.parts(packing, blocks), plan.kind == "units"
        ways.append(Way(plan, Workspace(dtype, shapes), settings))
    kind = (
        kind_of_calls(layer_forward, size, batch, packing.rows.bit_length(), plans, packed) if len(plans) > 1 else None
    )
    return Ways(tuple(ways), kind)


@functools.lru_cache(maxsize=16)  # as the arrays in `packing`
def _equal_call(
    weight_ih: tuple[int, int], steps: int, batch: int, dtype: Any, packed: bool
) -> tuple[tuple[Array, ...], Callable[[int], Ways]]:
    """Return what a call on sequences of equal length shares with others of its size: so much less to do for each.

    These are the kernel's arguments that say where the rows are, and the ways to run it.
    """
    size, packing = size_of(*weight_ih, dtype), Packing.of(None, steps, batch)

    @functools.cache
    def ways(most: int) -> Ways:
        return _forward_ways(size, packing, False, packed, most)

    return (packing.order, packing.lengths, packing.offsets, packing.places(False)), ways


def _chunk(packing: Packing) -> int:
    """Steps whose gate gradients, and with `recompute` their gates, are kept at a time."""
    steps = packing.offsets.size - 1
    chunk: int = max(1, -(-steps // 8), min(-(-steps // 4), -(-_CHUNK_ROWS // packing.order.size)))
    return chunk


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
    dtype, reverse = dx.dtype, direction == 1
    size = Size.of(weights.weight_ih)
    weight_ih, weight_hh, bias = plain(weights.weight_ih), plain(weights.weight_hh), bias_of(weights)
    grads = [new_array(array.shape, dtype) for array in (weight_ih, weight_hh, bias)]
    recompute = tape.gates.shape[2] < TAPE
    arguments = (
        weight_ih, weight_hh, bias, packing.pack(layer.x, reverse), tape.gates, tape.h_rows, tape.c0,
        packing.order, packing.lengths, packing.offsets, packing.places(reverse),
        dy, direction * size.hidden, dh_n, dc_n, reverse, dx, dh0, dc0, *grads, _chunk(packing),
        *(() if recompute else (None, None, None)),
    )  # fmt: skip

    def ways(most: int) -> Ways:
        return _backward_ways(size, packing, recompute, most)

    run_call(layer_backward, arguments, ways, packing.rows, get_num_threads())
    return Weights(grads[0], grads[1], None if weights.bias is None else grads[2])


@functools.lru_cache(maxsize=256)
def _backward_ways(size: Size, packing: Packing, recompute: bool, most: int) -> Ways:
    """Return the ways to run the backward kernel on at most so many threads."""
    inputs, hidden, width, blocks, dtype = size
    batch, plans = packing.order.size, size.plans(packing, most, backward=True)
    chunk_rows = packing.rows_of_chunk(_chunk(packing))
    depth, panel = GATES * blocks * width, VECTORS * width
    again = (chunk_rows, blocks, TAPE, width), *size.packed_shapes
    ways = []
    for plan in plans:
        shapes = (
            *(again if recompute else ()),
            (chunk_rows, depth),
            (batch, blocks * width),
            (batch, blocks * width),
            (-(-inputs // panel), depth, panel),
            (-(-hidden // panel), depth, panel),
            (-(-inputs // panel), depth, panel),
            (-(-hidden // panel), depth, panel),
            (depth,),
            (plan.threads, PANEL_ROWS, panel),
        )
        ways.append(Way(plan, Workspace(dtype, shapes), (plan.parts(packing, blocks), plan.kind == "units")))
    kind = kind_of_calls(layer_backward, size, batch, packing.rows.bit_length(), plans) if len(plans) > 1 else None
    return Ways(tuple(ways), kind)


BACKEND: Any = CpuBackend()
