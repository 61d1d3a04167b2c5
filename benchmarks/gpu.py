"""The CUDA backend against ``torch.nn.LSTM`` (cuDNN) on one GPU; a stage's file is written after each case.

    python benchmarks/gpu.py --out OUTDIR/B.json --seconds 150

Cases are measured as by ``fastlstm bench``: results are compared first, sides take turns. PyTorch is also timed with
TF32, and our sequences with products in TF32 and bfloat16. Where a persistent kernel is planned
(``fastlstm/backends/cuda/plans.py``), the path of a product and a kernel each step is timed too. The most
important cases come first; those that the time does not reach are listed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gpu_common

from fastlstm.bench import grid, peers, report, run
from fastlstm.bench.results import Case
from fastlstm.bench.work import Work

OURS, THEIRS = (peers.CUDA, peers.BY_STEPS), ("torch cuda", "torch cuda TF32")
ROUNDED = (f"{peers.CUDA} TF32", f"{peers.CUDA} bfloat16")
SECONDS_OF_A_CASE = 1.5  # of timing
UNREACHED = "the time ran out"


def sequences(*sizes: tuple[int, int], make: Callable[..., Work] = Work, **variant: Any) -> list[Work]:
    """Inference and training, T=512, for each (B, H), with I = H."""
    return [replace(make(512, b, h, h, kind=kind), **variant) for b, h in sizes for kind in ("infer", "train")]


# In order of importance: one batch at all sizes, one work of each other kind, the other batches, then all others.
SIZES, DEEP = (512, 256, 1024, 128), {"layers": 2, "bidirectional": True}
WORKS = (
    *sequences(*((16, hidden) for hidden in SIZES)),
    Work(1, 1, 256, 256, kind="stream"),
    *sequences((16, 512), **DEEP),
    *sequences((64, 256), make=Work.ragged),
    *sequences(*((batch, hidden) for batch in (64, 1) for hidden in SIZES)),
    Work(1, 1, 1024, 1024, kind="stream"),
    Work(1, 16, 512, 512, kind="stream"),
    *sequences((16, 512), (64, 1024), make=Work.ragged),
    *sequences((64, 256), **DEEP),
    *sequences(*((batch, hidden) for hidden in (64, 192, 768) for batch in (16, 64, 1))),
    *sequences(*((256, hidden) for hidden in SIZES)),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the file; 1 if our side fails, or torch's float32 results are not ours."""
    parser = argparse.ArgumentParser(description="time the CUDA backend and torch.nn.LSTM")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the stage's file")
    add("--seconds", type=float, default=150.0, help="start no case after these; default: %(default)s")
    add("--done", type=Path, help="a stage's file: leave its cases out; if it has none, begin with the last ones")
    add("--shape", action="append", metavar="T,B,I,H", help="measure this instead of the table; repeatable")
    add("--no-torch", action="store_true", help="time this library alone")
    options = parser.parse_args(arguments)
    begin, measured, complaints = time.monotonic(), 0, list[str]()
    asked = OURS if options.no_torch else (*OURS, *THEIRS, *ROUNDED)
    names = [name for name in asked if peers.missing(name) is None]
    gpu_common.update(options.out, machine=gpu_common.machine(with_torch="torch cuda" in names))
    shapes = grid.of_shapes(options.shape or (), ("float32",), ("infer", "train"))
    works = left_of(shapes or list(WORKS), options.done)
    for work in works:
        if time.monotonic() - begin > options.seconds:
            break
        case = run.measure_case(work, names, 1, SECONDS_OF_A_CASE)
        gpu_common.update(options.out, [case])
        print(report.line(case), flush=True)
        wrong = [(side, reason) for side, reason in case.refused.items()
                 if side in (*OURS, run.EVERYBODY) or (side == "torch cuda" and "computes" in reason)]  # fmt: skip
        complaints += [f"{case.name}: {side}: {reason}" for side, reason in wrong]
        measured += 1
    late = {"refused": {run.EVERYBODY: UNREACHED}}
    left = [Case(work.title, {}, group=work.kind, work=work, **late) for work in works[measured:]]
    gpu_common.update(options.out, left)
    print(*complaints, f"{measured} of {len(works)} cases measured", sep="\n")
    return 1 if complaints else 0


def left_of(works: list[Work], done: Path | None) -> list[Work]:
    """Return the works that a stage's file lacks, in order; if it has none of them, begin with the last."""
    stage = gpu_common.load(done) if done else None
    measured = {case.name for case in stage.cases if peers.CUDA in case.values} if stage else set()
    left = [work for work in works if work.title not in measured]
    return left[::-1] if done and not measured else left


if __name__ == "__main__":
    sys.exit(main())
