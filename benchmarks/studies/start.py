"""How long until the first result: in the first process ever, which compiles, and in every one after it.

Each sample is a new process. Ours is run twice with a kernel cache of its own: empty at first, then as the first run
left it. PyTorch compiles nothing at its first call, so its two samples differ by chance alone. In turn with them, a
process imports Numba and does nothing else: no first call of ours can take less.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from . import rows
from .record import OURS, Case

ROUNDS = 5
ABOUT = (
    "Seconds in a new process, float32, T=100, B=32, I=64, H=128: of the import, and of the first calls, which are a"
    " training pass (forward and backward), an inference, and a step of one sequence, by the model and by the same"
    " frozen; these are the kernels that a model needs, for many rows and for few. `Cold` is a process that finds no"
    " compiled kernel, `warm` the next one. What a"
    f" first call loads, such as Numba, is counted to it. Medians of {ROUNDS} processes each, the sides in turn; their"
    " files are in the system's cache."
)
NUMBA = "importing Numba"
SIDES = (OURS, "torch")
PARTS = ("import", "training pass", "inference", "step")

# The sides print the seconds of each of the PARTS; the last script those of the import.
_CLOCK = """
import json, sys, time
import numpy as np
x = np.random.default_rng(0).standard_normal((100, 32, 64), np.float32)
times = [time.perf_counter()]
def lap():
    times.append(time.perf_counter())
"""
_OURS = """
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
from fastlstm.kernels.cpu import sequence_backward, sequence_forward, small_batch
kernels = sequence_forward.sequence_forward, sequence_backward.sequence_backward, small_batch.small_forward, \
    small_batch.small_forward_packed
compiled = sum(sum(kernel.stats.cache_misses.values()) for kernel in kernels)
"""
_TORCH = """
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
compiled = 0
"""
_PRINT = """
print(json.dumps({"seconds": [b - a for a, b in zip(times, times[1:])], "compiled": compiled}))
"""
_NUMBA = """
import numba
lap()
compiled = 0
"""
SCRIPTS = {OURS: _CLOCK + _OURS + _PRINT, "torch": _CLOCK + _TORCH + _PRINT, NUMBA: _CLOCK + _NUMBA + _PRINT}


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Start the processes; their number is fixed, so `seconds` is not needed."""
    names = rows.here(SIDES, threads)
    found: dict[tuple[str, str], list[list[float]]] = {(when, name): [] for when in ("cold", "warm") for name in names}
    imports = []
    for name in (*names, NUMBA):
        with tempfile.TemporaryDirectory() as folder:
            started(name, threads, Path(folder))  # brings every file into the system's cache
    for turn in range(ROUNDS):
        for name in names if turn % 2 == 0 else names[::-1]:
            with tempfile.TemporaryDirectory() as folder:
                for when in ("cold", "warm"):
                    times, compiled = started(name, threads, Path(folder))
                    if name == OURS and bool(compiled) != (when == "cold"):
                        raise RuntimeError(f"a {when} process compiled {compiled} kernels")
                    found[when, name].append(times)
        with tempfile.TemporaryDirectory() as folder:
            imports.append(started(NUMBA, threads, Path(folder))[0][0])
    for when in ("cold", "warm"):
        for number, part in enumerate(PARTS):
            values = {name: tuple(times[number] for times in found[when, name]) for name in names}
            yield Case(f"{when}: {part}", values)
        values = {name: tuple(sum(times[1:]) for times in found[when, name]) for name in names}
        yield Case(f"{when}: all three calls", values | {NUMBA: tuple(imports)}, yardsticks=(NUMBA,))
        values = {name: tuple(sum(times) for times in found[when, name]) for name in names}
        yield Case(f"{when}: import and calls", values)


def started(name: str, threads: int, cache: Path) -> tuple[list[float], int]:
    """Start a process of one side; the seconds of each part, and how many kernels it compiled."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("NUMBA_", "FASTLSTM_"))}
    environment |= {"NUMBA_CACHE_DIR": str(cache), "FASTLSTM_NUM_THREADS": str(threads)}
    # -P: the folder it stands in is not searched for modules, so that the fastlstm that is installed is measured.
    command = [sys.executable, "-P", "-c", SCRIPTS[name], str(threads)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{name} failed to start: {done.stderr.strip().splitlines()[-1:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    return result["seconds"], result["compiled"]
