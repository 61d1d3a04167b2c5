"""The project's goals on a CPU, compared with the results of one machine, and why some are missed.

A reason is one sentence without figures, which are generated. ``figures.py`` fails if a missed goal, or a case that a
peer wins, has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
OLD = "55c5fee"  # of versions.json
Value = Callable[[Results, Case], float | None]


class MissingReasonError(Exception):
    """A goal is missed, or a peer wins, and no reason is given."""


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


class Goal(NamedTuple):
    """A goal, at least or at most, and how to read its value off the results.

    `place` begins the names of the files and, behind a slash, those of their groups: each has a value of its own, which
    `combine` makes of the values of its cases.
    """

    words: str
    asked: float
    at_most: bool
    place: str
    value: Value
    combine: Callable[[Sequence[float]], float] = max
    why: str = ""

    def found(self, files: Mapping[str, Results]) -> list[float]:
        """Return the values of each file or group."""
        name, _, group = self.place.partition("/")
        values: dict[tuple[str, str], list[float]] = {}
        for file in (file for file in files if file.startswith(name)):
            for case in files[file].cases:
                of = case.group if group else ""
                if of.startswith(group) and (value := self.value(files[file], case)) is not None:
                    values.setdefault((file, of), []).append(value)
        return [self.combine(found) for found in values.values()]

    def misses(self, value: float) -> bool:
        """Whether a value misses the goal."""
        return value > self.asked if self.at_most else not value >= self.asked


def best_peer(kind: str, dtype: str) -> Value:
    """Return the best peer's time / ours, of plain works."""

    def value(_: Results, case: Case) -> float | None:
        if not case.work or not case.work.is_plain or (case.work.kind, case.work.dtype) != (kind, dtype):
            return None
        ratios = [report.ratio_of(case, side) for side in case.values if report.is_peer(side)]
        return min((ratio.middle for ratio in ratios if ratio), default=None)

    return value


def share_of_peak(title: str) -> Value:
    """Return the share of the measured peak, of the work of this title."""
    return lambda results, case: results.share_of_peak(case, OURS) if case.name == title else None


def ratio(*sides: str, of: str = "", inverse: bool = False) -> Value:
    """Return the largest time of some sides / ours, or ours / theirs, of cases whose name has the given words."""

    def value(_: Results, case: Case) -> float | None:
        found = [spread.middle for side in sides if of in case.name and (spread := case.ratio(side))]
        return max((1 / value if inverse else value for value in found), default=None)

    return value


def against(theirs: Sequence[str], ours: Sequence[str], name: str = "") -> Value:
    """Return the least time of some sides / that of others, all of which were measured, of cases of such a name."""

    def value(_: Results, case: Case) -> float | None:
        if name not in case.name or not set(ours) <= set(case.values):
            return None
        found = [case.ratio(side, mine) for side in theirs for mine in ours]
        return min((ratio.middle for ratio in found if ratio), default=None)

    return value


def seconds(name: str, scale: float = 1.0) -> Value:
    """Return our seconds, of the case of this name."""
    return lambda _, case: scale * case.spread(OURS).middle if case.name == name else None


def of_step(results: Results, case: Case) -> float | None:
    """Return the ratio of the old version at a step of a model that is not frozen."""
    return ratio(OLD)(results, case) if case.name == "step (1, I)" else None


def of_shapes(results: Results, case: Case) -> float | None:
    """Return the ratio of the old version at the shapes of the grid."""
    return ratio(OLD)(results, case) if "," in case.name and case.name.startswith(("inference", "training")) else None


CHECKED = "A prepared call checks type, dtype and shape of each parameter in Python at every call."
HANDED = "On one thread the same shapes are level, so what is lost is in handing a call to the second thread."
NORMED = "Layer norm goes over each row three times more, and keeps nine more numbers a unit for training."
COMPILED = "What remains is LLVM's optimisation and code generation of the kernels themselves."
PAGED = "The tape of the largest batch exceeds the memory that is kept between calls, so each step gets new pages."
INFER, TRAIN = best_peer("infer", "float32"), best_peer("train", "float32")
GOALS = (
    Goal("inference, float32: best peer's time / ours, least", 1.0, False, "goals", INFER, min),
    Goal("inference, float32: geometric mean", 1.4, False, "goals", INFER, mean),
    Goal("training, float32: PyTorch's time / ours, least", 1.2, False, "goals", TRAIN, min),
    Goal("training, float32: geometric mean", 2.0, False, "goals", TRAIN, mean),
    Goal("inference, float64: geometric mean", 1.5, False, "goals", best_peer("infer", "float64"), mean),
    Goal("training, float64: geometric mean", 1.5, False, "goals", best_peer("train", "float64"), mean),
    Goal("a streaming step, microseconds", 4.0, True, "goals", seconds(STEP.title, 1e6)),
    Goal("a streaming step: ONNX Runtime's time / ours", 2.0, False, "goals", ratio("onnxruntime", of=STEP.title)),
    Goal("ragged training: PyTorch's packed sequences / ours", 20.0, False, "goals", ratio("torch", of="ragged")),
    Goal("share of the peak, inference 50,64,512,512", 0.8, False, "goals", share_of_peak(LARGE), min),
    Goal("ragged training / the same padded", 0.85, True, "ragged", ratio(studies.PADDED, of="365", inverse=True)),
    Goal("first calls with an empty kernel cache, seconds", 10.0, True, "start", seconds("cold: all three calls")),
    Goal("first calls in a later process, seconds", 0.5, True, "start", seconds("warm: all three calls")),
    Goal("memory, numbers per unit, step, sequence", 7.0, True, "memory", lambda _, c: c.facts.get(studies.GROWING)),
    Goal("training with recompute, times the time", 1.35, True, "recompute", ratio(studies.RECOMPUTED)),
    Goal("closed loop, training: PyTorch's time / ours", 4.0, False, "closed_loop", ratio("torch", of="training")),
    Goal("closed loop, training: PyTorch's time / ours in `@njit`", 8.0, False, "closed_loop",
         against(["torch"], [loops.NJIT], "training")),
    Goal("closed loop, training in `@njit` / the open loop in one call", 1.6, True, "closed_loop",
         against([loops.NJIT], [loops.OPEN])),
    Goal("a small step: from Python / in `@njit`", 8.0, False, "closed_loop", against([OURS], [loops.NJIT], "small")),
    Goal("closed loop, inference: best peer's time / ours, from Python and in `@njit`, least", 1.0, False,
         "closed_loop", against(LOOPED, [OURS, loops.NJIT], "inference"), min),
    Goal("steps of other cells / the plain LSTM, most", 1.1, True, "family", ratio(*studies.STEP_VARIANTS)),
    Goal("any other cell / the plain LSTM, most", 1.3, True, "family", ratio(*studies.PHASES), max, NORMED),
    Goal("training with the truncated gradient / the plain LSTM", 1.0, True, "family",
         ratio(studies.TRUNCATED, of="train")),
    Goal("plain RNN / the plain LSTM, most", 0.45, True, "family", ratio(studies.RNN_NAME)),
    Goal("`torch.nn.LSTM` / `fastlstm.torch.LSTM`, training, least", 2.0, False, "torch_lstm", ratio("torch"), min,
         PAGED),
    Goal(f"first call, CPU time / {OLD}, most", 0.6, True, "versions/first", ratio(OLD, inverse=True), max, COMPILED),
    Goal(f"first call, CPU time / {OLD}, least", 0.6, True, "versions/first", ratio(OLD, inverse=True), min, COMPILED),
    Goal(f"shapes: {OLD} / ours, geometric mean", 0.98, False, "versions/calls", of_shapes, mean, HANDED),
    Goal(f"shapes: {OLD} / ours, least", 0.93, False, "versions/calls", of_shapes, min, HANDED),
    Goal(f"`step`: {OLD} / ours", 1.0, False, "versions/calls", of_step, min, CHECKED),
    Goal(f"training on one step: {OLD} / ours", 1.0, False, "versions/calls", ratio(OLD, of="one step"), min, CHECKED),
)  # fmt: skip
NOTES = (
    "A second variant of the cell is asked to compile in at most 2 s. One of the step takes 0.8 s; the first cell with"
    " phases (layer norm, projection, zoneout, recurrent dropout, RNN) takes 2.4 s forward and 3.5 s backward of CPU,"
    " once for all of them: they have drivers of their own. That was timed by itself and is in no file.",
    "A short bidirectional call is asked to take at most 2 us more than a plain one, and takes 4: it is a second"
    " launch. That was timed by itself and is in no file.",
)
WINS = {
    ("start", "cold"): "The first process compiles the kernels for its processor; PyTorch comes compiled.",
    ("start", "warm"): "The first call loads Numba and the compiled kernels; PyTorch has loaded its own in its import.",
}
"""Why a peer wins, by file and the beginning of the case's name."""


def rows(files: Mapping[str, Results]) -> Iterator[list[str]]:
    """Give the rows of the table of goals: what misses is bold, with the reason.

    Raises
    ------
    MissingReasonError
        If there is none.
    """
    for goal in GOALS:
        values = goal.found(files)
        missed = [goal.misses(value) for value in values]
        if any(missed) and not goal.why:
            raise MissingReasonError(f"goals.py does not say why this goal is missed: {goal.words}")
        cells = [f"**{v:.2f}**" if bad else f"{v:.2f}" for v, bad in zip(values, missed, strict=True)]
        if values:
            bound = f"at {'most' if goal.at_most else 'least'} {goal.asked:g}"
            yield [goal.words, bound, " / ".join(cells), goal.why if any(missed) else ""]


def wins(results: Results) -> Iterator[str]:
    """Give a line for each reason why a peer wins cases of a file, with these cases.

    Raises
    ------
    MissingReasonError
        If a case has none.
    """
    found: dict[str, list[str]] = {}
    for case, side, spread in report.losses(results.cases):
        fits = [why for (name, start), why in WINS.items() if name == results.name and case.name.startswith(start)]
        if not fits:
            raise MissingReasonError(f"goals.py does not say why {side} wins at {results.name}: {case.name}")
        found.setdefault(fits[0], []).append(f"{case.name} ({side} {spread.middle:.2f})")
    for why, cases in found.items():
        yield f"- {'; '.join(cases)}: {why}"
