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
from cpu import SHAPES

from fastlstm.bench import ceilings, clock, sides
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Array, Problem, Work

from .record import OURS, Case

TILE, WEIGHTS, NOTHING, BLAS = "bare tile", "reading the weights", "a call of nothing", "NumPy's products"
ROOFS = (TILE, WEIGHTS, NOTHING)
"""Each for itself a bound from below; NumPy's products are none, but another's best at the same sizes."""
SIDES = (OURS, *ROOFS, BLAS)
ABOUT = (
    f"Whole calls in float32, and in turn with them the roofs of the machine. The {TILE}: as many multiply-adds by the"
    " matrix tile on data in the first-level cache. For a few sequences"
    f" {WEIGHTS}: all of them once, and the recurrent ones once for each step, and as often again where there are"
    f" gradients, to and fro, with nothing but an addition for each. For single steps {NOTHING}: a compiled function"
    f" that returns at once, given as many arrays, the new ones among them. And {BLAS}, for comparison: the matrix"
    " products alone by its BLAS, those of the inputs for all steps at once, without gates, packing or gradients by the"
    " bias. Threads divide the operations and the weights evenly. On one thread, and on as many as there are."
)
KINDS = ("infer", "train")
STEP = Work(1, 1, 32, 64, kind="stream")
FEW = 8  # sequences at once: with more, each number of the weights is used too often for reading it to be the limit


def name_of(work: Work, threads: int) -> str:
    """Name of the case of a work."""
    return f"{work.name} {work.kind}, {threads} thread{'s' if threads > 1 else ''}"


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure each shape, on one thread and on `threads`."""
    works = [Work(*shape, kind=kind) for kind in KINDS for shape in SHAPES] + [STEP]
    for count in sorted({1, threads}):
        for work in works:
            yield _case(work, count, seconds)


def _case(work: Work, threads: int, seconds: float) -> Case:
    problem, refused = Problem.of(work), {}
    with contextlib.ExitStack() as stack:
        built = {OURS: stack.enter_context(sides.cpu(problem, threads))}
        built[TILE] = stack.enter_context(tile(work, threads))
        if work.batch <= FEW:
            built[WEIGHTS] = stack.enter_context(weights(work, threads))
        if work.steps * work.batch <= FEW and work.kind != "train":
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
    return Case(name_of(work, threads), values, facts={"threads": threads}, refused=refused)


def _passes(work: Work) -> int:
    """How often a call reads the weights of one step: forward, and back."""
    return 2 if work.kind == "train" else 1


@contextlib.contextmanager
def _roof(jobs: Sequence[Callable[[], None]]) -> Iterator[Side]:
    with ceilings.at_once(jobs) as seconds:
        yield Side(lambda: seconds(1), tuple, lambda call, count: seconds(count))


def tile(work: Work, threads: int) -> contextlib.AbstractContextManager[Side]:
    """As many multiply-adds by the bare tile, with the sums that its last one is short of or beyond."""
    forward = 8.0 * work.steps * work.batch * work.hidden * (work.inputs + work.hidden)
    operations = forward * (3 if work.kind == "train" else 1)
    return _roof([ceilings.tile_job(work.dtype, operations / threads)[0] for _ in range(threads)])


@functools.cache
def _reader() -> Any:
    from numba import njit

    simd: Any = import_module("fastlstm.kernels.cpu.simd")
    address, fill, lanes_of, load, offset, store = (
        getattr(simd, name) for name in ("address", "fill", "lanes_of", "load", "offset", "store")
    )

    @njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
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
    read = _reader()

    def job() -> Callable[[], None]:
        of_inputs, of_states = (
            np.ones(4 * work.hidden * size // threads, work.dtype) for size in (work.inputs, work.hidden)
        )
        total = np.zeros(64 // of_states.itemsize, work.dtype)

        def run() -> None:
            read(_passes(work), of_inputs, total)
            read(_passes(work) * work.steps, of_states, total)

        return run

    return _roof([job() for _ in range(threads)])


@functools.cache
def _empty() -> Any:
    from numba import njit

    @njit(nogil=True)  # type: ignore[untyped-decorator, unused-ignore]
    def empty(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any, h: Any, i: Any) -> bool:
        return True

    return empty


def nothing(problem: Problem) -> Side:
    """Call a compiled function that does nothing: weights, bias, input and states, and three new arrays."""
    work, params, empty = problem.work, problem.model.params, _empty()
    given = [params["weight_ih_l0"], params["weight_hh_l0"], params["bias_l0"], problem.x[0]]
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
        for _ in range(steps):
            np.matmul(h, w_hh, out=a_step)
        if work.kind == "train":
            for step in range(steps):
                np.matmul(a[step * batch : (step + 1) * batch], w_hh_back, out=dh)
            np.matmul(a, w_ih_back, out=dx)
            np.matmul(x.T, a, out=dw_ih)
            np.matmul(h_rows.T, a, out=dw_hh)

    with limits(threads):
        yield Side(call, tuple)
