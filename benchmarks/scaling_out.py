"""When more machines pay: the bytes of the gradients of a step against its computation, from measured rates.

    python benchmarks/scaling_out.py                       # tables in Markdown
    mpiexec -n 2 python benchmarks/scaling_out.py --measure  # what an Allreduce takes between processes of this machine

Seconds of computation are medians of committed results on one thread (``benchmarks/results/MACHINE``). What a network
takes is not measured but computed, from a latency and a bandwidth that are stated in the table: an Allreduce of n bytes
between p processes takes 2 log2(p) latencies and 2 n (p - 1) / p bytes over each link (R. Thakur, R. Rabenseifner,
W. Gropp: Optimization of collective communication operations in MPICH, 2005).
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlstm.bench import results
from fastlstm.cell import Cell
from fastlstm.parameters import shapes

RESULTS = Path(__file__).parent / "results"
WORKERS = 2, 16, 128, 1000


class Network(NamedTuple):
    """A link between two machines."""

    name: str
    latency: float  # s
    bandwidth: float  # bytes / s

    def allreduce(self, size: int, workers: int) -> float:
        """Seconds of an Allreduce of `size` bytes."""
        if workers == 1:
            return 0.0
        return 2 * math.log2(workers) * self.latency + 2 * size * (workers - 1) / workers / self.bandwidth


NETWORKS = Network("10 Gb/s, 30 µs", 30e-6, 1.25e9), Network("100 Gb/s, 2 µs", 2e-6, 12.5e9)


class Work(NamedTuple):
    """A measured call of one worker."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    seconds: float

    @property
    def gradients(self) -> int:
        """Bytes of the LSTM's gradients, in float32."""
        return 4 * sum(math.prod(shape) for shape in shapes(Cell(self.inputs, self.hidden)).values())

    @property
    def data(self) -> int:
        """Bytes of the inputs, in float32."""
        return 4 * self.steps * self.batch * self.inputs

    def efficiency(self, network: Network, workers: int, share: float = 1.0) -> float:
        """Share of the time that is computation, if each worker has this `share` of the batch."""
        compute = self.seconds * share
        return compute / (compute + network.allreduce(self.gradients, workers))

    def most_workers(self, network: Network) -> int:
        """How many workers may divide this one batch before half of the time is communication; at most one a row.

        A part of the batch is taken to need its share of the time; small parts need more.
        """
        workers = 1
        while workers < self.batch and self.efficiency(network, workers + 1, 1 / (workers + 1)) >= 0.5:
            workers += 1
        return workers


def measured(machine: str, kind: str) -> list[Work]:
    """Return the float32 rows of a kind, with a batch worth dividing, from a machine's committed results."""
    works = []
    for case in results.load(RESULTS / machine / "goals-1-thread.json").cases:
        work = case.work
        if work and work.is_plain and (work.kind, work.dtype) == (kind, "float32") and work.batch >= 32:
            seconds = case.spread("fastlstm").middle
            works.append(Work(work.steps, work.batch, work.inputs, work.hidden, seconds))
    return works


def training_table(machine: str) -> str:
    """Return the table of data-parallel training."""
    ahead = "".join(f" {n.name}: p = {', '.join(map(str, WORKERS))} | one batch divided |" for n in NETWORKS)
    lines = [f"| T, B, I, H | gradients | computation |{ahead}", "|---|---|---|" + "---|---|" * len(NETWORKS)]
    for work in measured(machine, "train"):
        cells = ""
        for network in NETWORKS:
            shares = ", ".join(f"{work.efficiency(network, workers):.0%}" for workers in WORKERS)
            cells += f" {shares} | {work.most_workers(network)} |"
        sizes = f"{work.steps}, {work.batch}, {work.inputs}, {work.hidden}"
        lines.append(f"| {sizes} | {work.gradients / 1e6:.2g} MB | {work.seconds * 1e3:.3g} ms |{cells}")
    return "\n".join(lines)


def inference_table(machine: str) -> str:
    """Return the table of inference over data on disk."""
    lines = ["| T, B, I, H | a worker reads | series / s | workers that 1 GB/s feeds |", "|---|---|---|---|"]
    for work in measured(machine, "infer"):
        rate = work.data / work.seconds
        sizes = f"{work.steps}, {work.batch}, {work.inputs}, {work.hidden}"
        lines.append(
            f"| {sizes} | {rate / 1e6:,.0f} MB/s | {work.batch / work.seconds:,.0f} | {max(1, int(1e9 / rate)):,} |"
        )
    return "\n".join(lines)


def measure() -> None:
    """Time the Allreduce of gradients between the processes of this job, as `training.allreduce` does it."""
    from mpi4py import MPI

    from fastlstm.training import allreduce

    comm = MPI.COMM_WORLD
    for hidden in (64, 256, 1024):
        grads = {name: np.ones(shape, np.float32) for name, shape in shapes(Cell(32, hidden)).items()}
        seconds = []
        for _ in range(20):
            comm.Barrier()
            begin = time.perf_counter()
            allreduce(grads, comm)
            seconds.append(time.perf_counter() - begin)
        if comm.rank == 0:
            size = sum(value.nbytes for value in grads.values())
            print(f"{comm.size} processes, H={hidden}: {size / 1e6:.2g} MB in {min(seconds) * 1e6:.0f} µs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--machine", default="epyc-zen5-2-cores", help="a folder of benchmarks/results")
    parser.add_argument("--measure", action="store_true", help="time Allreduce between the processes of this job")
    options = parser.parse_args()
    if options.measure:
        measure()
        return
    print(f"Training, each worker with a batch of its own: share of the time that is computation ({options.machine})\n")
    print(training_table(options.machine))
    print("\nInference over series on disk, one thread a worker\n")
    print(inference_table(options.machine))


if __name__ == "__main__":
    main()
