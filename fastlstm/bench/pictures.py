"""The results as pictures: time against T, B and H, where a GPU starts to pay, the roofline, and the peers as bars.

Each function takes results, measures nothing, and returns a figure of Matplotlib, or says in words why there is none: a
picture of what was not measured is not drawn. :func:`draw` makes PNGs of all of them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np

from fastlstm.bench.clock import verdict
from fastlstm.bench.peers import COPIES, CPU, CUDA, OURS
from fastlstm.bench.results import Results, Row
from fastlstm.bench.table import Line, lines

__all__ = ["PICTURES", "bars", "crossover", "draw", "roofline", "scaling"]

AXES = {"T": "time steps T", "B": "batch B", "H": "hidden units H"}
WIN, LEVEL, LOSS = "tab:green", "0.6", "tab:red"
LEAST_POINTS = 3  # of a curve


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


def _size(row: Row, axis: str) -> int:
    return dict(zip("TBIH", row.work.shape, strict=True))[axis]


def sweep(results: Results, kind: str, axis: str) -> list[Row]:
    """Return the longest list of rows that differ in one size alone, sorted by it; empty if there are too few."""
    groups: dict[Any, dict[int, Row]] = {}
    for row in results.rows:
        work = row.work
        if work.kind == kind and work.lengths is None and row.sides:
            others = tuple(size for name, size in zip("TBIH", work.shape, strict=True) if name != axis)
            groups.setdefault((others, work.dtype, row.threads), {})[_size(row, axis)] = row
    best = max(groups.values(), key=len, default={})
    return [best[size] for size in sorted(best)] if len(best) >= LEAST_POINTS else []


def scaling(results: Results) -> Any:
    """Time against T, B and H for each side: the median, and the quartiles as a band."""
    kinds = [kind for kind in ("infer", "train", "stream") if any(sweep(results, kind, axis) for axis in AXES)]
    if not kinds:
        return f"there are no {LEAST_POINTS} rows that differ in T, B or H alone"
    names = list(dict.fromkeys(name for row in results.rows for name in row.sides))
    colours = {name: f"C{number}" for number, name in enumerate(names)}
    figure = _figure(13, 3.8 * len(kinds))
    panels = figure.subplots(len(kinds), len(AXES), squeeze=False)
    for kind, line in zip(kinds, panels, strict=True):
        for axis, panel in zip(AXES, line, strict=True):
            rows = sweep(results, kind, axis)
            if not rows:
                panel.text(0.5, 0.5, "not measured", ha="center", va="center", transform=panel.transAxes)
                panel.set_axis_off()
                continue
            for name in names:
                points = [(_size(row, axis), row.sides[name].spread) for row in rows if name in row.sides]
                if not points:
                    continue
                sizes = [size for size, _ in points]
                style: dict[str, Any] = {"color": colours[name], "linewidth": 2.2 if name in OURS else 1.1}
                panel.plot(
                    sizes, [spread.middle for _, spread in points], "o-", markersize=3, label=_only_text(name), **style
                )
                quartiles = [s.low for _, s in points], [s.high for _, s in points]
                panel.fill_between(sizes, *quartiles, color=colours[name], alpha=0.2, linewidth=0)
            fixed = ", ".join(f"{key}={_size(rows[0], key)}" for key in "TBIH" if key != axis)
            panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel="seconds", title=f"{kind}, {fixed}")
            _plain_ticks(panel, [_size(row, axis) for row in rows])
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7)
    figure.suptitle(_caption(results), fontsize=9)
    return figure


def crossover(results: Results) -> Any:
    """A map over (B, H) of how many times faster the GPU is than the CPU, with the line where it starts to pay."""
    if not any(name in row.sides for row in results.rows for name in (CUDA, COPIES)):
        return "no GPU was measured here, so there is no map of where one starts to pay"
    if not any(CPU in row.sides for row in results.rows):
        return "the CPU was not measured, so there is nothing to compare the GPU with"
    panels = [(kind, side) for kind in ("infer", "train") for side in (CUDA, COPIES)]
    maps = {panel: found for panel in panels if (found := gpu_ratios(results, *panel))}
    if not maps:
        return "the map of where the GPU starts to pay needs two batches and two numbers of units: --grid full"
    figure = _figure(6.2 * min(2, len(maps)), 4.6 * math.ceil(len(maps) / 2))
    axes = figure.subplots(math.ceil(len(maps) / 2), min(2, len(maps)), squeeze=False).ravel()
    for panel, ((kind, side), found) in zip(axes, maps.items(), strict=False):
        batches, hiddens = (sorted({key[n] for key in found}) for n in (0, 1))
        ratios = np.array([[math.log2(found.get((b, h), math.nan)) for b in batches] for h in hiddens])
        across, up = np.arange(len(batches)), np.arange(len(hiddens))
        limit = math.ceil(max(1.0, float(np.nanmax(np.abs(ratios)))))
        image = panel.pcolormesh(across, up, ratios, cmap="RdYlGn", vmin=-limit, vmax=limit, shading="nearest")
        for (b, h), value in found.items():
            panel.text(batches.index(b), hiddens.index(h), f"{value:.2g}", ha="center", va="center", fontsize=8)
        whole = np.ma.masked_invalid(ratios)
        if whole.min() < 0 < whole.max():
            panel.contour(across, up, whole, levels=[0.0], colors="black", linewidths=2)
        panel.set_xticks(across, [str(b) for b in batches])
        panel.set_yticks(up, [str(h) for h in hiddens])
        copies = "copies in and out counted" if side == COPIES else "copies not counted"
        panel.set(title=f"{kind}, {copies}", xlabel=AXES["B"], ylabel=AXES["H"])
        bar = figure.colorbar(image, ax=panel, ticks=(-limit, 0, limit))
        bar.set_ticklabels([f"1/{2**limit}", "1", f"{2**limit}"])
        bar.set_label("time on the CPU / time on the GPU")
    for panel in axes[len(maps) :]:
        panel.set_axis_off()
    figure.suptitle("Black: where the GPU starts to pay. " + _caption(results), fontsize=9)
    return figure


def gpu_ratios(results: Results, kind: str, side: str) -> dict[tuple[int, int], float]:
    """Return time on the CPU / time on the GPU by (B, H), from the T, dtype and threads with the most of them.

    Nothing if they are not at least two batches and two numbers of hidden units.
    """
    groups: dict[Any, dict[tuple[int, int], float]] = {}
    for row in results.rows:
        ratio = row.ratio(CPU, side)
        work = row.work
        if ratio is None or work.kind != kind or work.lengths is not None:
            continue
        # The map has as many inputs as hidden units; other rows are of other works.
        if work.inputs == work.hidden:
            groups.setdefault((work.steps, work.dtype, row.threads), {})[work.batch, work.hidden] = ratio.middle
    best = max(groups.values(), key=len, default={})
    return best if all(len({key[n] for key in best}) >= 2 for n in (0, 1)) else {}


def roofline(results: Results) -> Any:
    """Operations per second against operations per byte that has to be moved, under what the machine can do."""
    found = [line for line in lines(results) if line.share is not None and line.side != COPIES]
    if not found:
        return "nothing was measured on a device whose peak is known"
    devices = [device for device in results.ceilings if any(_device(line) == device for line in found)]
    figure = _figure(7 * len(devices), 5)
    for device, panel in zip(devices, figure.subplots(1, len(devices), squeeze=False)[0], strict=True):
        here = [line for line in found if _device(line) == device]
        ceiling = results.ceilings[device]
        intensities = [line.row.work.operations / line.row.work.bytes for line in here]
        span = np.geomspace(min(intensities) / 3, max(intensities) * 3, 200)
        for number, (dtype, peak) in enumerate(ceiling.operations.items()):
            roof = np.minimum(peak, ceiling.bandwidth * span)
            panel.plot(span, roof, color=f"C{number}", label=_only_text(f"the machine, {dtype}"))
            for kind, marker in (("infer", "o"), ("train", "s"), ("stream", "^")):
                chosen = [line for line in here if (line.row.work.kind, line.row.work.dtype) == (kind, dtype)]
                if chosen:
                    panel.scatter(
                        [line.row.work.operations / line.row.work.bytes for line in chosen],
                        [line.operations for line in chosen],
                        marker=marker, s=22, color=f"C{number}", label=_only_text(f"{kind}, {dtype}"),
                    )  # fmt: skip
        panel.set(xscale="log", yscale="log", ylabel="operations per second", title=_only_text(device))
        panel.set_xlabel("operations per byte that has to be moved at least")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    figure.suptitle("Points above the slope live in the caches. " + _caption(results), fontsize=9)
    return figure


def _device(line: Line) -> str:
    return "cpu" if line.side == CPU else "cuda"


def bars(results: Results) -> Any:
    """Time theirs / time ours as bars from one, with the quartiles: wins, losses, and where there is no difference."""
    found = [line for line in lines(results) if line.ratios]
    if not found:
        return "no peer was measured"
    sides = list(dict.fromkeys((line.side, name) for line in found for name in line.ratios))
    labels = list(dict.fromkeys((line.row.work, line.row.threads) for line in found))
    figure = _figure(2 + 2.6 * len(sides), max(3.0, 1.4 + 0.24 * len(labels)))
    panels = figure.subplots(1, len(sides), squeeze=False, sharey=True)[0]
    extremes = [value for line in found for ratio in line.ratios.values() for value in ratio]
    limit = 2 ** math.ceil(max(1.0, *(1.1 * abs(math.log2(value)) for value in extremes)))  # the same for all panels
    for (side, name), panel in zip(sides, panels, strict=True):
        for line in found:
            ratio = line.ratios.get(name)
            if line.side != side or ratio is None:
                continue
            at = labels.index((line.row.work, line.row.threads))
            colour = {"faster": WIN, "slower": LOSS}.get(verdict(ratio), LEVEL)
            panel.barh(at, ratio.middle - 1, left=1, color=colour, height=0.7)
            panel.plot([ratio.low, ratio.high], [at, at], color="black", linewidth=1)
            inside = dict(ha="right", x=1 / 1.1) if ratio.middle > 1 else dict(ha="left", x=1.1)
            panel.text(y=at, s=f"{ratio.middle:.2f}", va="center", fontsize=7, **inside)
        panel.axvline(1, color="black", linewidth=1)
        panel.set(xscale="log", title=_only_text(f"{name}\nagainst {side}"), xlabel="their time / ours")
        panel.set_xlim(1 / limit, limit)
        _plain_ticks(panel, [1 / limit, 1, limit])
        panel.grid(alpha=0.3, axis="x")
    names = [f"{work.name} {work.kind} {work.dtype}" for work, _ in labels]
    panels[0].set_yticks(range(len(names)), names, fontsize=7)
    panels[0].invert_yaxis()
    figure.suptitle("Right of 1, green: fastlstm is faster. Red: it is slower. Grey: no difference.", fontsize=9)
    return figure


def _caption(results: Results) -> str:
    """Say what it was measured on."""
    places = [results.machine.get("processor", ""), results.machine.get("GPU", "")]
    return f"{'; '.join(_only_text(place) for place in places if place)}; {results.threads} thread(s)"


def _plain_ticks(panel: Any, values: list[float]) -> None:
    """Label a logarithmic axis with the values themselves, those that stand far enough apart."""
    shown = [values[0]]
    for value in values[1:]:
        if value >= 1.4 * shown[-1]:
            shown.append(value)
    panel.set_xticks(shown, [f"1/{1 / value:.0f}" if value < 1 else f"{value:g}" for value in shown])
    panel.minorticks_off()


def _only_text(words: str) -> str:
    """Let no name of a machine or of a side be read as mathematics."""
    return words.replace("$", r"\$")


PICTURES: dict[str, Callable[[Results], Any]] = {
    "scaling": scaling,
    "crossover": crossover,
    "roofline": roofline,
    "peers": bars,
}
