"""What this project holds itself to on a processor, and how far it is there: met, or missed by how much."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from cpu import STEPS
from studies import memory, ragged, recompute, roofs, start
from studies.record import OURS, Case, Study

from fastlstm.bench import table
from fastlstm.bench.peers import CPU
from fastlstm.bench.results import Results
from fastlstm.bench.table import Line
from fastlstm.bench.work import Work

from . import cells, limits
from .reasons import FILE, MissingReasonError, Reason

PEAK = Work(50, 64, 512, 512)  # where most of the time is arithmetic
STEP = STEPS[0]


Shares = Mapping[Work, float]
"""By what the time of a work is multiplied before a goal is read off; nothing at all for the times as they are."""


class Goal(NamedTuple):
    """One goal: what is asked for, at least or at most, and how to read it off the results; None if it is not there."""

    words: str
    asked: float
    at_most: bool
    found: Callable[..., float | None]

    def missed(self, *given: Any) -> bool:
        """Say whether what was measured misses the goal."""
        value = self.found(*given)
        return value is not None and not (value <= self.asked if self.at_most else value >= self.asked)

    def cell(self, *given: Any) -> str:
        """Return the value, bold if it misses the goal."""
        value = self.found(*given)
        if value is None:
            return "-"
        return f"**{value:.2f}**" if self.missed(*given) else f"{value:.2f}"

    def shortfall(self, *given: Any) -> str:
        """Say by how much it is missed."""
        value = self.found(*given)
        assert value is not None
        share = abs(value / self.asked - 1.0)
        return f"{value:.2f}, {100 * share:.0f} % too {'much' if self.at_most else 'little'}"

    @property
    def bound(self) -> str:
        """What is asked for, in words."""
        return f"at {'most' if self.at_most else 'least'} {self.asked:g}"


OfLines = Callable[[Sequence[Line], Shares | None], float | None]


def _share(line: Line, shares: Shares | None) -> float | None:
    """By what a row's time is multiplied, None if that is not known."""
    return 1.0 if shares is None else shares.get(line.row.work)


def _ratios(kind: str, dtype: str, lines: Sequence[Line], shares: Shares | None) -> list[float]:
    """Return, for each row of a kind and dtype, the best peer's time divided by ours; none if one has no share."""
    works = [(line, line.row.work) for line in lines if line.ratios]
    chosen = [line for line, work in works if (work.kind, work.dtype, work.lengths) == (kind, dtype, None)]
    found = [(min(ratio.middle for ratio in line.ratios.values()), _share(line, shares)) for line in chosen]
    return [ratio / share for ratio, share in found if share] if all(share for _, share in found) else []


def _least(kind: str, dtype: str) -> OfLines:
    return lambda lines, shares: min(_ratios(kind, dtype, lines, shares), default=None)


def _mean(kind: str, dtype: str) -> OfLines:
    def mean(lines: Sequence[Line], shares: Shares | None) -> float | None:
        ratios = _ratios(kind, dtype, lines, shares)
        return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None

    return mean


def _step(lines: Sequence[Line], shares: Shares | None) -> float | None:
    found = [(line.seconds.middle, _share(line, shares)) for line in lines if line.row.work == STEP]
    return next((1e6 * seconds * share for seconds, share in found if share), None)


def _step_ratio(lines: Sequence[Line], shares: Shares | None) -> float | None:
    steps = [line for line in lines if line.row.work == STEP]
    found = [(line.ratios.get("onnxruntime"), _share(line, shares)) for line in steps]
    return next((ratio.middle / share for ratio, share in found if ratio and share), None)


def _ragged(lines: Sequence[Line], shares: Shares | None) -> float | None:
    found = [(line.ratios.get("torch"), _share(line, shares)) for line in lines if line.row.work.lengths]
    return next((ratio.middle / share for ratio, share in found if ratio and share), None)


OF_SHAPES = (
    Goal("inference, float32: best peer's time / ours, least", 1.0, False, _least("infer", "float32")),
    Goal("inference, float32: geometric mean", 1.4, False, _mean("infer", "float32")),
    Goal("training, float32: torch's time / ours, least", 1.2, False, _least("train", "float32")),
    Goal("training, float32: geometric mean", 2.0, False, _mean("train", "float32")),
    Goal("inference, float64: torch's time / ours, geometric mean", 1.5, False, _mean("infer", "float64")),
    Goal("training, float64: torch's time / ours, geometric mean", 1.5, False, _mean("train", "float64")),
    Goal("a streaming step, microseconds", 4.0, True, _step),
    Goal("a streaming step: onnxruntime's time / ours", 2.0, False, _step_ratio),
    Goal("ragged training: torch's packed sequences / ours", 20.0, False, _ragged),
)
"""Of the tables of ``benchmarks/cpu.py``: over its eight shapes."""


def _case(study: str, words: str) -> Callable[[Mapping[str, Study]], Case | None]:
    """Make the function that finds the case of a study whose name ends so."""

    def find(studies: Mapping[str, Study]) -> Case | None:
        return (
            next((case for case in studies[study].cases if case.name.endswith(words)), None)
            if study in studies
            else None
        )

    return find


def _padded(studies: Mapping[str, Study]) -> float | None:
    case = _case("ragged", f"T up to {ragged.SHAPES[-1][0]}, against ourselves padded")(studies)
    ratio = case.ratio(ragged.PADDED) if case else None
    return 1.0 / ratio.middle if ratio else None


def _seconds(words: str) -> Callable[[Mapping[str, Study]], float | None]:
    def seconds(studies: Mapping[str, Study]) -> float | None:
        case = _case("start", words)(studies)
        return case.spread(OURS).middle if case else None

    return seconds


def _memory(studies: Mapping[str, Study]) -> float | None:
    return (
        max((case.facts[memory.GROWING] for case in studies["memory"].cases), default=None)
        if "memory" in studies
        else None
    )


def _recompute(studies: Mapping[str, Study]) -> float | None:
    cases = studies["recompute"].cases if "recompute" in studies else ()
    return max((ratio.middle for case in cases if (ratio := case.ratio(recompute.RECOMPUTED))), default=None)


def _peak(which: Callable[[Iterable[float]], float]) -> Callable[[Mapping[str, Study]], float | None]:
    """Make the function that finds the bare tile's time as a share of ours, on the fewest or the most threads."""

    def share(studies: Mapping[str, Study]) -> float | None:
        cases = studies["roofs"].cases if "roofs" in studies else ()
        cases = [case for case in cases if case.name.startswith(f"{PEAK.name} {PEAK.kind},")]
        if not cases:
            return None
        threads = which(case.facts["threads"] for case in cases)
        (ratio,) = (case.ratio(roofs.TILE) for case in cases if case.facts["threads"] == threads)
        return ratio.middle if ratio else None

    return share


OF_STUDIES = (
    Goal(f"share of the peak, inference, float32, {PEAK.name}, one thread", 0.8, False, _peak(min)),
    Goal(f"share of the peak, inference, float32, {PEAK.name}, all threads", 0.8, False, _peak(max)),
    Goal("ragged training, share of our own padded time", 0.85, True, _padded),
    Goal("first calls of a model with an empty kernel cache, seconds", 10.0, True, _seconds("cold: all three calls")),
    Goal("first calls in a later process, seconds", 0.5, True, _seconds("warm: all three calls")),
    Goal("training memory that grows with T, numbers a unit, step and sequence", 7.0, True, _memory),
    Goal("training with recompute, times the time", 1.35, True, _recompute),
)


def paragraphs(
    kernels: Mapping[str, Results], studies: Mapping[str, Study], reasons: Sequence[Reason]
) -> Iterator[str]:
    """Return the goals, beside each what was measured: in `kernels`, by the name of the file, and in `studies`.

    Raises
    ------
    MissingReasonError
        If a goal is missed, and none of the reasons for the study ``goals`` says why.
    """
    misses: dict[Goal, list[str]] = {}
    yield (
        "What the project holds itself to, and where it is: bold is what misses its goal. Beside it stands what it"
        f" would be if our calls took no longer than their {roofs.PARTS}, what they cannot do without, measured in turn"
        " with them: where that is bold too, it is not enough to save what is done around them. They are no bounds, for"
        " several could be done at a time. How far the machine itself would let anyone go stands under each table."
    )
    if kernels:
        head: list[str] = ["goal", "asked"]
        given: list[tuple[Sequence[Line], Shares | None]] = []
        for name, results in kernels.items():
            lines = [line for line in table.lines(results) if line.side == CPU]
            found = limits.of(results, studies.get("roofs"))
            shares = {limit.line.row.work: limit.parts for limit in found if limit.parts}
            title = name.replace("-", " ")
            head += [title, "by parts"]
            given += [(lines, None), (lines, shares)]
            for goal in OF_SHAPES:
                if goal.missed(lines, None):
                    misses.setdefault(goal, []).append(f"{goal.shortfall(lines, None)} ({title})")
        rows = [[goal.words, goal.bound, *(goal.cell(*each) for each in given)] for goal in OF_SHAPES]
        yield cells.table(head, rows)
    if studies:
        rows = [[goal.words, goal.bound, goal.cell(studies)] for goal in OF_STUDIES]
        yield cells.table(["goal", "asked", "studies"], rows)
        misses |= {goal: [goal.shortfall(studies)] for goal in OF_STUDIES if goal.missed(studies)}
        case = _case("start", "warm: all three calls")(studies)
        share = case.ratio(start.NUMBA) if case else None
        if share:
            yield f"Of the first calls in a later process, {100 * share.middle:.0f} % are the import of Numba."

    if misses:
        lines = [
            f"- **{goal.words}**, asked {goal.bound}: {'; '.join(misses[goal])}. {_why(goal, reasons)}"
            for goal in (*OF_SHAPES, *OF_STUDIES)
            if goal in misses
        ]
        yield "\n".join(["Where a goal is missed, by how much, and why:", "", *lines])


def _why(goal: Goal, reasons: Iterable[Reason]) -> str:
    for reason in reasons:
        if reason.study == "goals" and reason.what in goal.words:
            return reason.why.strip()
    raise MissingReasonError(f"{FILE.name} does not say why this goal is missed: {goal.words}")
