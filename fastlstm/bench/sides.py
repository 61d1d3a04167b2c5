"""The sides of a comparison, and those of fastlstm: on NumPy arrays, and on CuPy arrays.

A side is built for one problem and a number of threads by a context manager; leaving it restores what it has set for
the whole process, such as the number of threads.

>>> from fastlstm.bench.work import Problem, Work
>>> with cpu(Problem.of(Work(5, 2, 3, 8)), threads=1) as side:
...     y, = side.outputs()
...     seconds = side.time(10)  # of each of ten calls in a row
>>> y.shape
(5, 2, 8)
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import numpy as np

import fastlstm
from fastlstm.backends import threads as team
from fastlstm.bench.work import Array, Problem

__all__ = [
    "CHECKED_STEPS", "Side", "cpu", "cuda", "cuda_by_steps", "cuda_in", "cuda_with_copies", "event_seconds",
    "host_seconds",
]  # fmt: skip

CHECKED_STEPS = 4  # of a stream, from a zero state, before it is timed


def host_seconds(call: Callable[[], Any], count: int) -> float:
    """Seconds of each of `count` calls in a row, by the host's clock."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


@dataclass(frozen=True)
class Side:
    """One way to compute one problem.

    `outputs` returns NumPy arrays to compare: y (T, B, D * H) of an inference; y, dx, and every parameter's gradient of
    a training pass; h (CHECKED_STEPS, B, H) of a stream's first steps.
    """

    call: Callable[[], Any]  # computes it once; a stream continues from the state before
    outputs: Callable[[], tuple[Array, ...]]
    seconds: Callable[[Callable[[], Any], int], float] = host_seconds  # of each of so many calls in a row
    host: list[float] = field(default_factory=list)  # on a GPU: seconds of the host per call, until it is launched

    def time(self, count: int) -> float:
        """Seconds of each of `count` calls in a row."""
        return self.seconds(self.call, count)


def _ours(problem: Problem, model: fastlstm.LSTM, x: Any, dy: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the call to time, and one for the arrays to compare; both on the arrays' own device."""
    kind, lengths = problem.work.kind, problem.lengths
    if problem.work.unbatched:
        x, dy = x[:, 0].copy(), dy[:, 0].copy()

    def train() -> tuple[Any, ...]:
        y, _, tape = model.forward(x, lengths=lengths)
        grads = model.backward(tape, dy)
        return y, grads.x, *(grads.params[name] for name in model.params)

    if kind == "train":
        return train, train
    if kind == "infer":
        return lambda: model(x, lengths=lengths), lambda: (model(x, lengths=lengths)[0],)
    x_t = x[0]
    state: Any = None

    def step() -> Any:
        nonlocal state
        h, state = model.step(x_t, state)
        return h

    def first_steps() -> tuple[Any, ...]:
        nonlocal state
        state = None
        return tuple(step() for _ in range(CHECKED_STEPS))

    return step, first_steps


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Set our own number of threads; what was chosen before is restored, None being "as the machine has them"."""
    before = team._chosen and team._chosen.threads
    fastlstm.set_num_threads(threads)
    try:
        yield
    finally:
        fastlstm.set_num_threads(before)


def _on_host(problem: Problem, arrays: tuple[Any, ...]) -> tuple[Array, ...]:
    """Bring arrays to the host, in the shapes of a batch; the steps of a stream become one array."""
    host = [value if isinstance(value, np.ndarray) else value.get() for value in arrays]
    if problem.work.unbatched:
        count = 2 if problem.work.kind == "train" else len(host)  # y and dx; parameters have no batch
        host[:count] = [value[..., None, :] for value in host[:count]]
    return (np.stack(host),) if problem.work.kind == "stream" else tuple(host)


@contextlib.contextmanager
def cpu(problem: Problem, threads: int, *, frozen: bool = True) -> Iterator[Side]:
    """Our library on NumPy arrays. The model is frozen, unless it is trained or `frozen` is false."""
    with _threads(threads):
        call, results = _ours(problem, problem.frozen_or_trained if frozen else problem.model, problem.x, problem.dy)
        yield Side(call, lambda: _on_host(problem, results()))


def event_seconds(cuda: Any, call: Callable[[], Any], count: int, host: list[float] | None = None) -> float:
    """Seconds of each of `count` calls in a row on the current stream, by CUDA events, gaps between launches included.

    The seconds of the host, which end before anything is waited for, are appended to `host`.
    """
    start, end = cuda.Event(), cuda.Event()
    cuda.get_current_stream().synchronize()
    start.record()
    begin = time.perf_counter()
    for _ in range(count):
        call()
    if host is not None:
        host.append((time.perf_counter() - begin) / count)
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) / 1e3 / count


@contextlib.contextmanager
def cuda(problem: Problem, threads: int, precision: str = "float32") -> Iterator[Side]:
    """Our library on CuPy arrays that are on the GPU already, timed by CUDA events; no array is copied."""
    cupy = import_module("cupy")
    cupy.get_default_memory_pool().free_all_blocks()  # left by the work before; PyTorch has another pool
    model, host = problem.model.to(cupy), list[float]()
    model.precision = precision
    call, results = _ours(problem, model, cupy.asarray(problem.x), cupy.asarray(problem.dy))

    def seconds(call: Callable[[], Any], count: int) -> float:
        return event_seconds(cupy.cuda, call, count, host)

    yield Side(call, lambda: _on_host(problem, results()), seconds, host)


def cuda_in(precision: str) -> Callable[[Problem, int], contextlib.AbstractContextManager[Side]]:
    """Return the builder of our library on the GPU with products that round their factors."""
    return lambda problem, threads: cuda(problem, threads, precision)


@contextlib.contextmanager
def cuda_by_steps(problem: Problem, threads: int) -> Iterator[Side]:
    """Our library on the GPU with a product and a kernel for each time step, whatever the plan is."""
    plans: Any = import_module("fastlstm.backends.cuda.plans")

    @contextlib.contextmanager
    def held() -> Iterator[None]:  # within each sample: the sides take turns
        before, plans.FORCED = plans.FORCED, "step"
        try:
            yield
        finally:
            plans.FORCED = before

    with cuda(problem, threads) as side:

        def seconds(call: Callable[[], Any], count: int) -> float:
            with held():
                return side.seconds(call, count)

        def outputs() -> tuple[Array, ...]:
            with held():
                return side.outputs()

        yield Side(side.call, outputs, seconds, side.host)


@contextlib.contextmanager
def cuda_with_copies(problem: Problem, threads: int) -> Iterator[Side]:
    """Our library on the GPU for a caller who has NumPy arrays, by the host's clock; model and state stay there."""
    cupy = import_module("cupy")
    model, lengths, kind = problem.model.to(cupy), problem.lengths, problem.work.kind
    state: Any = None

    def call() -> tuple[Any, ...]:
        nonlocal state
        x = cupy.asarray(problem.x[:, 0] if problem.work.unbatched else problem.x)
        if kind == "infer":
            return (model(x, lengths=lengths)[0].get(),)
        if kind == "stream":
            h, state = model.step(x[0], state)
            return (h.get(),)
        y, _, tape = model.forward(x, lengths=lengths)
        dy = cupy.asarray(problem.dy[:, 0] if problem.work.unbatched else problem.dy)
        grads = model.backward(tape, dy)
        return (y.get(), grads.x.get(), *(grads.params[name].get() for name in model.params))

    def outputs() -> tuple[Array, ...]:
        nonlocal state
        state = None
        found = call() if kind != "stream" else tuple(call()[0] for _ in range(CHECKED_STEPS))
        return _on_host(problem, found)

    yield Side(call, outputs)
