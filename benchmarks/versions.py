"""Two versions of fastlstm on one machine, in turn: ``python benchmarks/versions.py OLD_PYTHON NEW_PYTHON --out FILE``.

Each interpreter has one of the versions installed. Two processes, one each, hold the same models and take turns, as the
sides of ``fastlstm bench``. One process may be slower than another throughout, depending on where its memory is, so
several pairs of processes are measured. The ratio is old time / new time: above 1 the new version is faster. A first
call is timed in processes of its own, with an empty kernel cache, in CPU seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from first_calls import new_process

from fastlstm.bench import clock, grid, run
from fastlstm.bench.peers import CPU
from fastlstm.bench.results import Case
from fastlstm.bench.sides import Side

ABOUT = __doc__.partition("\n\n")[2].strip()
WORKER = """
import json, sys, time
import numpy as np
import fastlstm
from fastlstm import LSTM, functional

INFER, TRAIN, threads = json.loads(sys.argv[1])
fastlstm.set_num_threads(threads)
rng = np.random.default_rng(0)

def x(*shape):
    return rng.standard_normal(shape).astype(np.float32)

def step(model, x):
    _, state = model.step(x)
    return lambda: model.step(x, state)

def inference(model, x, lengths=None):
    return lambda: model(x, None, lengths)

def training(model, x, dy, lengths=None):
    return lambda: model.backward(model.forward(x, lengths=lengths)[2], dy)

def by_hand(models, x):
    states, h = [], x
    for model in models:
        h, state = model.step(h)
        states.append(state)
    def call():
        h = x
        for model, state in zip(models, states):
            h, _ = model.step(h, state)
    return call

plain, few = LSTM(32, 64, seed=0), x(10, 4, 32)
cells = {
    "frozen step (1, I)": step(plain.freeze(), x(1, 32)),
    "step (1, I)": step(plain, x(1, 32)),
    "frozen step (I,)": step(plain.freeze(), x(32)),
    "frozen step, 2 layers": step(LSTM(32, 64, 2, seed=0).freeze(), x(1, 32)),
    "frozen step, 3 layers": step(LSTM(32, 64, 3, seed=0).freeze(), x(1, 32)),
    "frozen step, 2 models": by_hand([LSTM(i, 64, seed=0).freeze() for i in (32, 64)], x(1, 32)),
    "frozen step, 3 models": by_hand([LSTM(i, 64, seed=0).freeze() for i in (32, 64, 64)], x(1, 32)),
    "call (10, 4, I)": inference(plain, few),
    "batch_first": inference(LSTM(32, 64, batch_first=True, seed=0), x(4, 10, 32)),
    "unbatched": inference(plain, x(10, 32)),
    "one sequence": inference(plain, few[:, :1]),
    "ragged": inference(plain, few, np.array([10, 7, 5, 2])),
    "bidirectional": inference(LSTM(32, 64, bidirectional=True, seed=0), few),
    "forward": lambda: plain.forward(few),
    "functional": lambda: functional.lstm_forward(plain.params, few),
    "training on one step": training(plain, x(1, 1, 32), x(1, 1, 64)),
    "training 100,64,32,128 ragged": training(
        LSTM(32, 128, seed=0), x(100, 64, 32), x(100, 64, 128), rng.integers(1, 101, 64)),
}
for t, b, i, h in INFER:
    cells[f"inference {t},{b},{i},{h}"] = inference(LSTM(i, h, seed=0), x(t, b, i))
for t, b, i, h in TRAIN:
    cells[f"training {t},{b},{i},{h}"] = training(LSTM(i, h, seed=0), x(t, b, i), x(t, b, h))

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

FIRST_CALLS = "inference", "training", "step", "frozen step"
SECOND_CALLS = "inference, then clip", "inference, then layer_norm", "training, then layer_norm"
FIRST = """
import sys, time
import numpy as np
import fastlstm
try:  # kernels that stand beside the source from other runs are not to be found
    from fastlstm.kernels.cpu import kernel_cache
    kernel_cache.folders = kernel_cache.folders[:1]
except (ImportError, AttributeError):  # a version that looks in one folder only
    pass
what, _, variant = sys.argv[2].partition(", then ")
x = np.ones((40, 8, 32), np.float32)

def call(**options):
    model = fastlstm.LSTM(32, 64, seed=0, **options)
    if what == "inference":
        model(x)
    elif what == "training":
        y, _, tape = model.forward(x)
        model.backward(tape, y)
    else:
        (model.freeze() if what == "frozen step" else model).step(x[0, :1])

start = time.process_time()
call()
if variant:
    start = time.process_time()
    call(**{variant: 3.0 if variant == "clip" else True})
print(time.process_time() - start)
"""


@contextlib.contextmanager
def version(python: str, threads: int) -> Iterator[dict[str, Side]]:
    """Start a process that holds the models; its sides by cell."""
    command = [python, "-c", WORKER, json.dumps([grid.SMALL["infer"], grid.SMALL["train"], threads])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tempfile.gettempdir(), **pipes) as process:

        def seconds(cell: str, _: object, count: int) -> float:
            print(json.dumps([cell, count]), file=process.stdin, flush=True)
            return float(process.stdout.readline()) / count

        try:
            cells = json.loads(process.stdout.readline())
            yield {cell: Side(lambda: None, tuple, functools.partial(seconds, cell)) for cell in cells}
        finally:
            process.kill()


def first_call(python: str, what: str) -> float:
    """CPU seconds of a first call with an empty kernel cache."""
    with tempfile.TemporaryDirectory() as cache:
        return float(new_process(python, FIRST, Path(cache), 1, what))


def cases(pythons: dict[str, str], threads: list[int], processes: int, seconds: float) -> Iterator[Case]:
    """Measure first calls, and then all cells, as often as there are pairs of processes."""
    for what in (*FIRST_CALLS, *SECOND_CALLS) if processes else ():
        here = pythons if what in FIRST_CALLS else {CPU: pythons[CPU]}  # the old version may not know the variant
        values = {name: () for name in here}
        for name, python in [*here.items()] * processes:
            values[name] += (first_call(python, what),)
        yield Case(what, values, group="first call, empty kernel cache, CPU time")
    for count in threads:
        cells: dict[str, dict[str, tuple[float, ...]]] = {}
        for _ in range(processes):
            with contextlib.ExitStack() as stack:
                versions = {name: stack.enter_context(version(python, count)) for name, python in pythons.items()}
                for cell in versions[CPU]:
                    times = clock.take_turns({name: held[cell] for name, held in versions.items()}, seconds)
                    before = cells.get(cell, dict.fromkeys(pythons, ()))
                    cells[cell] = {name: before[name] + more for name, more in times.items()}
        group = f"calls on {count} thread{'s' * (count > 1)}"
        yield from (Case(cell, values, threads=count, group=group) for cell, values in cells.items())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("old", help="the interpreter of the old version")
    add("new", help="that of the new one")
    add("--out", type=Path, required=True, help="the JSON file to write")
    add("--name", default="old", help="of the old version, for the file")
    add("--threads", type=int, nargs="+", default=[1, 2])
    add("--processes", type=int, default=3, help="pairs of processes, and of first calls")
    add("--seconds", type=float, default=0.5, help="for a cell of each pair of processes")
    options = parser.parse_args(arguments)
    pythons = {CPU: options.new, options.name: options.old}
    measured = cases(pythons, options.threads, options.processes, options.seconds)
    begun = run.begin(options.out.stem, [], max(options.threads), ABOUT)
    return 130 if run.keep(begun, measured, options.out, print).interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
