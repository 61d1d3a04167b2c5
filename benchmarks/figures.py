"""Write the figures of the README from the results that are committed; nobody types one.

    python benchmarks/figures.py          # draw the pictures, and write the figures anew
    python benchmarks/figures.py --check  # only say whether they are what the results say; status 1 if not

``benchmarks/results`` has a folder for each machine: ``bench.json`` is of ``fastlstm bench``, a study's file of
``benchmarks/study.py --out``, ``A.json``, ``B.json`` and ``C.json`` of ``.ci/gpu``, ``versions.json`` of
``benchmarks/versions.py``, and any other of ``benchmarks/cpu.py``. Of the first two is made everything between the two
marks in ``README.md``; of the others ``benchmarks/RESULTS.md``, with the roofs of the machine beside each row, and of
those of a GPU one sentence between two marks of its own in ``README.md``. A row in which a peer wins is always shown,
and ``benchmarks/reasons.toml`` has to say why it does on a CPU, and why a goal is missed: without, this fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from readme import beyond, goals, gpu, kernels, limits, reasons, versions
from studies import record
from studies.record import Study

from fastlstm.bench import results as bench
from fastlstm.bench.results import Results
from fastlstm.errors import ResultsFileError

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
TABLES = HERE / "RESULTS.md"
FIRST = "bench"  # the README's file among those of `fastlstm bench`
BEGIN = (
    "<!-- figures: `python benchmarks/figures.py` makes them from benchmarks/results; what is typed here is lost -->"
)
END = "<!-- end of the figures -->"
BEGIN_GPU, END_GPU = "<!-- GPU: made by benchmarks/figures.py -->", "<!-- end of GPU -->"
NOTHING = (
    "No results are committed yet. On a quiet machine, the commands in `benchmarks/README.md` measure, and"
    " `python benchmarks/figures.py` writes what they found here."
)


class Machine(NamedTuple):
    """The results of one machine."""

    folder: Path
    kernels: dict[str, Results]  # by file name
    studies: dict[str, Study]  # by name of the study
    gpu: dict[str, Any]  # by stage of .ci/gpu
    versions: list[dict[str, Any]]  # comparisons of two


def machines(folder: Path) -> list[Machine]:
    """Read all results, one folder for each machine.

    Raises
    ------
    ResultsFileError
        If a file is broken, or is named otherwise than its study.
    """
    found = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        machine = Machine(place, {}, {}, {}, [])
        for path in sorted(place.glob("*.json")):
            if _kind(path) == bench.FORMAT:
                machine.kernels[path.stem] = bench.load(path)
                continue
            if _kind(path) == gpu.FORMAT:
                machine.gpu[path.stem] = gpu.load(path)
                continue
            if _kind(path) == versions.FORMAT:
                machine.versions.append(versions.load(path))
                continue
            study = record.load(path)
            if study.study != path.stem:
                raise ResultsFileError(f"{path} holds the study {study.study!r}")
            machine.studies[study.study] = study
        if machine.kernels or machine.studies or machine.gpu or machine.versions:
            found.append(machine)
    return found


def _kind(path: Path) -> str | None:
    """Say what a file calls itself; what is wrong with it, its own reader says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return content.get("format") if isinstance(content, dict) else None


def section(folder: Path = RESULTS, root: Path = README.parent, why: Path = reasons.FILE) -> str:
    """Return what has to stand between the marks.

    Raises
    ------
    ResultsFileError
        If a file of results is broken.
    MissingReasonError
        If a peer wins somewhere and no reason is given.
    """
    found = [machine for machine in machines(folder) if machine.kernels or machine.studies]
    if not found:
        return NOTHING
    given = reasons.load(why)
    parts = []
    for machine in found:
        if len(found) > 1:
            parts.append(f"### {machine.folder.name}")
        if FIRST in machine.kernels:
            parts += kernels.paragraphs(machine.kernels[FIRST], given)
            parts += _pictures(machine.folder, root, prefix=f"{FIRST}-")
        parts += beyond.paragraphs(machine.studies, given)
        parts += _pictures(machine.folder, root, prefix="study-")
    return "\n\n".join(parts)


def tables(folder: Path = RESULTS, why: Path = reasons.FILE) -> str:
    """Return what ``RESULTS.md`` has to be: every other table, and how far anyone could go.

    Raises
    ------
    ResultsFileError, MissingReasonError
        As for :func:`section`.
    """
    given = reasons.load(why)
    parts = [
        "# Results, shape by shape",
        "Made by `python benchmarks/figures.py` from the files in `benchmarks/results`; what is typed here is lost. The"
        " method stands in `fastlstm/bench/clock.py`.",
    ]
    for machine in machines(folder):
        others = {name: results for name, results in machine.kernels.items() if name != FIRST}
        parts += [f"## {machine.folder.name}", *goals.paragraphs(others, machine.studies, given)] if others else []
        for name, results in others.items():
            parts.append(f"### {name.replace('-', ' ')}")
            parts += kernels.paragraphs(results, given, every=True)
            parts += limits.paragraphs(results, machine.studies.get("roofs"))
        parts += [part for comparison in machine.versions for part in versions.paragraphs(comparison)]
        if machine.gpu:
            parts += [] if others else [f"## {machine.folder.name}"]
            parts += [part for stage in machine.gpu.values() for part in gpu.stage(stage)]
    return "\n\n".join(parts) + "\n"


def gpu_sentence(folder: Path = RESULTS) -> str:
    """Return what the README has to say of measurements on GPUs."""
    return gpu.sentence([machine.gpu for machine in machines(folder)])


def _pictures(folder: Path, root: Path, prefix: str) -> Iterator[str]:
    for path in sorted(folder.glob(f"{prefix}*.png")):
        words = path.stem.removeprefix(prefix)
        yield f"![{words}]({path.relative_to(root).as_posix()})"


def draw(machine: Machine) -> Iterator[Path]:
    """Draw and write the pictures of a machine; give the files."""
    from fastlstm.bench import pictures

    if FIRST in machine.kernels:
        for picture, made in pictures.draw(machine.kernels[FIRST]).items():
            if isinstance(made, bytes):
                path = machine.folder / f"{FIRST}-{picture}.png"
                path.write_bytes(made)
                yield path
    if "growth" in machine.studies:
        path = machine.folder / "study-growth.png"
        path.write_bytes(beyond.growth_picture(machine.studies["growth"]))
        yield path


def replaced(text: str, inside: str, first: str = BEGIN, last: str = END, gap: str = "\n\n") -> str:
    """Return a text with what stands between two marks replaced.

    Raises
    ------
    ValueError
        If it does not have each mark once, in this order.
    """
    before, begin, rest = text.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end or first in after or last in before + after:
        raise ValueError(f"README.md needs the two marks {first} and {last}, each once")
    return f"{before}{first}{gap}{inside}{gap}{last}{after}"


def readme(text: str, figures: str, sentence: str) -> str:
    """Return the README with all that is generated."""
    return replaced(replaced(text, figures), sentence, BEGIN_GPU, END_GPU, "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if figures and results differ")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            for machine in machines(RESULTS):
                for path in draw(machine):
                    print(f"wrote {path}")
        text = README.read_text(encoding="utf-8")
        wanted = {README: readme(text, section(), gpu_sentence(RESULTS)), TABLES: tables()}
    except (reasons.MissingReasonError, ResultsFileError) as error:
        print(error, file=sys.stderr)
        return 1
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    for path in stale:
        if options.check:
            print(f"{path.name} and benchmarks/results differ: run `python benchmarks/figures.py`", file=sys.stderr)
        else:
            path.write_text(wanted[path], encoding="utf-8")
            print(f"wrote {path}")
    if not stale:
        print("The figures are what the results say.")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
