"""A ragged batch: what padding costs those who compute it, and what avoiding it costs us."""

from __future__ import annotations

from collections.abc import Iterator

from fastlstm.bench import clock, grid, sides
from fastlstm.bench.work import Problem, Work

from . import rows
from .record import OURS, Case

ABOUT = (
    "A batch of sequences of uneven length, unsorted, between half of T and T, in float32. PyTorch packs and unpacks"
    " them in each call, as one does; fastlstm is given the lengths. The last cases are our own ragged batches against"
    " the same batches padded."
)
SIDES = (OURS, "torch", "onnxruntime", "openvino")
SHAPES = (grid.RAGGED, (365, 64, 32, 128))
KINDS = {"train": "a training pass", "infer": "inference"}
PADDED = "fastlstm, padded"


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure training and inference against the peers, then training against our own padded batch."""
    for shape in SHAPES:
        for kind, words in KINDS.items():
            work = Work.ragged(*shape, kind=kind)
            yield rows.measured(work, SIDES, threads, seconds, f"{words}, T up to {work.steps}")
    for shape in SHAPES:
        ragged, padded = Work.ragged(*shape), Work(*shape, kind="train")
        with sides.cpu(Problem.of(ragged), threads) as one, sides.cpu(Problem.of(padded), threads) as other:
            values, _, interrupted = clock.take_turns({OURS: one, PADDED: other}, seconds)
        if interrupted:
            raise KeyboardInterrupt
        facts = {"share of the padded steps": ragged.rows / padded.rows}
        yield Case(f"a training pass, T up to {ragged.steps}, against ourselves padded", values, facts=facts)
