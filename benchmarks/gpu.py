"""The CUDA backend against ``torch.nn.LSTM`` (cuDNN) on one GPU; a stage's file is written after each case.

    python benchmarks/gpu.py --out OUTDIR/B.json --seconds 150

Cases are measured as by ``fastlstm bench``: results are compared first, sides take turns. PyTorch is timed with and
without TF32. Where a persistent kernel is planned (``fastlstm/backends/cuda/plans.py``), the path of a product and a
kernel each step is timed too. The most telling cells come first; those that the time does not reach are listed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import gpu_common
import numpy as np

from fastlstm import cell as models
from fastlstm import dispatch
from fastlstm.bench import peers, run
from fastlstm.bench.results import Case
from fastlstm.bench.work import Work

OURS, THEIRS = (peers.CUDA, peers.BY_STEPS), ("torch cuda", "torch cuda TF32")
SECONDS_OF_A_CELL = 3.0  # of timing, inference and training together
UNREACHED = "the time ran out"


class Cell(NamedTuple):
    """One problem: T steps of B sequences with I = H inputs."""

    batch: int
    hidden: int
    kind: str = "sequence"  # "ragged": lengths from T / 2 to T; "one step": streaming
    layers: int = 1
    bidirectional: bool = False
    steps: int = 512

    def works(self) -> list[Work]:
        """Inference and training, or a step."""
        variant = {"layers": self.layers, "bidirectional": self.bidirectional}
        if self.kind == "one step":
            return [Work(1, self.batch, self.hidden, self.hidden, kind="stream", layers=self.layers)]
        make = Work.ragged if self.kind == "ragged" else Work
        shape = self.steps, self.batch, self.hidden, self.hidden
        return [replace(make(*shape, kind=kind), **variant) for kind in ("infer", "train")]


# The most telling first: one batch at all sizes, one cell of each other kind, the other batches; then what is left.
SIZES = (512, 256, 1024, 128)
CELLS = (
    *(Cell(16, hidden) for hidden in SIZES),
    Cell(1, 256, "one step"),
    Cell(16, 512, layers=2, bidirectional=True),
    Cell(64, 256, "ragged"),
    *(Cell(batch, hidden) for batch in (64, 1) for hidden in SIZES),
    *(Cell(batch, hidden, "one step") for batch, hidden in ((1, 1024), (16, 512))),
    *(Cell(batch, hidden, "ragged") for batch, hidden in ((16, 512), (64, 1024))),
    Cell(64, 256, layers=2, bidirectional=True),
    *(Cell(batch, hidden) for hidden in (64, 192, 768) for batch in (16, 64, 1)),
    *(Cell(256, hidden) for hidden in SIZES),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, and write the file; 1 if our side fails, or torch's float32 results are not ours."""
    options = parser().parse_args(arguments)
    begin = time.monotonic()
    cupy = import_module("cupy")
    peers.TORCH_GPU = options.torch_device
    names = [name for name in (*OURS, *(() if options.no_torch else THEIRS)) if peers.missing(name) is None]
    machine = gpu_common.machine(cupy)
    if "torch cuda" in names:
        torch = import_module("torch")
        machine |= {"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda)}
        machine |= {"cuDNN": str(torch.backends.cudnn.version())}
    gpu_common.update(options.out, machine=machine)
    todo, measured, failed = chosen(options), 0, False
    for cell in todo:
        if time.monotonic() - begin > options.seconds:
            break
        found = []
        for work in cell.works():
            sides = [name for name in names if name != peers.BY_STEPS or is_persistent(work)]
            case, interrupted = run.measure_case(work, sides, 1, SECONDS_OF_A_CELL / len(cell.works()))
            gpu_common.update(options.out, [case])
            if interrupted:
                return 1
            found.append(case)
            failed |= bool(complaints(case))
        measured += 1
        print(f"cell {cell.works()[0].name}: {summary(found)}", flush=True)
    left = [work for cell in todo[measured:] for work in cell.works()]
    late = {"refused": {run.EVERYBODY: UNREACHED}}
    gpu_common.update(options.out, [Case(work.title, {}, group=work.kind, work=work, **late) for work in left])
    print(f"{measured} of {len(todo)} cells measured")
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    result = argparse.ArgumentParser(description="time the CUDA backend and torch.nn.LSTM")
    add = result.add_argument
    add("--out", type=Path, required=True, help="the stage's file")
    add("--seconds", type=float, default=150.0, help="start no cell after these; default: %(default)s")
    add("--done", type=Path, help="a stage's file: leave its cells out")
    add("--last-first", action="store_true", help="begin with the cells that are reached last otherwise")
    add("--cells", type=json.loads, help="other cells, as a JSON list of lists, e.g. [[16, 512]]")
    add("--no-torch", action="store_true", help="time this library alone")
    add("--torch-device", default="cuda", help="for trying this out; default: %(default)s")
    return result


def is_persistent(work: Work) -> bool:
    """Whether a persistent kernel is planned for some layer."""
    if work.kind == "stream":
        return False
    sizes, dtype = (work.inputs, work.hidden, work.layers), np.dtype(work.dtype)
    cell = models.Cell(*sizes, bidirectional=work.bidirectional, dtype=dtype)
    plan = dispatch.backend_named("cuda").plan(cell, work.rows, work.batch, False)
    return any("one launch a sequence" in words for words in plan)


def chosen(options: argparse.Namespace) -> list[Cell]:
    """Return the cells to measure, in order."""
    cells = [Cell(*given) for given in options.cells] if options.cells else list(CELLS)
    stage = gpu_common.load(options.done) if options.done else None
    done = {case.name for case in stage.cases if peers.CUDA in case.values} if stage else set()
    left = [cell for cell in cells if any(work.title not in done for work in cell.works())]
    return left[::-1] if options.last_first and not done else left


def summary(found: list[Case]) -> str:
    """Say in one line how a cell went: microseconds of inference and training, or of a step."""
    parts = []
    for name in dict.fromkeys(side for case in found for side in (*case.values, *case.refused)):
        times = [f"{1e6 * case.spread(name).middle:.1f}" for case in found if name in case.values]
        parts.append(
            f"{name} {' / '.join(times) or next(case.refused[name] for case in found if name in case.refused)}"
        )
    return ", ".join(parts)


def complaints(case: Case) -> list[str]:
    """Print and return what should not be: our side failed, or float32 without TF32 is not what we compute."""
    ours = [reason for side, reason in case.refused.items() if side in (*OURS, run.EVERYBODY)]
    theirs = [reason for reason in [case.refused.get("torch cuda", "")] if "computes" in reason]
    for line in (*ours, *theirs):
        print(f"{case.name}: {line}", file=sys.stderr)
    return [*ours, *theirs]


if __name__ == "__main__":
    sys.exit(main())
