"""Code that the demos share: options and results, the array library, data files, compiling, and pictures."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastlstm import LSTM, dispatch
from fastlstm.backends.base import Array
from fastlstm.errors import ArgumentError, BackendError
from fastlstm.training import Linear

__all__ = [
    "DEVICES",
    "DemoResult",
    "Options",
    "array_library",
    "compile_first",
    "load_data",
    "new_figure",
    "save_and_load",
    "to_numpy",
]

DEVICES = {"cpu": "numpy", "cuda": "cupy"}


class Options(NamedTuple):
    """The arguments of a demo's ``run``."""

    xp: ModuleType  # numpy or cupy
    seed: int
    out: Path  # an existing folder
    batches: int | None  # batches to train on; None for the demo's default


class DemoResult(NamedTuple):
    """The report to print, the scores in it by name, and the files written."""

    report: str
    scores: dict[str, float]
    files: tuple[Path, ...]


def array_library(device: str, packages: tuple[str, ...]) -> ModuleType:
    """Return the array library of `device`, after checking that it and the demo's `packages` are installed.

    Raises
    ------
    ArgumentError
        If there is no such device.
    BackendError
        If something is missing; the message says what to install.
    """
    if device not in DEVICES:
        raise ArgumentError(f"there is no device {device!r}; choose one of {', '.join(DEVICES)}")
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise BackendError(f'the demo needs {", ".join(missing)}: pip install "fastlstm[demo]"')
    if device != "cpu":
        dispatch.backend_named(device)  # raises an error that says what to install
    return import_module(DEVICES[device])


def load_data(name: str) -> dict[str, Any]:
    """Load the arrays of a file in the folder ``data``."""
    with np.load(Path(__file__).parent / "data" / name) as arrays:
        return dict(arrays)


def compile_first(lstm: LSTM, x: Array) -> None:
    """Compile what training on inputs shaped like `x` needs, so that a progress bar does not count it as a step."""
    other = copy.copy(lstm)  # a pass with dropout advances the masks
    y, _, tape = other.forward(x)
    other.backward(tape, y)


def save_and_load(options: Options, name: str, lstm: LSTM, head: Linear) -> tuple[LSTM, Linear, tuple[Path, Path]]:
    """Save an LSTM and a linear layer, and return what the two files hold."""
    files = options.out / f"{name}-lstm.safetensors", options.out / f"{name}-head.npz"
    lstm.save(files[0])
    np.savez(files[1], **head.to(np).params)
    with np.load(files[1]) as saved:
        head.params = {key: options.xp.asarray(saved[key]) for key in saved}
    return LSTM.load(files[0]).to(options.xp), head, files


def to_numpy(array: Array) -> Any:
    """Copy a NumPy or CuPy array to a NumPy array."""
    return np.asarray(array.get() if hasattr(array, "get") else array)


def new_figure(width: float, height: float) -> Any:
    """Return an empty Matplotlib figure, in inches, that leaves pyplot and its settings alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
