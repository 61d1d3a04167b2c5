"""The measured peak of this machine, in operations per second, for the shares of the peak in reports.

On the processor all threads run the kernels' own GEMM microkernel at once, on data in L1. On a GPU it is a product of
large matrices by cuBLAS.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from threading import Barrier
from typing import Any

import numpy as np

from fastlstm.bench.sides import event_seconds

__all__ = ["cpu", "cuda", "of", "tile_jobs"]

SECONDS = 0.3  # for each dtype
CUDA_SIZE = 4096  # of the square matrices
OPERATIONS = 5e7  # of a sample: about half a millisecond


def of(device: str, threads: int, dtypes: tuple[str, ...]) -> dict[str, float]:
    """Measure a device by dtype: ``cpu``, with so many threads at once, or ``cuda``."""
    return {dtype: cuda(dtype) if device == "cuda" else cpu(dtype, threads) for dtype in dtypes}


def tile_jobs(dtype: str, threads: int, operations: float = OPERATIONS) -> tuple[list[functools.partial[None]], float]:
    """Return a call of the microkernel alone for each thread, and the operations of one: about as many as asked for."""
    from fastlstm.kernels.cpu.gemm_microkernel import MR, NR, tile
    from fastlstm.kernels.cpu.jit import unkept_kernel
    from fastlstm.kernels.cpu.vector import lanes

    # Numba's stubs want an intrinsic called as Python sees it, with the typing context.
    address: Any = import_module("fastlstm.kernels.cpu.vector").address

    # What plain Numba compiles cannot call the kernels' parts.
    @unkept_kernel  # type: ignore[untyped-decorator, unused-ignore]
    def tiles(count: int, k: int, a: Any, b: Any, c: Any) -> None:
        for _ in range(count):
            left, right, sums, row = address(a), address(b), address(c), c.shape[1]
            tile(MR, NR, k, left, k, 1, right, b.shape[1], sums, row, sums, row, right, 0)

    k, columns = 64, int(NR * lanes(np.dtype(dtype)))
    of_one = 2.0 * MR * k * columns
    count, jobs = max(1, round(operations / of_one)), []
    for _ in range(threads):
        a, b, c = np.ones((MR, k), dtype), np.ones((k, columns), dtype), np.zeros((MR, columns), dtype)
        tiles(1, k, a, b, c)  # compiles
        jobs.append(functools.partial(tiles, count, k, a, b, c))
    return jobs, count * of_one


def cpu(dtype: str, threads: int) -> float:
    """Operations per second of `threads` threads at once, in the round in which all of them were done first."""
    jobs, operations = tile_jobs(dtype, threads)
    barrier = Barrier(threads)
    cores = itertools.cycle(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_setaffinity") else [])

    def keep_to_a_core() -> None:
        for core in cores:  # two threads that wake at once may be put on one core, and stay there for milliseconds
            os.sched_setaffinity(0, {core})
            break

    def run(job: Callable[[], None]) -> tuple[float, float]:
        barrier.wait()
        start = time.perf_counter()
        job()
        return start, time.perf_counter()

    times, until = list[float](), time.perf_counter() + SECONDS
    with ThreadPoolExecutor(threads, initializer=keep_to_a_core) as pool:
        while len(times) < 3 or time.perf_counter() < until:
            starts, ends = zip(*pool.map(run, jobs), strict=True)
            times.append(max(ends) - min(starts))
    return threads * operations / min(times)


def cuda(dtype: str, repeats: int = 10) -> float:
    """Operations per second of a product in full precision: CuPy takes TF32 only if asked."""
    cupy = import_module("cupy")
    a, b = (cupy.ones((CUDA_SIZE, CUDA_SIZE), dtype) for _ in range(2))
    cupy.matmul(a, b)
    return 2.0 * CUDA_SIZE**3 / min(event_seconds(cupy.cuda, lambda: cupy.matmul(a, b), 1) for _ in range(repeats))
