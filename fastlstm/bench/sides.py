"""The sides of a comparison, and those of fastlstm: on NumPy arrays, and on CuPy arrays.

A library says in :class:`Calls` how it computes; :func:`side_of` makes a side of that and a problem.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

import fastlstm
from fastlstm.backends import threads as team
from fastlstm.bench.work import Array, Problem

__all__ = ["CHECKED_STEPS", "Calls", "Side", "cpu", "cuda", "event_seconds", "held", "side_of", "with_threads"]

CHECKED_STEPS = 4  # of a stream, from a zero state, before it is timed


def host_seconds(call: Callable[[], Any], count: int) -> float:
    """Seconds of each of `count` calls in a row, by the host's clock."""
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def event_seconds(cuda: Any, call: Callable[[], Any], count: int) -> float:
    """Seconds of each of `count` calls in a row on the current stream, by CUDA events, with gaps between launches."""
    start, end = cuda.Event(), cuda.Event()
    cuda.get_current_stream().synchronize()
    start.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return float(cuda.get_elapsed_time(start, end)) / 1e3 / count


@dataclass(frozen=True)
class Side:
    """One way to compute one problem.

    `outputs` returns NumPy arrays to compare: y (T, B, D * H) of an inference; y, dx, and every parameter's gradient of
    a training pass; h (CHECKED_STEPS, B, H) of a stream's first steps.
    """

    call: Callable[[], Any]  # computes it once; a stream continues from the state before
    outputs: Callable[[], tuple[Array, ...]]
    seconds: Callable[[Callable[[], Any], int], float] = host_seconds  # of each of so many calls in a row

    def time(self, count: int) -> float:
        """Seconds of each of `count` calls in a row."""
        return self.seconds(self.call, count)


@dataclass(frozen=True)
class Calls:
    """How a library computes, on arrays of its own; x is (T, B, I), or (T, I) if it is unbatched."""

    infer: Callable[[Any], Any]  # x -> y
    train: Callable[[Any, Any], Any]  # x, dy -> y, dx, every parameter's gradient
    step: Callable[[Any, Any], Any]  # x, state or None -> h, state
    load: Callable[[Array], Any] = lambda array: array  # from the host; before anything is timed
    fetch: Callable[[Any], Array] = lambda array: array  # to the host

    def with_copies(self) -> Calls:
        """Return the same calls on NumPy arrays: each call copies them to the GPU and back; the state stays there."""

        def step(x: Array, state: Any) -> tuple[Array, Any]:
            h, state = self.step(self.load(x), state)
            return self.fetch(h), state

        return Calls(
            lambda x: self.fetch(self.infer(self.load(x))),
            lambda x, dy: [self.fetch(found) for found in self.train(self.load(x), self.load(dy))],
            step,
        )


def side_of(
    problem: Problem, calls: Calls, events: Any = None, setting: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Side:
    """Make a side, timed by CUDA events where there are any; `setting` is held in each sample: sides take turns."""
    work = problem.work
    given = [array[:, 0].copy() if work.unbatched else array for array in (problem.x, problem.dy)]
    x, dy = calls.load(given[0]), calls.load(given[1]) if work.kind == "train" else None
    state: Any = None

    def step() -> Any:
        nonlocal state
        h, state = calls.step(x, state)
        return h

    def outputs() -> tuple[Array, ...]:
        nonlocal state
        with setting():
            if work.kind == "stream":
                state = None
                steps = [calls.fetch(step()) for _ in range(CHECKED_STEPS)]
                return (np.stack(steps).reshape(CHECKED_STEPS, work.batch, -1),)
            found = [calls.fetch(value) for value in (call() if work.kind == "train" else [call()])]
        if work.unbatched:  # y and dx; parameters have no batch
            found[:2] = [value.reshape(work.steps, 1, -1) for value in found[:2]]
        return tuple(found)

    def seconds(call: Callable[[], Any], count: int) -> float:
        with setting():
            return event_seconds(events, call, count) if events else host_seconds(call, count)

    call = {"infer": lambda: calls.infer(x), "train": lambda: calls.train(x, dy), "stream": step}[work.kind]
    return Side(call, outputs, seconds)


@contextlib.contextmanager
def held(name: str, value: Any, *places: Any) -> Iterator[None]:
    """Set an attribute of some objects, and restore what it was."""
    before = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, old in zip(places, before, strict=True):
            setattr(place, name, old)


def _ours(problem: Problem, model: fastlstm.LSTM, xp: Any = np, **options: Any) -> Calls:
    """Our calls on arrays of NumPy or CuPy, with options of the forward pass."""
    lengths, streams = problem.lengths, problem.work.kind == "stream"

    def train(x: Any, dy: Any) -> tuple[Any, ...]:
        y, _, tape = model.forward(x, lengths=lengths, **options)
        grads = model.backward(tape, dy)
        return y, grads.x, *(grads.params[name] for name in model.params)

    return Calls(
        lambda x: model(x, lengths=lengths)[0],
        train,
        model.step,
        load=lambda host: xp.asarray(host[0] if streams else host),
        fetch=np.asarray if xp is np else xp.asnumpy,
    )


@contextlib.contextmanager
def with_threads(threads: int, names: Iterable[str] = ()) -> Iterator[None]:
    """Set the number of threads of fastlstm, and of PyTorch if a side has its name; restore what was set before."""
    torch: Any = None
    if any(name.startswith("torch") for name in names):
        with contextlib.suppress(Exception):  # a library that is broken stops its own sides, and no others
            torch = import_module("torch")
    before = team._chosen and team._chosen.threads, torch and torch.get_num_threads()  # None: "as the machine has them"
    fastlstm.set_num_threads(threads)
    if torch:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        fastlstm.set_num_threads(before[0])
        if torch:
            torch.set_num_threads(before[1])


def cpu(problem: Problem, threads: int, *, frozen: bool = True, recompute: bool = False) -> Side:
    """Our library on NumPy arrays. The model is frozen, unless it is trained or `frozen` is false.

    The parameters are constants for ONNX Runtime and OpenVINO, too.
    """
    model = problem.model.freeze() if frozen and problem.work.kind != "train" else problem.model
    return side_of(problem, _ours(problem, model, recompute=recompute))


def cuda(
    problem: Problem, threads: int, *, copies: bool = False, by_steps: bool = False, precision: str = "float32"
) -> Side:
    """Our library on the GPU, timed by CUDA events, on CuPy arrays that are there already.

    With `copies`, on NumPy arrays, timed by the host's clock; model and state stay on the GPU. With
    `by_steps`, with a product and a kernel for each time step, whatever the plan is. `precision` is the model's.
    """
    cupy, plans = import_module("cupy"), import_module("fastlstm.backends.cuda.plans")
    cupy.get_default_memory_pool().free_all_blocks()  # left by the work before; PyTorch has another pool
    model = problem.model.to(cupy)
    model.precision = precision
    calls = _ours(problem, model, cupy)
    if copies:
        return side_of(problem, calls.with_copies())
    return side_of(problem, calls, cupy.cuda, lambda: held("FORCED", "step" if by_steps else plans.FORCED, plans))
