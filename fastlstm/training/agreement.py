"""What the processes of a training run must have in common, as text that they compare.

Where they differ, parameters come apart silently, or one process waits for a message that no other sends.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.cell import real
from fastlstm.dispatch import kind_of
from fastlstm.training import tied
from fastlstm.training.loop import Run
from fastlstm.training.model import Model
from fastlstm.training.optimisers import Optimiser
from fastlstm.training.samples import Samples

__all__ = ["fingerprint"]

# Options that decide the numbers. `progress` and `callback` may differ, such as a progress bar in process 0 alone.
OPTIONS = ("epochs", "batch_size", "shuffle", "patience", "clip_norm", "recompute")


class Sum:
    """The CRC-32 of the numbers of some arrays, one after another, and their dtypes."""

    def __init__(self) -> None:
        self.value, self.dtypes = 0, dict[str, None]()

    def add(self, array: Array) -> None:
        """Take one array more, in the order of its indices."""
        host = array if kind_of("array", array).library == "numpy" else array.get()
        self.value = zlib.crc32(np.ascontiguousarray(host).data, self.value)
        self.dtypes[str(host.dtype)] = None

    def __str__(self) -> str:
        return f"{'/'.join(self.dtypes)} of CRC-32 {self.value:08x}"


def fingerprint(run: Run, data: Samples, held_out: Samples | None, validation: Any) -> dict[str, str]:
    """Describe model, options and data of a run; `validation` is as :func:`fastlstm.training.fit` was given it."""
    found = {name: repr(getattr(run, name)) for name in OPTIONS}
    # Functions cannot be compared: the rates are those of process 0.
    found["schedule"] = repr(run.schedule) if isinstance(run.schedule, str) else "a function"
    found |= {_of_head("loss", run.model, name): _described(loss) for name, loss in run.losses.items()}
    found |= _of_model(run.model) | _of_optimiser(run.optimiser)
    found["validation"] = "data" if held_out is not None else repr(None if validation is None else real(validation))
    found |= _of_data("", data)
    if held_out is not None:
        found |= _of_data("validation's ", held_out)
    return found


def _of_head(kind: str, model: Model, name: str) -> str:
    return kind if model.single_head else f"{kind} of {name}"


def _of_model(model: Model) -> dict[str, str]:
    params = dict(model.params)
    first = tied.first_names(params)
    found = {name: repr(lstm).partition("  #")[0] for name, lstm in model.lstms.items()}
    found |= {"heads": ", ".join(model.heads), "output": repr(model.output), "scale": repr(model.scale)}
    # In their order, in which the norm of the gradients is summed.
    found["parameters"] = ", ".join(params)
    for name, value in params.items():
        tie = "" if first[name] == name else f", the same as {first[name]}"
        found[name] = f"{kind_of(name, value).library} {value.dtype} of shape {tuple(value.shape)}{tie}"
    scaler = {} if model.scaler is None else model.scaler.arrays
    found["scaler"] = _checksum(scaler[name] for name in sorted(scaler)) if scaler else "None"
    return found


def _of_optimiser(optimiser: Optimiser) -> dict[str, str]:
    """Describe an optimiser with its state: it is not sent to the other processes, as the parameters are."""
    found = {"optimiser": type(optimiser).__name__}
    for name, value in vars(optimiser).items():
        if name not in {"_source", "_seen", "_first", "_slots"}:
            found[f"optimiser's {name.strip('_')}"] = _described(value)
    for slot, arrays in optimiser._slots.items():
        found[f"optimiser's {slot}"] = _checksum(value for _, value in sorted(arrays.items()))
    return found


def _of_data(prefix: str, data: Samples) -> dict[str, str]:
    found = {f"{prefix}number of sequences": str(data.count), f"{prefix}number of steps": str(data.steps)}
    sums = dict[str, Sum]()
    for name, array in data.contents():
        sums.setdefault(f"{prefix}{name}", Sum()).add(array)
    return found | {name: str(value) for name, value in sums.items()}


def _checksum(arrays: Iterable[Array]) -> str:
    found = Sum()
    for array in arrays:
        found.add(array)
    return str(found)


def _described(value: Any) -> str:
    """Describe a function or an option without the address of an object, which each process has its own of."""
    if isinstance(value, functools.partial):
        options = [_described(option) for option in value.args]
        options += [f"{name}={_described(option)}" for name, option in value.keywords.items()]
        return f"{_described(value.func)}({', '.join(options)})"
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_described, value))})"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{name}: {_described(value[name])}' for name in sorted(value, key=str))})"
    if value is None or isinstance(value, bool | int | float | str | np.generic):
        return repr(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"array {_checksum([value])}"
    name: str = getattr(value, "__qualname__", type(value).__qualname__)
    return name
