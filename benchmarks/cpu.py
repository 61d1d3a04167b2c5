"""The CPU backend against its peers, and against the processor's own peak: one table, one JSON file.

    python benchmarks/cpu.py --threads 2 --json results.json

All sides run in this process, with the same weights, data and number of threads, at equal precision; their
outputs are compared before anything is timed. They are timed in turn, ours, peer, peer, ours, ..., so that a
drift of the machine's speed meets all of them, with a pause before each run: the idle threads of PyTorch, ONNX
Runtime and OpenVINO spin on their cores for a while, and would be measured with the next side otherwise. The
table gives medians, and the ratio peer / ours, above one
where fastlstm is faster. The peak is that of the bare matrix tile on data in the first-level cache, measured
in the same run. Denormals are left as the system has them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import peers
from numba import njit
from peers import Work

import fastlstm
from fastlstm.environment import describe
from fastlstm.kernels.cpu.simd import address, lanes
from fastlstm.kernels.cpu.tile import ROWS, VECTORS, tile

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
PAUSE = 0.02  # seconds
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}  # of the largest value: whether two sides computed the same thing


@njit(nogil=True)
def _tiles(count, k, a, b, c):
    for _ in range(count):
        tile(ROWS, VECTORS, k, address(a), k, 1, address(b), b.shape[1], address(c), c.shape[1])


def peak(dtype: str) -> float:
    """Operations per second of one core, by the bare tile on data in the first-level cache."""
    k, columns = 64, VECTORS * lanes(np.dtype(dtype))
    a, b, c = np.ones((ROWS, k), dtype), np.ones((k, columns), dtype), np.zeros((ROWS, columns), dtype)
    _tiles(1, k, a, b, c)
    count, best = 20_000, math.inf
    for _ in range(15):
        start = time.perf_counter()
        _tiles(count, k, a, b, c)
        best = min(best, time.perf_counter() - start)
    return 2.0 * count * ROWS * k * columns / best


def time_in_turn(sides: dict[str, Any], seconds: float) -> dict[str, list[float]]:
    """Run the sides in turn for about `seconds`, at least nine times each; the time of each run."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
        run()
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times["fastlstm"]) < 9:
        for name, run in sides.items():
            time.sleep(PAUSE)
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def check_equal(work: Work, sides: dict[str, Any]) -> None:
    """Compare what the sides compute with our own, before anything is timed."""
    expected = sides["fastlstm"]()
    for name, run in sides.items():
        for mine, theirs in zip(expected, run(), strict=True):
            error = float(np.abs(mine - theirs).max() / np.abs(mine).max())
            if not error <= TOLERANCE[work.dtype]:
                raise SystemExit(f"{name} computes something else at {work}: {error:.1e}")


def measure(work: Work, threads: int, seconds: float, ceiling: float) -> dict[str, Any]:
    """Measure one row of the table."""
    sides = {"fastlstm": peers.ours(work, threads)}
    sides |= {name: peers.PEERS[name].build(work, threads) for name in peers.able(work)}
    check_equal(work, sides)
    times = time_in_turn(sides, seconds)
    mine = median(times["fastlstm"])
    row: dict[str, Any] = {"T": work.steps, "B": work.batch, "I": work.inputs, "H": work.hidden}
    row |= {"dtype": work.dtype, "work": "train" if work.train else "infer", "threads": threads}
    row |= {"ragged": work.lengths is not None, "plan": plan_of(work), "runs": len(times["fastlstm"])}
    row["milliseconds"] = {name: 1e3 * median(values) for name, values in times.items()}
    row["quartiles"] = {name: [1e3 * q for q in quantiles(values, n=4)] for name, values in times.items()}
    row["ratio"] = {name: median(values) / mine for name, values in times.items() if name != "fastlstm"}
    row["share_of_peak"] = work.operations / mine / (ceiling * threads)
    return row


def plan_of(work: Work) -> str:
    """How fastlstm runs this."""
    x, _ = work.data()
    return work.model().plan(x, work.lengths).partition(": ")[2]


def geometric_mean(values: list[float]) -> float:
    """The geometric mean; NaN of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print one table: times, ratios to each peer, share of the peak; and the geometric mean against the best."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    print(f"{'T,B,I,H':>18} {'ms':>9} " + " ".join(f"{name:>12}" for name in names) + "   best/ours  of peak")
    for row in rows:
        shape = ",".join(str(row[key]) for key in "TBIH") + (" ragged" if row["ragged"] else "")
        cells = [f"{row['ratio'][name]:12.2f}" if name in row["ratio"] else f"{'-':>12}" for name in names]
        best = min(row["ratio"].values(), default=math.nan)
        share = f"{100 * row['share_of_peak']:7.1f} %"
        print(f"{shape:>18} {row['milliseconds']['fastlstm']:9.3f} {' '.join(cells)} {best:11.2f} {share}", flush=True)
    bests = [min(row["ratio"].values()) for row in rows if row["ratio"]]
    if bests:
        print(f"{'geometric mean':>18} {'':9} {'':{13 * len(names) - 1}} {geometric_mean(bests):11.2f}")


def step_row(seconds: float) -> dict[str, Any]:
    """One streaming step, B=1, I=32, H=64: the whole Python call, against ONNX Runtime's for T=1."""
    work = Work(1, 1, 32, 64)
    model, (x, _) = work.model(), work.data()
    state = model.step(x[0])[1]
    sides = {"fastlstm": lambda: model.step(x[0], state)}
    if "onnxruntime" in peers.able(work):
        sides["onnxruntime"] = peers.onnxruntime(work, 1)
    x_t, hundred = x[0], range(100)
    sides["fastlstm"] = lambda: [model.step(x_t, state) for _ in hundred]
    if "onnxruntime" in sides:
        run = sides["onnxruntime"]
        sides["onnxruntime"] = lambda: [run() for _ in hundred]
    times = {name: [t / 100 for t in values] for name, values in time_in_turn(sides, seconds).items()}
    mine = median(times["fastlstm"])
    return {
        "microseconds": {name: 1e6 * median(values) for name, values in times.items()},
        "ratio": {name: median(values) / mine for name, values in times.items() if name != "fastlstm"},
    }


def ragged_rows(threads: int, seconds: float, ceiling: float) -> list[dict[str, Any]]:
    """A ragged training batch against packed sequences, and our own padded one."""
    lengths = np.random.default_rng(5).integers(365 // 2, 365 + 1, 64)
    ragged = Work(365, 64, 32, 128, train=True, lengths=lengths)
    rows = [measure(ragged, threads, seconds, ceiling)]
    padded = ragged._replace(lengths=None)
    sides = {"fastlstm": peers.ours(ragged, threads), "padded": peers.ours(padded, threads)}
    times = time_in_turn(sides, seconds)
    rows[0]["of_padded_time"] = median(times["fastlstm"]) / median(times["padded"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=fastlstm.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), action="append", help="default: both")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row; default: %(default)s")
    parser.add_argument("--shape", action="append", help="T,B,I,H; default: the table's eight")
    parser.add_argument("--only", choices=("infer", "train", "step", "ragged"), action="append")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    parts = options.only or ["infer", "train", "step", "ragged"]
    shapes = [tuple(map(int, text.split(","))) for text in options.shape] if options.shape else SHAPES
    for name, needs in peers.missing().items():
        print(f"{name} is not here and so is not measured: {needs}")
    machine = describe() | {name: __import__(name).__version__ for name in peers.able(Work(1, 1, 1, 1))}
    results: dict[str, Any] = {"machine": machine, "threads": options.threads, "rows": []}
    for dtype in options.dtype or list(TOLERANCE):
        ceiling = peak(dtype)
        results[f"peak_{dtype}_one_core"] = ceiling
        print(f"\n{dtype}: peak of one core {ceiling / 1e9:.0f} GFLOP/s")
        for train in [kind == "train" for kind in ("infer", "train") if kind in parts]:
            rows = []
            for shape in shapes:
                rows.append(measure(Work(*shape, dtype, train), options.threads, options.seconds, ceiling))
                results["rows"].append(rows[-1])
            print(f"\n{'training' if train else 'inference'}, {dtype}, {options.threads} thread(s); ratio peer / ours")
            print_table(rows)
    if "step" in parts:
        results["step"] = step_row(options.seconds)
        print("\none streaming step, B=1 I=32 H=64:", json.dumps(results["step"]))
    if "ragged" in parts:
        results["ragged"] = ragged_rows(options.threads, options.seconds, peak("float32"))
        print("\nragged training against packed sequences")
        print_table(results["ragged"])
        print(f"share of our own padded time: {results['ragged'][0]['of_padded_time']:.2f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
