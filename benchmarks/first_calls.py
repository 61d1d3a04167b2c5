"""The study ``start`` of ``studies.py``: import and first calls in new processes."""

from __future__ import annotations

import itertools
import json
import operator
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastlstm.bench import peers
from fastlstm.bench.results import Case

OURS, NUMBA = peers.CPU, "importing Numba"

# The sides print the seconds of each of PARTS, and how many kernels they compiled.
PARTS = ("import", "training pass", "inference", "step")
_CLOCK = """
import json, sys, time
import numpy as np
x = np.random.default_rng(0).standard_normal((100, 32, 64), np.float32)
times, compiled = [time.perf_counter()], 0
def lap():
    times.append(time.perf_counter())
"""
SCRIPTS = {
    OURS: """
import fastlstm
lap()
model = fastlstm.LSTM(64, 128, seed=0)
y, _, tape = model.forward(x)
model.backward(tape, y)
lap()
model(x)
lap()
model.step(x[0, :1])
model.freeze().step(x[0, :1])
lap()
from fastlstm.kernels.cpu.jit import KERNELS
compiled = sum(sum(kernel.stats.cache_misses.values()) for kernel in KERNELS)
""",
    "torch": """
import torch
lap()
torch.set_num_threads(int(sys.argv[1]))
model = torch.nn.LSTM(64, 128)
leaf = torch.from_numpy(x).requires_grad_()
y = model(leaf)[0]
y.backward(y.detach())
lap()
with torch.inference_mode():
    model(torch.from_numpy(x))
    lap()
    for _ in range(2):
        model(torch.from_numpy(x[:1, :1]))
lap()
""",
    NUMBA: "\nimport numba\nlap()\n",
}
_PRINT = '\nprint(json.dumps({"seconds": [b - a for a, b in zip(times, times[1:])], "compiled": compiled}))\n'


def start(threads: int, seconds: float, rounds: int = 5) -> Iterator[Case]:
    """Seconds in a new process, float32, T=100, B=32, I=64, H=128: import, training pass, inference, single steps.

    Cold is a process that finds no compiled kernel, warm the next one. A first call includes all that it loads, such as
    Numba, whose import is also measured by itself. Medians of five processes, the sides in turn.
    """
    names = [*(name for name in (OURS, "torch") if peers.missing(name) is None), NUMBA]
    found: dict[tuple[str, str], list[list[float]]] = {(when, name): [] for when in ("cold", "warm") for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 == 0 else names[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                for when in ("cold", "warm"):
                    made = new_process(sys.executable, _CLOCK + SCRIPTS[name] + _PRINT, Path(folder), threads)
                    if name == OURS and bool(made["compiled"]) != (when == "cold"):
                        raise RuntimeError(f"a {when} process compiled {made['compiled']} kernels")
                    if turn:  # the first brings every file into the system's cache
                        found[when, name].append(made["seconds"])
    names.remove(NUMBA)
    figures: dict[str, Any] = {part: operator.itemgetter(number) for number, part in enumerate(PARTS)}
    figures |= {"all three calls": lambda times: sum(times[1:]), "import and calls": sum}
    for when, (what, seconds_of) in itertools.product(("cold", "warm"), figures.items()):
        values = {name: tuple(map(seconds_of, found[when, name])) for name in names}
        if what == "all three calls":
            values[NUMBA] = tuple(times[0] for times in found[when, NUMBA])
        yield Case(f"{when}: {what}", values, threads=threads)


def new_process(python: str, script: str, cache: Path, threads: int, *arguments: str) -> Any:
    """Run a script with its own kernel cache; what its last line holds, in JSON."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "FASTLSTM_"))}
    environment |= {"NUMBA_CACHE_DIR": str(cache), "FASTLSTM_NUM_THREADS": str(threads), "FASTLSTM_QUIET": "1"}
    # -P: its folder is not searched for modules, so that the fastlstm that is installed is measured.
    command = [python, "-P", "-c", script, str(threads), *arguments]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"a process failed to start: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])
