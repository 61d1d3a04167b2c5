"""A stage of ``.ci/gpu``: its table of the CUDA backend against ``torch.nn.LSTM`` (cuDNN), its file and its page.

    python benchmarks/gpu.py table --out OUTDIR/B.json --seconds 150
    python benchmarks/gpu.py step OUTDIR/A.json NAME RESULT SECONDS REMARK  # note the end of a step
    python benchmarks/gpu.py page OUTDIR/A.json OUTDIR/B.json  # print stages as Markdown

Cases are measured as by ``fastlstm bench``: results are compared first, sides take turns. PyTorch is also timed with
TF32, and our sequences with products in TF32 and bfloat16. Where a persistent kernel is planned
(``fastlstm/backends/cuda/plans.py``), the path of a product and a kernel each step is timed too. The most
important cases come first; those that the time does not reach are listed.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlstm.bench import grid, peers, report, results, run
from fastlstm.bench.results import Case, Results
from fastlstm.bench.work import Work

OURS = (peers.CUDA, peers.BY_STEPS)  # which have to work
SIDES = (*OURS, "torch cuda", "torch cuda TF32", f"{peers.CUDA} TF32", f"{peers.CUDA} bfloat16")
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


def load(path: Path) -> Results:
    """Read a stage's file; empty results if there is none yet."""
    return results.load(path) if path.exists() else Results(path.stem, {}, threads=1)


def begin(path: Path, names: Iterable[str]) -> Results:
    """Return what a stage's file has so far, with the machine on which these sides are measured."""
    before = load(path)
    return replace(run.begin(path.stem, names, threads=1), cases=before.cases, steps=before.steps)


def step(file: str, *parts: str) -> int:
    """Note the end of a step."""
    stage = load(Path(file))
    new = dict(zip(("name", "result", "seconds", "remark"), parts, strict=True))
    results.save(Path(file), replace(stage, steps=(*stage.steps, new)))
    return 0


def page(*files: str) -> int:
    """Print stages as Markdown."""
    stages = [load(Path(file)) for file in files]
    print("\n\n".join(part for stage in stages for part in (f"### Stage {stage.name}", *report.text(stage))))
    return 0


def measured(works: list[Work], names: list[str], until: float) -> Iterator[Case]:
    """Measure works, and refuse those that would begin after `until` of the monotonic clock."""
    for work in works:
        if time.monotonic() > until:
            yield Case(work.title, {}, group=work.kind, work=work, refused={run.EVERYBODY: UNREACHED})
        else:
            yield run.measure_case(work, names, 1, SECONDS_OF_A_CASE)


def table(*arguments: str) -> int:
    """Measure, and write the file; 1 if our side fails, or torch's float32 results are not ours."""
    parser = argparse.ArgumentParser(description="time the CUDA backend and torch.nn.LSTM")
    add = parser.add_argument
    add("--out", type=Path, required=True, help="the stage's file")
    add("--seconds", type=float, default=150.0, help="start no case after these; default: %(default)s")
    add("--done", type=Path, help="a stage's file: leave its cases out; if it has none, begin with the last ones")
    add("--shape", action="append", metavar="T,B,I,H", help="measure this instead of the table; repeatable")
    options = parser.parse_args(arguments)
    until = time.monotonic() + options.seconds
    works = grid.of_shapes(options.shape or (), ("float32",), ("infer", "train")) or list(WORKS)
    if options.done:
        done = {case.name for case in load(options.done).cases if peers.CUDA in case.values}
        works = [work for work in works if work.title not in done] if done else works[::-1]
    before = begin(options.out, SIDES)
    names = [name for name in SIDES if name not in before.absent]
    found = run.keep(before, measured(works, names, until), options.out, functools.partial(print, flush=True))
    titles = {work.title for work in works}
    reached = [case for case in found.cases if case.name in titles and UNREACHED not in case.refused.values()]
    complaints = [
        f"{case.name}: {side}: {reason}" for case in reached for side, reason in case.refused.items()
        if side in (*OURS, run.EVERYBODY) or (side == "torch cuda" and "computes" in reason)
    ]  # fmt: skip
    print(*complaints, f"{len(reached)} of {len(works)} cases measured", sep="\n")
    return 130 if found.interrupted else min(len(complaints), 1)


if __name__ == "__main__":
    sys.exit({"table": table, "step": step, "page": page}[sys.argv[1]](*sys.argv[2:]))
