"""Peak and bandwidth of this machine, measured: the roofline.

The peak of the processor is that of the kernels' own GEMM microkernel on data in L1, on all threads at once; the peak
of a GPU is that of a large product of cuBLAS. The bandwidth is that of a copy between two arrays far larger than the
caches, bytes read and bytes written.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from threading import Barrier
from typing import Any

import numpy as np

from fastlstm.bench.results import Ceiling
from fastlstm.bench.sides import event_seconds

__all__ = ["at_once", "cpu_bandwidth", "cpu_peak", "cuda", "of", "tile_job"]

SECONDS = 0.3  # for each ceiling
CPU_BYTES, CUDA_BYTES = 1 << 28, 1 << 29  # of each of the two arrays of a copy
CUDA_SIZE = 4096  # of the square matrices
_OPERATIONS = 5e7  # of a sample of the tile: about half a millisecond


def of(device: str, threads: int, dtypes: tuple[str, ...]) -> Ceiling:
    """Measure a device: ``cpu``, with so many threads at once, or ``cuda``."""
    if device == "cuda":
        return cuda(dtypes)
    operations = {dtype: cpu_peak(dtype, threads, SECONDS) for dtype in dtypes}
    return Ceiling(operations, cpu_bandwidth(threads, SECONDS, CPU_BYTES))


@functools.cache
def _tiles() -> tuple[Any, int, int]:
    """Compile a loop over the microkernel; return it, and the rows and vectors of a tile."""
    from fastlstm.kernels.cpu.gemm_microkernel import MR, NR, tile
    from fastlstm.kernels.cpu.jit import unkept_kernel

    # Numba's stubs want an intrinsic called as Python sees it, with the typing context.
    address: Any = import_module("fastlstm.kernels.cpu.vector").address

    # What plain Numba compiles cannot call the kernels' parts.
    @unkept_kernel  # type: ignore[untyped-decorator, unused-ignore]
    def tiles(count: int, k: int, a: Any, b: Any, c: Any) -> None:
        for _ in range(count):
            left, right, sums, row = address(a), address(b), address(c), c.shape[1]
            tile(MR, NR, k, left, k, 1, right, b.shape[1], sums, row, sums, row, right, 0)

    return tiles, MR, NR


def tile_job(dtype: str, operations: float) -> tuple[Callable[[], None], float]:
    """Return a call of the bare microkernel on data in L1, and its operations: about as many as asked for."""
    from fastlstm.kernels.cpu.vector import lanes

    tiles, rows, vectors = _tiles()
    k, columns = 64, int(vectors * lanes(np.dtype(dtype)))
    of_one = 2.0 * rows * k * columns
    count = max(1, round(operations / of_one))
    a, b, c = np.ones((rows, k), dtype), np.ones((k, columns), dtype), np.zeros((rows, columns), dtype)
    tiles(1, k, a, b, c)  # compiles
    return lambda: tiles(count, k, a, b, c), count * of_one


def cpu_peak(dtype: str, threads: int, seconds: float) -> float:
    """Operations per second of `threads` threads at once, each with the bare microkernel on data in L1."""
    jobs = [tile_job(dtype, _OPERATIONS) for _ in range(threads)]
    return sum(operations for _, operations in jobs) / _shortest([job for job, _ in jobs], seconds)


def cpu_bandwidth(threads: int, seconds: float, size: int) -> float:
    """Bytes per second, read and written together, of a copy that all threads share."""
    share = max(1, size // threads // 8)  # numbers of eight bytes

    def job() -> Callable[[], None]:
        source, target = np.ones(share), np.zeros(share)
        return lambda: np.copyto(target, source)

    return 16.0 * share * threads / _shortest([job() for _ in range(threads)], seconds)


@contextlib.contextmanager
def at_once(jobs: Sequence[Callable[[], None]]) -> Iterator[Callable[[int], float]]:
    """Run jobs at once, each on a thread and, where the system lets it, a core of its own.

    What is yielded runs each job so many times in a row, and returns the seconds from the first start to the last end,
    divided by the number.
    """
    barrier = Barrier(len(jobs))
    here = itertools.cycle(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else [])

    def keep_to_a_core() -> None:
        for core in here:  # two threads that wake at once may be put on one core, and stay there for milliseconds
            os.sched_setaffinity(0, {core})
            break

    def run(job: Callable[[], None], count: int) -> tuple[float, float]:
        barrier.wait()
        start = time.perf_counter()
        for _ in range(count):
            job()
        return start, time.perf_counter()

    with ThreadPoolExecutor(len(jobs), initializer=keep_to_a_core) as pool:

        def seconds(count: int) -> float:
            starts, ends = zip(*pool.map(run, jobs, [count] * len(jobs)), strict=True)
            return float(max(ends) - min(starts)) / count

        yield seconds


def _shortest(jobs: Sequence[Callable[[], None]], seconds: float) -> float:
    """Run all jobs at once, again and again; the shortest time in which all of them were done."""
    best, rounds, until = math.inf, 0, time.perf_counter() + seconds
    with at_once(jobs) as timed:
        while rounds < 3 or time.perf_counter() < until:
            best = min(best, timed(1))
            rounds += 1
    return best


def cuda(dtypes: tuple[str, ...], size: int = CUDA_SIZE, copied: int = CUDA_BYTES, repeats: int = 10) -> Ceiling:
    """Measure the current GPU: products in full precision, since CuPy takes TF32 only if asked, and a copy."""
    cupy = import_module("cupy")
    operations = {}
    for dtype in dtypes:
        a, b = (cupy.ones((size, size), dtype) for _ in range(2))
        operations[dtype] = 2.0 * size**3 / _best(cupy, functools.partial(cupy.matmul, a, b), repeats)
    del a, b
    source, target = (cupy.ones(copied // 4, np.float32) for _ in range(2))

    def copy() -> None:
        target[...] = source

    return Ceiling(operations, 2.0 * copied / _best(cupy, copy, repeats))


def _best(cupy: Any, call: Callable[[], Any], repeats: int) -> float:
    call()
    return min(event_seconds(cupy.cuda, call, 1) for _ in range(repeats))
