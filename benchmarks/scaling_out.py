"""The cost of more machines: the time of a step's all-reduce against that of its computation, for ``RESULTS.md``.

Seconds of computation are medians of committed results on one thread. Those of a network are computed, from a latency
and a bandwidth: an all-reduce of n bytes between p processes takes 2 log2(p) latencies and 2 n (p - 1) / p bytes over
each link (R. Thakur, R. Rabenseifner, W. Gropp: Optimization of collective communication operations in MPICH, 2005).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from fastlstm.bench import report
from fastlstm.bench.results import Results
from fastlstm.bench.work import Work
from fastlstm.cell import Cell
from fastlstm.parameters import shapes

WORKERS = 2, 16, 128, 1000


class Network(NamedTuple):
    """A link between two machines."""

    name: str
    latency: float  # s
    bandwidth: float  # bytes / s

    def allreduce(self, size: int, workers: int) -> float:
        """Seconds of an all-reduce of `size` bytes."""
        if workers == 1:
            return 0.0
        return 2 * math.log2(workers) * self.latency + 2 * size * (workers - 1) / workers / self.bandwidth


NETWORKS = Network("10 Gb/s, 30 us", 30e-6, 1.25e9), Network("100 Gb/s, 2 us", 2e-6, 12.5e9)


def gradients(work: Work) -> int:
    """Bytes of the LSTM's gradients, in float32."""
    return 4 * sum(math.prod(shape) for shape in shapes(Cell(work.inputs, work.hidden)).values())


def efficiency(size: int, seconds: float, network: Network, workers: int) -> float:
    """Share of the time that is computation, if each worker computes for so many seconds."""
    return seconds / (seconds + network.allreduce(size, workers))


def most_workers(work: Work, seconds: float, network: Network) -> int:
    """How many workers may divide this batch before half of the time is communication; at most one a row.

    A part of the batch is taken to need its share of the time; small parts need more.
    """
    workers, size = 1, gradients(work)
    while workers < work.batch and efficiency(size, seconds / (workers + 1), network, workers + 1) >= 0.5:
        workers += 1
    return workers


def tables(results: Results) -> Iterator[str]:
    """Give the tables of training and of inference, for plain float32 works with a batch worth dividing."""
    found: dict[str, list[tuple[Work, float]]] = {"train": [], "infer": []}
    for case in results.cases:
        work = case.work
        if work and work.kind in found and work == Work(*work.shape, kind=work.kind) and work.batch >= 32:
            found[work.kind].append((work, case.spread("fastlstm").middle))
    rows = []
    for work, seconds in found["train"]:
        size, cells = gradients(work), []
        for network in NETWORKS:
            shares = ", ".join(f"{efficiency(size, seconds, network, workers):.0%}" for workers in WORKERS)
            cells += [shares, str(most_workers(work, seconds, network))]
        rows.append([work.name, f"{size / 1e6:.2g} MB", report.amount(seconds), *cells])
    heads = [head for network in NETWORKS for head in (network.name, "one batch divided")]
    yield f"Training, share of the time that is computation with p = {', '.join(map(str, WORKERS))} workers:"
    yield report.table(["T,B,I,H", "gradients", "computation", *heads], rows)
    rates = [(work, work.steps * work.batch * work.inputs * 4 / seconds, seconds) for work, seconds in found["infer"]]
    rows = [[work.name, f"{rate / 1e6:,.0f} MB/s", f"{work.batch / seconds:,.0f}", f"{max(1, int(1e9 / rate)):,}"]
            for work, rate, seconds in rates]  # fmt: skip
    yield "Inference over data on disk:"
    yield report.table(["T,B,I,H", "a worker reads", "series / s", "workers that 1 GB/s feeds"], rows)
