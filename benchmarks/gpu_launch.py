"""Microbenchmarks that decide how a persistent kernel is built: barriers between blocks, and the cost of a launch.

    python benchmarks/gpu_launch.py --out OUTDIR/B.json

A barrier's time is that of one round: grid-wide with one counter, in groups of blocks with a flag for each block, and
in thread-block clusters; each group barrier also with the exchange of 8 KiB, which is h of H = 128, B = 16. Groups fill
the GPU, as a persistent kernel does. A launch is that of an empty RawKernel with a gate kernel's 20 arguments, and with
the same in one record; beside it stands a small matrix product. The kernels are in ``gpu_barriers.cu``.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import gpu_common
import numpy as np

from fastlstm.bench.results import Case
from fastlstm.bench.sides import event_seconds

SOURCE = Path(__file__).with_name("gpu_barriers.cu")
THREADS = 256
STRIDE = 256  # words between the flags of two groups, as in the source
WORDS = 2048  # of an exchange
GROUPS = (2, 4, 8, 24, 32, 64, 96, 128)  # blocks of a group
CLUSTERS = (2, 4, 8)  # 8 is the largest that every GPU with clusters has
SAMPLES = 5
LAUNCHES = 500  # of a sample: fewer than the launch queue holds, so that the host never waits for room
RECORD = np.dtype([("arrays", np.uint64, 9), ("numbers", np.int64, 11)])

GROUP = "microbenchmarks of barriers and launches"
Measure = Callable[[], dict[str, tuple[float, ...]]]


def main(arguments: list[str] | None = None) -> int:
    """Measure everything, and write the file after each cell; 1 if any cell failed."""
    parser = argparse.ArgumentParser(description="time barriers between blocks, and launches")
    parser.add_argument("--out", type=Path, required=True, help="the stage's file")
    parser.add_argument("--rounds", type=int, default=2000, help="barriers of a launch; default: %(default)s")
    options = parser.parse_args(arguments)
    cupy = import_module("cupy")
    gpu_common.update(options.out, machine=gpu_common.machine(cupy))
    failed = False
    for name, measure in (*launches(cupy), *barriers(cupy, options.rounds), *compilations(cupy)):
        try:
            case = Case(name, measure(), group=GROUP)
        except (RuntimeError, ValueError, MemoryError) as error:
            case, failed = Case(name, {}, group=GROUP, refused={"device": gpu_common.one_line(error)}), True
        gpu_common.update(options.out, [case])
        print(name, dict(case.values), dict(case.refused), flush=True)
    print("microbenchmarks done")
    return int(failed)


def module(cupy: Any, cluster: int = 1) -> Any:
    return cupy.RawModule(code=SOURCE.read_text(encoding="utf-8"), options=("--std=c++17", f"-DCLUSTER={cluster}"))


def launches(cupy: Any) -> Iterator[tuple[str, Measure]]:
    """Yield the empty kernels and a product: seconds of one in a row of many, on the device and on the host."""
    product = import_module("fastlstm.backends.cuda").BACKEND.device.product

    def empty(name: str, arguments: tuple[Any, ...]) -> Measure:
        return lambda: in_a_row(cupy, module(cupy).get_function(name), ((1,), (32,), arguments))

    def small_product() -> dict[str, tuple[float, ...]]:
        square, out = cupy.ones((8, 8), np.float32), cupy.empty((8, 8), np.float32)
        return in_a_row(cupy, product(square, square, out), ())

    words = [cupy.zeros(1, np.uint32) for _ in range(9)]
    record = np.zeros(1, RECORD)
    record["arrays"] = [array.data.ptr for array in words]
    yield "launch, 20 arguments", empty("empty_of_20", (*words, *range(11)))
    yield "launch, one record", empty("empty_of_record", (record,))
    yield "product of 8 x 8", small_product


def in_a_row(cupy: Any, call: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, tuple[float, ...]]:
    """Time a call many times in a row; the first sample does not count."""
    host: list[float] = []
    times = [event_seconds(cupy.cuda, lambda: call(*arguments), LAUNCHES, host) for _ in range(1 + SAMPLES)]
    return {"device": tuple(times[1:]), "host": tuple(host[1:])}


def barriers(cupy: Any, rounds: int) -> Iterator[tuple[str, Measure]]:
    """Yield all barriers: seconds of a round."""
    device = cupy.cuda.Device()
    blocks = cupy.cuda.runtime.getDeviceProperties(device.id)["multiProcessorCount"]
    sizes = [size for size in GROUPS if size <= blocks]
    measure = functools.partial(barrier, cupy, rounds)
    for size in dict.fromkeys((*sizes, blocks)):
        yield f"counter, grid of {size}", functools.partial(measure, "counter", size, 1)
    for name, words in (("flags", 0), ("exchange", WORDS)):
        for size in sizes:
            count = blocks // size
            yield f"{name}, {count} groups of {size}", functools.partial(measure, name, size, count, words)
    if int(device.compute_capability) < 90:
        return  # without clusters
    for name, words in (("cluster", 0), ("cluster_exchange", WORDS)):
        for size in CLUSTERS:
            count = blocks // size
            call = functools.partial(measure, name, size, count, words, cluster=size)
            yield f"barrier.{name}, {count} clusters of {size}", call


def barrier(
    cupy: Any, rounds: int, name: str, size: int, groups: int, exchanged: int = 0, *, cluster: int = 1
) -> dict[str, tuple[float, ...]]:
    """Time a kernel of `rounds` barriers; the words that it exchanges are checked."""
    kernel = module(cupy, cluster).get_function(name)
    words = cupy.empty(groups * (STRIDE + 2 * exchanged), np.uint32)
    arguments = (words, rounds, exchanged) if exchanged else (words, rounds)
    times = []
    for _ in range(1 + SAMPLES):
        words[...] = 0
        times.append(event_seconds(cupy.cuda, lambda: kernel((size, groups), (THREADS,), arguments), 1) / rounds)
    wrong = words[: groups * STRIDE].reshape(groups, STRIDE)[:, -1].get()
    if exchanged and wrong.any():
        raise RuntimeError(f"{wrong.sum()} threads read words of another round")
    return {"device": tuple(times[1:])}


def compilations(cupy: Any) -> Iterator[tuple[str, Measure]]:
    """Yield what a process waits for the kernels of one dtype: never compiled before, and from CuPy's cache on disk."""
    loader, dtype = import_module("fastlstm.kernels.cuda.loader"), np.dtype(np.float32)
    source = f"{loader.source()}\n// {time.time_ns()}"  # no cache has that

    def load() -> dict[str, tuple[float, ...]]:
        if hasattr(cupy, "clear_memo"):
            cupy.clear_memo()  # else CuPy remembers within the process
        begin = time.perf_counter()
        cupy.RawModule(code=source, options=loader.options(dtype, loader.wide(dtype))).get_function("step_forward")
        return {"host": (time.perf_counter() - begin,)}

    yield "kernels of one dtype, compiled", load
    yield "kernels of one dtype, from the disk", load


if __name__ == "__main__":
    sys.exit(main())
