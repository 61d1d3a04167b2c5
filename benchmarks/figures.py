"""Write the figures of the README from the results that are committed; nobody types one.

    python benchmarks/figures.py          # draw the pictures, and write the README's section anew
    python benchmarks/figures.py --check  # only say whether the README is what the results say; status 1 if not

``benchmarks/results`` has a folder for each machine, with the files of ``fastlstm bench --json`` and of
``benchmarks/study.py --out``. Everything between the two marks in ``README.md`` is generated from them. A row in which
a peer wins is always shown, and ``benchmarks/reasons.toml`` has to say why it does: without, this fails.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from readme import beyond, kernels, reasons
from studies import record
from studies.record import Study

from fastlstm.bench import results as bench
from fastlstm.bench.results import Results
from fastlstm.errors import ResultsFileError

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
BEGIN = (
    "<!-- figures: `python benchmarks/figures.py` makes them from benchmarks/results; what is typed here is lost -->"
)
END = "<!-- end of the figures -->"
NOTHING = (
    "No results are committed yet. On a quiet machine, the commands in `benchmarks/README.md` measure, and"
    " `python benchmarks/figures.py` writes what they found here."
)


class Machine(NamedTuple):
    """The results of one machine."""

    folder: Path
    kernels: dict[str, Results]  # by file name
    studies: dict[str, Study]  # by name of the study


def machines(folder: Path) -> list[Machine]:
    """Read all results, one folder for each machine.

    Raises
    ------
    ResultsFileError
        If a file is broken, or is named otherwise than its study.
    """
    found = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        machine = Machine(place, {}, {})
        for path in sorted(place.glob("*.json")):
            if _kind(path) == bench.FORMAT:
                machine.kernels[path.stem] = bench.load(path)
                continue
            study = record.load(path)
            if study.study != path.stem:
                raise ResultsFileError(f"{path} holds the study {study.study!r}")
            machine.studies[study.study] = study
        if machine.kernels or machine.studies:
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
    found = machines(folder)
    if not found:
        return NOTHING
    given = reasons.load(why)
    parts = []
    for machine in found:
        if len(found) > 1:
            parts.append(f"### {machine.folder.name}")
        for name, results in machine.kernels.items():
            parts += kernels.paragraphs(results, given)
            parts += _pictures(machine.folder, root, prefix=f"{name}-")
        parts += beyond.paragraphs(machine.studies, given)
        parts += _pictures(machine.folder, root, prefix="study-")
    return "\n\n".join(parts)


def _pictures(folder: Path, root: Path, prefix: str) -> Iterator[str]:
    for path in sorted(folder.glob(f"{prefix}*.png")):
        words = path.stem.removeprefix(prefix)
        yield f"![{words}]({path.relative_to(root).as_posix()})"


def draw(machine: Machine) -> Iterator[Path]:
    """Draw and write the pictures of a machine; give the files."""
    from fastlstm.bench import pictures

    for name, results in machine.kernels.items():
        for picture, made in pictures.draw(results).items():
            if isinstance(made, bytes):
                path = machine.folder / f"{name}-{picture}.png"
                path.write_bytes(made)
                yield path
    if "growth" in machine.studies:
        path = machine.folder / "study-growth.png"
        path.write_bytes(beyond.growth_picture(machine.studies["growth"]))
        yield path


def replaced(text: str, inside: str) -> str:
    """Return a text with what stands between the marks replaced.

    Raises
    ------
    ValueError
        If it does not have each mark once, in this order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError("README.md needs the two marks of the figures, each once")
    return f"{before}{BEGIN}\n\n{inside}\n\n{END}{after}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if README and results differ")
    options = parser.parse_args(arguments)
    try:
        if not options.check:
            for machine in machines(RESULTS):
                for path in draw(machine):
                    print(f"wrote {path}")
        before = README.read_text(encoding="utf-8")
        after = replaced(before, section())
    except (reasons.MissingReasonError, ResultsFileError) as error:
        print(error, file=sys.stderr)
        return 1
    if before == after:
        print("The README is what the results say.")
        return 0
    if options.check:
        print("README.md and benchmarks/results differ: run `python benchmarks/figures.py`", file=sys.stderr)
        return 1
    README.write_text(after, encoding="utf-8")
    print(f"wrote {README}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
