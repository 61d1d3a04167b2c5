"""What a side of a comparison is, and our own: the library on NumPy arrays, and on CuPy arrays.

A side is built for one problem and a number of threads, by a function that is a context manager: leaving it puts back
what it had set for the whole process, such as the number of threads.

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
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

import fastlstm
from fastlstm.backends import threads as team
from fastlstm.bench.work import Array, Problem

__all__ = [
    "CHECKED_STEPS", "Side", "cpu", "cuda", "cuda_with_copies", "event_seconds", "host_seconds", "not_frozen",
    "reference",
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

    Attributes
    ----------
    call : callable
        Computes it once; what it returns does not matter. When streaming, it goes on from the state before.
    outputs : callable
        Computes it and returns NumPy arrays to compare, in this order: y (T, B, H) of an inference; y, dx, and the
        gradients by W_ih, W_hh and b of a training pass; h (CHECKED_STEPS, B, H) of a stream's first steps.
    seconds : callable
        Given `call` and a count, the seconds of each of so many calls in a row.
    """

    call: Callable[[], Any]
    outputs: Callable[[], tuple[Array, ...]]
    seconds: Callable[[Callable[[], Any], int], float] = host_seconds

    def time(self, count: int) -> float:
        """Seconds of each of `count` calls in a row."""
        return self.seconds(self.call, count)


GRADIENTS = ("weight_ih_l0", "weight_hh_l0", "bias_l0")


def _ours(problem: Problem, model: fastlstm.LSTM, x: Any, dy: Any) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return the call to time, and one for the arrays to compare; both on the arrays' own device."""
    kind, lengths = problem.work.kind, problem.lengths

    def train() -> tuple[Any, ...]:
        y, _, tape = model.forward(x, lengths=lengths)
        grads = model.backward(tape, dy)
        return y, grads.x, *(grads.params[name] for name in GRADIENTS)

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
    """Hold our own number of threads."""
    before = (
        team._chosen and team._chosen.threads
    )  # and not get_num_threads(): None stands for "as the machine has them"
    fastlstm.set_num_threads(threads)
    try:
        yield
    finally:
        fastlstm.set_num_threads(before)


def _stacked(problem: Problem, arrays: tuple[Any, ...]) -> tuple[Array, ...]:
    """Bring arrays to the host; the steps of a stream become one array."""
    host = tuple(value if isinstance(value, np.ndarray) else value.get() for value in arrays)
    return (np.stack(host),) if problem.work.kind == "stream" else host


@contextlib.contextmanager
def cpu(problem: Problem, threads: int) -> Iterator[Side]:
    """Our library on NumPy arrays, as it runs them: on the compiled kernels. The model is frozen unless it trains."""
    with _cpu(problem, problem.frozen_or_trained, threads) as side:
        yield side


@contextlib.contextmanager
def not_frozen(problem: Problem, threads: int) -> Iterator[Side]:
    """The same on a model whose parameters could change between any two calls."""
    with _cpu(problem, problem.model, threads) as side:
        yield side


@contextlib.contextmanager
def _cpu(problem: Problem, model: fastlstm.LSTM, threads: int) -> Iterator[Side]:
    with _threads(threads):
        call, results = _ours(problem, model, problem.x, problem.dy)
        yield Side(call, lambda: _stacked(problem, results()))


@contextlib.contextmanager
def reference(problem: Problem, threads: int) -> Iterator[Side]:
    """Our reference: plain NumPy, its matrix products held to so many threads."""
    limits = import_module("threadpoolctl").threadpool_limits
    call, results = _ours(problem, problem.model, problem.x, problem.dy)

    def forced(function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with fastlstm.use_backend("reference"):
                return function()

        return run

    with limits(threads):
        yield Side(forced(call), lambda: _stacked(problem, forced(results)()))


def event_seconds(cupy: Any, call: Callable[[], Any], count: int) -> float:
    """Seconds of each of `count` calls in a row by CUDA events on the current stream, the host's delays included."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.get_current_stream().synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(cupy.cuda.get_elapsed_time(start, end)) / 1e3 / count


@contextlib.contextmanager
def cuda(problem: Problem, threads: int) -> Iterator[Side]:
    """Our library on CuPy arrays that are on the GPU already, timed by CUDA events; no array is copied."""
    cupy = import_module("cupy")
    cupy.get_default_memory_pool().free_all_blocks()  # what the work before has left; PyTorch has another pool
    model = problem.model.to(cupy)
    call, results = _ours(problem, model, cupy.asarray(problem.x), cupy.asarray(problem.dy))
    yield Side(
        call,
        lambda: _stacked(problem, results()),
        lambda call, count: event_seconds(cupy, call, count),
    )


@contextlib.contextmanager
def cuda_with_copies(problem: Problem, threads: int) -> Iterator[Side]:
    """Our library on the GPU for a caller who has NumPy arrays, timed by the host's clock.

    The model stays on the GPU, as does a stream's state. Each call copies its input there and what it computes back:
    y of an inference, h of a step, y and every gradient of a training pass.
    """
    cupy = import_module("cupy")
    model = problem.model.to(cupy)
    work, lengths = problem.work, problem.lengths
    state: Any = None

    def call() -> Any:
        nonlocal state
        x = cupy.asarray(problem.x)
        if work.kind == "infer":
            return (model(x, lengths=lengths)[0].get(),)
        if work.kind == "stream":
            h, state = model.step(x[0], state)
            return h.get()
        y, _, tape = model.forward(x, lengths=lengths)
        grads = model.backward(tape, cupy.asarray(problem.dy))
        return (y.get(), grads.x.get(), *(grads.params[name].get() for name in GRADIENTS))

    def outputs() -> tuple[Array, ...]:
        nonlocal state
        state = None
        if work.kind == "stream":
            return (np.stack([call() for _ in range(CHECKED_STEPS)]),)
        found: tuple[Array, ...] = call()
        return found

    yield Side(call, outputs)
