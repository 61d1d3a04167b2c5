"""What the programs of ``.ci/gpu`` share: the clock, the machine, and one JSON file for each stage.

A stage's file is replaced as a whole after each cell, so a run that is cut off keeps all finished cells. ``.ci/gpu``
calls this file to note the end of a step, and to print stages as Markdown:

    python benchmarks/gpu_common.py step OUTDIR/A.json NAME RESULT SECONDS REMARK
    python benchmarks/gpu_common.py page OUTDIR/A.json OUTDIR/B.json   # or short: without the kernels' names
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from readme import gpu as shown

import fastlstm
from fastlstm import diagnostics

SMI_FIELDS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"


def update(path: Path, **parts: Any) -> None:
    """Set parts of a stage's file and replace it; a reader never sees half a file."""
    begun = shown.load(path) or {
        "format": shown.FORMAT,
        "stage": path.stem,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(begun | parts, indent=1), encoding="utf-8")
    part.replace(path)


def step(path: Path, name: str, result: str, seconds: str, remark: str) -> None:
    """Append one step to a stage's file."""
    steps = (shown.load(path) or {}).get("steps", [])
    steps.append({"name": name, "result": result, "seconds": int(seconds), "remark": remark})
    update(path, steps=steps)


def machine(cupy: Any) -> dict[str, str]:
    """Name the GPU and the versions on which the figures depend, without importing torch."""
    runtime = cupy.cuda.runtime
    device = cupy.cuda.Device()
    properties = runtime.getDeviceProperties(device.id)
    found = {
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
        "TF32": "never in ours; on torch's side as each column says",
        "NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "not set"),
    }
    try:
        return found | {"torch": version("torch")}
    except PackageNotFoundError:
        return found


def dotted(number: int) -> str:
    """Turn CUDA's 13020 into 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def nvidia_smi() -> dict[str, str]:
    """Ask for the driver's release, the clocks and the power limit."""
    command = ["nvidia-smi", f"--query-gpu={SMI_FIELDS}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"driver": "unknown, nvidia-smi does not answer"}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(["driver", *SMI_FIELDS.split(",")[1:]], values, strict=False))


def elapsed(cupy: Any, call: Callable[[], Any]) -> tuple[float, float]:
    """Return a call's microseconds on the current stream by events, and on the host until it returns.

    The events enclose everything from the first launch to the last result, with the gaps in which the GPU waits for
    the host. The host's time ends before anything is waited for; it includes waiting for room in the launch queue.
    """
    start, end = cupy.cuda.Event(), cupy.cuda.Event()
    cupy.cuda.get_current_stream().synchronize()
    start.record()
    begin = time.perf_counter()
    call()
    host = time.perf_counter() - begin
    end.record()
    end.synchronize()
    return 1e3 * float(cupy.cuda.get_elapsed_time(start, end)), 1e6 * host


def one_line(error: BaseException) -> str:
    """Say in one line what went wrong."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


def main(arguments: list[str]) -> int:
    what, first, *rest = arguments
    if what == "step":
        step(Path(first), *rest)
    else:
        found = [content for path in (first, *rest) if (content := shown.load(Path(path)))]
        print("\n\n".join(part for content in found for part in shown.stage(content, short=what == "short")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
