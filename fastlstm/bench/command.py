"""The command ``fastlstm bench``: its options, and what is done with the results."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from fastlstm.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fastlstm.bench.results import Results
    from fastlstm.bench.work import Work

__all__ = ["add_arguments", "bench"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastlstm bench``; what they hold is checked when they are used."""
    parser.add_argument(
        "--shape", action="append", metavar="T,B,I,H", help="measure this in place of the grid; repeatable"
    )
    parser.add_argument("--grid", choices=("small", "full"), default="small", help="default: %(default)s, two minutes")
    parser.add_argument(
        "--peers", metavar="NAMES", help="with commas between them, or none; default: all that are here"
    )
    parser.add_argument("--threads", type=int, help="for each side; default: as many as this process has cores")
    parser.add_argument("--dtype", action="append", choices=("float32", "float64"), help="repeatable; default: float32")
    for kind, what in (("infer", "inference"), ("train", "training"), ("stream", "streaming")):
        parser.add_argument(
            f"--{kind}", action="append_const", dest="kinds", const=kind, help=f"only {what}; they add up"
        )
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each row; default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, anew after each row")
    parser.add_argument("--plot", type=Path, metavar="FOLDER", help="write the pictures here")
    parser.add_argument(
        "--compare", type=Path, metavar="FILE", help="say what is slower than there; status 1 if we are"
    )
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: make one page of these"
    )
    parser.add_argument(
        "--page", type=Path, default=Path("fastlstm-bench.html"), help="of --report; default: %(default)s"
    )


def bench(options: argparse.Namespace) -> int:
    """Run the command.

    Returns
    -------
    int
        1 if one of our own sides failed, computed something else, or is slower than in the file to compare with; 130
        if it was interrupted; else 0.

    Raises
    ------
    ArgumentError
        If an option makes no sense, or a file cannot be read or written: before anything is measured.
    """
    if options.report:
        return _report(options.report, options.page)

    from fastlstm.backends.threads import get_num_threads
    from fastlstm.bench import grid, peers, results, run, table

    kinds, dtypes = options.kinds or ("infer", "train", "stream"), options.dtype or ("float32",)
    shapes, names = options.shape, peers.chosen(options.peers)
    works = grid.of_shapes(shapes, dtypes, kinds) if shapes else grid.named(options.grid, dtypes, kinds)
    before = _prepare(options)
    found = run.measure(
        works,
        names,
        threads=get_num_threads() if options.threads is None else options.threads,
        seconds=options.seconds,
        ours_only=() if shapes else grid.crossover(options.grid, dtypes, kinds),
        progress=_progress(),
        keep=lambda found: results.save(options.json, found) if options.json else None,
    )
    for line in table.text(found):
        print(line)
    status = 1 if any(name in (*peers.OURS, run.EVERYBODY) for row in found.rows for name in row.refused) else 0
    if options.json:
        results.save(options.json, found)
        print(f"wrote {options.json}")
    if options.plot:
        _plot(found, options.plot)
    if before is not None:
        status = max(status, _compare(before, found))
    return 130 if found.interrupted else status


@contextlib.contextmanager
def _files() -> Iterator[None]:
    """Turn the system's errors about files into one line for the user."""
    try:
        yield
    except OSError as error:
        raise ArgumentError(f"{error.filename}: {error.strerror}") from error


def _prepare(options: argparse.Namespace) -> Results | None:
    """Make the folders and try the files, so that no run is lost for want of one; return what to compare with."""
    from fastlstm.bench import results

    with _files():
        before = results.load(options.compare) if options.compare else None
        if options.json is not None:
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.open("a").close()  # leaves what is there
        if options.plot is not None:
            options.plot.mkdir(parents=True, exist_ok=True)
    return before


def _progress() -> Callable[[Iterable[Work]], Iterable[Work]]:
    """Return a progress bar on stderr, or nothing if tqdm is missing."""
    try:
        from tqdm import tqdm
    except ImportError:
        return iter

    def bar(works: Iterable[Work]) -> Iterable[Work]:
        with tqdm(works, unit="row", disable=None) as shown:
            for work in shown:
                shown.set_postfix_str(f"{work.name} {work.kind} {work.dtype}")
                yield work

    return bar


def _plot(found: Results, folder: Path) -> None:
    from fastlstm.bench import pictures

    for name, made in pictures.draw(found).items():
        if isinstance(made, str):
            print(f"no picture {name}: {made}")
        else:
            (folder / f"{name}.png").write_bytes(made)
            print(f"wrote {folder / f'{name}.png'}")


def _compare(before: Results, now: Results) -> int:
    """Print what has changed; 1 if one of our own sides got slower. A peer that did says that the machine has."""
    from fastlstm.bench import peers, results, table

    changes, alone = results.compare(before, now)
    print(f"\nCompared with {before.made or 'the run before'}:")
    if before.machine.get("processor") != now.machine.get("processor"):
        print(f"ANOTHER PROCESSOR: {before.machine.get('processor')} before, {now.machine.get('processor')} now")
    for line in table.changes(changes, alone):
        print(line)
    return 1 if any(change.verdict == "slower" and change.side in peers.OURS for change in changes) else 0


def _report(paths: list[Path], page: Path) -> int:
    from fastlstm.bench import page as pages
    from fastlstm.bench import results

    several = len({path.name for path in paths}) < len(paths)  # of one name, in several folders
    with _files():
        found = {str(path) if several else path.name: results.load(path) for path in paths}
        text = pages.html(found)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")
    print(f"wrote {page}")
    return 0
