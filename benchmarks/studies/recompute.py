"""The low-memory mode: what it takes in time to compute the gates again, and what it saves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastlstm.bench import clock, sides
from fastlstm.bench.work import Problem, Work

from . import memory
from .record import OURS, Case

ABOUT = (
    "A training pass in float32 and float64 whose tape keeps h and c alone, and whose backward pass computes the gates"
    " again (`recompute=True`), against one that keeps all. Both give the same gradients to the last bit. The memory is"
    " that of the study `memory`, by the same count."
)
RECOMPUTED = "fastlstm, recompute"
SIDES = (OURS, RECOMPUTED)
SHAPES = ((100, 1, 128, 256), (100, 32, 64, 128), (365, 64, 32, 256), (50, 64, 512, 512))
DTYPES = ("float32", "float64")
SAVED = "memory, as a share of that with the whole tape"


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure each shape and dtype, the two modes in turn."""
    for dtype in DTYPES:
        for shape in SHAPES:
            work = Work(*shape, dtype, "train")
            problem = Problem.of(work)
            with sides.cpu(problem, threads):
                both = {name: side(problem, name == RECOMPUTED) for name in SIDES}
                for one in both.values():
                    one.call()  # compiles
                values, _, interrupted = clock.take_turns(both, seconds)
            if interrupted:
                raise KeyboardInterrupt
            yield Case(f"{work.name} {dtype}", values, facts={SAVED: share_of_memory(problem, threads)})


def side(problem: Problem, recompute: bool) -> sides.Side:
    """One of the two modes."""

    def train() -> tuple[Any, ...]:
        y, _, tape = problem.model.forward(problem.x, recompute=recompute)
        grads = problem.model.backward(tape, problem.dy)
        return y, grads.x, *(grads.params[name] for name in sides.GRADIENTS)

    return sides.Side(train, train)


def share_of_memory(problem: Problem, threads: int) -> float:
    """Bytes beyond inputs and outputs with `recompute`, as a share of those without."""
    steps, batch = problem.work.steps, problem.work.batch
    with sides.cpu(problem, threads):
        less, whole = (
            memory.extra_bytes(problem.model, steps, batch, recompute=recompute) for recompute in (True, False)
        )
    return less / whole
