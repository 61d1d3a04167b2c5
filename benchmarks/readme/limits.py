"""How far anyone could go: each row against the roofs of the machine that it was measured on.

Two roofs matter to an LSTM. The arithmetic: 8 T B H (I + H) operations forward, three times as many with all
gradients, at the measured peak. And the recurrent weights, 4 H^2 numbers that every step reads again: with few
sequences at once each is used only once or twice when it arrives, and the caches' bandwidth decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fastlstm.bench import table
from fastlstm.bench.clock import Spread
from fastlstm.bench.peers import CPU
from fastlstm.bench.results import Results
from fastlstm.bench.table import Line

from . import cells

FEW = 8  # sequences at once: each number of the weights is then used too rarely for the arithmetic to be the limit


def paragraphs(results: Results) -> Iterator[str]:
    """Return the table of limits and how to read it; nothing without a measured peak."""
    found = [line for line in table.lines(results) if line.side == CPU and line.ratios and line.share]
    found = [line for line in found if not line.row.work.lengths and line.row.work.kind != "stream"]
    if not found:
        return
    yield (
        "How far anyone could go: a kernel that ran at the machine's measured peak, and did nothing but multiply and"
        " add, would beat the best peer by *at most* so much. Where that is little above one, the peer is near the"
        " roof itself. With few sequences, every step reads all recurrent weights again, and the caches that hold"
        f" them are the roof; a copy in main memory moves {results.ceilings['cpu'].bandwidth / 1e9:.0f} GB/s here."
    )
    head = ["T,B,I,H", "what", "fastlstm, of peak", "best peer", "of peak", "ratio", "at most", "weights"]
    yield cells.table(head, map(_row, found), left=2)
    groups: dict[str, list[float]] = {}
    for line in found:
        groups.setdefault(f"{line.row.work.kind} {line.row.work.dtype}", []).append(_best(line)[1].middle)
    yield "\n".join(
        f"- {what}: geometric mean of the best peer's time divided by ours {math.exp(np.mean(np.log(ratios))):.2f},"
        f" least {min(ratios):.2f}"
        for what, ratios in groups.items()
    )


def _best(line: Line) -> tuple[str, Spread]:
    return min(line.ratios.items(), key=lambda item: item[1].middle)


def _row(line: Line) -> Sequence[str]:
    work = line.row.work
    name, ratio = _best(line)
    assert line.share is not None
    theirs = line.share / ratio.middle
    return [
        work.name,
        f"{work.kind} {work.dtype}",
        f"{100 * line.share:.0f} %",
        name,
        f"{100 * theirs:.0f} %",
        cells.ratio(ratio),
        f"{1 / theirs:.2f}" if theirs > 1 / 100 else "-",
        _weights(line) if work.batch <= FEW < work.steps else "-",
    ]


def _weights(line: Line) -> str:
    """Size of the recurrent weights, and the rate at which our steps read them, once each, or twice with gradients."""
    work = line.row.work
    size = 4 * work.hidden**2 * np.dtype(work.dtype).itemsize
    reads = work.steps * (2 if work.kind == "train" else 1)
    return f"{size / 2**10:.0f} KiB at {reads * size / line.seconds.middle / 1e9:.0f} GB/s"
