"""The results as text: one line for each work and each of our own sides, and then all that a fair reader asks for.

Ratios are time theirs / time ours, above one where fastlstm is faster. Losses are marked and listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from fastlstm.bench.clock import Spread, verdict
from fastlstm.bench.peers import COPIES, CPU, CUDA, opponents
from fastlstm.bench.results import Change, Results, Row
from fastlstm.bench.work import KINDS

__all__ = ["Line", "Score", "cell", "changes", "lines", "scores", "text", "time_of"]


class Line(NamedTuple):
    """What one of our own sides did in one row.

    Attributes
    ----------
    row : Row
        The row.
    side : str
        Our side.
    seconds : Spread
        Of one call.
    steps : float
        Time steps per second, those of all sequences together.
    operations : float
        Operations per second.
    share : float or None
        Of the device's measured peak.
    ratios : dict of str to Spread
        Time theirs / time ours, by name.
    """

    row: Row
    side: str
    seconds: Spread
    steps: float
    operations: float
    share: float | None
    ratios: dict[str, Spread]


def lines(results: Results) -> list[Line]:
    """Return a line for each row and each of our sides on a device that was timed."""
    found = []
    for row in results.rows:
        for side in (CPU, CUDA, COPIES):
            if side not in row.sides:
                continue
            seconds = row.sides[side].spread
            ratios = {name: row.ratio(name, side) for name in opponents(side, row.sides)}
            found.append(
                Line(
                    row,
                    side,
                    seconds,
                    row.work.rows / seconds.middle,
                    row.work.operations / seconds.middle,
                    results.share_of_peak(row, side),
                    {name: ratio for name, ratio in ratios.items() if ratio is not None},
                )
            )
    return found


class Score(NamedTuple):
    """How one of our sides stands with one opponent, over all rows.

    Attributes
    ----------
    side, opponent : str
        Who.
    won, level, lost : list of Line
        Where ours was faster, where there was no difference, and where it was slower.
    mean : float
        The geometric mean of the ratios.
    """

    side: str
    opponent: str
    won: list[Line]
    level: list[Line]
    lost: list[Line]
    mean: float


def scores(found: Iterable[Line]) -> list[Score]:
    """Sum the lines up, by our side and opponent."""
    found = list(found)
    result = []
    for side, name in dict.fromkeys((line.side, name) for line in found for name in line.ratios):
        met = [line for line in found if line.side == side and name in line.ratios]
        won, level, lost = ([line for line in met if verdict(line.ratios[name]) == word] for word in VERDICTS)
        mean = math.exp(sum(math.log(line.ratios[name].middle) for line in met) / len(met))
        result.append(Score(side, name, won, level, lost, mean))
    return result


VERDICTS = ("faster", "no difference", "slower")
_MARKS = {"faster": "", "slower": " LOSS"}


def cell(ratio: Spread | None) -> str:
    """Return a ratio as it stands in the table."""
    if ratio is None:
        return "-"
    word = verdict(ratio)
    return word if word == "no difference" else f"{ratio.middle:.2f}{_MARKS[word]}"


def time_of(seconds: float) -> str:
    """Return a time with the unit that suits it."""
    unit, scale = next((unit, scale) for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 0.0)) if seconds >= scale)
    scale = scale or 1e-6
    return f"{seconds / scale:.3g} {unit}" if seconds < 999 * scale else f"{seconds / scale:.0f} {unit}"


def text(results: Results) -> Iterator[str]:
    """Return the whole report, line by line."""
    for device, ceiling in results.ceilings.items():
        rates = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {dtype}" for dtype, rate in ceiling.operations.items())
        threads = f"{results.threads} thread(s)" if device == "cpu" else "one GPU, no TF32"
        yield f"Measured peak, {device}: {rates}; copies {ceiling.bandwidth / 1e9:.1f} GB/s; {threads}."
    yield f"Ratios are time theirs / time fastlstm's, {results.threads} thread(s) each: above 1, fastlstm is faster."
    found = lines(results)
    for kind, dtype in dict.fromkeys((line.row.work.kind, line.row.work.dtype) for line in found):
        yield ""
        yield f"{KINDS[kind]}, {dtype}"
        yield from _table([line for line in found if (line.row.work.kind, line.row.work.dtype) == (kind, dtype)])
    yield from _standing(found)
    yield from _small_print(results)


def _table(found: list[Line]) -> Iterator[str]:
    names = list(dict.fromkeys(name for line in found for name in line.ratios))
    several = {line.side for line in found} != {CPU}
    head = ["T,B,I,H", *(["side"] if several else []), "time", "spread", "steps/s", "GFLOP/s", "of peak", *names]
    rows = [head]
    for line in found:
        spread = (line.seconds.high - line.seconds.low) / line.seconds.middle
        rows.append(
            [
                line.row.work.name,
                *([line.side] if several else []),
                time_of(line.seconds.middle),
                f"{100 * spread:.0f} %",
                f"{line.steps:,.0f}",
                f"{line.operations / 1e9:.3g}",
                "-" if line.share is None else f"{100 * line.share:.1f} %",
                *(cell(line.ratios.get(name)) for name in names),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(f"{value:>{width}}" for value, width in zip(row, widths, strict=True)).rstrip()


def _standing(found: list[Line]) -> Iterator[str]:
    """Say how it stands with each opponent, losses one by one."""
    for score in scores(found):
        yield ""
        yield (
            f"{score.side} against {score.opponent}: faster in {len(score.won)} of"
            f" {sum(map(len, (score.won, score.level, score.lost)))} rows, no difference in {len(score.level)},"
            f" slower in {len(score.lost)}; geometric mean of the ratios {score.mean:.2f}"
        )
        for line in score.lost:
            work, ratio = line.row.work, line.ratios[score.opponent]
            yield (
                f"  LOSS at {work.name} {work.kind} {work.dtype}: {ratio.middle:.2f}"
                f" (quartiles {ratio.low:.2f} to {ratio.high:.2f})"
            )


def _small_print(results: Results) -> Iterator[str]:
    yield ""
    for name, (build, first) in _beginnings(results).items():
        yield f"{name}: built in {time_of(build)}, first results {time_of(first)} later, at most; in no other figure"
    for name, words in results.denormals.items():
        yield f"{name}: denormals {words}"
    for name, reason in results.absent.items():
        yield f"{name} is not measured: {reason}"
    for row in results.rows:
        for name, reason in row.refused.items():
            yield f"{name} is not timed at {row.work.name} {row.work.kind} {row.work.dtype}: {reason}"
    if results.interrupted:
        yield "Interrupted: this is what was measured until then."


def _beginnings(results: Results) -> dict[str, tuple[float, float]]:
    """Return the longest build of each side, and the longest time to first results: those with nothing compiled yet."""
    found: dict[str, tuple[float, float]] = {}
    for row in results.rows:
        for name, timing in row.sides.items():
            build, first = found.get(name, (0.0, 0.0))
            found[name] = max(build, timing.build), max(first, timing.first)
    return found


def changes(found: list[Change], alone: list[str]) -> Iterator[str]:
    """Return what :func:`fastlstm.bench.results.compare` found, line by line."""
    for change in found:
        if change.verdict != "no difference":
            yield (
                f"{change.verdict.upper()}: {change.side} at {change.work.name} {change.work.kind} {change.work.dtype},"
                f" {change.threads} thread(s): {time_of(change.before.middle)} before, {time_of(change.now.middle)} now"
                f" ({change.now.middle / change.before.middle:.2f} of it)"
            )
    level = sum(change.verdict == "no difference" for change in found)
    yield f"{len(found)} figures are in both; {level} of them differ by no more than the spread of the two runs."
    if alone:
        yield f"{len(alone)} are in one of them only, such as {alone[0]}."
