"""Two versions of fastlstm on one machine, in turn: ``python benchmarks/versions.py OLD_PYTHON NEW_PYTHON --out FILE``.

Each interpreter has one of the versions installed. Two processes, one for each, hold the same models; a block of calls
of the one follows a block of the other, so that a slow phase of the machine meets both. A process may be slower than
its like throughout, by where its memory lies, so several pairs of processes are measured. A cell's ratio is the median
over all rounds of old time / new time: above 1, the new version is faster. A first call is timed in processes of its
own, with an empty kernel cache, in CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# T, B, I, H
INFER = ((1, 1, 128, 256), (100, 1, 32, 64), (100, 1, 128, 256), (100, 32, 64, 128), (10, 32, 64, 128),
         (1000, 32, 64, 128), (100, 1, 64, 128), (100, 256, 64, 128), (100, 32, 64, 32), (100, 32, 64, 512),
         (365, 64, 32, 256), (50, 64, 512, 512))  # fmt: skip
TRAIN = ((100, 1, 32, 64), (100, 32, 64, 128), (100, 64, 32, 256), (50, 64, 512, 512))

WORKER = """
import json, sys, time
import numpy as np
import fastlstm
from fastlstm import LSTM, functional

INFER, TRAIN, threads = json.loads(sys.argv[1])
fastlstm.set_num_threads(threads)
f4, cells = np.float32, {}
rng = np.random.default_rng(0)

def x(*shape):
    return rng.standard_normal(shape).astype(f4)

def training(model, x, dy):
    return lambda: model.backward(model.forward(x)[2], dy)

one, row, few = x(1, 32), x(32), x(10, 4, 32)
plain = LSTM(32, 64, seed=0)
frozen = plain.freeze()
state = frozen.step(one)[1]
cells["frozen step (1, I)"] = lambda: frozen.step(one, state)
cells["step (1, I)"] = lambda: plain.step(one, state)
flat = tuple(s[:, 0] for s in state)
cells["frozen step (I,)"] = lambda: frozen.step(row, flat)
for layers in (2, 3):
    deep = LSTM(32, 64, layers, seed=0).freeze()
    cells[f"frozen step, {layers} layers"] = lambda deep=deep, s=deep.step(one)[1]: deep.step(one, s)
    chain = [LSTM(64 if k else 32, 64, seed=k).freeze() for k in range(layers)]
    states = [model.step(x(1, 64 if k else 32))[1] for k, model in enumerate(chain)]
    def chained(chain=chain, states=states):
        h = one
        for model, s in zip(chain, states):
            h, _ = model.step(h, s)
    cells[f"frozen step, {layers} models by hand"] = chained
cells["call (10, 4, I)"] = lambda: plain(few)
first = LSTM(32, 64, batch_first=True, seed=0)
swapped = np.ascontiguousarray(few.swapaxes(0, 1))
cells["batch_first"] = lambda: first(swapped)
alone = np.ascontiguousarray(few[:, 0])
cells["unbatched"], cells["one sequence"] = lambda: plain(alone), lambda: plain(few[:, :1])
cells["ragged"] = lambda lengths=np.array([10, 7, 5, 2]): plain(few, None, lengths)
both = LSTM(32, 64, bidirectional=True, seed=0)
cells["bidirectional"] = lambda: both(few)
cells["forward"], cells["functional"] = lambda: plain.forward(few), lambda: functional.lstm_forward(plain.params, few)
cells["training on one step"] = training(plain, few[:1, :1].copy(), x(1, 1, 64))
for t, b, i, h in INFER:
    cells[f"inference {t},{b},{i},{h}"] = lambda m=LSTM(i, h, seed=0), given=x(t, b, i): m(given)
for t, b, i, h in TRAIN:
    cells[f"training {t},{b},{i},{h}"] = training(LSTM(i, h, seed=0), x(t, b, i), x(t, b, h))
lengths, m, given, dy = rng.integers(1, 101, 64), LSTM(32, 128, seed=0), x(100, 64, 32), x(100, 64, 128)
cells["training 100,64,32,128 ragged"] = lambda: m.backward(m.forward(given, lengths=lengths)[2], dy)

for call in cells.values():
    for _ in range(30 if threads > 1 else 3):  # compiled, and the candidate schedules tried
        call()
print(json.dumps(list(cells)), flush=True)
for line in sys.stdin:
    name, count = json.loads(line)
    start = time.perf_counter()
    for _ in range(count):
        cells[name]()
    print(time.perf_counter() - start, flush=True)
"""

FIRST = """
import sys, time
import numpy as np
import fastlstm
start = time.process_time()
try:  # kernels that stand beside the source from other runs are not to be found
    from fastlstm.kernels.cpu import kernel_cache
    kernel_cache.folders = kernel_cache.folders[:1]
except (ImportError, AttributeError):  # a version that looks in one folder only
    pass
what = sys.argv[1]
model, x = fastlstm.LSTM(32, 64, seed=0), np.ones((40, 8, 32), np.float32)
if what == "inference":
    model(x)
elif what == "training":
    y, _, tape = model.forward(x)
    model.backward(tape, y)
else:
    (model.freeze() if what == "frozen step" else model).step(x[0, :1])
print(time.process_time() - start)
"""


class Version:
    """One process that holds the models."""

    def __init__(self, python: str, threads: int) -> None:
        command = [python, "-c", WORKER, json.dumps([INFER, TRAIN, threads])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tempfile.gettempdir()
        )
        self.cells = json.loads(self._line())

    def __enter__(self) -> Version:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()

    def seconds(self, cell: str, count: int) -> float:
        """Run so many calls of a cell."""
        assert self.process.stdin is not None
        print(json.dumps([cell, count]), file=self.process.stdin, flush=True)
        return float(self._line())


Pairs = list[tuple[float, float]]


def time_in_turn(old: Version, new: Version, cell: str, rounds: int, block: float) -> Pairs:
    """Time blocks of calls in turn: the seconds of a call, of each version."""
    count = max(1, round(block / max(1e-7, min(new.seconds(cell, 1) for _ in range(3)))))
    return [(old.seconds(cell, count) / count, new.seconds(cell, count) / count) for _ in range(rounds)]


def summary(pairs: Pairs) -> dict[str, Any]:
    """Summarise the times of one cell."""
    ratios = sorted(a / b for a, b in pairs)
    return {
        "old us": 1e6 * statistics.median(a for a, _ in pairs), "new us": 1e6 * statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios), "quartiles": [ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]],
    }  # fmt: skip


def first_calls(old: str, new: str, rounds: int) -> dict[str, dict[str, float]]:
    """Time first calls with an empty kernel cache, in CPU seconds."""
    found = {}
    for what in ("inference", "training", "step", "frozen step"):
        seconds: dict[str, list[float]] = {old: [], new: []}
        for _ in range(rounds):
            for python in (old, new):
                with tempfile.TemporaryDirectory() as cache:
                    environment = os.environ | {
                        "NUMBA_CACHE_DIR": cache,
                        "FASTLSTM_NUM_THREADS": "1",
                        "FASTLSTM_QUIET": "1",
                    }
                    done = subprocess.run(
                        [python, "-c", FIRST, what],
                        env=environment,
                        cwd=cache,
                        capture_output=True,
                        text=True,
                        check=True,
                    )
                    seconds[python].append(float(done.stdout))
        a, b = (statistics.median(seconds[python]) for python in (old, new))
        found[what] = {"old s": a, "new s": b, "new / old": b / a}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="the interpreter of the old version")
    parser.add_argument("new", help="that of the new one")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--names", nargs=2, default=["old", "new"], help="of the versions, for the file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--processes", type=int, default=3, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=7, help="of each pair of processes")
    parser.add_argument("--block", type=float, default=0.02, help="seconds of a block of calls, at least one call")
    options = parser.parse_args()
    found: dict[str, Any] = {"format": "fastlstm versions 1", "versions": options.names, "calls": {}}
    found["first calls"] = first_calls(options.old, options.new, 3)
    for threads in options.threads:
        times: dict[str, Pairs] = {}
        for _ in range(options.processes):
            with Version(options.old, threads) as old, Version(options.new, threads) as new:
                for cell in new.cells:
                    times.setdefault(cell, []).extend(time_in_turn(old, new, cell, options.rounds, options.block))
        found["calls"][str(threads)] = {cell: summary(pairs) for cell, pairs in times.items()}
    from fastlstm.diagnostics import describe_for_others

    found["machine"] = describe_for_others()
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
