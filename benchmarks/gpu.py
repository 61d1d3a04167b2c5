"""The CUDA backend against ``torch.nn.LSTM`` (cuDNN) on one GPU: one JSON file, written anew after each shape.

    python benchmarks/gpu.py --out results.json --seconds 240

All sides have the same weights and data, the product of the inputs is part of the work on every side, and
outputs and gradients are compared before anything is timed. One shape's contenders run in turn, in one order and then
in the reverse one, so that a drift of the clock meets all of them. Times are those of CUDA events on the
stream that all share: from the first launch to the last result, the host's delays included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

import fastlstm
from fastlstm.environment import describe

HIDDEN = (512, 1024, 256, 128, 64, 768, 168)  # the most telling first, should the time run out
BATCH = (16, 64, 1, 256)
STEPS = 512
CONTENDERS = {"torch float32": (np.float32, False), "torch float32 TF32": (np.float32, True),
              "torch bfloat16": ("bfloat16", False), "torch float16": ("float16", False)}  # fmt: skip
# Errors against our float32 result, as a share of the largest value: what the number format alone explains, over 512
# steps and sums of 131,072 products. Beyond them the contender computes something else, and its time means nothing.
TOLERANCE = {"torch float32": 5e-4, "torch float32 TF32": 2e-2, "torch bfloat16": 2e-1, "torch float16": 2e-2}
DEVICE = "cuda"  # torch's
ROUNDS = (3, 11)  # of each contender, at least and at most
SECONDS_OF_A_SHAPE = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the file; 1 if a contender's results are not ours."""
    options = parser().parse_args(arguments)
    end = time.monotonic() + options.seconds
    cupy = import_module("cupy")
    torch = None if options.no_torch else optional_torch()
    results: dict[str, Any] = {"machine": machine(cupy, torch), "steps": options.steps, "shapes": [], "skipped": []}
    results["launch"] = launch_cost(cupy)
    write(options.out, results)
    for hidden, batch in shapes(options):
        if time.monotonic() > end:
            results["skipped"].append([hidden, batch])
            continue
        try:
            results["shapes"].append(measure(cupy, torch, options.steps, batch, hidden))
        except MemoryError as error:
            results["shapes"].append({"hidden": hidden, "batch": batch, "error": str(error)})
        cupy.get_default_memory_pool().free_all_blocks()
        write(options.out, results)
    write(options.out, results)
    wrong = [(s["hidden"], s["batch"], name) for s in results["shapes"] for name, c in s.get("contenders", {}).items()
             if not c["agrees"]]  # fmt: skip
    for hidden, batch, name in wrong:
        print(f"H={hidden} B={batch}: the results of {name} are not ours", file=sys.stderr)
    return 1 if wrong else 0


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    result = argparse.ArgumentParser(description="time the CUDA backend and torch.nn.LSTM")
    result.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    result.add_argument("--seconds", type=float, default=300.0, help="start no shape after this; default: %(default)s")
    result.add_argument("--hidden", type=int, nargs="+", default=HIDDEN, help="default: %(default)s")
    result.add_argument("--batch", type=int, nargs="+", default=BATCH, help="default: %(default)s")
    result.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    result.add_argument("--no-torch", action="store_true", help="time this library alone")
    return result


def shapes(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """All (H, B), in the order in which they are measured."""
    return ((hidden, batch) for hidden in options.hidden for batch in options.batch)


def optional_torch() -> Any:
    """Import torch if it is there and sees the GPU."""
    try:
        torch = import_module("torch")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def machine(cupy: Any, torch: Any) -> dict[str, str]:
    """Name everything that the figures depend on."""
    found = describe() | {"CuPy": cupy.__version__}
    found["precision of CuPy's products"] = "CUPY_TF32 is not read: cublasSgemm, full float32"
    if torch is None:
        return found | {"torch": "missing, or without a GPU"}
    return found | {"torch": torch.__version__, "torch's CUDA": torch.version.cuda,
                    "cuDNN": str(torch.backends.cudnn.version())}  # fmt: skip


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file as a whole, so that it is readable whenever this program is stopped."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1), encoding="utf-8")
    part.replace(path)


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
    """Microseconds that one RawKernel launch and one small product take, on the host and in a row on the device."""
    device = import_module("fastlstm.backends.cuda").BACKEND.device
    one, order = cupy.zeros((1, 1), np.float32), cupy.zeros(1, np.int64)
    square, out = cupy.ones((8, 8), np.float32), cupy.empty((8, 8), np.float32)
    kernel = device.kernel("gather_rows", np.dtype(np.float32), 1)
    found = {}
    for name, call in (
        ("RawKernel", lambda: kernel((1,), (32,), (one, order, one, 1, 1))),
        ("product", lambda: device.matmul(square, square, out)),
    ):
        call()
        cupy.cuda.get_current_stream().synchronize()
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        found[f"{name}, host"] = 1e6 * (time.perf_counter() - begin) / repeats
        found[f"{name}, device"] = elapsed(cupy, lambda call=call: [call() for _ in range(repeats)]) / repeats
    return found


def measure(cupy: Any, torch: Any, steps: int, batch: int, hidden: int) -> dict[str, Any]:
    """Compare and time all contenders on one shape: one layer, as many inputs as hidden units."""
    rng = np.random.default_rng(0)
    model = fastlstm.LSTM(hidden, hidden, seed=0).to(cupy)
    x, dy = (cupy.asarray(rng.uniform(-1, 1, (steps, batch, hidden)).astype(np.float32)) for _ in range(2))

    def train() -> tuple[Any, ...]:
        y, _, tape = model.forward(x)
        grads = model.backward(tape, dy)
        return y, grads.x, grads.params["weight_hh_l0"], grads.params["weight_ih_l0"]

    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {"fastlstm float32": (lambda: model(x), train)}
    truth = [cupy.asnumpy(value) for value in train()]
    found: dict[str, Any] = {"fastlstm float32": {"agrees": True, "error": 0.0}}
    if torch is not None:
        for name, (dtype, tf32) in CONTENDERS.items():
            calls[name] = torch_calls(torch, model, truth, cupy.asnumpy(x), cupy.asnumpy(dy), dtype, tf32)
            error = worst_error([value.float().cpu().numpy() for value in calls[name][1]()], truth)
            found[name] = {"agrees": error <= TOLERANCE[name], "error": error}
    for which, label in enumerate(("forward", "forward and backward")):
        for name, times in timed(cupy, {name: both[which] for name, both in calls.items()}).items():
            low, _, high = quantiles(times, n=4)
            found[name][label] = {"us per step": median(times) / steps, "quartiles": [low / steps, high / steps],
                                  "rounds": len(times)}  # fmt: skip
    return {"hidden": hidden, "batch": batch, "contenders": found}


def timed(cupy: Any, calls: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Time all contenders in turn, in one order and then the other, after one call of each that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        elapsed(cupy, call)
    end = time.monotonic() + SECONDS_OF_A_SHAPE / 2
    names = list(calls)
    for number in range(ROUNDS[1]):
        if number >= ROUNDS[0] and time.monotonic() > end:
            break
        for name in reversed(names) if number % 2 else names:
            times[name].append(elapsed(cupy, calls[name]))
    return times


def torch_calls(torch: Any, model: Any, truth: Any, x: Any, dy: Any, dtype: Any, tf32: bool) -> tuple[Any, Any]:
    """Make torch's forward, and forward and backward, with the weights of `model`; on the stream that CuPy uses."""
    kind = torch.float32 if dtype is np.float32 else getattr(torch, dtype)
    hidden = model.cell.hidden_size
    theirs = torch.nn.LSTM(hidden, hidden).to(DEVICE, kind)
    state = model.to(np).to_torch_state_dict()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()})
    theirs.flatten_parameters()
    x, dy = torch.from_numpy(x).to(DEVICE, kind), torch.from_numpy(dy).to(DEVICE, kind)
    x.requires_grad_()

    def forward() -> Any:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.no_grad():
            return theirs(x)[0]

    def train() -> Any:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        theirs.zero_grad(set_to_none=True)
        x.grad = None
        y = theirs(x)[0]
        torch.autograd.backward([y], [dy])
        return y.detach(), x.grad, theirs.weight_hh_l0.grad, theirs.weight_ih_l0.grad

    return forward, train


def worst_error(found: list[Any], truth: list[Any]) -> float:
    """Largest difference over the largest true value, over all arrays."""
    return max(float(np.abs(f - t).max() / np.abs(t).max()) for f, t in zip(found, truth, strict=True))


if __name__ == "__main__":
    sys.exit(main())
