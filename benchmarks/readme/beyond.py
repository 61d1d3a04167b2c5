"""The README's part beyond kernels: what ``benchmarks/study.py`` found on one machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from studies import growth, memory, recompute, show
from studies.record import OURS, Case, Study

from fastlstm.bench import table as bench_table
from fastlstm.bench.clock import ratio, verdict

from . import cells, reasons
from .reasons import Loss, Reason

TITLES = {
    "vowels": "JapaneseVowels",
    "loop": "closed loop",
    "ragged": "ragged batch",
    "hydrology": "hydrology",
}
"""The studies that share the first table, and what they are called there."""


def paragraphs(found: Mapping[str, Study], given: Sequence[Reason]) -> Iterator[str]:
    """Return the tables, the machine under each, and the losses of all."""
    together = [found[name] for name in TITLES if name in found]
    if together:
        yield from _together(together)
    if "vowels" in found:
        yield from _accuracies(found["vowels"])
    for name, part in PARTS.items():
        if name in found:
            yield from part(found[name])
            yield _under([found[name]])
    yield from reasons.paragraph(losses(found.values()), given)


def losses(found: Any) -> list[Loss]:
    """Return every case and peer where the peer needs less."""
    return [
        Loss(study.study, f"{TITLES.get(study.study, study.study)}: {case.name}", side, spread)
        for study in found
        for case in study.cases
        for side in case.values
        if side not in (OURS, *case.yardsticks)
        and (spread := case.ratio(side)) is not None
        and verdict(spread) == "slower"
    ]


def _under(studies: Sequence[Study]) -> str:
    """Return the machine's line, or lines, if the studies were not all measured on the same day with the same."""
    lines = [cells.machine_line(study.machine, study.threads, study.made) for study in studies]
    return "\n\n".join(dict.fromkeys(lines))


def _cell(case: Case, side: str) -> str:
    """Return the median, and behind it what it is of ours."""
    if not case.values.get(side):
        return "not timed" if side in case.refused else "-"
    found = case.ratio(side)
    assert found is not None
    share = f"{100 * found.middle:.0f} % of ours" if side in case.yardsticks else cells.ratio(found)
    return f"{show.amount(case.spread(side).middle, case.unit)} ({share})"


def _sides(cases: Sequence[Case]) -> list[str]:
    return list(dict.fromkeys(side for case in cases for side in (*case.values, *case.refused) if side != OURS))


def _rows(study: Study, sides: Sequence[str], title: str = "") -> Iterator[list[str]]:
    for case in study.cases:
        ours = show.amount(case.spread(OURS).middle, case.unit)
        name = f"{title}: {case.name}" if title else case.name
        yield [name, ours, *(_cell(case, side) for side in sides)]


def _together(studies: Sequence[Study]) -> Iterator[str]:
    yield (
        "Beyond kernels. Behind each time of a peer is that time divided by ours, read as above."
        " What exactly is measured, and how, stands in `benchmarks/studies`."
    )
    sides = _sides([case for study in studies for case in study.cases])
    rows = [row for study in studies for row in _rows(study, sides, TITLES[study.study])]
    yield cells.table(["what", OURS, *sides], rows)
    yield _under(studies)


def _accuracies(study: Study) -> Iterator[str]:
    (case,) = study.cases
    facts = case.facts
    sides = list(case.values)
    accuracies = " and ".join(f"{facts[f'final accuracy, {side}']:.1%} ({side})" for side in sides)
    epochs = " and ".join(f"{facts[f'epochs, {side}']:g} ({side})" for side in sides)
    yield (
        f"JapaneseVowels is trained with the same recipe on both sides, from {facts['seeds']:g} seeds. Medians over"
        f" seeds: {epochs} epochs until the goal, test accuracy {accuracies} after the last one."
        f" Seeds with which a side did not reach the goal: {facts['seeds that a side did not get there with']:g}."
    )


def _memory(study: Study) -> Iterator[str]:
    most = max(case.facts[memory.GROWING] for case in study.cases)
    yield (
        "Memory of a training call of one layer beyond inputs and outputs; seven numbers for each unit, step and"
        f" sequence are promised to be the most that grows with T. The most that was measured is {most:.2f}."
    )
    rows = [
        [
            case.name,
            show.amount(case.spread(OURS).middle, case.unit),
            f"{case.facts[memory.GROWING]:.2f}",
            show.amount(max(0.0, case.facts[memory.FIXED]), "bytes"),
        ]
        for case in study.cases
    ]
    yield cells.table(["T,B,I,H", "allocated", "numbers per unit, step and sequence", "fixed"], rows)


def _recompute(study: Study) -> Iterator[str]:
    worst = max(found.middle for case in study.cases if (found := case.ratio(recompute.RECOMPUTED)))
    yield (
        "The low-memory mode, which computes the gates again in the backward pass: a training pass with it, in how many"
        f" times the time, {worst:.2f} at most, and in what share of the memory."
    )
    rows = [
        [
            case.name,
            show.amount(case.spread(OURS).middle, case.unit),
            show.amount(case.spread(recompute.RECOMPUTED).middle, case.unit),
            cells.ratio(case.ratio(recompute.RECOMPUTED)),
            f"{case.facts[recompute.SAVED]:.2f}",
        ]
        for case in study.cases
    ]
    yield cells.table(["T,B,I,H", OURS, "with recompute", "times the time", "share of the memory"], rows)


def _freeze(study: Study) -> Iterator[str]:
    yield (
        "A frozen model (`lstm.freeze()`), as it is in all comparisons of inference and streaming, beside the same"
        " model as it was, whose parameters could change between any two calls; and that time divided by the frozen's."
    )
    sides = _sides(study.cases)
    yield cells.table(["T,B,I,H", "frozen", *sides], _rows(study, sides))


def _start(study: Study) -> Iterator[str]:
    yield (
        "Start: seconds in a new process. Cold is the first process ever, which compiles the kernels, warm every later"
        " one; a first call includes all that it loads, and so the import of Numba, which also stands by itself."
    )
    sides = _sides(study.cases)
    yield cells.table(["what", OURS, *sides], _rows(study, sides))


def _threads(study: Study) -> Iterator[str]:
    yield "Threads: the time of a call, and how many times faster it is than on one. Our results are the same bits."
    sides = [OURS, *_sides(study.cases)]
    rows, one = [], None
    for case in study.cases:
        if case.facts["threads"] == 1:
            one = case
        assert one is not None
        row = [case.name]
        for side in sides:
            if case.values.get(side) and one.values.get(side):
                speedup = ratio(one.values[side], case.values[side]).middle
                row.append(f"{bench_table.time_of(case.spread(side).middle)} ({speedup:.2f}x)")
            else:
                row.append("-")
        rows.append([*row, *(cells.ratio(case.ratio(side)) for side in sides[1:])])
    yield cells.table(["T,B,I,H", *sides, *(f"{side} / ours" for side in sides[1:])], rows)


def _growth(study: Study) -> Iterator[str]:
    words, sides = [], [OURS, *_sides(study.cases)]
    for axis in growth.SIZES:
        seconds = growth.sweep(study.cases, axis)
        if len(seconds) < 2:
            continue
        exponents = ", ".join(
            f"{side} {growth.exponent(found):.2f}"
            for side in sides
            if len(found := growth.sweep(study.cases, axis, side)) >= 2
        )
        words.append(f"- {axis} from {min(seconds):,} to {max(seconds):,}: {exponents}")
    yield "\n".join(["Growth of a training pass with one size, as the power of it that the times follow:", "", *words])
    seconds = growth.sweep(study.cases, "T")
    rows = [
        [f"{size:,}", bench_table.time_of(found), bench_table.time_of(found / size)] for size, found in seconds.items()
    ]
    yield cells.table(["T", OURS, "for each step"], rows, left=0)


PARTS: dict[str, Callable[[Study], Iterator[str]]] = {
    "memory": _memory,
    "recompute": _recompute,
    "freeze": _freeze,
    "start": _start,
    "threads": _threads,
    "growth": _growth,
}


def growth_picture(study: Study) -> bytes:
    """Draw time against T, B and H, with the quartiles as a band; a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, panel in zip(growth.SIZES, figure.subplots(1, len(growth.SIZES)), strict=True):
        cases = [case for case in study.cases if axis in case.facts]
        if not cases:
            panel.set_axis_off()
            continue
        for side in (OURS, *_sides(cases)):
            points = [(case.facts[axis], case.spread(side)) for case in cases if case.values.get(side)]
            sizes = [size for size, _ in points]
            (line,) = panel.plot(sizes, [spread.middle for _, spread in points], "o-", markersize=3, label=side)
            band = [spread.low for _, spread in points], [spread.high for _, spread in points]
            panel.fill_between(sizes, *band, color=line.get_color(), alpha=0.2, linewidth=0)
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="seconds of a training pass")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    caption = cells.machine_line(study.machine, study.threads, study.made).strip("*")
    figure.suptitle(caption.replace("$", r"\$"), fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
