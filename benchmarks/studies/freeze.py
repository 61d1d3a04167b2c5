"""A frozen model against the same whose parameters may change from call to call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fastlstm.bench import clock, sides
from fastlstm.bench.work import Problem, Work

from .record import OURS, Case

ABOUT = (
    "Inference of whole sequences and single steps in float32, by a frozen model, whose weights were brought into the"
    " order of the kernels once, and by the model as it was. Their outputs are compared first."
)
LIVE = "not frozen"
SIDES = (OURS, LIVE)
STREAMS = ((1, 1, 32, 64), (1, 8, 32, 64), (1, 1, 128, 256), (1, 32, 10, 100), (1, 64, 64, 128), (1, 32, 128, 256))
SEQUENCES = ((1, 1, 128, 256), (10, 1, 32, 64), (100, 1, 32, 64), (10, 32, 64, 128), (100, 32, 64, 128))


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure each shape, the two models in turn."""
    works = [Work(*shape, kind="stream") for shape in STREAMS] + [Work(*shape) for shape in SEQUENCES]
    for work in works:
        problem, refused = Problem.of(work), {}
        with contextlib.ExitStack() as stack:
            built = {
                OURS: stack.enter_context(sides.cpu(problem, threads)),
                LIVE: stack.enter_context(sides.not_frozen(problem, threads)),
            }
            wrong = clock.disagreement(built[OURS].outputs(), built[LIVE].outputs(), work.dtype)
            if wrong is not None:
                refused[LIVE] = wrong
                del built[LIVE]
            values, _, interrupted = clock.take_turns(built, seconds)
        if interrupted:
            raise KeyboardInterrupt
        yield Case(f"{work.name} {work.kind}", values, refused=refused)
