"""The CPU backend: sorts and packs the batch, provides memory and threads, and calls ``kernels/cpu``.

The kernels see the sequences sorted by length and their steps packed (``kernels/cpu/forward.py`` says
how). What a training call keeps are, for each layer and direction, six numbers a hidden unit and step: the
four gates, c, and the h before the step; the backward pass adds at most one for the gradients of the gates,
which are kept for an eighth to a quarter of the steps at a time. With `recompute` it keeps two, c and h, and
the backward pass computes the gates of these steps again, by one product, since the states are known.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.backends.layers import LayeredBackend, LayerGradients, LayerResult, Weights, layer_weights
from fastlstm.backends.memory import SCRATCH, Workspace, new_array, one_block
from fastlstm.backends.packing import Packing
from fastlstm.backends.plan import (
    FEW_ROWS,
    LEAST_TO_SHARE,
    TRIALS,
    Plan,
    Trials,
    are_few,
    choose,
    is_short,
    most_threads,
)
from fastlstm.backends.threads import get_num_threads
from fastlstm.backends.workers import NO_TEAM, release, reserve, run_each, run_team
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.backward import INPUT_ROWS, layer_backward
from fastlstm.kernels.cpu.compile import compile_for
from fastlstm.kernels.cpu.forward import layer_forward
from fastlstm.kernels.cpu.gates import GATES, TAPE
from fastlstm.kernels.cpu.pack import pack_weights
from fastlstm.kernels.cpu.simd import lanes
from fastlstm.kernels.cpu.small import (
    prepare,
    ready,
    ready_packed,
    small_backward,
    small_forward,
    small_forward_packed,
    small_forward_taped,
)
from fastlstm.kernels.cpu.tile import GROUP, ROWS, VECTORS

__all__ = ["BACKEND", "CpuBackend"]


# Rows of a chunk of the backward pass, if a quarter of the steps has so many: below, fetching the weights and their
# gradients anew for each chunk would cost too much.
_CHUNK_ROWS = 256


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
        x, h0, c0 = _plain(x), _plain(h0), _plain(c0)
        steps, batch, _ = x.shape
        packing = Packing.of(lengths, steps, batch)
        y = new_array((steps * batch, len(weights) * h0.shape[2]), x.dtype, zero=packing.ragged)
        h_n, c_n = np.empty_like(h0), np.empty_like(c0)
        if _is_short(packing, weights) and not (keep_tape and weights[0].kept is not None):
            small = _small_forward(weights[0], x, h0, c0, y, h_n, c_n, keep_tape)
            tape = LayerTape(x, packing, [small]) if small else None
            return LayerResult(y.reshape(steps, batch, y.shape[1]), h_n, c_n, tape)

        def run(d: int, threads: int) -> DirectionTape | None:
            return _direction_forward(
                weights[d], x, h0[d], c0[d], packing, d, y, h_n[d], c_n[d], keep_tape, recompute, threads
            )

        tapes = _run_directions(run, _Size.of(weights[0].weight_ih), len(weights), packing)
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
        dy = np.empty((0, columns), dh_n.dtype) if dy is None else _plain(dy).reshape(-1, columns)
        steps, batch, inputs = tape.x.shape
        dx = new_array((steps * batch, inputs), dh_n.dtype, zero=tape.packing.ragged)
        dh_n, dc_n = _plain(dh_n), _plain(dc_n)
        dh0, dc0 = np.empty_like(dh_n), np.empty_like(dc_n)
        if _is_short(tape.packing, weights, backward=True):
            dweights = [_small_backward(weights[0], tape, dy, dh_n[0], dc_n[0], dx, dh0[0], dc0[0])]
            return LayerGradients(dx.reshape(tape.x.shape), dh0, dc0, dweights)
        # One direction after the other: each adds to dx, and a second one would not fit into the memory promised.
        dweights = [
            _direction_backward(w, tape, d, dy, dh_n[d], dc_n[d], dx, dh0[d], dc0[d]) for d, w in enumerate(weights)
        ]
        return LayerGradients(dx.reshape(tape.x.shape), dh0, dc0, dweights)


def _plain(array: Array) -> Array:
    """Return an array that the kernels take without another compilation: C-contiguous, aligned and writeable."""
    array = np.asarray(array)  # no subclass, such as memmap
    return array if array.flags.carray else np.array(array, order="C")


def _bias(weights: Weights) -> Array:
    """Return the bias, or an empty array for none, so that the kernels have one signature."""
    return np.empty(0, weights.weight_hh.dtype) if weights.bias is None else _plain(weights.bias)


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
        run = small_forward if small else _few_rows
        fits = dtype in ready and run(
            weight_ih, weight_hh, bias, _as_rows(x, rows, inputs), h0, c0, y, h_n, c_n,
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
    if params.cell is not cell or not rows:
        return None
    packed, packed_bias = params.kept[0, 0][CpuBackend.name]  # which raises before the first call has packed them
    small = rows <= FEW_ROWS and hidden * (inputs + hidden) < LEAST_TO_SHARE
    if small or is_short(rows, inputs, hidden, most=_most_short(steps)):
        y = np.empty((rows, hidden), dtype)
        run = small_forward_packed if small else _few_rows_packed
        fits = dtype in ready_packed and run(
            packed, packed_bias, _as_rows(x, rows, inputs), h0, c0, y, h_n, c_n,
            inputs, hidden, NO_TEAM, 0,
        )  # fmt: skip
    else:
        y = new_array((rows, hidden), dtype)
        fits = _many_rows(cell, layer_weights(cell, params, 0)[0], x, h0, c0, y, h_n, c_n)
    return y if fits else None


def _as_rows(x: Array, rows: int, inputs: int) -> Array:
    """Return an input as contiguous rows: in a closed loop it is often a part of the output."""
    x = np.ascontiguousarray(x)
    return x if x.ndim == 2 else x.reshape(rows, inputs)


def _most_short(steps: int) -> int:
    """Return how many rows a short call may have on packed weights: a single step as many as a tile's weights serve."""
    return GROUP if steps == 1 else FEW_ROWS


def _packed(weights: Weights) -> tuple[Array, ...]:
    """Return weights that never change in the order of the kernels, brought there at the first call; () for others."""
    if weights.kept is None:
        return ()
    found: tuple[Array, ...] | None = weights.kept.get(CpuBackend.name)
    if found is None:
        size = _Size.of(weights.weight_ih)
        found = tuple(one_block(size.dtype, *size.packed_shapes, lasting=True))
        pack_weights(weights.weight_ih, weights.weight_hh, _bias(weights), *found)
        found = weights.kept.setdefault(CpuBackend.name, found)  # another thread may have been faster
    return found


def _many_rows(cell: Cell, weights: Weights, x: Array, h0: Array, c0: Array, y: Array, h_n: Array, c_n: Array) -> bool:
    """Run one layer over x (T, B, I); return False, with nothing done, if anything does not fit."""
    inputs, hidden, dtype = cell.input_size, cell.hidden_size, cell.dtype
    weight_ih, weight_hh, bias = weights.weight_ih, weights.weight_hh, _bias(weights)
    if not (
        (weight_ih.shape == (4 * hidden, inputs) and weight_hh.shape == (4 * hidden, hidden))
        and (bias.shape == (4 * hidden * cell.bias,) and x.shape[-1] == inputs)
        and (h0.shape == c0.shape == h_n.shape and h0.dtype == c0.dtype == x.dtype == dtype)
        and (weight_ih.dtype == weight_hh.dtype == bias.dtype == dtype)
    ):
        return False
    batch, packed = x.shape[-2], _packed(weights)
    where, ways = _equal_call(weight_ih.shape, len(y) // batch, batch, dtype, bool(packed))
    arguments = (
        _plain(weight_ih), _plain(weight_hh), _plain(bias), _plain(x).reshape(-1, inputs), _plain(h0)[0], _plain(c0)[0],
        *where, y, 0, h_n[0], c_n[0], False,
    )  # fmt: skip
    _run(layer_forward, arguments, ways, len(y), get_num_threads(), packed)
    return True


def _few_rows(*arguments: Any) -> bool:
    """Call :func:`small_forward`, for one thread, with a team if that is better."""
    return _with_team(small_forward, arguments, *arguments[3:5], *arguments[9:11])


def _few_rows_packed(*arguments: Any) -> bool:
    """Call :func:`small_forward_packed`, for one thread, with a team if that is better."""
    return _with_team(small_forward_packed, arguments, *arguments[2:4], *arguments[8:10])


def _with_team(kernel: Any, arguments: tuple[Any, ...], x: Array, h0: Array, inputs: int, hidden: int) -> bool:
    rows, threads = len(x), get_num_threads()
    if threads == 1 or most_threads(rows, inputs, hidden, are_few(rows, inputs, hidden, ROWS)) == 1:
        return bool(kernel(*arguments))
    ways = _short_ways(kernel, rows, h0.shape[1], inputs, hidden, x.dtype)
    return bool(_run(kernel, arguments[:-2], ways, rows, threads))


@functools.lru_cache(maxsize=64)
def _short_ways(kernel: Any, rows: int, batch: int, inputs: int, hidden: int, dtype: Any) -> Callable[[int], _Ways]:
    """Return what returns the ways to run a short call on at most so many threads."""
    packed = kernel is small_forward_packed

    @functools.cache
    def ways(most: int) -> _Ways:
        plans = choose(rows, batch, inputs, hidden, -(-hidden // lanes(dtype)), ROWS, most, packed=packed)
        plans = tuple({plan.threads: plan for plan in plans[::-1]}.values())[::-1]  # a team always divides the units
        kind = _kind(kernel, rows, batch, inputs, hidden, dtype, plans) if len(plans) > 1 else None
        return _Ways(tuple(_Way(plan, Workspace(dtype, ()), ()) for plan in plans), kind)

    return ways


def _is_short(packing: Packing, weights: Sequence[Weights], backward: bool = False) -> bool:
    """Say whether a layer is run by the kernels for a few rows, on the weights as they lie."""
    if len(weights) > 1 or packing.ragged:
        return False
    hidden, inputs = weights[0].weight_hh.shape[1], weights[0].weight_ih.shape[1]
    most = FEW_ROWS if backward or weights[0].kept is None else _most_short(packing.steps)
    return is_short(packing.rows, inputs, hidden, backward, most)


def _small_forward(
    weights: Weights, x: Array, h0: Array, c0: Array, y: Array, h_n: Array, c_n: Array, keep_tape: bool
) -> DirectionTape | None:
    """Run one layer over a few rows; writes y, h_n and c_n. The tape keeps the gates even with `recompute`."""
    rows, inputs, hidden = len(y), x.shape[2], h0.shape[2]
    weight_ih, weight_hh, bias = _plain(weights.weight_ih), _plain(weights.weight_hh), _bias(weights)
    x = x.reshape(rows, inputs)
    if not keep_tape:
        packed = _packed(weights)
        prepare(x.dtype, bool(packed))
        if packed:
            fits = _few_rows_packed(*packed, x, h0, c0, y, h_n, c_n, inputs, hidden, NO_TEAM, 0)
        else:
            biased = weights.bias is not None
            fits = _few_rows(
                weight_ih, weight_hh, bias, x, h0, c0, y, h_n, c_n, inputs, hidden, biased, NO_TEAM, 0
            )  # fmt: skip
        assert fits
        return None
    size = _Size.of(weight_ih)
    # Each by itself, for so few rows need not be aligned; that would take longer.
    tape = np.empty((rows, size.blocks, TAPE, size.width), x.dtype)
    h_rows = np.empty((rows, size.blocks * size.width), x.dtype)
    small_forward_taped(weight_ih, weight_hh, bias, x, h0, c0, y, h_n, c_n, tape, h_rows, NO_TEAM)
    return DirectionTape(tape, h_rows, c0[0].copy())


def _small_backward(
    weights: Weights, layer: LayerTape, dy: Array, dh_n: Array, dc_n: Array, dx: Array, dh0: Array, dc0: Array
) -> Weights:
    """Back-propagate through one layer over a few rows; writes dx, dh0 and dc0."""
    (tape,), dtype = layer.directions, dx.dtype
    weight_ih, weight_hh, bias = _plain(weights.weight_ih), _plain(weights.weight_hh), _bias(weights)
    grads = [new_array(array.shape, dtype) for array in (weight_ih, weight_hh, bias)]
    workspace = _gate_gradients(len(dx), len(weight_hh), dtype)
    scratch = SCRATCH.borrow(workspace)
    small_backward(
        weight_ih, weight_hh, layer.x.reshape(dx.shape), tape.gates, tape.h_rows, tape.c0, dy, dh_n, dc_n,
        dx, dh0, dc0, *grads, *scratch,
    )  # fmt: skip
    SCRATCH.give_back(workspace, scratch)
    return Weights(grads[0], grads[1], None if weights.bias is None else grads[2])


@functools.lru_cache(maxsize=16)
def _gate_gradients(rows: int, columns: int, dtype: Any) -> Workspace:
    return Workspace(dtype, ((rows, columns),))


def _run_directions(run: Callable[[int, int], Any], size: _Size, directions: int, packing: Packing) -> list[Any]:
    """Run a layer's directions forward, at once if that is better; `run` is given one, and the most threads for it."""
    most = get_num_threads()
    if directions == 1 or size.plans(packing, most, directions=directions)[0].kind != "directions":
        return [run(direction, most) for direction in range(directions)]
    return run_each(lambda direction: run(direction, 1), directions)


class _Size(NamedTuple):
    """Of one layer in one direction."""

    inputs: int  # I
    hidden: int  # H
    width: int  # V, lanes of a vector
    blocks: int  # vectors that H takes
    dtype: Any

    @classmethod
    def of(cls, weight_ih: Array) -> _Size:
        """Read it off the weights."""
        return _size(*weight_ih.shape, weight_ih.dtype)

    @property
    def packed_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the packed weights and the packed bias."""
        return (self.blocks, self.inputs + self.hidden, GATES, self.width), (self.blocks, GATES, self.width)

    def plans(
        self, packing: Packing, threads: int, directions: int = 1, backward: bool = False, packed: bool = False
    ) -> tuple[Plan, ...]:
        """Choose a plan for the layer or for one direction of it, or several to try."""
        sizes = packing.rows, packing.order.size, self.inputs, self.hidden, self.blocks
        return choose(*sizes, ROWS, threads, directions, backward, packed)


@functools.lru_cache(maxsize=64)
def _size(columns: int, inputs: int, dtype: Any) -> _Size:
    hidden, width = columns // GATES, lanes(dtype)
    return _Size(inputs, hidden, width, -(-hidden // width), dtype)


class _Way(NamedTuple):
    """One way to run a kernel: by a plan, and with what follows from it."""

    plan: Plan
    workspace: Workspace
    settings: tuple[Any, ...]  # the kernel's arguments after its arrays, up to the team


class _Ways(NamedTuple):
    """The ways of which one may be the fastest, the most promising first."""

    ways: tuple[_Way, ...]
    kind: object  # of calls, for the trials which is the fastest; None if there is but one


@functools.lru_cache(maxsize=Trials.KINDS)
def _kind(*_: Any) -> object:
    """Return an object for each kind of call, found faster than what it stands for."""
    return object()


_compiled: set[Any] = set()  # kernel, dtype and number of arrays to work with: what makes one of its signatures


def _run(
    kernel: Any,
    arguments: tuple[Any, ...],
    ways_for: Callable[[int], _Ways],
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
    signature = kernel, way.workspace.dtype, len(way.workspace.shapes)
    if way.plan.threads > 1 and signature not in _compiled:
        # Not with workers, who would wait awake all the time, on a core and for the interpreter.
        like_scratch = (np.empty((0,) * len(shape), way.workspace.dtype) for shape in way.workspace.shapes)
        compile_for(kernel, (*arguments, *like_scratch, *kept, *way.settings, NO_TEAM, 0))
        _compiled.add(signature)
    workers = reserve(way.plan.threads - 1) if way.plan.threads > 1 else []
    try:
        as_planned = 1 + len(workers) == way.plan.threads
        if not as_planned:  # other calls have the workers
            way = ways_for(1 + len(workers)).ways[0]
        scratch = SCRATCH.borrow(way.workspace)
        start = time.perf_counter()
        result = run_team(kernel, (*arguments, *scratch, *kept, *way.settings), workers[: way.plan.threads - 1])
    finally:
        if workers:
            release(workers)
    if kind and as_planned and result is not False:
        TRIALS.report(kind, number, time.perf_counter() - start, rows)
    SCRATCH.give_back(way.workspace, scratch)
    return result


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
    size = _Size.of(weights.weight_ih)
    # What was computed on the weights as they lie could not be computed again to the same bits, and is little.
    recompute = recompute and not are_few(packing.rows, size.inputs, size.hidden, ROWS)
    rows, kept = packing.rows, 1 if recompute else TAPE
    shapes = (rows, size.blocks, kept, size.width), (rows, size.blocks * size.width)
    tape = one_block(dtype, *shapes) if keep_tape else []
    arguments = (
        _plain(weights.weight_ih), _plain(weights.weight_hh), _bias(weights), packing.pack(x, reverse),
        h0, c0, packing.order, packing.lengths, packing.offsets, packing.places(reverse),
        y, direction * size.hidden, h_n, c_n, keep_tape, *tape,
    )  # fmt: skip

    packed = _packed(weights)

    def ways(most: int) -> _Ways:
        return _forward_ways(size, packing, keep_tape, bool(packed), most)

    _run(layer_forward, arguments, ways, packing.rows, threads, packed)
    return DirectionTape(tape[0], tape[1], c0.copy()) if keep_tape else None


@functools.lru_cache(maxsize=256)
def _forward_ways(size: _Size, packing: Packing, training: bool, packed: bool, most: int) -> _Ways:
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
            *(() if packed else ((weights[0], 0, *weights[2:]) if plan.as_they_lie else weights, bias)),
        )
        pack = not (packed or plan.as_they_lie)
        settings = pack, plan.ahead, plan.parts(packing, blocks), plan.kind == "units"
        ways.append(_Way(plan, Workspace(dtype, shapes), settings))
    kind = _kind(layer_forward, size, batch, packing.rows.bit_length(), plans, packed) if len(plans) > 1 else None
    return _Ways(tuple(ways), kind)


@functools.lru_cache(maxsize=16)  # as the arrays in `packing`
def _equal_call(
    weight_ih: tuple[int, int], steps: int, batch: int, dtype: Any, packed: bool
) -> tuple[tuple[Array, ...], Callable[[int], _Ways]]:
    """Return what a call on sequences of equal length shares with others of its size: so much less to do for each.

    These are the kernel's arguments that say where the rows are, and the ways to run it.
    """
    size, packing = _size(*weight_ih, dtype), Packing.of(None, steps, batch)

    @functools.cache
    def ways(most: int) -> _Ways:
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
    size = _Size.of(weights.weight_ih)
    weight_ih, weight_hh, bias = _plain(weights.weight_ih), _plain(weights.weight_hh), _bias(weights)
    grads = [new_array(array.shape, dtype) for array in (weight_ih, weight_hh, bias)]
    recompute = tape.gates.shape[2] < TAPE
    arguments = (
        weight_ih, weight_hh, bias, packing.pack(layer.x, reverse), tape.gates, tape.h_rows, tape.c0,
        packing.order, packing.lengths, packing.offsets, packing.places(reverse),
        dy, direction * size.hidden, dh_n, dc_n, reverse, dx, dh0, dc0, *grads, _chunk(packing),
        *(() if recompute else (None, None, None)),
    )  # fmt: skip

    def ways(most: int) -> _Ways:
        return _backward_ways(size, packing, recompute, most)

    _run(layer_backward, arguments, ways, packing.rows, get_num_threads())
    return Weights(grads[0], grads[1], None if weights.bias is None else grads[2])


@functools.lru_cache(maxsize=256)
def _backward_ways(size: _Size, packing: Packing, recompute: bool, most: int) -> _Ways:
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
            (plan.threads, INPUT_ROWS, panel),
        )
        ways.append(_Way(plan, Workspace(dtype, shapes), (plan.parts(packing, blocks), plan.kind == "units")))
    kind = _kind(layer_backward, size, batch, packing.rows.bit_length(), plans) if len(plans) > 1 else None
    return _Ways(tuple(ways), kind)


BACKEND: Any = CpuBackend()
