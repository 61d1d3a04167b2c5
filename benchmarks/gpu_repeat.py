"""Forward and backward on a GPU, again and again: every result must be the first one, bit for bit.

    python benchmarks/gpu_repeat.py --times 1000 --out repeat.json

With ``--times 1 --no-pool`` it is the small set for ``compute-sanitizer``: each array is an allocation of its own then,
so that an access outside it is seen. The results are compared with the float64 reference, too.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import fastlstm

# steps, batch, inputs, hidden, layers, bidirectional, ragged: wide and narrow loads, one and several slabs of a sum
CASES = ((20, 16, 8, 64, 2, True, True), (20, 16, 8, 33, 1, False, False), (70, 5, 3, 8, 1, True, True),
         (1, 1, 1, 1, 1, False, False))  # fmt: skip
BOUNDS = {"float32": 1e-4, "float64": 1e-12}  # sums over at most 350 rows, through at most 70 steps


def main(arguments: list[str] | None = None) -> int:
    """Run all cases in both dtypes; 1 if a result differs from the first one, or from the reference."""
    parser = argparse.ArgumentParser(description="repeat forward and backward on the GPU and compare every bit")
    parser.add_argument("--times", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    parser.add_argument("--no-pool", action="store_true", help="allocate each array by itself")
    options = parser.parse_args(arguments)
    cupy = import_module("cupy")
    if options.no_pool:
        cupy.cuda.set_allocator(None)
    found = []
    for case in CASES:
        for dtype in ("float32", "float64"):
            begin = time.perf_counter()
            differences, error = repeat(cupy, case, dtype, options.times)
            found.append({"case": case, "dtype": dtype, "repetitions": options.times, "different": differences,
                          "error": error, "seconds": time.perf_counter() - begin})  # fmt: skip
            print(f"{case} {dtype}: {differences} of {options.times} differ, error {error:.2e}", flush=True)
    failed = [f for f in found if f["different"] or not f["error"] <= BOUNDS[f["dtype"]]]
    if options.out:
        options.out.write_text(json.dumps({"passed": not failed, "cases": found}, indent=1), encoding="utf-8")
    return 1 if failed else 0


def repeat(cupy: Any, case: tuple[Any, ...], dtype: str, times: int) -> tuple[int, float]:
    """Return how many repetitions differ from the first in any bit, and the first one's error."""
    steps, batch, inputs, hidden, layers, bidirectional, ragged = case
    rng = np.random.default_rng(0)
    host = fastlstm.LSTM(inputs, hidden, layers, bidirectional=bidirectional, dtype=np.float64, seed=0)
    x, dy = (rng.uniform(-1, 1, (steps, batch, n)) for n in (inputs, host.cell.output_size))
    lengths = rng.integers(0, steps + 1, batch) if ragged else None
    with fastlstm.use_backend("reference"):
        truth = results(host, x, dy, lengths)
    model = fastlstm.LSTM(inputs, hidden, layers, bidirectional=bidirectional, dtype=dtype, seed=0)
    model.params.update({name: value.astype(dtype) for name, value in host.params.items()})
    model, x, dy = model.to(cupy), cupy.asarray(x.astype(dtype)), cupy.asarray(dy.astype(dtype))
    bits = np.dtype(dtype).str.replace("f", "u")
    first = results(model, x, dy, lengths)
    error = max(
        float(np.abs(cupy.asnumpy(f) - t).max() / max(np.abs(t).max(), 1e-30))
        for f, t in zip(first, truth, strict=True)
    )
    different = cupy.zeros((), np.int64)
    for _ in range(times):
        again = results(model, x, dy, lengths)
        changed = [(a.view(bits) != f.view(bits)).any() for a, f in zip(again, first, strict=True)]
        different += cupy.stack(changed).any()  # stays on the device: nothing waits inside the loop
    return int(different), error


def results(model: Any, x: Any, dy: Any, lengths: Any) -> list[Any]:
    """All outputs and gradients of one forward and backward pass."""
    y, state, tape = model.forward(x, lengths=lengths)
    grads = model.backward(tape, dy)
    return [y, *state, grads.x, *grads.state, *grads.params.values()]


if __name__ == "__main__":
    sys.exit(main())
