"""The roofs of the machine, in the same moments as each call: what nobody who computes an LSTM on it gets below.

A share of a peak that was measured at another time says little on a machine whose speed changes from minute to minute.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any

import numpy as np
from cpu import SHAPES, STEPS

from fastlstm.bench import ceilings, clock, sides
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Array, Problem, Work

from .record import OURS, Case

TILE, WEIGHTS, NOTHING = "bare tile", "reading the weights", "a call of nothing"
PARTS, BLAS = "bare parts", "NumPy's products"
ROOFS = (TILE, WEIGHTS, NOTHING)
"""Each for itself a bound from below. What a call consists of comes one after the other in the bare parts, and might
overlap; NumPy's products are another's best at the same sizes."""
SIDES = (OURS, *ROOFS, PARTS, BLAS)
ABOUT = (
    f"Whole calls in float32, and in turn with them the roofs of the machine. The {TILE}: as many multiply-adds by"
    f" the matrix tile on data in the first-level cache. For a few sequences {WEIGHTS}: those of the inputs once, and"
    " the recurrent ones once for each step that has a state, and as often again where there are gradients, to and"
    f" fro, with nothing but an addition for each. For single steps {NOTHING}: a compiled function that returns at"
    f" once, given as many arrays, the new ones among them. The {PARTS} are all that a call cannot do without, each"
    " at its best and one after the other: the bare tile for the products whose weights many rows share, reading the"
    " weights for the others, the activations of all gates on vectors in the first-level cache, and for single steps"
    f" the call of nothing. And {BLAS}, for comparison: the matrix products alone by its BLAS, those of the inputs"
    " for all steps at once, without gates, packing or gradients by the bias. Threads divide the operations, the"
    " weights and the gates evenly. On one thread, and on as many as there are."
)
KINDS = ("infer", "train")
FEW = 8  # sequences at once: with more, each number of the weights is used too often for reading it to be the limit


def name_of(work: Work, threads: int) -> str:
    """Name of the case of a work."""
    return f"{work.name} {work.kind}, {threads} thread{'s' if threads > 1 else ''}"


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure each shape, on one thread and on `threads`."""
    works = [Work(*shape, kind=kind) for kind in KINDS for shape in SHAPES] + [*STEPS]
    for count in sorted({1, threads}):
        for work in works:
            yield _case(work, count, seconds)


def _case(work: Work, threads: int, seconds: float) -> Case:
    problem, refused = Problem.of(work), {}
    with contextlib.ExitStack() as stack:
        built = {OURS: stack.enter_context(sides.cpu(problem, threads))}
        built[TILE] = stack.enter_context(tile(work, threads))
        built[PARTS] = stack.enter_context(parts(problem, threads))
        if work.batch <= FEW:
            built[WEIGHTS] = stack.enter_context(weights(work, threads))
        if _is_call(work):
            built[NOTHING] = nothing(problem)
        try:
            built[BLAS] = stack.enter_context(products(work, threads))
        except ImportError as error:
            refused[BLAS] = f"its threads are held by threadpoolctl: {error}"
        for side in built.values():
            side.call()  # compiles
        values, _, interrupted = clock.take_turns(built, seconds)
    if interrupted:
        raise KeyboardInterrupt
    yardsticks = tuple(side for side in values if side != OURS)
    return Case(name_of(work, threads), values, facts={"threads": threads}, refused=refused, yardsticks=yardsticks)


def _passes(work: Work) -> int:
    """How often a call reads the weights of one step: forward, and back."""
    return 2 if work.kind == "train" else 1


def _is_call(work: Work) -> bool:
    """Whether the call as such counts: a step or a few, without a tape."""
    return work.steps * work.batch <= FEW and work.kind != "train"


@contextlib.contextmanager
def _roof(jobs: Sequence[Callable[[], None]]) -> Iterator[Side]:
    with ceilings.at_once(jobs) as seconds:
        yield Side(lambda: seconds(1), tuple, lambda call, count: seconds(count))


def tile(work: Work, threads: int) -> contextlib.AbstractContextManager[Side]:
    """As many multiply-adds by the bare tile, with the sums that its last one is short of or beyond."""
    return _roof([ceilings.tile_job(work.dtype, work.operations / threads)[0] for _ in range(threads)])


@functools.cache
def _reader() -> Any:
    from fastlstm.kernels.cpu.jit import unkept_kernel

    simd: Any = import_module("fastlstm.kernels.cpu.vector")
    address, fill, lanes_of, load, offset, store = (
        getattr(simd, name) for name in ("address", "fill", "lanes_of", "load", "offset", "store")
    )

    @unkept_kernel  # what plain Numba compiles cannot call the kernels' parts
    def read(passes: int, array: Any, total: Any) -> None:
        """Add up an array so many times; eight sums, for an addition has to wait for the one before."""
        start = address(array)
        width = lanes_of(start)
        parts = array.size // (8 * width)
        a = b = c = d = e = f = g = h = fill(start, 0.0)
        for n in range(passes):
            for m in range(parts):
                here = offset(start, (parts - 1 - m if n & 1 else m) * 8 * width)
                a, b = a + load(here), b + load(offset(here, width))
                c, d = c + load(offset(here, 2 * width)), d + load(offset(here, 3 * width))
                e, f = e + load(offset(here, 4 * width)), f + load(offset(here, 5 * width))
                g, h = g + load(offset(here, 6 * width)), h + load(offset(here, 7 * width))
        store(address(total), ((a + b) + (c + d)) + ((e + f) + (g + h)))

    return read


def weights(work: Work, threads: int) -> contextlib.AbstractContextManager[Side]:
    """Read as many bytes of weights, as often as the steps need them."""
    return _roof([_reading(work, threads, of_inputs=True) for _ in range(threads)])


def _reading(work: Work, threads: int, *, of_inputs: bool) -> Callable[[], None]:
    """Return one thread's share of it, with or without the weights of the inputs."""
    read = _reader()
    first, each = (np.ones(4 * work.hidden * size // threads, work.dtype) for size in (work.inputs, work.hidden))
    total = np.zeros(64 // each.itemsize, work.dtype)

    def run() -> None:
        if of_inputs:
            read(_passes(work), first, total)
        read(_passes(work) * (work.recurrent_rows // work.batch), each, total)

    return run


@functools.cache
def _gates() -> Any:
    from fastlstm.kernels.cpu.jit import unkept_kernel

    simd: Any = import_module("fastlstm.kernels.cpu.vector")
    address, lanes_of, load, offset, store = (
        getattr(simd, name) for name in ("address", "lanes_of", "load", "offset", "store")
    )
    of_cell: Any = import_module("fastlstm.kernels.cpu.cell_step")
    update, output, backward, kept = of_cell.update, of_cell.output, of_cell.backward, of_cell.TAPE
    Cell = of_cell.Cell

    @unkept_kernel
    def gates(count: int, back: bool, a: Any, c: Any, h: Any, da: Any) -> None:
        """Take vectors of cells, `count` in all, through the gates and, if asked, back again, a row after the other."""
        width = lanes_of(address(a))
        cell = Cell(0, 0, 0, 0, address(a), width)  # the plain LSTM
        vectors = c.size // width
        for done in range(0, count, vectors):
            here = vectors if count - done > vectors else count - done
            for n in range(here):
                of_a, of_c = offset(address(a), n * kept * width), offset(address(c), n * width)
                o, c_n = update(cell, of_a, width, load(of_c), of_a, 0)
                store(of_c, c_n)
                store(offset(of_a, 4 * width), o)
            for n in range(here):
                of_h, o = offset(address(h), n * width), load(offset(address(a), (n * kept + 4) * width))
                store(of_h, output(cell, o, load(offset(address(c), n * width))))
            if back:
                for n in range(here):
                    of_c, of_h = offset(address(c), n * width), offset(address(h), n * width)
                    tape = offset(address(a), n * kept * width)
                    store(of_c, backward(cell, load(of_h), load(of_c), tape, width, load(of_c), address(da)))

    return gates


def _gating(work: Work, threads: int) -> Callable[[], None]:
    """Return one thread's share of all gates: vectors in a first-level cache that hold about half."""
    simd: Any = import_module("fastlstm.kernels.cpu.vector")
    gates, width, kept = (
        _gates(),
        simd.lanes(np.dtype(work.dtype)),
        import_module("fastlstm.kernels.cpu.cell_step").TAPE,
    )
    count = work.steps * work.batch * -(-work.hidden // width) // threads
    a = np.full(64 * kept * width, 0.5, work.dtype)
    c, h = np.zeros(64 * width, work.dtype), np.zeros(64 * width, work.dtype)
    da = np.empty(4 * width, work.dtype)
    return lambda: gates(count, work.kind == "train", a, c, h, da)


def shared_operations(work: Work) -> float:
    """Count the operations of the products in which more than a few rows share each of the weights.

    With few sequences these are not the products with the states, step by step, forward and back; with few rows in
    all nothing but the gradients of the weights is left.
    """
    inputs, states = 8.0 * work.hidden * work.rows * work.inputs, 8.0 * work.hidden * work.recurrent_rows * work.hidden
    gradients = work.kind == "train"
    of_inputs = 3 * gradients or 1 if work.steps * work.batch > FEW else int(gradients)
    of_states = 3 * gradients or 1 if work.batch > FEW else int(gradients)
    return inputs * of_inputs + states * of_states


@contextlib.contextmanager
def parts(problem: Problem, threads: int) -> Iterator[Side]:
    """All that a call cannot do without, one after the other, each at its best."""
    work = problem.work

    def job() -> Callable[[], None]:
        operations = shared_operations(work)
        jobs = [_gating(work, threads)]
        if operations:
            jobs.append(ceilings.tile_job(work.dtype, operations / threads)[0])
        if work.batch <= FEW:
            jobs.append(_reading(work, threads, of_inputs=work.steps * work.batch <= FEW))

        def run() -> None:
            for part in jobs:
                part()

        return run

    call = nothing(problem).call if _is_call(work) else lambda: None
    with ceilings.at_once([job() for _ in range(threads)]) as seconds:

        def timed(_: Callable[[], None], count: int) -> float:
            return seconds(count) + (sides.host_seconds(call, count) if _is_call(work) else 0.0)

        yield Side(lambda: (seconds(1), call()), tuple, timed)


@functools.cache
def _empty() -> Any:
    from numba import njit

    @njit(nogil=True, _nrt=False)  # type: ignore[call-overload, untyped-decorator, unused-ignore]
    def empty(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any) -> bool:
        return True

    return empty


def nothing(problem: Problem) -> Side:
    """Call a compiled function that does nothing: packed weights and bias, input and states, and three new arrays."""
    work, params, empty = problem.work, problem.model.params, _empty()
    given = [params["weight_hh_l0"], params["bias_l0"], problem.x[0]]
    state = np.zeros((1, work.batch, work.hidden), work.dtype)

    def call() -> None:
        y = np.empty((work.batch, work.hidden), work.dtype)
        h_n, c_n = (
            np.empty((1, work.batch, work.hidden), work.dtype),
            np.empty((1, work.batch, work.hidden), work.dtype),
        )
        empty(*given, state, state, y, h_n, c_n)

    return Side(call, tuple)


@contextlib.contextmanager
def products(work: Work, threads: int) -> Iterator[Side]:
    """All matrix products of a call by NumPy, written where they belong; the arrays hold other numbers than a model's.

    Raises
    ------
    ImportError
        Without threadpoolctl.
    """
    limits = import_module("threadpoolctl").threadpool_limits
    rng = np.random.default_rng(0)
    steps, batch, inputs, hidden = work.shape

    def array(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(work.dtype)

    x, h, h_rows = array(steps * batch, inputs), array(batch, hidden), array(steps * batch, hidden)
    w_ih, w_hh = array(inputs, 4 * hidden), array(hidden, 4 * hidden)
    a, dh, dx = array(steps * batch, 4 * hidden), np.empty_like(h), np.empty_like(x)
    a_step, dw_ih, dw_hh = array(batch, 4 * hidden), np.empty_like(w_ih), np.empty_like(w_hh)
    w_ih_back, w_hh_back = np.ascontiguousarray(w_ih.T), np.ascontiguousarray(w_hh.T)

    def call() -> None:
        np.matmul(x, w_ih, out=a)
        for _ in range(work.recurrent_rows // batch):
            np.matmul(h, w_hh, out=a_step)
        if work.kind == "train":
            for step in range(1, steps):
                np.matmul(a[step * batch : (step + 1) * batch], w_hh_back, out=dh)
            np.matmul(a, w_ih_back, out=dx)
            np.matmul(x.T, a, out=dw_ih)
            np.matmul(h_rows.T, a, out=dw_hh)

    with limits(threads):
        yield Side(call, tuple)
