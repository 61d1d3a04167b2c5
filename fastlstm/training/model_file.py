"""Files of whole models: those of :mod:`fastlstm.storage`, with the parameters of all parts and a description of them.

The tensors are the parameters under the names that they have in :attr:`fastlstm.training.Model.params`, and those of
the scaler under ``scaler.``. The description stands in the metadata under ``fastlstm.training.Model``, as JSON::

    {"format": 1, "lstms": [{"cell": {...}, "dropout_key": null}], "listed": false, "batch_first": false,
     "heads": [{"name": "head", "in": 8, "out": 1, "bias": true}], "single_head": true,
     "output": "last", "scale": true, "scaled": ["head"], "sha256": "..."}

``scaled`` has the heads with targets that are scaled, and is null if nothing was measured. The digest, and what is held
against what before anything is read, are those of :mod:`fastlstm.storage`.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fastlstm import checks, storage
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.errors import ModelFileError
from fastlstm.lstm import LSTM
from fastlstm.stored import on_host
from fastlstm.training.linear import Linear
from fastlstm.training.scaler import Scaler

if TYPE_CHECKING:
    from fastlstm.training.model import Model

__all__ = ["LONGEST_NAME", "is_name", "load", "save"]

KEY = "fastlstm.training.Model"
FIELDS = {
    1: {
        "format", "lstms", "listed", "batch_first", "heads", "single_head", "output", "scale", "scaled", "sha256",
    }
}  # fmt: skip
LONGEST_NAME = 100  # characters of a head's
MOST_FEATURES = 2**31
_MISSING = "the metadata of fastlstm.training.Model is missing; for a single LSTM, use LSTM.load"


def is_name(name: Any) -> bool:
    """Whether this can be the name of a head: its parameters can be mistaken for no others."""
    return (
        isinstance(name, str)
        and re.fullmatch(rf"[A-Za-z0-9_]{{1,{LONGEST_NAME}}}", name) is not None
        and name not in ("x", "scaler")
        and not name.startswith("lstm")
    )


def save(path: str | os.PathLike[str] | BinaryIO, model: Model) -> None:
    """Write a model; see :meth:`fastlstm.training.Model.save`."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    lstms: list[dict[str, Any]] = []
    for name, lstm in model.lstms.items():
        given = checks.params(lstm.cell, lstm.params)
        tensors |= {f"{name}.{key}": on_host(key, value) for key, value in given.items()}
        draws_masks = lstm.cell.dropout and lstm.cell.num_layers > 1
        lstms.append({"cell": lstm.cell.describe(), "dropout_key": lstm._dropout_key if draws_masks else None})
    heads: list[dict[str, Any]] = []
    for name, head in model.heads.items():
        weight, bias = head._checked_params()
        tensors[f"{name}.weight"] = on_host("weight", weight)
        if bias is not None:
            tensors[f"{name}.bias"] = on_host("bias", bias)
        heads.append({"name": name, "in": weight.shape[1], "out": weight.shape[0], "bias": bias is not None})
    scaled = None
    if model.scaler is not None:
        scaled = list(model.scaler.heads)
        tensors |= {f"scaler.{key}": on_host(key, value) for key, value in model.scaler.arrays.items()}
    description = {
        "format": 1, "lstms": lstms, "listed": "lstm" not in model.lstms, "batch_first": model.batch_first,
        "heads": heads, "single_head": model.single_head, "output": model.output, "scale": model.scale,
        "scaled": scaled,
    }  # fmt: skip
    storage.write(path, tensors, KEY, description, _check_header)


def load(
    path: str | os.PathLike[str] | BinaryIO,
) -> tuple[dict[str, LSTM], dict[str, Linear], bool, str, bool, Scaler | None]:
    """Read a model; return the arguments of ``Model._assemble``."""
    header, tensors = storage.read(path, _check_header)
    parts: dict[str, dict[str, Array]] = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = value
    said = header.description
    lstms = {}
    for (name, cell), fields in zip(header.meaning.items(), said["lstms"], strict=True):
        lstms[name] = LSTM._from(cell, parts[name], said["batch_first"], fields["dropout_key"] or 0)
    heads = {}
    for fields in said["heads"]:
        heads[fields["name"]] = head = Linear.__new__(Linear)
        head.params = parts[fields["name"]]
    scaler = None if said["scaled"] is None else Scaler(parts["scaler"])
    if scaler is not None:
        _check_scaler(scaler)
    return lstms, heads, said["single_head"], said["output"], said["scale"], scaler


def _check_scaler(scaler: Scaler) -> None:
    for name, value in scaler.arrays.items():
        if not np.isfinite(value).all() or (name.endswith(".deviation") and not (value > 0).all()):
            raise ModelFileError("it is not a model file, or it is damaged: its scaler cannot scale")


def _check_header(header: bytes, size: int | None) -> storage.Header:
    """Hold the header of a file of `size` bytes, if that is known, against all that it has to be."""
    entries, said = storage.parse_header(header, KEY, FIELDS, _MISSING)
    flags = ("listed", "batch_first", "single_head", "scale")
    # A string that is not one of these may be a list, which is in no set.
    if said["output"] not in ["last", "mean", "sequence"] or not all(isinstance(said[name], bool) for name in flags):
        raise _broken()
    most = len(entries)
    cells = _cells(said, most)
    first, last = next(iter(cells.values())), list(cells.values())[-1]
    layout: storage.Layout = {}
    for name, cell in cells.items():
        layout |= {f"{name}.{key}": value for key, value in storage.layout_of(cell, most).items()}
    outputs = _heads(said, last, most, layout)
    _scaled(said, first, outputs, layout)
    length = storage.spans(entries, layout, None if size is None else size - storage.PREFIX - len(header))
    sha256 = said.pop("sha256")
    return storage.Header(cells, layout, said, sha256, length)


def _cells(said: dict[str, Any], most: int) -> dict[str, Cell]:
    """Return the LSTMs' cells by name, which fit each other."""
    lstms = said["lstms"]
    if not isinstance(lstms, list) or not 1 <= len(lstms) <= (most if said["listed"] else 1):
        raise _broken()
    cells: dict[str, Cell] = {}
    before: Cell | None = None
    for k, fields in enumerate(lstms):
        if not isinstance(fields, dict) or fields.keys() != {"cell", "dropout_key"}:
            raise _broken()
        key = fields["dropout_key"]
        if key is not None and (type(key) is not int or key < 0):
            raise _broken()
        cell = storage.cell_from(fields["cell"])
        if before is not None and (cell.input_size != before.output_size or cell.dtype != before.dtype):
            raise _broken()
        cells[f"lstm{k}" if said["listed"] else "lstm"] = before = cell
    return cells


def _heads(said: dict[str, Any], last: Cell, most: int, layout: storage.Layout) -> dict[str, int]:
    """Enter the heads into the layout; return their sizes of output."""
    heads = said["heads"]
    if not isinstance(heads, list) or not 1 <= len(heads) <= (1 if said["single_head"] else most):
        raise _broken()
    outputs: dict[str, int] = {}
    for fields in heads:
        if not isinstance(fields, dict) or fields.keys() != {"name", "in", "out", "bias"}:
            raise _broken()
        name, columns, rows = fields["name"], fields["in"], fields["out"]
        if not is_name(name) or name in outputs or not isinstance(fields["bias"], bool):
            raise _broken()
        if type(columns) is not int or columns != last.output_size or type(rows) is not int:
            raise _broken()
        if not 1 <= rows <= MOST_FEATURES:
            raise _broken()
        outputs[name] = rows
        layout[f"{name}.weight"] = (last.dtype, (rows, columns))
        if fields["bias"]:
            layout[f"{name}.bias"] = (last.dtype, (rows,))
    return outputs


def _scaled(said: dict[str, Any], first: Cell, outputs: dict[str, int], layout: storage.Layout) -> None:
    """Enter the scaler into the layout."""
    scaled = said["scaled"]
    if scaled is None:
        return
    if not said["scale"] or not isinstance(scaled, list) or not all(isinstance(name, str) for name in scaled):
        raise _broken()
    if len(set(scaled)) != len(scaled) or not set(scaled) <= outputs.keys():
        raise _broken()
    for name, columns in {"x": first.input_size, **{name: outputs[name] for name in scaled}}.items():
        layout[f"scaler.{name}.mean"] = layout[f"scaler.{name}.deviation"] = (first.dtype, (columns,))


def _broken() -> ModelFileError:
    return ModelFileError("its description of the model is broken")
