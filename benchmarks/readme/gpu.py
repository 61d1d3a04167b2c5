"""What ``.ci/gpu`` found, as Markdown: for its own output, for ``RESULTS.md``, and one sentence for the README."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import cells

FORMAT = "fastlstm gpu 1"
OURS = "fastlstm float32"
MODES = ("forward", "forward and backward")
STEP = "one step"  # the kind of a cell whose calls are single steps
VERSIONS = ("driver", "CUDA", "CuPy", "torch", "cuDNN", "NVRTC", "cuBLAS", "fastlstm")
NOT_MEASURED = "They have not been measured on a GPU yet: `.ci/gpu OUTDIR` does that where there is one."


def load(path: Path) -> Any:
    """Read a stage's file; None if it is missing, broken, or of another format."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and content.get("format") == FORMAT else None


def stage(content: Mapping[str, Any], short: bool = False) -> Iterator[str]:
    """Return all that one stage found: its steps last, which is what ends the output of ``.ci/gpu``."""
    yield f"### Stage {content['stage']}"
    yield from measured(content, short)
    yield from steps(content)


def steps(content: Mapping[str, Any]) -> Iterator[str]:
    """Return the table of steps: what ran and how it ended."""
    rows = [[s["name"], s["result"], f"{s['seconds']} s", s["remark"]] for s in content.get("steps", [])]
    if rows:
        yield cells.table(["step", "result", "time", "last line of its log"], rows, left=2)


def measured(content: Mapping[str, Any], short: bool = False) -> Iterator[str]:
    """Return the machine, then repetitions, microbenchmarks and the table against torch, as far as they are there.

    The short form leaves the names of torch's kernels out.
    """
    if "machine" in content:
        yield machine_line(content)
    if cases := content.get("repeat"):
        yield repetitions(cases)
    if launch := content.get("launch"):
        yield "Microbenchmarks, microseconds: medians between their quartiles."
        yield cells.table(["what", "device", "host"], [_launch_row(cell) for cell in launch])
    if table := content.get("table"):
        yield from comparison(table)
        if not short:
            yield from kernels(table)
    if skipped := content.get("skipped"):
        yield f"Not measured, because the time ran out: {'; '.join(skipped)}."


def machine_line(content: Mapping[str, Any]) -> str:
    """Return the line that names the GPU, the versions, TF32 and the day."""
    found = content["machine"]
    names = [f"{name} {found[name]}" for name in VERSIONS if name in found]
    missing = [f"no {name}" for name in ("torch",) if name not in found]
    tf32 = f"TF32 {found['TF32']}" if "TF32" in found else ""
    day = content["made"].partition("T")[0]
    return "*" + "; ".join(filter(None, (found["GPU"], ", ".join(names + missing), tf32, day))) + "*"


def repetitions(cases: Sequence[Mapping[str, Any]]) -> str:
    """Say whether every repetition gave the same bits."""
    total, different = (sum(case[key] for case in cases) for key in ("repetitions", "different"))
    errors = [
        f"{max(of_dtype):.1e} ({dtype})"
        for dtype in ("float32", "float64")
        if (of_dtype := [case["error"] for case in cases if case["dtype"] == dtype])
    ]
    return (
        f"Forward and backward, repeated: {different} of {total} repetitions differ in any bit from the first."
        f" Largest error against the float64 reference: {', '.join(errors)}."
    )


def _launch_row(cell: Mapping[str, Any]) -> list[str]:
    for key in ("failed", "not run"):
        if key in cell:
            return [cell["name"], f"{key}: {cell[key]}", "-"]
    return [cell["name"], *(_spread(cell[where]) if where in cell else "-" for where in ("device", "host"))]


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (f"{value:.2f}" if value < 1000 else f"{value:.0f}" for value in values)
    return f"{middle} [{low}, {high}]"


def comparison(table: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Return a table for each mode, the means, and what failed or disagrees."""
    names = list(dict.fromkeys(name for cell in table for name in cell.get("sides", {})))
    yield (
        "Device time by CUDA events, microseconds a time step; of ours between its quartiles, behind each of torch's in"
        " parentheses that time / ours, bold where torch is faster. Host time is microseconds a call, before anything"
        " is waited for. The product of the inputs is part of the work on every side."
    )
    for mode in MODES:
        rows = [_row(cell, mode, names) for cell in table if mode in cell.get("sides", {}).get(OURS, {})]
        if rows:
            head = [f"{mode}", *names, *(f"host, {name}" for name in names[:2])]
            yield cells.table(head, rows)
    if means := [_mean_line(table, mode, name) for mode in MODES for name in names if name != OURS]:
        yield "\n".join(filter(None, means))
    if failures := list(_failures(table)):
        yield "\n".join(failures)


def kernels(table: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Return the table of the kernels that torch ran."""
    names = list(dict.fromkeys(name for cell in table for name in cell.get("sides", {}) if name != OURS))
    rows = [
        [cell["name"], *(_kernel(cell["sides"].get(name, {})) for name in names)]
        for cell in table
        if any("kernels" in side for side in cell.get("sides", {}).values())
    ]
    if rows:
        yield "The kernel that took most of the device time on torch's side, and how often it was launched:"
        yield cells.table(["cell", *names], rows, left=1 + len(names))


def _row(cell: Mapping[str, Any], mode: str, names: Sequence[str]) -> list[str]:
    sides = cell["sides"]
    ours = sides[OURS][mode]["device"]
    row = [cell["name"], _spread(ours)]
    for name in names:
        if name == OURS:
            continue
        found = ratio(cell, mode, name)
        if found is None:
            row.append("failed" if "failed" in sides.get(name, {}) else "-")
            continue
        remark = "" if sides[name]["agrees"] else ", disagrees"
        text = f"{found:.2f}" if found >= 1 else f"**{found:.2f}**"
        row.append(f"{sides[name][mode]['device'][1]:.2f} ({text}{remark})")
    hosts = (sides.get(name, {}).get(mode) for name in names[:2])
    return row + [f"{host['host'][1]:.0f}" if host else "-" for host in hosts]


def ratio(cell: Mapping[str, Any], mode: str, name: str) -> float | None:
    """Return the median device time of a side divided by ours, or None."""
    theirs, ours = (cell.get("sides", {}).get(side, {}).get(mode) for side in (name, OURS))
    return theirs["device"][1] / ours["device"][1] if theirs and ours else None


def mean_ratio(table: Sequence[Mapping[str, Any]], mode: str, name: str) -> tuple[float, int]:
    """Return the geometric mean of a side's ratios, and over how many cells: those that agree and are no steps."""
    found = [
        one
        for cell in table
        if cell["kind"] != STEP and (one := ratio(cell, mode, name)) is not None and cell["sides"][name]["agrees"]
    ]
    return (math.exp(sum(map(math.log, found)) / len(found)) if found else math.nan), len(found)


def _mean_line(table: Sequence[Mapping[str, Any]], mode: str, name: str) -> str:
    mean, count = mean_ratio(table, mode, name)
    return f"- {mode}, {name}: geometric mean of its time / ours {mean:.2f} over {count} cells" if count else ""


def _failures(table: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for cell in table:
        if "failed" in cell:
            yield f"- {cell['name']}: {cell['failed']}"
        for name, side in cell.get("sides", {}).items():
            if "failed" in side:
                yield f"- {cell['name']}, {name}: {side['failed']}"
            elif not side["agrees"]:
                yield f"- {cell['name']}, {name}: results differ from ours by {side['error']:.1e} of the largest value"


def _kernel(side: Mapping[str, Any]) -> str:
    if not side.get("kernels"):
        return "-"
    name, count = side["kernels"][0]
    return f"`{name[:60].replace('|', '/')}` x {count}"


def sentence(found: Sequence[Mapping[str, Any]]) -> str:
    """Return the README's sentence about measurements on GPUs; `found` has each machine's stages."""
    parts = []
    for stages in found:
        tables = [content for content in stages.values() if {"table", "machine"} <= set(content)]
        if not tables:
            continue
        table, machine = tables[0]["table"], tables[0]["machine"]
        versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS[:5] if name in machine)
        means = [
            f"{mean:.2f} {mode} (TF32 {tf32}, {count} cells)"
            for name, tf32 in (("torch float32", "off"), ("torch float32 TF32", "on"))
            for mode in MODES
            for mean, count in [mean_ratio(table, mode, name)]
            if count
        ]
        against = f": torch's time / ours is {', '.join(means)}" if means else ""
        parts.append(f"Measured on {machine['GPU']} ({versions}){against}.")
    return " ".join([*parts, "`benchmarks/RESULTS.md` has the tables."]) if parts else NOT_MEASURED
