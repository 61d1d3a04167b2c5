"""How far anyone could go: each row against the roofs of the machine that it was measured on.

The roofs are those of the study ``roofs``, each measured in turn with the call itself: the arithmetic, 8 B H (T I +
(T - 1) H) operations forward, for a state of zeros needs no product, and three times as many with all gradients; the
weights, which every step reads again and a few sequences use only once or twice when they arrive; and for single steps
the call as such. Where a row is not in the study, its roof is the arithmetic at the peak that was measured once, before
the table. Nearer than the highest roof is what these take one after the other, with the gates: the bare parts of a
call.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from studies import roofs
from studies.record import OURS, Case, Study

from fastlstm.bench import table
from fastlstm.bench.clock import Spread
from fastlstm.bench.peers import CPU
from fastlstm.bench.results import Results
from fastlstm.bench.table import Line

from . import cells

PEAK = "peak"  # measured before the table


class Limit(NamedTuple):
    """What bounds a row: the time of the roof as a share of our call's, and who comes nearest to us."""

    line: Line
    roof: str
    share: float
    peer: str
    ratio: Spread  # the peer's time / ours
    case: Case | None  # of the study, if it has the row
    parts: float | None = None  # the time of the bare parts as a share of our call's, if it was measured

    @property
    def at_most(self) -> float:
        """The best peer's time divided by the roof's: what the ratio would be at the roof."""
        return self.ratio.middle / self.share

    @property
    def by_parts(self) -> float | None:
        """The best peer's time divided by that of the bare parts."""
        return self.ratio.middle / self.parts if self.parts else None


def paragraphs(results: Results, study: Study | None = None) -> Iterator[str]:
    """Return the table of limits and how to read it; nothing where no roof was measured."""
    found = of(results, study)
    if not found:
        return
    yield (
        "How far anyone could go. A roof is what a call cannot get below on this machine, and stands here as a share of"
        f" our time: the {roofs.TILE}, as many multiply-adds on data in the first-level cache; {roofs.WEIGHTS}, as"
        f" often as the steps need them, where few sequences share them; {roofs.NOTHING}, with as many arrays. The"
        " largest of them counts. They were measured in turn with the call; only the *peak* was measured once, before"
        " the table. *At most* is the best peer's time divided by the roof's: nobody could be further ahead of it"
        f" here, whoever wrote the kernel. The {roofs.PARTS} are no roof, since some of their work could overlap, but"
        " nearer to what can be had: all that a call cannot do without, one after the other, each on data in the"
        " first-level cache; the products that many rows share by the bare tile, the other weights read, the"
        " activations of the gates on vectors, and for single steps the call of nothing. The ratio *by parts* is"
        f" the best peer's time divided by theirs. Last, where it was measured: {roofs.BLAS}, the matrix products alone"
        " by its BLAS, divided by our whole call. A copy in main memory moves"
        f" {results.ceilings['cpu'].bandwidth / 1e9:.0f} GB/s."
    )
    head = [
        "T,B,I,H",
        "what",
        "roof",
        "of our time",
        roofs.PARTS,
        "best peer",
        "ratio",
        "by parts",
        "at most",
        roofs.BLAS,
    ]
    yield cells.table(head, map(_row, found), left=3)
    groups: dict[str, list[Limit]] = {}
    for limit in found:
        groups.setdefault(f"{limit.line.row.work.kind} {limit.line.row.work.dtype}", []).append(limit)
    yield "\n".join(f"- {what}: {_summary(members)}" for what, members in groups.items())


def _summary(limits: Sequence[Limit]) -> str:
    ratios, most = [limit.ratio.middle for limit in limits], [limit.at_most for limit in limits]
    words = f"geometric mean of the best peer's time divided by ours {_mean(ratios):.2f}, least {min(ratios):.2f}"
    parts = [limit.by_parts for limit in limits if limit.by_parts]
    if len(parts) == len(limits):
        words += f"; with every call as fast as its bare parts it would be {_mean(parts):.2f}, least {min(parts):.2f}"
    if all(limit.case for limit in limits):
        words += f"; with every call at its roof {_mean(most):.2f}, least {min(most):.2f}"
    return words


def _mean(ratios: Sequence[float]) -> float:
    return math.exp(np.mean(np.log(ratios)))


def of(results: Results, study: Study | None = None) -> list[Limit]:
    """Find what bounds each of our rows."""
    return [limit for line in table.lines(results) if (limit := _limit(line, study, results.threads))]


def _limit(line: Line, study: Study | None, threads: int) -> Limit | None:
    if line.side != CPU or not line.ratios or line.row.work.lengths:
        return None
    peer, ratio = min(line.ratios.items(), key=lambda item: item[1].middle)
    measured = {case.name: case for case in study.cases} if study and line.row.work.dtype == "float32" else {}
    case, alone = (measured.get(roofs.name_of(line.row.work, count)) for count in (threads, 1))
    if case:
        shares = {side: found.middle for side in (*roofs.ROOFS, roofs.PARTS) if (found := case.ratio(side))}
        # Starting several threads takes time, and a short call does without them: then the roof is that of one.
        if alone and threads > 1:
            ours = case.spread(OURS).middle
            shares = {side: min(share, alone.spread(side).middle / ours) for side, share in shares.items()}
        parts = shares.pop(roofs.PARTS, None)
        roof = max(shares, key=lambda name: shares[name])
        return Limit(line, roof, shares[roof], peer, ratio, case, parts)
    return Limit(line, PEAK, line.share, peer, ratio, None) if line.share else None


def _row(limit: Limit) -> Sequence[str]:
    work = limit.line.row.work
    blas = limit.case.ratio(roofs.BLAS) if limit.case else None
    return [
        work.name,
        f"{work.kind} {work.dtype}",
        limit.roof,
        f"{100 * limit.share:.0f} %",
        f"{100 * limit.parts:.0f} %" if limit.parts else "-",
        limit.peer,
        cells.ratio(limit.ratio),
        f"{limit.by_parts:.2f}" if limit.by_parts else "-",
        f"{limit.at_most:.2f}" if limit.share > 1 / 100 else "-",
        f"{blas.middle:.2f}" if blas else "-",
    ]
