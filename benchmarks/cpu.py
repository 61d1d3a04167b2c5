"""The CPU at its limit: eight shapes in inference and training, float32 and float64, streaming, a ragged batch.

    python benchmarks/cpu.py --threads 2 --json results.json

The table that `fastlstm bench` prints, for the shapes that this project holds itself to; the method is that of
`fastlstm.bench.clock`. The geometric mean is that of the ratios to the best peer of each row.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import fastlstm
from fastlstm.bench import clock, grid, peers, results, run, sides, table
from fastlstm.bench.work import DTYPES, Problem, Work

SHAPES = (
    (1, 1, 32, 64),
    (1, 1, 128, 256),
    (100, 1, 32, 64),
    (100, 1, 128, 256),
    (100, 32, 64, 128),
    (365, 64, 32, 256),
    (50, 64, 512, 512),
    (50, 64, 1024, 1024),
)
STEPS = (Work(1, 1, 32, 64, kind="stream"), Work(1, 1, 128, 256, kind="stream"))
RAGGED = (365, 64, 32, 128)
PARTS = ("infer", "train", "step", "ragged")


def works(options: argparse.Namespace) -> list[Work]:
    """Return what the options ask for."""
    parts, found = options.only or PARTS, []
    for dtype in options.dtype or DTYPES:
        kinds = [kind for kind in ("infer", "train") if kind in parts]
        if options.shape:
            found += grid.of_shapes(options.shape, [dtype], kinds)
        else:
            found += [Work(*shape, dtype, kind) for kind in kinds for shape in SHAPES]
    if "step" in parts:
        found += STEPS
    if "ragged" in parts:
        found.append(Work.ragged(*RAGGED))
    return found


def best_ratios(found: list[table.Line], kind: str, dtype: str) -> list[float]:
    """The best peer's time over ours, for each row of a kind and dtype; not of the ragged batch, which is no shape."""
    chosen = [line for line in found if (line.row.work.kind, line.row.work.dtype) == (kind, dtype)]
    chosen = [line for line in chosen if line.row.work.lengths is None]
    return [min(ratio.middle for ratio in line.ratios.values()) for line in chosen if line.ratios]


def share_of_padded_time(threads: int, seconds: float) -> clock.Spread:
    """Our own time for the ragged batch as a share of that for the padded one, the two in turn."""
    ragged, padded = Work.ragged(*RAGGED), Work(*RAGGED, kind="train")
    with sides.cpu(Problem.of(ragged), threads) as one, sides.cpu(Problem.of(padded), threads) as other:
        times, _, _ = clock.take_turns({"ragged": one, "padded": other}, seconds)
    return clock.ratio(times["ragged"], times["padded"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=fastlstm.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row; default: %(default)s")
    parser.add_argument("--shape", action="append", help="T,B,I,H; default: the table's eight")
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()

    names = [name for name in peers.chosen(None) if peers.CONTENDERS[name].device == "cpu"]
    found = run.measure(works(options), names, threads=options.threads, seconds=options.seconds)
    for line in table.text(found):
        print(line)
    lines = table.lines(found)
    for kind, dtype in dict.fromkeys((line.row.work.kind, line.row.work.dtype) for line in lines):
        if ratios := best_ratios(lines, kind, dtype):
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            print(f"{kind} {dtype}: geometric mean of the best peer's time / ours {mean:.2f}")
    if "ragged" in (options.only or PARTS) and not found.interrupted:
        share = share_of_padded_time(options.threads, options.seconds)
        print(f"ragged training, share of our own padded time: {share.middle:.2f}, {share.low:.2f} to {share.high:.2f}")
    if options.json:
        results.save(options.json, found)


if __name__ == "__main__":
    main()
