"""Repeat forward and backward passes on a GPU: every result must be bit-identical to the first.

    python tests/gpu_repeat.py --times 1000 --out OUTDIR/C.json  # with benchmarks/ in PYTHONPATH, as .ci/gpu has it

With ``--times 0 --no-pool`` it is the small set for ``compute-sanitizer``: each array is an allocation of its own then,
so that an access outside it is seen. Results are also compared with the float64 reference.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import gpu
import numpy as np

import fastlstm
from fastlstm.bench import peers, run
from fastlstm.bench.results import Case, Results

# steps, batch, inputs, hidden, layers, bidirectional, ragged, peephole: wide and narrow loads, one and several slabs of
# a sum; persistent kernels of one block a group, of a cluster, and of groups that exchange through memory
CASES = ((12, 16, 8, 64, 2, True, True, False), (20, 16, 8, 33, 1, False, False, False),
         (30, 5, 3, 8, 1, True, True, True), (1, 1, 1, 1, 1, False, False, False),
         (9, 5, 3, 248, 1, True, True, True), (6, 9, 3, 512, 1, True, True, False),
         (6, 3, 3, 1000, 1, False, False, True))  # fmt: skip
BOUNDS = {"float32": 1e-4, "float64": 1e-12}  # sums over at most 320 rows, through at most 30 steps
AT_ONCE = 10  # repetitions that nothing waits between


def main(arguments: list[str] | None = None) -> int:
    """Run all cases in both dtypes; 1 if a result differs from the first one, or from the reference."""
    parser = argparse.ArgumentParser(description="repeat forward and backward on the GPU and compare every bit")
    parser.add_argument("--times", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="the stage's file")
    parser.add_argument("--no-pool", action="store_true", help="allocate each array by itself")
    options = parser.parse_args(arguments)
    cupy = import_module("cupy")
    if options.no_pool:
        cupy.cuda.set_allocator(None)
    passed = True

    def cases() -> Iterator[Case]:
        nonlocal passed
        for case, dtype in [(case, dtype) for case in CASES for dtype in BOUNDS]:
            differences, error = repeat(cupy, case, dtype, options.times)
            passed &= not differences and error <= BOUNDS[dtype]
            facts = {"repetitions": float(options.times), "not bit-identical": float(differences), "error": error}
            print(f"{case} {dtype}: {differences} of {options.times} differ, error {error:.2e}", flush=True)
            finite = {name: value for name, value in facts.items() if np.isfinite(value)}
            yield Case(f"{case} {dtype}", {}, group="repetitions", facts=finite)

    begun = gpu.begin(options.out, [peers.CUDA]) if options.out else Results("repetitions", {}, threads=1)
    interrupted = run.keep(begun, cases(), options.out).interrupted
    passed &= not interrupted
    print("every result is the first one, bit for bit" if passed else "NOT every result is as it should be")
    return 0 if passed else 1


def repeat(cupy: Any, case: tuple[Any, ...], dtype: str, times: int) -> tuple[int, float]:
    """Return how many repetitions differ from the first in any bit, and the first one's error."""
    steps, batch, inputs, hidden, layers, bidirectional, ragged, peephole = case
    rng = np.random.default_rng(0)
    options = {"bidirectional": bidirectional, "peephole": peephole, "seed": 0}
    host = fastlstm.LSTM(inputs, hidden, layers, dtype=np.float64, **options)
    x, dy = (rng.uniform(-1, 1, (steps, batch, n)) for n in (inputs, host.cell.output_size))
    lengths = rng.integers(0, steps + 1, batch) if ragged else None
    with fastlstm.use_backend("reference"):
        truth = results(host, x, dy, lengths)
    model = fastlstm.LSTM(inputs, hidden, layers, dtype=dtype, **options)
    model.params.update({name: value.astype(dtype) for name, value in host.params.items()})
    model, x, dy = model.to(cupy), cupy.asarray(x.astype(dtype)), cupy.asarray(dy.astype(dtype))
    first = [cupy.asnumpy(value) for value in results(model, x, dy, lengths)]
    errors = [np.abs(f - t).max() / max(np.abs(t).max(), 1e-30) for f, t in zip(first, truth, strict=True)]
    error = float(np.max(errors))  # NaN, if any of them is
    expected = [value.tobytes() for value in first]
    different = 0
    for begin in range(0, times, AT_ONCE):
        # Compared on the host, since that compiles nothing; several together, since waiting would hide what
        # successive calls may do to each other.
        several = [results(model, x, dy, lengths) for _ in range(min(AT_ONCE, times - begin))]
        for again in several:
            found = [cupy.asnumpy(value).tobytes() for value in again]
            different += found != expected
    return different, error


def results(model: Any, x: Any, dy: Any, lengths: Any) -> list[Any]:
    """All outputs and gradients of one forward and backward pass."""
    y, state, tape = model.forward(x, lengths=lengths)
    grads = model.backward(tape, dy)
    return [y, *state, grads.x, *grads.state, *grads.params.values()]


if __name__ == "__main__":
    sys.exit(main())
