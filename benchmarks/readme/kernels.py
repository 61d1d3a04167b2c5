"""The README's part on the kernels: what ``fastlstm bench`` found on one machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fastlstm.bench import grid, table
from fastlstm.bench.clock import Spread, verdict
from fastlstm.bench.peers import CPU
from fastlstm.bench.results import Results
from fastlstm.bench.table import Line

from . import cells, reasons
from .reasons import BENCH, Loss, Reason


def paragraphs(results: Results, given: Sequence[Reason], every: bool = False) -> Iterator[str]:
    """Return the table, of every row or of a choice, the machine under it, the score against each peer, the losses."""
    found = table.lines(results)
    shown = found if every else chosen(found)
    names = list(dict.fromkeys(name for line in found for name in line.ratios))
    several = {line.side for line in found} != {CPU}
    yield (
        "Time of one call, and under each peer its time divided by ours: above 1 fastlstm is faster, **bold** is where"
        " the peer is, `=` where the quartiles leave no difference."
    )
    head = ["T,B,I,H", "what", *(["where"] if several else []), "fastlstm", *names]
    rows = []
    for line in shown:
        work = line.row.work
        where = [line.side] if several else []
        ratios = [cells.ratio(line.ratios.get(name)) for name in names]
        rows.append([work.name, f"{work.kind} {work.dtype}", *where, table.time_of(line.seconds.middle), *ratios])
    yield cells.table(head, rows, left=3 if several else 2)
    yield cells.machine_line(results.machine, results.threads, results.made, gpu=several)
    yield "\n".join(f"- {_score(score, several)}" for score in table.scores(found))
    if len(shown) < len(found):
        yield f"{len(shown)} of {len(found)} rows are shown, all that a peer wins among them; the counts are of all."
    yield from reasons.paragraph(losses(found), given)


def chosen(found: Sequence[Line]) -> list[Line]:
    """Return the lines to show: the small grid's, and all that a peer wins; or all, if none is of that grid."""
    dtypes = dict.fromkeys(line.row.work.dtype for line in found)
    kinds = dict.fromkeys(line.row.work.kind for line in found)
    small = set(grid.small(dtypes, kinds))
    if not any(line.row.work in small for line in found):
        return list(found)
    return [line for line in found if line.row.work in small or any(map(_lost, line.ratios.values()))]


def _lost(ratio: Spread) -> bool:
    return verdict(ratio) == "slower"


def losses(found: Sequence[Line]) -> list[Loss]:
    """Return every row and peer where the peer is faster."""
    return [
        Loss(BENCH, f"{line.row.work.name} {line.row.work.kind} {line.row.work.dtype}", name, ratio)
        for line in found
        for name, ratio in line.ratios.items()
        if _lost(ratio)
    ]


def _score(score: table.Score, several: bool) -> str:
    total = len(score.won) + len(score.level) + len(score.lost)
    who = f"{score.side} against {score.opponent}" if several else f"against {score.opponent}"
    return (
        f"{who}: faster in {len(score.won)} of {total} rows, no difference in {len(score.level)}, slower in"
        f" {len(score.lost)}; geometric mean of the ratios {score.mean:.2f}"
    )
