"""The CUDA backend against ``torch.nn.LSTM`` (cuDNN) on one GPU: one JSON file, written anew after each shape.

    python benchmarks/gpu.py --out results.json --seconds 240

All sides have the same weights and data, the product of the inputs is part of the work on every side, and
outputs and gradients are compared before anything is timed. One shape's contenders run in turn, in one order and then
in the reverse one, so that a drift of the clock meets all of them. Times are those of CUDA events on the
stream that all share: from the first launch to the last result, the host's delays included.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import numpy as np

import fastlstm
from fastlstm.environment import describe_for_others

# The most telling first, should the time run out: of a small batch all sizes, of a large one, where products take most
# of the time whoever calls them, what is left.
BATCH = (16, 64, 1, 256)
HIDDEN = (512, 1024, 256, 128, 64, 768, 168)
STEPS = 512
OURS = "fastlstm float32"
MODES = ("forward", "forward and backward")
CONTENDERS = {"torch float32": ("float32", False), "torch float32 TF32": ("float32", True),
              "torch bfloat16": ("bfloat16", False), "torch float16": ("float16", False)}  # fmt: skip
# Errors against our float32 result, as a share of the largest value: what the number format alone explains, over 512
# steps and sums of 131,072 products. Beyond them the contender computes something else, and its time means nothing.
TOLERANCE = {"torch float32": 5e-4, "torch float32 TF32": 2e-2, "torch bfloat16": 2e-1, "torch float16": 2e-2}
ROUNDS = (3, 11)  # of each contender, at least and at most
SECONDS_OF_A_SHAPE = 5.0  # at most; less when the time for all of them is short


class Contender(NamedTuple):
    """What is timed: `prepare` is not, and comes before each of the others."""

    prepare: Callable[[], None]
    forward: Callable[[], Any]  # inference
    train: Callable[[], list[Any]]  # y and the gradients by x, W_hh and W_ih


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the file; 1 if our side fails, or torch's float32 results are not ours."""
    options = parser().parse_args(arguments)
    end = time.monotonic() + options.seconds
    cupy = import_module("cupy")
    torch = None if options.no_torch else optional_torch(options.torch_device)
    results: dict[str, Any] = {"machine": machine(cupy, torch), "steps": options.steps, "shapes": [], "skipped": []}
    results["launch"] = launch_cost(cupy)
    results["compilation"] = compilation(cupy)
    todo = list(shapes(options))
    while todo:
        left = end - time.monotonic()
        if left <= 0:
            results["skipped"] = todo
            break
        hidden, batch = todo.pop(0)
        # A fifth is for what is not timed: data, the comparison, the first call of each contender.
        seconds = min(SECONDS_OF_A_SHAPE, 0.8 * left / (len(todo) + 1))
        found: dict[str, Any] = {"hidden": hidden, "batch": batch}
        try:
            found["contenders"] = measure(cupy, torch, options, batch, hidden, seconds)
        except (MemoryError, RuntimeError) as error:
            found["error"] = one_line(error)
        results["shapes"].append(found)
        cupy.get_default_memory_pool().free_all_blocks()
        if torch is not None and options.torch_device == "cuda":
            torch.cuda.empty_cache()
        write(options.out, results)
        print(f"H={hidden} B={batch}: {summary(found)}", flush=True)
    write(options.out, results)
    return 1 if complaints(results) else 0


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    result = argparse.ArgumentParser(description="time the CUDA backend and torch.nn.LSTM")
    result.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    result.add_argument("--seconds", type=float, default=300.0, help="start no shape after this; default: %(default)s")
    result.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, help="default: %(default)s")
    result.add_argument("--batch", type=int, nargs="+", default=BATCH, help="default: %(default)s")
    result.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    result.add_argument("--no-torch", action="store_true", help="time this library alone")
    result.add_argument("--torch-device", default="cuda", help="for trying this out; default: %(default)s")
    return result


def shapes(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """All (H, B), in the order in which they are measured."""
    return ((hidden, batch) for batch in options.batch for hidden in options.hidden)


def optional_torch(device: str) -> Any:
    """Import torch if it is there and sees the GPU."""
    try:
        torch = import_module("torch")
    except ImportError:
        return None
    return torch if device != "cuda" or torch.cuda.is_available() else None


def machine(cupy: Any, torch: Any) -> dict[str, str]:
    """Name everything that the figures depend on."""
    found = describe_for_others()
    found |= {"CuPy": cupy.__version__, "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion()))}
    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    found["multiprocessors"] = str(properties["multiProcessorCount"])
    found["GPU memory, GiB"] = f"{properties['totalGlobalMem'] / 2**30:.1f}"
    found["driver and clocks"] = nvidia_smi()
    found["precision of our products"] = "cublasSgemm, full float32: CuPy's setting for TF32 does not reach it"
    found["TF32 forced by the environment"] = os.environ.get("NVIDIA_TF32_OVERRIDE", "no")
    if torch is None:
        return found | {"torch": "missing, or without a GPU"}
    flags = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return found | {
        "torch": torch.__version__, "torch's CUDA": str(torch.version.cuda),
        "cuDNN": str(torch.backends.cudnn.version()),
        "torch's TF32 by default": f"cuDNN {flags[0]}, products {flags[1]}",
    }  # fmt: skip


def nvidia_smi() -> str:
    """Ask for the driver's release and the clocks, in words."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown: nvidia-smi does not answer"
    return "; ".join(f"{name} {value}" for name, value in zip(fields.split(","), done.stdout.strip().split(", "),
                                                              strict=False))  # fmt: skip


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole, so that it is readable whenever this program is stopped."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1), encoding="utf-8")
    part.replace(path)


def one_line(error: BaseException) -> str:
    """Say in one line what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def summary(found: dict[str, Any]) -> str:
    """Say in one line how one shape went."""
    if "error" in found:
        return str(found["error"])
    cells = []
    for name, contender in found["contenders"].items():
        times = " / ".join(f"{contender[mode]['us per step']:.2f}" for mode in MODES if mode in contender)
        cells.append(f"{name} {contender.get('failed') or times}")
    return ", ".join(cells)


def complaints(results: dict[str, Any]) -> list[str]:
    """Print and return what should not be: where we fail, and where float32 without TF32 is not what we compute.

    A contender of another precision, or one that has no room, tells of itself in the table.
    """
    found = [f"H={s['hidden']} B={s['batch']}: {s['error']}" for s in results["shapes"] if "error" in s]
    for shape in results["shapes"]:
        plain = shape.get("contenders", {}).get("torch float32", {})
        if not plain.get("agrees", True):
            found.append(f"H={shape['hidden']} B={shape['batch']}: the float32 results of torch are not ours")
    for line in found:
        print(line, file=sys.stderr)
    return found


def elapsed(cupy: Any, call: Callable[[], Any]) -> float:
    """Microseconds on the current stream from before the first launch of `call` to after its last."""
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.get_current_stream().synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(1e3 * cupy.cuda.get_elapsed_time(start, end))


def launch_cost(cupy: Any, repeats: int = 2000) -> dict[str, float]:
    """Microseconds that a launch takes, on the host and in a row on the device: a kernel, a step kernel, a product."""
    device = import_module("fastlstm.backends.cuda").BACKEND.device
    launch, packing = (import_module(f"fastlstm.backends.{name}") for name in ("cuda.launch", "packing"))
    one = cupy.zeros((1, 1), np.float32)
    square, out = cupy.ones((8, 8), np.float32), cupy.empty((8, 8), np.float32)
    small, step = (device.kernel(name, np.dtype(np.float32), 1) for name in ("gather_rows", "step_forward"))
    wide, bias = cupy.zeros((1, 4), np.float32), cupy.zeros(4, np.float32)
    records = launch.step_records(packing.Packing.of(None, 1, 1), [(0, 1)], 1, 1, 0, keep_tape=False)
    arguments = (wide, bias, None, None, None, one, one, one, one, one, one, *device.by_value(records))
    product = device.product(square, square, out)
    found = {}
    for name, call in (
        ("RawKernel of 5 arguments", lambda: small((1,), (32,), (one, None, one, 1, 1))),
        (f"RawKernel of {len(arguments)} arguments", lambda: step((1,), (32,), arguments)),
        ("product", product),
    ):
        call()
        cupy.cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        found[f"{name}, host"] = 1e6 * (time.perf_counter() - begin) / repeats
        found[f"{name}, device"] = elapsed(cupy, lambda call=call: [call() for _ in range(repeats)]) / repeats
    return found


def compilation(cupy: Any) -> dict[str, float]:
    """Seconds that a process waits for the kernels of one dtype and width: never compiled before, and from the disk."""
    loader, dtype = import_module("fastlstm.kernels.cuda.loader"), np.dtype(np.float32)
    source = f"{loader.source()}\n// {time.time_ns()}"  # no cache has that
    found = {}
    for name in ("NVRTC", "from the disk"):
        if hasattr(cupy, "clear_memo"):
            cupy.clear_memo()  # else CuPy remembers within the process
        begin = time.perf_counter()
        module = cupy.RawModule(code=source, options=loader.options(dtype, loader.wide(dtype)))
        module.get_function("step_forward")
        found[name] = time.perf_counter() - begin
    return found


def measure(
    cupy: Any, torch: Any, options: argparse.Namespace, batch: int, hidden: int, seconds: float
) -> dict[str, Any]:
    """Compare and time all contenders on one shape: one layer, as many inputs as hidden units."""
    rng = np.random.default_rng(0)
    model = fastlstm.LSTM(hidden, hidden, seed=0).to(cupy)
    shape = (options.steps, batch, hidden)
    x, dy = (cupy.asarray(2 * rng.random(shape, np.float32) - 1) for _ in range(2))

    def train() -> list[Any]:
        y, _, tape = model.forward(x)
        grads = model.backward(tape, dy)
        return [y, grads.x, grads.params["weight_hh_l0"], grads.params["weight_ih_l0"]]

    calls = {OURS: Contender(lambda: None, lambda: model(x), train)}
    truth = train()
    found: dict[str, Any] = {OURS: {"agrees": True, "error": 0.0}}
    for name, (kind, tf32) in CONTENDERS.items() if torch is not None else ():
        try:
            contender = torch_contender(torch, options.torch_device, model, x, dy, kind, tf32)
            contender.prepare()
            error = worst_error(torch, contender.train(), truth)
        except (MemoryError, RuntimeError) as problem:  # torch's own error for memory is a RuntimeError
            found[name] = {"failed": one_line(problem)}
            continue
        calls[name] = contender
        found[name] = {"agrees": error <= TOLERANCE[name], "error": error}
    del truth
    for mode in MODES:
        for name, times in timed(cupy, calls, mode, seconds / 2).items():
            us = [value / options.steps for value in times]
            low, _, high = quantiles(us, n=4)
            found[name][mode] = {"us per step": median(us), "quartiles": [low, high], "rounds": len(us)}
    return found


def timed(cupy: Any, calls: dict[str, Contender], mode: str, seconds: float) -> dict[str, list[float]]:
    """Time all contenders in turn, in one order and then the other, after one call of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}

    def run(name: str) -> float:
        contender = calls[name]
        contender.prepare()
        return elapsed(cupy, contender.forward if mode == MODES[0] else contender.train)

    for name in calls:
        run(name)
    end = time.monotonic() + seconds
    names = list(calls)
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.monotonic() > end:
            break
        for name in reversed(names) if number % 2 else names:
            times[name].append(run(name))
    return times


def torch_contender(torch: Any, device: str, model: Any, x: Any, dy: Any, kind: str, tf32: bool) -> Contender:
    """Make torch's side, with the weights of `model` and the same data; it works on the stream that CuPy uses."""
    dtype, hidden = getattr(torch, kind), model.cell.hidden_size
    training = torch.nn.LSTM(hidden, hidden).to(device, dtype)
    state = model.to(np).to_torch_state_dict()
    training.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    inference = copy.deepcopy(training).eval()  # cuDNN does less then
    for module in (training, inference):
        module.flatten_parameters()
    x, dy = (torch.from_dlpack(value).to(dtype, copy=True) for value in (x, dy))  # on the GPU all the way
    leaf = x.detach().clone().requires_grad_()

    def prepare() -> None:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32

    def forward() -> Any:
        with torch.inference_mode():
            return inference(x)[0]

    def train() -> list[Any]:
        training.zero_grad(set_to_none=True)
        leaf.grad = None
        y = training(leaf)[0]
        torch.autograd.backward([y], [dy])
        return [y.detach(), leaf.grad, training.weight_hh_l0.grad, training.weight_ih_l0.grad]

    return Contender(prepare, forward, train)


def worst_error(torch: Any, found: list[Any], truth: list[Any]) -> float:
    """Largest difference over the largest true value, over all arrays; infinite if a value is no number."""
    worst = 0.0
    for theirs, ours in zip(found, map(torch.from_dlpack, truth), strict=True):
        error = float((theirs.to(ours.dtype) - ours).abs().max() / ours.abs().max())
        worst = max(worst, error if np.isfinite(error) else np.inf)
    return worst


if __name__ == "__main__":
    sys.exit(main())
