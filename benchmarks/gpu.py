"""The CUDA backend against ``torch.nn.LSTM`` (cuDNN) on one GPU; a stage's file is written after each cell.

    python benchmarks/gpu.py --out OUTDIR/B.json --seconds 150

All sides have the same weights and data, the product of the inputs is part of the work on every side, and outputs and
gradients are compared before anything is timed. A cell's sides take turns, in one order and then in the reverse one, so
that a drift of the clock meets all of them. Cells are ordered by value; those that the time does not reach are named.
The names of the kernels that cuDNN ran come last, from torch's profiler, which could slow what is timed after it.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import gpu_common
import numpy as np
from readme.gpu import MODES, OURS, STEP, load

import fastlstm
from fastlstm.backends.cuda import plans
from fastlstm.bench.clock import spread

STEPS = "fastlstm float32, by steps"  # where the plan has a persistent kernel: without it
SIDES = {"torch float32": ("float32", False), "torch float32 TF32": ("float32", True),
         "torch float16": ("float16", False), "torch bfloat16": ("bfloat16", False)}  # fmt: skip
# Errors against our float32 result, as a share of the largest value: what the number format alone explains, over 512
# steps and sums of 131,072 products. Beyond them the side computes something else, and its time means nothing.
TOLERANCE = {"torch float32": 5e-4, "torch float32 TF32": 2e-2, "torch float16": 2e-2, "torch bfloat16": 2e-1}
ROUNDS = (3, 11)  # samples of each side, at least and at most
SECONDS_OF_A_CELL = 3.0  # of timing, all modes together
SHARE_OF_KERNELS = 0.2  # of all seconds, for the kernels' names
CALLS = 50  # of one sample of single steps, each with the state of the one before


class Cell(NamedTuple):
    """One problem: T steps of B sequences with I = H inputs."""

    batch: int
    hidden: int
    kind: str = "sequence"  # "ragged": lengths from 1 to T; STEP: one step a call
    layers: int = 1
    bidirectional: bool = False
    steps: int = 512

    def __str__(self) -> str:
        kind = "" if self.kind == "sequence" else f", {self.kind}"
        layers = f", {self.layers} layers" if self.layers > 1 else ""
        return f"B={self.batch} H={self.hidden}{layers}{', both directions' if self.bidirectional else ''}{kind}"


# The most telling first: one batch at all sizes, one cell of each other kind, the other batches; then what is left.
SIZES = (512, 256, 1024, 128)
CELLS = (
    *(Cell(16, hidden) for hidden in SIZES),
    Cell(1, 256, STEP),
    Cell(16, 512, layers=2, bidirectional=True),
    Cell(64, 256, "ragged"),
    *(Cell(batch, hidden) for batch in (64, 1) for hidden in SIZES),
    *(Cell(batch, hidden, STEP) for batch, hidden in ((1, 1024), (16, 512))),
    *(Cell(batch, hidden, "ragged") for batch, hidden in ((16, 512), (64, 1024))),
    Cell(64, 256, layers=2, bidirectional=True),
    *(Cell(batch, hidden) for hidden in (64, 192, 768) for batch in (16, 64, 1)),
    *(Cell(256, hidden) for hidden in SIZES),
)


class Side(NamedTuple):
    """What is timed: `prepare` is not, and comes before each of the others."""

    prepare: Callable[[], None]
    forward: Callable[[], Any]  # inference: y, or h of the last of CALLS steps
    train: Callable[[], list[Any]]  # y and the gradients by x and by all weights


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the file; 1 if our side fails, or torch's float32 results are not ours."""
    options = parser().parse_args(arguments)
    begin = time.monotonic()
    cupy = import_module("cupy")
    torch = None if options.no_torch else optional_torch(options.torch_device)
    machine = gpu_common.machine(cupy)
    if torch is not None:
        machine |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
        machine |= {"cuDNN": str(torch.backends.cudnn.version())}
    gpu_common.update(options.out, machine=machine)
    todo = chosen(options)
    found: list[dict[str, Any]] = []
    for cell in todo:
        if time.monotonic() - begin > options.seconds * (1 - SHARE_OF_KERNELS * bool(torch)):
            break
        found.append({"name": str(cell), **cell._asdict()})
        try:
            found[-1]["sides"] = measure(cupy, torch, options.torch_device, cell)
        except (MemoryError, RuntimeError) as error:
            found[-1]["failed"] = gpu_common.one_line(error)
        gpu_common.update(options.out, table=found, skipped=[str(cell) for cell in todo[len(found) :]])
        print(f"cell {cell}: {summary(found[-1])}", flush=True)
        release(cupy, torch, options.torch_device)
    for cell, content in zip(todo, found, strict=False) if torch else ():
        if time.monotonic() - begin > options.seconds:
            break
        add_kernels(cupy, torch, options.torch_device, cell, content.get("sides", {}))
        gpu_common.update(options.out, table=found)
        release(cupy, torch, options.torch_device)
    print(f"{len(found)} of {len(todo)} cells measured")
    return 1 if complaints(found) else 0


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    result = argparse.ArgumentParser(description="time the CUDA backend and torch.nn.LSTM")
    result.add_argument("--out", type=Path, required=True, help="the stage's file")
    result.add_argument("--seconds", type=float, default=150.0, help="start no cell after these; default: %(default)s")
    result.add_argument("--done", type=Path, help="a stage's file: leave its cells out")
    result.add_argument(
        "--last-first", action="store_true", help="begin with the cells that are reached last otherwise"
    )
    result.add_argument("--cells", type=json.loads, help="other cells, as a JSON list of lists, e.g. [[16, 512]]")
    result.add_argument("--no-torch", action="store_true", help="time this library alone")
    result.add_argument("--torch-device", default="cuda", help="for trying this out; default: %(default)s")
    return result


def chosen(options: argparse.Namespace) -> list[Cell]:
    """Return the cells to measure, in order."""
    cells = [Cell(*given) for given in options.cells] if options.cells else list(CELLS)
    done = load(options.done) if options.done else None
    names = {cell["name"] for cell in (done or {}).get("table", []) if "failed" not in cell}
    left = [cell for cell in cells if str(cell) not in names]
    return left[::-1] if options.last_first and not names else left


def optional_torch(device: str) -> Any:
    """Import torch if it is there and sees the GPU."""
    try:
        torch = import_module("torch")
    except ImportError:
        return None
    return torch if device != "cuda" or torch.cuda.is_available() else None


def release(cupy: Any, torch: Any, device: str) -> None:
    """Give unused memory back, for the other library."""
    cupy.get_default_memory_pool().free_all_blocks()
    if torch is not None and device == "cuda":
        torch.cuda.empty_cache()


def summary(content: dict[str, Any]) -> str:
    """Say in one line how one cell went: microseconds of a time step."""
    if "failed" in content:
        return str(content["failed"])
    return ", ".join(
        f"{name} " + str(side.get("failed") or " / ".join(f"{side[m]['device'][1]:.2f}" for m in MODES if m in side))
        for name, side in content["sides"].items()
    )


def complaints(found: list[dict[str, Any]]) -> list[str]:
    """Print and return what should not be: where we fail, and where float32 without TF32 is not what we compute.

    A side of another precision, or one that has no room, tells of itself in the table.
    """
    lines = [f"{cell['name']}: {cell['failed']}" for cell in found if "failed" in cell]
    for cell in found:
        if not cell.get("sides", {}).get("torch float32", {}).get("agrees", True):
            lines.append(f"{cell['name']}: the float32 results of torch are not ours")
    for line in lines:
        print(line, file=sys.stderr)
    return lines


class Problem:
    """A cell's model and data on the GPU; and our side of it."""

    def __init__(self, cupy: Any, cell: Cell) -> None:
        rng = np.random.default_rng(0)
        self.cell = cell
        host = fastlstm.LSTM(cell.hidden, cell.hidden, cell.layers, bidirectional=cell.bidirectional, seed=0)
        self.model = host.to(cupy)
        steps = 1 if cell.kind == STEP else cell.steps
        widths = (cell.hidden, host.cell.output_size)
        self.x, self.dy = (cupy.asarray(2 * rng.random((steps, cell.batch, n), np.float32) - 1) for n in widths)
        self.lengths = rng.integers(1, steps + 1, cell.batch) if cell.kind == "ragged" else None
        self.weights = [name for name in self.model.params if name.startswith("weight")]  # torch has the same names

    def side(self) -> Side:
        return Side(lambda: take_path(None), self.steps if self.cell.kind == STEP else self.forward, self.train)

    def forward(self) -> Any:
        return self.model(self.x, lengths=self.lengths)

    def steps(self) -> Any:
        state, x = None, self.x[0]
        for _ in range(CALLS):
            y, state = self.model.step(x, state)
        return y

    def train(self) -> list[Any]:
        y, _, tape = self.model.forward(self.x, lengths=self.lengths)
        grads = self.model.backward(tape, self.dy)
        return [y, grads.x, *(grads.params[name] for name in self.weights)]


def take_path(forced: str | None) -> None:
    """Run our recurrences by steps, if "step", or as the plan says."""
    plans.FORCED = forced


def torch_side(torch: Any, device: str, problem: Problem, kind: str, tf32: bool) -> Side:
    """Make torch's side, with the same weights and data; it works on the stream that CuPy uses."""
    cell, dtype = problem.cell, getattr(torch, kind)
    training = torch.nn.LSTM(cell.hidden, cell.hidden, cell.layers, bidirectional=cell.bidirectional).to(device, dtype)
    state = problem.model.to(np).to_torch_state_dict()
    training.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    inference = copy.deepcopy(training).eval()  # cuDNN does less then
    for module in (training, inference):
        module.flatten_parameters()
    x, dy = (torch.from_dlpack(value).to(dtype, copy=True) for value in (problem.x, problem.dy))
    leaf = x.detach().clone().requires_grad_()
    lengths = None if problem.lengths is None else torch.from_numpy(problem.lengths)

    def prepare() -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32

    def call(module: Any, given: Any) -> Any:
        if lengths is None:
            return module(given)[0]
        packed = torch.nn.utils.rnn.pack_padded_sequence(given, lengths, enforce_sorted=False)
        return torch.nn.utils.rnn.pad_packed_sequence(module(packed)[0], total_length=given.shape[0])[0]

    def forward() -> Any:
        with torch.inference_mode():
            return call(inference, x)

    def steps() -> Any:
        state = None
        with torch.inference_mode():
            for _ in range(CALLS):
                y, state = inference(x, state)
        return y[0]

    def train() -> list[Any]:
        training.zero_grad(set_to_none=True)
        leaf.grad = None
        y = call(training, leaf)
        torch.autograd.backward([y], [dy])
        return [y.detach(), leaf.grad, *(getattr(training, name).grad for name in problem.weights)]

    return Side(prepare, steps if cell.kind == STEP else forward, train)


def measure(cupy: Any, torch: Any, device: str, cell: Cell) -> dict[str, Any]:
    """Compare and time all sides of one cell."""
    problem = Problem(cupy, cell)
    sides = {OURS: problem.side()}
    sides[OURS].prepare()
    truth = compared(sides[OURS], cell)
    found: dict[str, Any] = {OURS: {"agrees": True, "error": 0.0}}
    for name, (kind, tf32) in SIDES.items() if torch is not None else ():
        try:
            side = torch_side(torch, device, problem, kind, tf32)
            side.prepare()
            error = worst_error(torch, compared(side, cell), truth)
        except (MemoryError, RuntimeError) as failure:  # torch's own error for memory is a RuntimeError
            found[name] = {"failed": gpu_common.one_line(failure)}
            continue
        sides[name] = side
        found[name] = {"agrees": error <= TOLERANCE[name], "error": error}
    plan = problem.model.plan(problem.x, problem.lengths)
    if "one launch a sequence" in plan:
        sides[STEPS] = sides[OURS]._replace(prepare=lambda: take_path("step"))
        sides[STEPS].prepare()
        ours = compared(sides[STEPS], cell)
        error = worst_error(torch, list(map(torch.from_dlpack, ours)), truth) if torch is not None else 0.0
        found[STEPS] = {"agrees": error <= TOLERANCE["torch float32"], "error": error}
    found[OURS]["plan"] = plan
    del truth
    modes = MODES[:1] if cell.kind == STEP else MODES
    for mode in modes:
        for name, samples in timed(cupy, sides, mode, SECONDS_OF_A_CELL / len(modes)).items():
            device_us, host_us = np.array(samples).T
            calls, steps = (CALLS, CALLS) if cell.kind == STEP else (1, cell.steps)
            found[name][mode] = {
                "device": spread(device_us / steps), "host": spread(host_us / calls), "rounds": len(samples),
            }  # fmt: skip
    take_path(None)
    return found


def compared(side: Side, cell: Cell) -> list[Any]:
    """Return the arrays in which the sides have to agree."""
    return [side.forward()] if cell.kind == STEP else side.train()


def timed(cupy: Any, sides: dict[str, Side], mode: str, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Time all sides in turn, in one order and then the other, after one call of each that is not counted."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}

    def run(name: str) -> tuple[float, float]:
        side = sides[name]
        side.prepare()
        return gpu_common.elapsed(cupy, side.forward if mode == MODES[0] else side.train)

    for name in sides:
        run(name)
    end = time.monotonic() + seconds
    names = list(sides)
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.monotonic() > end:
            break
        for name in reversed(names) if number % 2 else names:
            samples[name].append(run(name))
    return samples


def worst_error(torch: Any, found: list[Any], truth: list[Any]) -> float:
    """Largest difference over the largest true value, over all arrays; infinite if a value is no number."""
    worst = 0.0
    for theirs, ours in zip(found, map(torch.from_dlpack, truth), strict=True):
        error = float((theirs.to(ours.dtype) - ours).abs().max() / ours.abs().max())
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


def add_kernels(cupy: Any, torch: Any, device: str, cell: Cell, found: dict[str, Any]) -> None:
    """Add to each side of torch the kernels of its calls and how often each ran, by their time on the device."""
    problem = Problem(cupy, cell)
    activity = getattr(torch.profiler.ProfilerActivity, "CUDA" if device == "cuda" else "CPU")
    for name, side in found.items():
        if name not in SIDES or "failed" in side:
            continue
        try:
            theirs = torch_side(torch, device, problem, *SIDES[name])
            theirs.prepare()
            compared(theirs, cell)  # the first call, which chooses
            with torch.profiler.profile(activities=[activity]) as profile:
                for call in (theirs.forward,) if cell.kind == STEP else (theirs.forward, theirs.train):
                    call()
                cupy.cuda.get_current_stream().synchronize()
        except (MemoryError, RuntimeError) as error:
            side["kernels"] = [[gpu_common.one_line(error), 0]]
            continue
        # The launches on the host are listed, too.
        events = [e for e in profile.key_averages() if device != "cuda" or str(e.device_type).endswith("CUDA")]
        spent = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
        events.sort(key=lambda event: getattr(event, spent), reverse=True)
        side["kernels"] = [[event.key[:120], event.count] for event in events[:8]]


if __name__ == "__main__":
    sys.exit(main())
