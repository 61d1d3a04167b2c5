"""The project's goals on a CPU, compared with the results of one machine, and why some are missed.

A reason is one sentence without figures, which are generated. ``figures.py`` fails if a missed goal, or a case that a
peer wins, has none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import truediv
from statistics import geometric_mean as mean
from typing import NamedTuple

import closed_loop as loops
import studies

from fastlstm.bench import report
from fastlstm.bench.results import Case, Results
from fastlstm.bench.work import Work

OURS = studies.OURS
LARGE = "50,64,512,512 infer float32"  # most of its time is arithmetic
STEP = Work(1, 1, 32, 64, kind="stream")
LOOPED = ("torch", loops.CELL, "onnxruntime")
OLD, CALL = "55c5fee", "call (10, 4, I)"  # of versions.json
Values = Callable[[Results, Case], Iterable[float]]  # of a case


class Goal(NamedTuple):
    """A goal, at least or at most, and how to read its values off a case.

    `where` is a pattern for the beginning of FILE/GROUP/CASE. Each group of each file has a value of its own, which
    `combine` makes of all values of its cases.
    """

    words: str
    asked: float
    at_most: bool
    where: str
    values: Values
    combine: Callable[[Iterable[float]], float] = max
    why: str = ""

    def found(self, files: Mapping[str, Results]) -> list[float]:
        """Return the value of each group of each file."""
        found: dict[tuple[str, str], list[float]] = {}
        for name, file in files.items():
            for case in file.cases:
                if re.match(self.where, f"{name}/{case.group}/{case.name}"):
                    found.setdefault((name, case.group), []).extend(self.values(file, case))
        return [self.combine(values) for values in found.values() if values]


def best_peer(_: Results, case: Case) -> list[float]:
    """Return the best peer's time / ours."""
    return sorted(ratio.middle for _, _, ratio in report.duels([case]))[:1]


def share_of_peak(results: Results, case: Case) -> Iterable[float]:
    """Return the share of the measured peak."""
    return filter(None, [results.share_of_peak(case, OURS)])


def ratio(*theirs: str, to: Sequence[str] = (OURS,)) -> Values:
    """Return the time of each of some sides / that of each of others."""
    return lambda _, case: [r.middle for side in theirs for other in to if (r := case.ratio(side, other))]


def beside(name: str, compared: Callable[[float, float], float]) -> Values:
    """Compare our seconds with those of another case of the group."""

    def found(results: Results, case: Case) -> list[float]:
        others = [other for other in results.cases if other.group == case.group and other.name == name]
        return [compared(case.spread(OURS).middle, other.spread(OURS).middle) for other in others]

    return found


def more(ours: float, other: float) -> float:
    """Return the difference of seconds in microseconds."""
    return 1e6 * (ours - other)


def seconds(_: Results, case: Case) -> list[float]:
    """Return our seconds."""
    return [case.spread(OURS).middle]


WHOLE = "family.*(infer|train)"  # the cases of whole sequences

CHECKED = "A prepared call checks each parameter in Python at every call."
NORMED = "Layer norm goes over each row three times more, and keeps nine more numbers a unit for training."
SEEN = "The cell's step runs twice in each direction of time, and what a gate sees is summed unit by unit."
COMPILED = "What remains is LLVM's optimisation and code generation of the kernels themselves."
PHASED = "Cells with phases have drivers of their own, compiled once for all of them, backward the longer one."
BOTH = "Most of it is the second direction's computation."
ORDERED = "Lengths are checked and put in order in each call, and rows of the batch are found through an index."
SMALL = "With few units the step is mostly the LSTM at its usual speed; what PyTorch does around it both sides share."
ONE_THREAD = "One thread is near the measured peak at this size, and so is PyTorch."
INFER, TRAIN = r"goals.*/[\d,]+ infer float32", r"goals.*/[\d,]+ train float32"
FIRST, SHAPES = ratio(OURS, to=[OLD]), r"versions/calls.*/(inference|training) .*,"
GOALS = (
    Goal("inference, float32: best peer's time / ours, least", 1.0, False, INFER, best_peer, min),
    Goal("inference, float32: geometric mean", 1.4, False, INFER, best_peer, mean),
    Goal("training, float32: PyTorch's time / ours, least", 1.2, False, TRAIN, best_peer, min, ONE_THREAD),
    Goal("training, float32: geometric mean", 2.0, False, TRAIN, best_peer, mean),
    Goal("inference, float64: geometric mean", 1.5, False, r"goals.*/[\d,]+ infer float64", best_peer, mean),
    Goal("training, float64: geometric mean", 1.5, False, r"goals.*/[\d,]+ train float64", best_peer, mean),
    Goal("a streaming step, microseconds", 4.0, True, f"goals.*/{STEP.title}",
         lambda _, case: [1e6 * case.spread(OURS).middle]),
    Goal("a streaming step: ONNX Runtime's time / ours", 2.0, False, f"goals.*/{STEP.title}", ratio("onnxruntime")),
    Goal("ragged training: PyTorch's packed sequences / ours", 20.0, False, "goals.*ragged", ratio("torch")),
    Goal("share of the peak, inference 50,64,512,512", 0.8, False, f"goals.*/{LARGE}",
         share_of_peak, min),
    Goal("ragged training / the same padded", 0.85, True, "ragged.*365", ratio(OURS, to=[studies.PADDED])),
    Goal("first calls with an empty kernel cache, seconds", 10.0, True, "start.*cold: all three calls", seconds),
    Goal("first calls in a later process, seconds", 0.5, True, "start.*warm: all three calls", seconds),
    Goal("memory, numbers per unit, step, sequence", 7.0, True, "memory",
         lambda _, case: [case.facts[studies.GROWING]]),
    Goal("training with recompute, times the time", 1.35, True, "recompute", ratio(studies.RECOMPUTED)),
    Goal("closed loop, training: PyTorch's time / ours", 4.0, False, "closed_loop.*training", ratio("torch")),
    Goal("closed loop, training: PyTorch's time / ours in `@njit`", 8.0, False, "closed_loop.*training",
         ratio("torch", to=[loops.NJIT])),
    Goal("closed loop, training in `@njit` / the open loop in one call", 1.6, True, "closed_loop",
         ratio(loops.NJIT, to=[loops.OPEN])),
    Goal("a small step: from Python / in `@njit`", 8.0, False, "closed_loop.*small", ratio(OURS, to=[loops.NJIT])),
    Goal("closed loop, inference: best peer's time / ours, from Python and in `@njit`, least", 1.0, False,
         "closed_loop.*inference", ratio(*LOOPED, to=[OURS, loops.NJIT]), min),
    Goal("steps of other cells / the plain LSTM, most", 1.1, True, WHOLE, ratio(*studies.STEP_VARIANTS)),
    Goal("any other cell / the plain LSTM, most", 1.3, True, WHOLE,
         ratio(*studies.PHASES, studies.PROJECTED), max, NORMED),
    Goal("peepholes of shared gates / the plain LSTM, most", 1.3, True, WHOLE, ratio(studies.SHARED), max, SEEN),
    Goal("frozen step of a cell with phases / the plain LSTM, most", 3.0, True, "family.*stream",
         ratio(*studies.PHASES, studies.PROJECTED, studies.SHARED, studies.RNN_NAME)),
    Goal("training with the truncated gradient / the plain LSTM", 1.0, True, "family.*train", ratio(studies.TRUNCATED)),
    Goal("plain RNN / the plain LSTM, most", 0.45, True, WHOLE, ratio(studies.RNN_NAME)),
    Goal("`torch.nn.LSTM` / `fastlstm.torch.LSTM`, training, least", 2.0, False, "torch_lstm", ratio("torch"), min,
         SMALL),
    Goal(f"first call, CPU time / {OLD}, most", 0.6, True, "versions/first", FIRST, max, COMPILED),
    Goal(f"first call, CPU time / {OLD}, least", 0.6, True, "versions/first", FIRST, min, COMPILED),
    Goal(f"shapes: {OLD} / ours, geometric mean", 0.98, False, SHAPES, ratio(OLD), mean),
    Goal(f"shapes: {OLD} / ours, least", 0.93, False, SHAPES, ratio(OLD), min),
    Goal(f"frozen step: {OLD} / ours", 1.0, False, r"versions/calls.*/frozen step \(1", ratio(OLD), min, CHECKED),
    Goal(f"`step`: {OLD} / ours", 1.0, False, "versions/calls.*/step", ratio(OLD), min, CHECKED),
    Goal(f"training on one step: {OLD} / ours", 1.0, False, "versions/calls.*one step", ratio(OLD), min, CHECKED),
    Goal("frozen step of 2 layers / 2 models by hand", 1.15, True, "versions/calls.*2 layers",
         beside("frozen step, 2 models", truediv)),
    Goal("frozen step of 3 layers / 3 models by hand", 1.15, True, "versions/calls.*3 layers",
         beside("frozen step, 3 models", truediv)),
    Goal("a step of two, of three layers: ONNX Runtime's time / ours", 1.0, False, "layers-", ratio("onnxruntime")),
    Goal("unbatched frozen step, microseconds more than a batch of one", 1.0, True, r"versions/calls.*/frozen step \(I",
         beside("frozen step (1, I)", more)),
    Goal("`batch_first`, microseconds more", 2.0, True, "versions/calls.*/batch_first", beside(CALL, more)),
    Goal("`functional.lstm_forward`, microseconds more than `forward`", 2.0, True, "versions/calls.*/functional",
         beside("forward", more)),
    Goal("ragged, microseconds more", 2.0, True, "versions/calls.*/ragged", beside(CALL, more), max, ORDERED),
    Goal("bidirectional, microseconds more", 2.0, True, "versions/calls.*/bidirectional",
         beside(CALL, more), max, BOTH),
    Goal("a second variant of the step, CPU seconds to compile", 2.0, True, "versions/first.*clip", seconds),
    Goal("the first cell with phases, inference, CPU seconds to compile", 2.0, True, "versions/first.*inference.*norm",
         seconds, max, PHASED),
    Goal("the first cell with phases, training, CPU seconds to compile", 2.0, True, "versions/first.*training.*norm",
         seconds, max, PHASED),
)  # fmt: skip
WINS = {
    ("bench", LARGE): "Both are near the measured peak at this size, and which is ahead changes from run to run.",
    ("start", "cold"): "The first process compiles the kernels for its processor; PyTorch comes compiled.",
    ("start", "warm"): "The first call loads Numba and the compiled kernels; PyTorch has loaded its own in its import.",
}
"""Why a peer wins, by file and the beginning of the case's name."""


def rows(files: Mapping[str, Results]) -> Iterator[list[str]]:
    """Give the rows of the table of goals: what misses is bold, with the reason; ValueError if it has none."""
    for goal in GOALS:
        values = goal.found(files)
        missed = [value > goal.asked if goal.at_most else not value >= goal.asked for value in values]
        if any(missed) and not goal.why:
            raise ValueError(f"goals.py does not say why this goal is missed: {goal.words}")
        cells = [f"**{v:.2f}**" if bad else f"{v:.2f}" for v, bad in zip(values, missed, strict=True)]
        if values:
            bound = f"at {'most' if goal.at_most else 'least'} {goal.asked:g}"
            yield [goal.words, bound, " / ".join(cells), goal.why if any(missed) else ""]


def wins(results: Results) -> Iterator[str]:
    """Give a line for each reason why a peer wins cases of a file, with these; ValueError if one has none."""
    found: dict[str, list[str]] = {}
    for case, side, spread in report.losses(results.cases):
        fits = [why for (name, start), why in WINS.items() if name == results.name and case.name.startswith(start)]
        if not fits:
            raise ValueError(f"goals.py does not say why {side} wins at {results.name}: {case.name}")
        found.setdefault(fits[0], []).append(f"{case.name} ({side} {spread.middle:.2f})")
    for why, cases in found.items():
        yield f"- {'; '.join(cases)}: {why}"
