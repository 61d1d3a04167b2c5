"""The file of a stage of ``.ci/gpu``, in the format of ``fastlstm.bench.results``: it is replaced after each case.

A run that is cut off keeps all finished cases. ``.ci/gpu`` calls this file to note the end of a step, and to print
stages as Markdown:

    python benchmarks/gpu_common.py step OUTDIR/A.json NAME RESULT SECONDS REMARK
    python benchmarks/gpu_common.py page OUTDIR/A.json OUTDIR/B.json   # or short
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import fastlstm
from fastlstm import diagnostics
from fastlstm.bench import report, results
from fastlstm.bench.results import Case, Results
from fastlstm.errors import ResultsFileError


def load(path: Path) -> Results | None:
    """Read a stage's file; None if it is missing or broken."""
    try:
        return results.load(path)
    except (OSError, ResultsFileError):
        return None


def update(path: Path, cases: Iterable[Case] = (), **parts: Any) -> None:
    """Add cases to a stage's file in place of those of the same name, and set other parts."""
    made = datetime.now(UTC).isoformat(timespec="seconds")
    before = load(path) or Results(path.stem, {}, threads=1, made=made)
    added = {(case.group, case.name): case for case in cases}
    kept = tuple(case for case in before.cases if (case.group, case.name) not in added)
    results.save(path, replace(before, cases=(*kept, *added.values()), **parts))


def machine(*, with_torch: bool = False) -> dict[str, str]:
    """Name the GPU and the versions on which the figures depend."""
    cupy = import_module("cupy")
    runtime, device = cupy.cuda.runtime, cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    torch = import_module("torch") if with_torch else None
    return {
        "GPU": properties["name"].decode(),
        "compute capability": str(device.compute_capability),
        "multiprocessors": str(properties["multiProcessorCount"]),
        "GPU memory": f"{properties['totalGlobalMem'] / 2**30:.1f} GiB",
        **nvidia_smi(),
        "CUDA": dotted(runtime.runtimeGetVersion()),
        "CUDA of the driver": dotted(runtime.driverGetVersion()),
        "cuBLAS": str(cupy.cuda.cublas.getVersion(cupy.cuda.device.get_cublas_handle())),
        "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "CuPy": cupy.__version__,
        "fastlstm": fastlstm.__version__,
        "python": platform.python_version(),
        "processor": f"{diagnostics.processor()}, {diagnostics.usable_cores()} cores",
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "not set"),
    } | ({"torch": torch.__version__, "CUDA of torch": str(torch.version.cuda),
          "cuDNN": str(torch.backends.cudnn.version())} if torch else {})  # fmt: skip


def dotted(number: int) -> str:
    """Turn CUDA's 13020 into 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def nvidia_smi() -> dict[str, str]:
    """Ask for the driver's release, the clocks and the power limit."""
    fields = ["driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"driver": "unknown, nvidia-smi does not answer"}
    return dict(zip(["driver", *fields[1:]], done.stdout.splitlines()[0].split(", "), strict=False))


def main(arguments: list[str]) -> int:
    what, first, *rest = arguments
    if what == "step":
        before = load(Path(first))
        new = dict(zip(("name", "result", "seconds", "remark"), rest, strict=True))
        update(Path(first), steps=(*(before.steps if before else ()), new))
        return 0
    stages = [stage for path in (first, *rest) if (stage := load(Path(path)))]
    print("\n\n".join(part for stage in stages for part in (f"### Stage {stage.name}", *report.text(stage))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
