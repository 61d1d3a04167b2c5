"""From one thread to as many as there are cores: the same bits, in how much less time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import fastlstm
from fastlstm.bench import clock, peers, sides
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Problem, Work

from . import rows
from .record import OURS, Case

ABOUT = (
    "The same work on one thread, two, and so on, all of them in turn within one run, float32. Our results on any"
    " number of threads are compared bit by bit with those on one before anything is timed."
)
SIDES = (OURS, "torch")
SHAPES = ((100, 32, 64, 128), (365, 64, 32, 256))
KINDS = ("infer", "train")


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure each shape with 1 to `threads` threads."""
    for shape in SHAPES:
        for kind in KINDS:
            yield from _scaling(Work(*shape, kind=kind), threads, seconds)


def _scaling(work: Work, threads: int, seconds: float) -> list[Case]:
    problem = Problem.of(work)
    built: dict[tuple[str, int], Side] = {}
    with contextlib.ExitStack() as stack:
        for name in rows.here(SIDES, threads):
            for count in range(1, threads + 1):
                side = stack.enter_context(peers.CONTENDERS[name].build(problem, count))
                built[name, count] = _held(side, _setter(name), count)
        truth = built[OURS, 1].outputs()
        refused: dict[tuple[str, int], str] = {}
        for key, side in list(built.items()):
            wrong = clock.disagreement(truth, side.outputs(), work.dtype)
            if key[0] == OURS and not same_bits(truth, side.outputs()):
                raise RuntimeError(f"{work.name} {work.kind}: other bits on {key[1]} threads than on one")
            if wrong is not None:
                refused[key] = wrong
                del built[key]
        labels = {f"{name} {count}": side for (name, count), side in built.items()}
        found, _, interrupted = clock.take_turns(labels, seconds * threads)
    if interrupted:
        raise KeyboardInterrupt
    return [
        Case(
            f"{work.name} {work.kind}, {count} thread{'s' if count > 1 else ''}",
            {name: found[f"{name} {count}"] for name in SIDES if (name, count) in built},
            facts={"threads": count},
            refused={name: reason for (name, of), reason in refused.items() if of == count},
        )
        for count in range(1, threads + 1)
    ]


def _setter(name: str) -> Callable[[int], Any]:
    setter: Callable[[int], Any] = (fastlstm if name == OURS else import_module("torch")).set_num_threads
    return setter


def _held(side: Side, set_threads: Callable[[int], Any], count: int) -> Side:
    """Return the same side, which sets its number of threads first: the sides in turn have different ones."""

    def call() -> Any:
        set_threads(count)
        return side.call()

    def outputs() -> Any:
        set_threads(count)
        return side.outputs()

    def seconds(_: Callable[[], Any], calls: int) -> float:
        set_threads(count)
        return sides.host_seconds(side.call, calls)

    return Side(call, outputs, seconds)


def same_bits(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Whether arrays are equal to the last bit, the sign of zero included."""
    return all(a.tobytes() == b.tobytes() for a, b in zip(first, second, strict=True))
