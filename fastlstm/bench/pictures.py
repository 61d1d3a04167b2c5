"""The results as pictures, each for one question, readable at the width of a README.

``peers``: who is faster here? ``gpu``: does a GPU pay for my sizes? ``scaling``: how does time grow with T, B and H?
``roofline``: how near is it to what the machine can do? Each function returns a figure of Matplotlib, or the reason why
there is none. :func:`draw` makes PNGs of all of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastlstm.bench import grid
from fastlstm.bench.peers import COPIES, CPU, CUDA
from fastlstm.bench.report import amount, is_peer, machine_line, ratio_of
from fastlstm.bench.results import Case, Results

__all__ = ["PICTURES", "draw", "gpu", "peers", "roofline", "scaling"]

AXES = {"T": "time steps T", "B": "batch B", "H": "hidden units H"}
KINDS = {"infer": "inference", "train": "training", "stream": "streaming"}
COLOURS = ("#1b6ca8", "#d1495b", "#edae49", "#66a182", "#8d6cab", "#777777")  # fastlstm is the first
LEAST_POINTS = 3  # of a curve
MOST_ROWS = 24  # of the picture of peers


def draw(results: Results) -> dict[str, bytes | str]:
    """Return each picture as a PNG, or the reason why there is none."""
    try:
        import_module("matplotlib")
    except ImportError:
        return dict.fromkeys(PICTURES, 'pictures need Matplotlib: pip install "fastlstm[bench]"')
    found: dict[str, bytes | str] = {}
    for name, make in PICTURES.items():
        figure = make(results)
        if not isinstance(figure, str):
            figure.supxlabel(_only_text(machine_line(results).strip("*")), fontsize=6.5, color="0.4")
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=110)
            figure = buffer.getvalue()
        found[name] = figure
    return found


def _figure(width: float, height: float) -> Any:
    """Return an empty figure with a canvas of its own, which leaves pyplot and its settings alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def peers(results: Results) -> Any:
    """One line for each size, one mark for each peer: its time / ours; left of 1 the peer is faster."""
    cases = [case for case in results.cases if any(is_peer(side) and ratio_of(case, side) for side in case.values)]
    if not cases:
        return "no peer was measured"
    names = list(dict.fromkeys(side for case in cases for side in case.values if is_peer(side)))
    if len(cases) > MOST_ROWS:  # those of the small grid, and where the peers come nearest
        nearest = sorted(cases, key=lambda case: min(r.middle for side in names if (r := ratio_of(case, side))))
        shown = [case for case in cases if case.work in grid.small(("float32",), KINDS)]
        shown += [case for case in nearest if case not in shown][: max(4, MOST_ROWS - len(shown))]
        cases = sorted(
            (case for case in cases if case in shown), key=lambda case: [*KINDS, case.group].index(case.group)
        )
    figure = _figure(8.3, 1.5 + 0.24 * len(cases))
    panel = figure.subplots()
    ratios = [ratio.middle for case in cases for side in names if (ratio := ratio_of(case, side))]
    low, high = min(0.8, 0.8 * min(ratios)), max(2.0, 1.2 * max(ratios))
    panel.axvspan(low, 1, color="#d1495b", alpha=0.12, linewidth=0)
    panel.axvline(1, color="black", linewidth=1)
    for number, name in enumerate(names):
        points = [(ratio, at) for at, case in enumerate(cases) if (ratio := ratio_of(case, name))]
        colour, marker = COLOURS[1 + number % 5], "osD^vP"[number % 6]
        panel.hlines(
            [at for _, at in points], *zip(*((r.low, r.high) for r, _ in points), strict=True), color=colour, alpha=0.5
        )
        panel.plot(
            [r.middle for r, _ in points], [at for _, at in points], marker, color=colour, label=_only_text(name)
        )
    labels = [f"{KINDS.get(case.group, '')} {case.work.name if case.work else case.name}" for case in cases]
    panel.set_yticks(range(len(cases)), labels, fontsize=8)
    panel.set_ylim(len(cases) - 0.4, -0.6)
    ours = panel.twinx()
    times = [amount(case.spread(CPU if CPU in case.values else CUDA).middle, case.unit) for case in cases]
    ours.set_yticks(range(len(cases)), times, fontsize=8)
    ours.set_ylim(panel.get_ylim())
    ours.set_ylabel("time of fastlstm", fontsize=8)
    panel.set(xscale="log", xlim=(low, high), xlabel="time of the peer / time of fastlstm")
    _ticks(panel, low, high)
    panel.grid(alpha=0.3)
    figure.legend(loc="outside upper center", ncols=6, fontsize=8)
    panel.set_title("Who is faster?  Right of 1: fastlstm.  Shaded: the peer.  Sizes are T,B,I,H", fontsize=10)
    return figure


def gpu(results: Results) -> Any:
    """A map over (B, H): how many times faster the GPU is than the CPU; green where it pays."""
    if not any(side in case.values for case in results.cases for side in (CUDA, COPIES)):
        return "no GPU was measured here, so there is no map of where one pays"
    panels = [(kind, side) for kind in ("infer", "train") for side in (CUDA, COPIES)]
    maps = {panel: found for panel in panels if (found := gpu_ratios(results, *panel))}
    if not maps:
        return (
            "the map of where a GPU pays needs the CPU's times, for two batches and two numbers of units: --grid full"
        )
    high = math.ceil(len(maps) / 2)
    figure = _figure(8.3, 0.8 + 2.9 * high)
    axes = figure.subplots(high, min(2, len(maps)), squeeze=False).ravel()
    for panel, ((kind, side), found) in zip(axes, maps.items(), strict=False):
        batches, hiddens = (sorted({key[n] for key in found}) for n in (0, 1))
        ratios = np.array([[math.log2(found.get((b, h), math.nan)) for b in batches] for h in hiddens])
        panel.pcolormesh(
            range(len(batches)), range(len(hiddens)), ratios, cmap="PiYG", vmin=-5, vmax=5, shading="nearest"
        )
        for (b, h), value in found.items():
            times = max(value, 1 / value)
            words = f"{times:.0f}" if times >= 10 else f"{times:.2g}"
            style = {"ha": "center", "va": "center", "fontsize": 9, "color": "white" if times > 12 else "black"}
            panel.text(batches.index(b), hiddens.index(h), f"{words}x" if value >= 1 else f"1/{words}", **style)
        panel.set_xticks(range(len(batches)), [str(b) for b in batches])
        panel.set_yticks(range(len(hiddens)), [str(h) for h in hiddens])
        copies = "arrays copied in each call" if side == COPIES else "arrays on the GPU"
        panel.set_title(f"{KINDS[kind]}, {copies}", fontsize=9)
        panel.set(xlabel=AXES["B"] + " (sequences)", ylabel=AXES["H"])
    figure.suptitle(
        f"Does a GPU pay?  CPU time / GPU time, T = {grid.MAP_STEPS}, I = H.  Green: the GPU is faster", fontsize=10
    )
    return figure


def gpu_ratios(results: Results, kind: str, side: str) -> dict[tuple[int, int], float]:
    """Return time on the CPU / time on the GPU by (B, H), of plain works with I = H; nothing below two of each."""
    groups: dict[Any, dict[tuple[int, int], float]] = {}
    for case in results.cases:
        work, ratio = case.work, case.ratio(CPU, side)
        if work and ratio and work.kind == kind and work.is_plain and work.inputs == work.hidden:
            groups.setdefault((work.steps, work.dtype, case.threads), {})[work.batch, work.hidden] = ratio.middle
    best = max(groups.values(), key=len, default={})
    return best if all(len({key[n] for key in best}) >= 2 for n in (0, 1)) else {}


def sweep(results: Results, kind: str, axis: str) -> tuple[str, dict[int, Case]]:
    """Return most of the plain cases that differ in one size alone, by that size; and the other sizes in words."""
    groups: dict[Any, dict[int, Case]] = {}
    for case in results.cases:
        if case.work and case.work.kind == kind and case.work.is_plain and case.values:
            sizes = dict(zip("TBIH", case.work.shape, strict=True))
            size = sizes.pop(axis)
            words = ", ".join(f"{key}={value}" for key, value in sizes.items())
            groups.setdefault((words, case.work.dtype, case.threads), {})[size] = case
    (words, *_), found = max(groups.items(), key=lambda item: len(item[1]), default=(("",), {}))
    return words, {size: found[size] for size in sorted(found)} if len(found) >= LEAST_POINTS else {}


def scaling(results: Results) -> Any:
    """Time against T, B and H for each side."""
    kinds = [kind for kind in KINDS if any(sweep(results, kind, axis)[1] for axis in AXES)]
    if not kinds:
        return f"there are no {LEAST_POINTS} rows that differ in T, B or H alone: --grid full"
    names = list(dict.fromkeys(name for case in results.cases if case.work for name in case.values))
    figure = _figure(8.3, 0.9 + 2.3 * len(kinds))
    for kind, line in zip(kinds, figure.subplots(len(kinds), len(AXES), squeeze=False, sharey="row"), strict=True):
        for axis, panel in zip(AXES, line, strict=True):
            words, cases = sweep(results, kind, axis)
            if not cases:
                panel.set_axis_off()
                continue
            for name in names:
                points = {size: case.spread(name).middle for size, case in cases.items() if name in case.values}
                style = {"color": COLOURS[names.index(name) % 6], "linewidth": 2.2 if name == CPU else 1.2}
                if points:
                    panel.plot([*points], [*points.values()], "o-", markersize=2.5, label=_only_text(name), **style)
            panel.set_title(f"{KINDS[kind]}, {words}", fontsize=8)
            panel.set(xscale="log", yscale="log")
            panel.set_xlabel(AXES[axis], fontsize=8)
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3)
        first = next(panel for panel in line if panel.axison)
        first.set_ylabel("seconds of a call", fontsize=8)
        first.tick_params(labelleft=True)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    return figure


def roofline(results: Results) -> Any:
    """Operations per second against operations per byte that has to be moved, under what the machine can do."""
    points: dict[str, dict[tuple[str, str], list[tuple[float, float]]]] = {}
    for device, side in (("cpu", CPU), ("cuda", CUDA)):
        for case in results.cases:
            if case.work and results.share_of_peak(case, side):
                rate = case.work.operations / case.spread(side).middle / 1e9
                of_kind = points.setdefault(device, {}).setdefault((case.work.dtype, case.work.kind), [])
                of_kind.append((case.work.operations / case.work.bytes, rate))
    if not points:
        return "nothing was measured on a device whose peak is known"
    figure = _figure(8.3, 3.8)
    for (device, found), panel in zip(points.items(), figure.subplots(1, len(points), squeeze=False)[0], strict=True):
        ceiling = results.ceilings[device]
        across = [x for of_kind in found.values() for x, _ in of_kind]
        span = np.geomspace(min(across) / 2, max(across) * 2, 200)
        for number, (dtype, peak) in enumerate(ceiling.operations.items()):
            roof = np.minimum(peak, ceiling.bandwidth * span) / 1e9
            panel.plot(span, roof, "-" if number == 0 else "--", color="black", label=_only_text(f"machine, {dtype}"))
            for kind, marker, colour in zip(KINDS, "os^", COLOURS, strict=False):
                if (dtype, kind) in found:
                    style = {"color": colour if number == 0 else "white", "edgecolors": colour, "marker": marker}
                    panel.scatter(
                        *zip(*found[dtype, kind], strict=True), s=16, label=f"{KINDS[kind]}, {dtype}", **style
                    )
        panel.set(xscale="log", yscale="log", xlabel="operations per byte moved at least (FLOP/B)", ylabel="GFLOP/s")
        panel.set_title({"cpu": "CPU", "cuda": "GPU"}[device] + ": points above the slope work in caches", fontsize=9)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    return figure


def _ticks(panel: Any, low: float, high: float) -> None:
    """Label a logarithmic axis of ratios with plain numbers."""
    values = [value for value in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= value <= high]
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.minorticks_off()


def _only_text(words: str) -> str:
    """Let no name of a machine or of a side be read as mathematics."""
    return words.replace("$", r"\$")


PICTURES: dict[str, Callable[[Results], Any]] = {"peers": peers, "gpu": gpu, "scaling": scaling, "roofline": roofline}
