"""What both demos need and a reader of them may skip: what they return, and where they run."""

from __future__ import annotations

import copy
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from fastlstm import LSTM, dispatch
from fastlstm.backends.base import Array
from fastlstm.errors import ArgumentError, BackendError

__all__ = ["DEVICES", "DemoResult", "array_library", "compile_first"]

DEVICES = {"cpu": "numpy", "cuda": "cupy"}


class DemoResult(NamedTuple):
    """What a demo found: a report to print, the scores in it by name, and the files written."""

    report: str
    scores: dict[str, float]
    files: tuple[Path, ...]


def array_library(device: str, packages: tuple[str, ...]) -> ModuleType:
    """Return the array library of `device`, after a check that it and the demo's `packages` are there.

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
        dispatch.backend_named(device)  # raises with what to install
    return import_module(DEVICES[device])


def compile_first(lstm: LSTM, x: Array) -> None:
    """Compile what training on inputs of the shape of `x` needs, so that a progress bar does not count it as a step."""
    other = copy.copy(lstm)  # with dropout, a pass draws masks
    y, _, tape = other.forward(x)
    other.backward(tape, y)
