"""The command ``fastlstm bench``: its options, its output and its files."""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from fastlstm.errors import ArgumentError

__all__ = ["add_arguments", "bench"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``fastlstm bench``; what they hold is checked when they are used."""
    add = parser.add_argument
    add("--shape", action="append", metavar="T,B,I,H", help="measure this instead of the grid; repeatable")
    add("--layers", type=int, default=1, help="of each --shape; default: %(default)s")
    add("--bidirectional", action="store_true", help="each --shape in both directions, which do not stream")
    add("--grid", choices=("small", "full", "goals"), default="small", help="default: %(default)s, two minutes")
    add("--peers", metavar="NAMES", help="with commas between them, or none; default: all that are installed")
    add("--threads", type=int, help="for each side; default: as many as this process has cores")
    add("--dtype", action="append", choices=("float32", "float64"), help="repeatable; default: float32")
    for kind, what in (("infer", "inference"), ("train", "training"), ("stream", "streaming")):
        add(f"--{kind}", action="append_const", dest="kinds", const=kind, help=f"only {what}; they add up")
    add("--seconds", type=float, default=3.0, help="of timing for each row; default: %(default)s")
    add("--json", type=Path, metavar="FILE", help="write the results here, anew after each row")
    add("--plot", type=Path, metavar="FOLDER", help="write the pictures here")


def bench(options: argparse.Namespace) -> int:
    """Run the command; 1 if one of our own sides failed or computed something else, 130 if it was interrupted.

    An option that makes no sense, or a file that cannot be written, is an ArgumentError before anything is measured.
    """
    from fastlstm.backends.threads import get_num_threads
    from fastlstm.bench import grid, peers, pictures, report, run

    dtypes, names = options.dtype or ("float32",), peers.chosen(options.peers)
    kinds = options.kinds or (("infer", "train") if options.bidirectional else ("infer", "train", "stream"))
    variant = {"layers": options.layers, "bidirectional": options.bidirectional}
    if options.shape:
        works = grid.of_shapes(options.shape, dtypes, kinds, **variant)
    elif options.layers != 1 or options.bidirectional:
        raise ArgumentError("--layers and --bidirectional go with --shape")
    else:
        works = grid.works(grid.GRIDS[options.grid], dtypes, kinds)
    a_map = functools.partial(grid.crossover, every=1 if options.grid == "full" else 2)
    try:
        for folder in filter(None, (options.json and options.json.parent, options.plot)):
            folder.mkdir(parents=True, exist_ok=True)
        if options.json:
            options.json.open("a").close()  # which changes no file
    except OSError as error:
        raise ArgumentError(f"{error.filename}: {error.strerror}") from error
    found = run.measure(
        works,
        names,
        threads=get_num_threads() if options.threads is None else options.threads,
        seconds=options.seconds,
        ours_only=() if options.shape else grid.works(a_map, dtypes, kinds),
        path=options.json,
        progress=functools.partial(print, file=sys.stderr, flush=True),
    )
    print(*report.text(found), sep="\n\n")
    status = 1 if any(name in (*peers.OURS, run.EVERYBODY) for case in found.cases for name in case.refused) else 0
    if options.json:
        print(f"wrote {options.json}")
    if options.plot:
        print(*pictures.write(found, options.plot), sep="\n")
    return 130 if found.interrupted else status
