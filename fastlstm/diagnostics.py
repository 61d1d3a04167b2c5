"""The facts that ``fastlstm info`` and ``fastlstm check`` print.

``info``: versions, backends and the reason why one is missing, processor, threads, caches, GPU. ``check``: the largest
difference between every backend that runs here and the float64 reference, over a grid of cases.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from fastlstm import __version__, dispatch
from fastlstm.backends.cpu_limits import usable_cores
from fastlstm.errors import BackendError
from fastlstm.lstm import LSTM

__all__ = ["BOUNDS", "Agreement", "Case", "backends", "cases", "compare", "describe", "describe_for_others"]

_PACKAGES = ("numpy", "numba", "llvmlite", "safetensors", "cupy-cuda12x", "cupy-cuda13x")


def backends() -> dict[str, str | None]:
    """Return the name of each backend, with None if it runs here, else the reason why it does not."""
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
    """Return, as text, what a report of a problem or a measurement should contain."""
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
    """Return the same for files that are published, without private facts: folders, the release of the system."""
    public = {name: text for name, text in describe().items() if name != "kernel cache"}
    return public | {"python": f"{platform.python_version()} on {platform.system()} {platform.machine()}"}


def processor() -> str:
    """Return the name of the processor, as the system reports it."""
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


# --- agreement with the reference -----------------------------------------------------------------------------

# Largest error allowed, as a share of the largest true value of its array. Float32 keeps 24 bits (6e-8), and
# the longest sums here have a few hundred terms of either sign; float64 keeps 53 bits (1e-16).
BOUNDS = {"float32": 1e-5, "float64": 1e-13}


class Case(NamedTuple):
    """One model and batch to compare backends on."""

    steps: int
    batch: int
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    bias: bool
    ragged: bool
    variant: Mapping[str, Any] = MappingProxyType({})  # fields of the cell


# Of the family, a few that need other kernels or routines.
VARIANTS: tuple[dict[str, Any], ...] = (
    {"peephole": True},
    {"coupled": True, "clip": 0.5, "activations": ("hard_sigmoid", "softsign", "identity")},
    {"forget_gate": False, "block_size": 2, "truncated": True, "activations": ("sigmoid", "1997", "1997")},
    {"proj_size": 5, "cell_clip": 0.5},
    {"peephole": True, "block_size": 2},
)


class Agreement(NamedTuple):
    """The largest error of one quantity on one backend, over all cases."""

    backend: str
    dtype: str
    quantity: str
    error: float
    case: Case

    @property
    def within_bound(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return bool(self.error <= BOUNDS[self.dtype])


def cases() -> Iterator[Case]:
    """Yield the grid: sizes of one, odd sizes and whole vectors, layers, directions, bias, ragged batches; variants."""
    sizes = [(1, 1, 1, 1), (3, 2, 5, 3), (7, 5, 4, 17), (12, 8, 16, 32), (9, 13, 3, 65)]
    for steps, batch, inputs, hidden in sizes:
        for num_layers, bidirectional in ((1, False), (1, True), (2, False), (3, True)):
            for bias, ragged in ((True, False), (False, True), (True, True)):
                yield Case(steps, batch, inputs, hidden, num_layers, bidirectional, bias, ragged)
    for variant in VARIANTS:
        yield Case(7, 5, 4, 18, 2, True, True, True, variant)


def compare(backend: str) -> list[Agreement]:
    """Compare one backend with the float64 reference; return the largest error of each quantity and dtype.

    Raises
    ------
    BackendError
        If there is no such backend, or it cannot run on this machine.
    """
    dispatch.backend_named(backend)
    worst: dict[tuple[str, str], Agreement] = {}
    library = import_module(dispatch.library_of(backend))
    for number, case in enumerate(cases()):
        for dtype in BOUNDS:
            for quantity, error in _errors(case, backend, library, dtype, seed=number).items():
                found = worst.get((dtype, quantity))
                if found is None or not error <= found.error:
                    worst[dtype, quantity] = Agreement(backend, dtype, quantity, error, case)
    return sorted(worst.values())


def _errors(case: Case, backend: str, library: Any, dtype: str, seed: int) -> dict[str, float]:
    """Run one case on the backend and on the reference; return the error of each quantity."""
    rng = np.random.default_rng(seed)
    model = LSTM(
        case.input_size, case.hidden_size, case.num_layers, case.bias, bidirectional=case.bidirectional, dtype=dtype,
        seed=rng, **case.variant,
    )  # fmt: skip
    features = model.cell.output_size
    rows = case.num_layers * model.cell.num_directions
    h_shape, c_shape = ((rows, case.batch, size) for size in (model.cell.h_size, case.hidden_size))
    drawn = {
        "x": (case.steps, case.batch, case.input_size), "dy": (case.steps, case.batch, features),
        "h0": h_shape, "c0": c_shape, "dh_n": h_shape, "dc_n": c_shape,
    }  # fmt: skip
    data = {name: rng.normal(size=shape).astype(dtype) for name, shape in drawn.items()}
    lengths = rng.integers(0, case.steps + 1, case.batch) if case.ragged else None
    exact = LSTM._from(
        model.cell.with_dtype("float64"), {name: p.astype("float64") for name, p in model.params.items()}, False
    )
    truth = _run(exact, "reference", {name: v.astype("float64") for name, v in data.items()}, lengths)
    found = _run(model.to(library), backend, {name: library.asarray(v) for name, v in data.items()}, lengths)
    return {name: _error(_host(found[name]), truth[name]) for name in truth}


def _run(model: LSTM, backend: str, data: dict[str, Any], lengths: Any) -> dict[str, Any]:
    """Return output, states and gradients by name; gradients of all layers and directions share a name."""
    with dispatch.use_backend(backend):
        y, (h_n, c_n), tape = model.forward(data["x"], (data["h0"], data["c0"]), lengths)
        grads = model.backward(tape, data["dy"], (data["dh_n"], data["dc_n"]))
    result = {"y": [y], "h_n": [h_n], "c_n": [c_n], "dx": [grads.x]}
    result |= {"dh0": [grads.state[0]], "dc0": [grads.state[1]]}
    for name, value in grads.params.items():
        result.setdefault("d" + name.partition("_l")[0], []).append(value)
    return result


def _host(values: list[Any]) -> list[Any]:
    return [value if isinstance(value, np.ndarray) else value.get() for value in values]


def _error(found: list[Any], truth: list[Any]) -> float:
    """Return the largest error of each array relative to its largest true value, over all arrays; NaN stays."""
    errors = [
        float(np.abs(f - t).max() / max(float(np.abs(t).max()), np.finfo(np.float32).tiny))
        for f, t in zip(found, truth, strict=True)
        if t.size
    ]
    return float(np.max(errors)) if errors else 0.0
