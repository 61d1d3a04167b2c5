"""The results as pictures, readable at the width of a README.

``peers`` shows whether fastlstm or another library is faster, ``gpu`` for which sizes a GPU is faster than the CPU.
Each function returns a figure of Matplotlib, or the reason why there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fastlstm.bench import grid
from fastlstm.bench.peers import COPIES, CPU, CUDA
from fastlstm.bench.report import amount, duels, machine_line
from fastlstm.bench.results import Case, Results
from fastlstm.bench.work import Work

__all__ = ["gpu", "peers", "write"]

KINDS = {"infer": "inference", "train": "training", "stream": "streaming"}
COLOURS, MARKERS = ("#d1495b", "#edae49", "#66a182", "#8d6cab", "#777777"), "osD^v"
MOST_ROWS = 26  # of the picture of peers
WIDTH = 8.3  # inches, which are 913 pixels


def write(results: Results, folder: Path) -> Iterator[str]:
    """Write both pictures as PNGs; give a line for each: its file, or the reason why there is none."""
    try:
        matplotlib = import_module("matplotlib")
    except ImportError:
        yield 'no pictures, which need Matplotlib: pip install "fastlstm[bench]"'
        return
    for name, make in (("peers", peers), ("gpu", gpu)):
        with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in the name of a machine or of a side is none
            figure = make(results)
            if isinstance(figure, str):
                yield f"no picture {name}: {figure}"
                continue
            figure.supxlabel(machine_line(results).strip("*"), fontsize=6.5, color="0.4")
            figure.savefig(folder / f"{name}.png", dpi=110)
        yield f"wrote {folder / name}.png"


def _figure(height: float) -> Any:
    """Return an empty figure that leaves pyplot and its settings alone."""
    return import_module("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")


def peers(results: Results) -> Any:
    """One line for each size, one mark for each peer: its time / ours; left of 1 the peer is faster."""
    cases = _most_telling([case for case in results.cases if any(duels([case]))])
    found = [(side, ratio, at) for at, case in enumerate(cases) for _, side, ratio in duels([case])]
    if not found:
        return "no peer was measured"
    figure = _figure(1.5 + 0.24 * len(cases))
    panel = figure.subplots()
    ratios = [ratio.middle for _, ratio, _ in found]
    low, high = min(0.8, 0.8 * min(ratios)), max(2.0, 1.2 * max(ratios))
    panel.axvspan(low, 1, color=COLOURS[0], alpha=0.12, linewidth=0)
    panel.axvline(1, color="black", linewidth=1)
    for name, colour, marker in zip(dict.fromkeys(side for side, *_ in found), COLOURS, MARKERS, strict=False):
        spreads, heights = zip(*((ratio, at) for side, ratio, at in found if side == name), strict=True)
        panel.hlines(heights, [r.low for r in spreads], [r.high for r in spreads], color=colour, alpha=0.5)
        panel.plot([r.middle for r in spreads], heights, marker, color=colour, label=name)
    names = [f"{KINDS.get(case.group, '')} {case.work.name if case.work else case.name}" for case in cases]
    panel.set_yticks(range(len(cases)), names, fontsize=8)
    panel.set_ylim(len(cases) - 0.4, -0.6)
    ours = panel.secondary_yaxis("right")
    times = [amount(case.spread(CPU if CPU in case.values else CUDA).middle, case.unit) for case in cases]
    ours.set_yticks(range(len(cases)), times, fontsize=8)
    ours.set_ylabel("time of fastlstm", fontsize=8)
    panel.set(xscale="log", xlim=(low, high), xlabel="time of the peer / time of fastlstm")
    ticks = [value for value in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= value <= high]
    panel.set_xticks(ticks, [f"{value:g}" for value in ticks])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=6, fontsize=8)
    panel.set_title(
        "Time of other libraries / time of fastlstm.  Shaded: the other library is faster.  Sizes: T,B,I,H", fontsize=10
    )
    return figure


def _most_telling(cases: list[Case]) -> list[Case]:
    """Return at most MOST_ROWS cases by kind: those of the small grid, and those with the smallest ratios."""
    small = grid.works(grid.small, ("float32",), KINDS)
    smallest = {case.name: min(ratio.middle for _, _, ratio in duels([case])) for case in cases}
    first = sorted(cases, key=lambda case: (case.work not in small, smallest[case.name]))[:MOST_ROWS]
    return sorted((case for case in cases if case in first), key=lambda case: [*KINDS, case.group].index(case.group))


def gpu(results: Results) -> Any:
    """A map over (B, H): how many times faster the GPU is than the CPU, green where it is."""
    if not any(side in case.values for case in results.cases for side in (CUDA, COPIES)):
        return "no GPU was measured here"
    panels = [(kind, side) for kind in ("infer", "train") for side in (CUDA, COPIES)]
    maps = {panel: found for panel in panels if (found := gpu_ratios(results, *panel))}
    if not maps:
        return "the map of GPU and CPU needs times on both, for two batches and two numbers of units: --grid full"
    high = math.ceil(len(maps) / 2)
    figure = _figure(0.8 + 2.9 * high)
    axes = figure.subplots(high, min(2, len(maps)), squeeze=False).ravel()
    for panel, ((kind, side), found) in zip(axes, maps.items(), strict=False):
        batches, hiddens = (sorted({key[n] for key in found}) for n in (0, 1))
        ratios = np.array([[math.log2(found.get((b, h), math.nan)) for b in batches] for h in hiddens])
        across, up = range(len(batches)), range(len(hiddens))
        panel.pcolormesh(across, up, ratios, cmap="PiYG", vmin=-5, vmax=5, shading="nearest")
        for (b, h), value in found.items():
            times = max(value, 1 / value)
            words = f"{times:.0f}" if times >= 10 else f"{times:.2g}"
            style = {"ha": "center", "va": "center", "fontsize": 9, "color": "white" if times > 12 else "black"}
            panel.text(batches.index(b), hiddens.index(h), f"{words}x" if value >= 1 else f"1/{words}", **style)
        panel.set_xticks(across, [str(b) for b in batches])
        panel.set_yticks(up, [str(h) for h in hiddens])
        copies = "arrays copied in each call" if side == COPIES else "arrays on the GPU"
        panel.set_title(f"{KINDS[kind]}, {copies}", fontsize=9)
        panel.set(xlabel="batch B (sequences)", ylabel="hidden units H")
    figure.suptitle(f"CPU time / GPU time, T = {grid.MAP_STEPS}, I = H.  Green: the GPU is faster", fontsize=10)
    return figure


def gpu_ratios(results: Results, kind: str, side: str) -> dict[tuple[int, int], float]:
    """Return time on the CPU / time on the GPU by (B, H), of the first dtype; nothing below two of each."""
    found: dict[tuple[int, int], float] = {}
    for case in results.cases:
        work, ratio = case.work, case.ratio(CPU, side)
        if work and ratio and work == Work(grid.MAP_STEPS, work.batch, work.hidden, work.hidden, work.dtype, kind):
            found.setdefault((work.batch, work.hidden), ratio.middle)
    return found if all(len({key[n] for key in found}) >= 2 for n in (0, 1)) else {}
