"""From what ``.ci/gpu`` left in a folder to one page: ``python benchmarks/gpu_report.py FOLDER`` writes summary.md.

And ``benchmark.png``, if matplotlib is there. Whatever is missing is said to be missing.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

OURS = "fastlstm float32"
MODES = ("forward", "forward and backward")


def main(arguments: list[str]) -> int:
    """Write the page and the picture."""
    folder = Path(arguments[0])
    results = load(folder / "benchmark.json")
    picture = "No picture: there are no measurements."
    if results and any("contenders" in shape for shape in results["shapes"]):
        picture = draw(results, folder / "benchmark.png")
    page = "\n".join(["# fastlstm on a GPU", "", *stages(folder), *repetitions(folder), *tables(results), picture, ""])
    (folder / "summary.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


def load(path: Path) -> Any:
    """Read a JSON file; None if it is not there or was cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def stages(folder: Path) -> list[str]:
    """What ran, and how it ended: from stages.tsv, one line a stage of name, status, seconds and remark."""
    path = folder / "stages.tsv"
    if not path.exists():
        return []
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
    lines = [f"| {name} | {status} | {seconds} s | {remark} |" for name, status, seconds, remark in rows]
    return ["| stage | result | time | remark |", "|---|---|---:|---|", *lines, ""]


def repetitions(folder: Path) -> list[str]:
    """Whether every repetition gave the same bits."""
    found = load(folder / "repeat.json")
    if not found:
        return ["Repetitions: not run.", ""]
    total = sum(case["repetitions"] for case in found["cases"])
    different = sum(case["different"] for case in found["cases"])
    line = f"Repetitions: {different} of {total} differ in any bit from the first; error against the float64 reference"
    for dtype in ("float32", "float64"):
        errors = [case["error"] for case in found["cases"] if case["dtype"] == dtype]
        line += f" {max(errors):.1e} ({dtype})," if errors else f" unknown ({dtype}),"
    missing = f" {found['missing']} cases are missing: the time was out." if found["missing"] else ""
    return [line[:-1] + "." + missing, ""]


def tables(results: Any) -> list[str]:
    """The machine, the cost of a launch, and the microseconds per step of every contender."""
    if not results:
        return ["Benchmarks: not run.", ""]
    lines = [f"- {name}: {value}" for name, value in results["machine"].items()]
    lines += ["", *(f"- {name}: {value:.2f} us a launch" for name, value in results.get("launch", {}).items())]
    lines += [
        f"- kernels of one dtype, {name}: {value:.2f} s" for name, value in results.get("compilation", {}).items()
    ]
    shapes = [shape for shape in results["shapes"] if "contenders" in shape]
    names = [name for name in (shapes[0]["contenders"] if shapes else {}) if name != OURS]
    for mode in MODES if shapes else ():
        lines += ["", f"## {mode.capitalize()}, T={results['steps']}: microseconds per step", ""]
        lines += ["Behind each time of torch: torch / fastlstm, above 1 where fastlstm is faster.", ""]
        lines += ["| H | B | fastlstm float32 | " + " | ".join(names) + " |", "|--:|--:|" + "--:|" * (1 + len(names))]
        for shape in sorted(shapes, key=lambda s: (s["hidden"], s["batch"])):
            ours = shape["contenders"][OURS][mode]["us per step"]
            cells = [cell(shape["contenders"][name], mode, ours) for name in names]
            lines.append(f"| {shape['hidden']} | {shape['batch']} | {ours:.2f} | " + " | ".join(cells) + " |")
    lines += ["", *remarks(results, shapes, names), ""]
    return lines


def cell(contender: dict[str, Any], mode: str, ours: float) -> str:
    """One contender's time and ratio; marked if its results were not ours."""
    if mode not in contender:
        return "failed"
    theirs = contender[mode]["us per step"]
    return f"{theirs:.2f} ({theirs / ours:.2f}x)" + ("" if contender["agrees"] else " **disagrees**")


def remarks(results: Any, shapes: list[Any], names: list[str]) -> list[str]:
    """The contenders' errors, who failed and why, and what no time was left for."""
    lines = []
    for name in names:
        errors = [s["contenders"][name]["error"] for s in shapes if "error" in s["contenders"][name]]
        if errors:
            lines.append(f"- {name}: results at most {max(errors):.1e} from ours, as a share of the largest value")
    for shape in results["shapes"]:
        where = f"H={shape['hidden']} B={shape['batch']}"
        lines += [f"- {where}: {shape['error']}"] if "error" in shape else []
        found = shape.get("contenders", {})
        lines += [f"- {where}, {name}: {value['failed']}" for name, value in found.items() if "failed" in value]
    if results["skipped"]:
        lines.append(f"- No time was left for H, B = {', '.join(str(tuple(pair)) for pair in results['skipped'])}.")
    return lines


def draw(results: Any, path: Path) -> str:
    """Draw microseconds per step over H, a panel for each mode and batch; a line for the page."""
    try:
        import matplotlib as mpl

        mpl.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "No picture: matplotlib is missing."
    shapes = [shape for shape in results["shapes"] if "contenders" in shape]
    batches = sorted({shape["batch"] for shape in shapes})
    figure, axes = plt.subplots(
        len(MODES), len(batches), figsize=(3.6 * len(batches), 6.4), sharex=True, squeeze=False, layout="constrained"
    )
    for row, mode in enumerate(MODES):
        for column, batch in enumerate(batches):
            panel = axes[row][column]
            chosen = sorted((s for s in shapes if s["batch"] == batch), key=lambda s: s["hidden"])
            for name in chosen[0]["contenders"]:
                there = [shape for shape in chosen if mode in shape["contenders"][name]]
                times = [shape["contenders"][name][mode]["us per step"] for shape in there]
                style = {"color": "black", "linewidth": 2.2} if name == OURS else {"linewidth": 1.2}
                panel.plot([shape["hidden"] for shape in there], times, marker="o", markersize=3, label=name, **style)
            panel.set(title=f"{mode}, B={batch}", xscale="log", yscale="log")
            panel.set_xticks([s["hidden"] for s in chosen], [str(s["hidden"]) for s in chosen], minor=False)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
    axes[-1][0].set(xlabel="hidden units H", ylabel="microseconds per step")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(f"T={results['steps']}, I=H, one layer, on {results['machine'].get('GPU', 'a GPU')}", fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return f"![Microseconds per step]({path.name})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
