"""What is here: the version, the backends and why one is missing, processor, threads, caches, GPU."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastlstm import __version__, dispatch
from fastlstm.backends.cpu_limits import usable_cores
from fastlstm.errors import BackendError

__all__ = ["backends", "describe", "describe_for_others"]

_PACKAGES = ("numpy", "numba", "llvmlite", "safetensors", "cupy-cuda12x", "cupy-cuda13x")


def backends() -> dict[str, str | None]:
    """Name of each backend, with None if it runs here, else the reason why it does not."""
    found: dict[str, str | None] = {}
    for name in dispatch.BACKENDS:
        try:
            dispatch.backend_named(name)
        except (BackendError, ImportError) as error:
            found[name] = str(error)
        else:
            found[name] = None
    return found


def describe() -> dict[str, str]:
    """Everything that a report of a problem or of a measurement should name, as text."""
    result = {"fastlstm": __version__, "python": f"{platform.python_version()} on {platform.platform()}"}
    result |= {name: found for name in _PACKAGES if (found := _version(name)) is not None}
    for name, reason in backends().items():
        result[f"backend {name}"] = "runs here" if reason is None else f"missing: {reason}"
    result["processor"] = f"{processor()}, {usable_cores()} of {os.cpu_count()} cores usable"
    if result["backend cpu"] == "runs here":
        result |= _compiled()
    if result["backend cuda"] == "runs here":
        result["GPU"] = _gpu()
    return result


def describe_for_others() -> dict[str, str]:
    """The same for files that are passed on, without what is the user's own affair: folders, the system's release."""
    public = {name: text for name, text in describe().items() if name != "kernel cache"}
    return public | {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}


def processor() -> str:
    """Name of the processor, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _compiled() -> dict[str, str]:
    threads = import_module("fastlstm.backends.threads")
    size = import_module("fastlstm.kernels.cpu.vector").VECTOR_BYTES
    plain = import_module("fastlstm.kernels.cpu.jit").PLAIN
    cache = "none: plain kernels are compiled in every process"
    if not plain:
        cache = import_module("fastlstm.kernels.cpu.kernel_cache").describe()
    return {
        "threads": threads.describe_num_threads(),
        "vectors": f"{8 * size} bits: {size // 4} float32 or {size // 8} float64",
        "kernel cache": cache,
    } | ({"compiler": f"plain njit: {plain}"} if plain else {})


def _gpu() -> str:
    cupy: Any = import_module("cupy")
    device = cupy.cuda.Device()
    properties = cupy.cuda.runtime.getDeviceProperties(device.id)
    return (
        f"{properties['name'].decode()}, compute capability {device.compute_capability},"
        f" driver {cupy.cuda.runtime.driverGetVersion()}, CUDA {cupy.cuda.runtime.runtimeGetVersion()}"
    )
