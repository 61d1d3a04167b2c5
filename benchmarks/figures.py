"""Write ``benchmarks/RESULTS.md``, its pictures, and the table of the README, from the results that are committed.

    python benchmarks/figures.py          # draw the pictures, and write the documents
    python benchmarks/figures.py --check  # only compare the documents with the results; status 1 if they differ

``benchmarks/results`` has a folder for each machine, with files of ``fastlstm bench --json``, ``studies.py``,
``versions.py`` and ``.ci/gpu``, all in one format. ``goals.py`` has the goals and the reasons.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import geometric_mean

import goals
import scaling_out

from fastlstm.bench import pictures, report, results
from fastlstm.bench.clock import verdict
from fastlstm.bench.peers import CPU
from fastlstm.bench.results import Case, Results
from fastlstm.bench.work import Work

HERE = Path(__file__).parent
README, TABLES, RESULTS = HERE.parent / "README.md", HERE / "RESULTS.md", HERE / "results"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
MAIN = "bench"  # the file whose cases are in the README and in the pictures
NO_GPU = "No GPU is measured yet: `.ci/gpu OUTDIR` does."
ROWS = {
    "one step, streaming": Work(1, 1, 32, 64, kind="stream"),
    "a step of 32 sequences": Work(1, 32, 64, 128, kind="stream"),
    "inference, one sequence": Work(100, 1, 32, 64),
    "inference, a batch": Work(100, 32, 64, 128),
    "training, a batch": Work(100, 32, 64, 128, kind="train"),
    "training, ragged": Work.ragged(100, 64, 32, 128),
}
"""Six rows of the README; two more are where the peers come nearest or win, and the first calls, which compile."""

Found = Mapping[str, Mapping[str, Results]]  # by folder, by file name


def tables(found: Found) -> str:
    """Return what ``RESULTS.md`` has to be; ValueError if a loss or a missed goal has no reason."""
    parts = [
        "# Results",
        "Made by `python benchmarks/figures.py` from the files in `benchmarks/results`. The method is described in"
        " `fastlstm/bench/clock.py`. Behind a peer's time stands its ratio to ours, the median over rounds in which"
        " both were timed in turn, which may differ from the ratio of the medians: above 1 fastlstm is faster, **bold**"
        " is where the peer is, `=` is no difference.",
    ]
    for machine, files in found.items():
        parts.append(f"## {machine}")
        if rows := list(goals.rows(files)):
            parts.append("Goals: **bold** misses. Two values are of one thread and of two.")
            parts += [report.table(["goal", "asked", "measured", "why it is missed"], rows, left=4)]
        for picture in sorted((RESULTS / machine).glob("*.png")):
            parts.append(f"![{picture.stem}](results/{machine}/{picture.name})")
        for name, file in files.items():
            parts += [f"### {name.replace('-', ' ')}", file.about, *report.text(file, list_losses=False)]
            if why := list(goals.wins(file)):
                parts.append("\n".join(["Where a peer wins, and why:", "", *why]))
        if "goals-1-thread" in files:
            parts += ["### scaling out", *scaling_out.tables(files["goals-1-thread"])]
    return "\n\n".join(filter(None, parts)) + "\n"


def section(found: Found) -> str:
    """Return the README's table of eight rows, the machine, and a sentence on GPUs."""
    parts, on_gpus = [], []
    for files in found.values():
        with_gpu = [file for file in files.values() if "GPU" in file.machine]
        if MAIN in files and files[MAIN] not in with_gpu:
            rows = dict(_rows(files))
            peers = list(dict.fromkeys(s for case in rows.values() for s in case.values if report.is_peer(s)))
            cells = [[words, case.work.name if case.work else "", *(report.cell(case, s) for s in (CPU, *peers))]
                     for words, case in rows.items()]  # fmt: skip
            parts.append(report.table(["call, float32", "T,B,I,H", CPU, *peers], cells, left=2))
            parts.append(report.machine_line(files[MAIN]))
        cases = (case for file in with_gpu for case in file.cases if case.work)
        if ratios := [ratio.middle for _, side, ratio in report.duels(cases) if side == "torch cuda"]:
            mean, gpu = geometric_mean(ratios), with_gpu[0].machine["GPU"].partition(",")[0]
            on_gpus.append(f"On {gpu}, the geometric mean of PyTorch's time / ours is {mean:.2f}.")
    parts.append(
        "In brackets: the peer's time / ours, **bold** where the peer is faster, `=` for no difference."
        " [All rows](benchmarks/RESULTS.md). " + (" ".join(on_gpus) or NO_GPU)
    )
    return "\n\n".join(parts)


def _rows(files: Mapping[str, Results]) -> Iterator[tuple[str, Case]]:
    cases = {case.work: case for case in files[MAIN].cases}
    yield from ((words, cases[work]) for words, work in ROWS.items() if work in cases)
    others = [(verdict(found) != "slower", found.middle, case.name, case)  # those that win before those that draw
              for case, _, found in report.duels(cases.values()) if case.work not in ROWS.values()]  # fmt: skip
    if others:
        *_, worst = min(others)
        yield f"{pictures.KINDS[worst.group]}, the peers' best other size", worst
    starts = files["start"].cases if "start" in files else ()
    yield from (("first calls ever, which compile", case) for case in starts if case.name == "cold: all three calls")


def readme(text: str, inside: str) -> str:
    """Return a text with what stands between the two marks replaced; ValueError if it does not have each once."""
    if re.findall(f"{BEGIN}|{END}", text) != [BEGIN, END]:
        raise ValueError(f"README.md needs the two marks {BEGIN} and {END}, each once")
    return f"{text.partition(BEGIN)[0]}{BEGIN}\n\n{inside}\n\n{END}{text.partition(END)[2]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if documents and results differ")
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, Results]] = {}
    try:
        for path in sorted(RESULTS.glob("*/*.json")):
            found.setdefault(path.parent.name, {})[path.stem] = results.load(path)
        for machine, files in found.items() if not options.check else ():
            if MAIN in files:
                print(*pictures.write(files[MAIN], RESULTS / machine), sep="\n")
        text = README.read_text(encoding="utf-8")
        wanted = {README: readme(text, section(found)), TABLES: tables(found)}
    except ValueError as error:  # also that a file is broken
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.name} and benchmarks/results differ: run `python benchmarks/figures.py`", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
