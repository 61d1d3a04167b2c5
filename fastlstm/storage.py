"""Model files: the safetensors format, checked before it is read and replaced whole when it is written.

The parameters are the file's tensors, under their names in :mod:`fastlstm.parameters`, so every tool for safetensors
reads them. The rest of the model is in the metadata under ``fastlstm``, as JSON::

    {"format": 2, "cell": {...}, "batch_first": false, "dropout_key": 123, "sha256": "..."}

``cell`` is :meth:`fastlstm.cell.Cell.describe`. ``dropout_key`` determines the masks of the next forward pass in
training; each pass adds one to it. ``sha256`` is the digest of the rest of this description (as JSON with sorted keys
and no blanks) followed by the bytes of all tensors, ordered by name; it finds a flipped bit in the weights, which the
format itself would not. The same model always gives the same bytes.

Format 1 has no ``dropout_key``. A model without dropout masks is written in format 1, which every release reads; a
model with masks is written in format 2. One more field is the only difference, but the number is higher because a
reader of format 1 refuses unknown fields, and reports a higher number as a file of a newer release. A reader that
ignored the field would repeat masks silently.

Nothing in a file is trusted: the size of the header is limited, and the header is parsed and compared with the sizes in
the description and with the size of the file, before the rest is read. Nothing in a file is ever executed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from fastlstm import files, parameters
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, DTypeError, ModelFileError, shown

__all__ = ["Header", "SavedModel", "cell_from", "layout_of", "load", "parse_header", "read", "save", "spans", "write"]

FIELDS = {  # of the description, by format
    1: {"format", "cell", "batch_first", "sha256"},
    2: {"format", "cell", "batch_first", "dropout_key", "sha256"},
}
KEY = "fastlstm"
CODES = {"float32": "F32", "float64": "F64"}  # dtypes, and what safetensors calls them
PREFIX = 8  # bytes before the header: its length, little-endian
MAX_HEADER = 2**20  # bytes: about 10,000 tensors, and parsing it cannot take much memory
MAX_DIGITS = 19  # of an integer in the header: 64 bits; Python's would have no end


class SavedModel(NamedTuple):
    """The content of a model file."""

    cell: Cell
    params: dict[str, np.ndarray[Any, Any]]  # writeable arrays in native byte order that own their memory
    batch_first: bool
    dropout_key: int | None  # None in format 1


# Of the tensors of a file, by name.
Layout = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]


class Header(NamedTuple):
    """The header of a valid file."""

    meaning: Any  # what the description stands for
    layout: Layout
    description: dict[str, Any]  # all that stands in the metadata, but for the digest
    sha256: str
    length: int  # bytes of all tensors


# Holds the header of a file, and the file's size if that is known, against all that it has to be.
Check = Callable[[bytes, int | None], Header]


def save(
    path: str | os.PathLike[str] | BinaryIO,
    cell: Cell,
    params: Mapping[str, np.ndarray[Any, Any]],
    batch_first: bool,
    dropout_key: int | None = None,
) -> None:
    """Write a model to a file, all of it or nothing, or to a file object.

    At a path, the file is written beside its destination, synced, and renamed over it; then the folder is synced.
    If anything fails before the renaming, an earlier file is unchanged and the temporary file is removed, also after an
    interrupt at any line of code (a killed process leaves it behind, as ``.fastlstm-*.tmp``).

    A file object is written to from its current position on, and is neither flushed, synced nor closed. An error may
    leave a part of the model in it, which :func:`load` refuses.

    Parameters
    ----------
    path : str, path-like or binary file object
        Where to write. An existing file is replaced, and its permissions are kept; a symbolic link stays one,
        and the file that it names is replaced.
    cell : Cell
        The model's description.
    params : mapping of str to numpy.ndarray
        The parameters, of the names, shapes and dtype that `cell` asks for.
    batch_first : bool
        Whether the model's input and output are (B, T, features).
    dropout_key : int, optional
        Determines the next dropout masks, at least 0 and below 10**19; None for a model without masks.

    Raises
    ------
    ArgumentError
        If `path` is neither a path nor a binary file object that can be written to.
    OSError
        If the file cannot be written, or `path` is there and is no regular file.
    ModelFileError
        If there are too many parameters for the header of a model file.
    """
    tensors = {name: params[name] for name in parameters.shapes(cell)}
    description: dict[str, Any] = {"format": 1, "cell": cell.describe(), "batch_first": batch_first}
    if dropout_key is not None:
        description |= {"format": 2, "dropout_key": dropout_key}
    write(path, tensors, KEY, description, _check_header)


def write(
    path: str | os.PathLike[str] | BinaryIO,
    tensors: Mapping[str, np.ndarray[Any, Any]],
    key: str,
    description: dict[str, Any],
    check: Check,
) -> None:
    """Write tensors and their description, which goes with a digest into the metadata under `key`; see :func:`save`."""
    file = files.file_object(path, "write")
    target = files.path_name(path) if file is None else None
    # Copies, so that a thread which trains on meanwhile cannot come between the digest and the bytes.
    copies = {name: np.array(t, dtype=t.dtype.newbyteorder("<"), order="C") for name, t in tensors.items()}
    whole = description | {"sha256": _digest(description, copies)}
    data = safetensors.numpy.save(copies, metadata={key: json.dumps(whole)})
    length = _header_length(data[:PREFIX], len(data))
    check(data[PREFIX : PREFIX + length], len(data))  # what load would refuse is never written
    if target is None:
        files.write(file, data)
    else:
        files.replace(target, data)


def load(path: str | os.PathLike[str] | BinaryIO) -> SavedModel:
    """Read a model from a file that :func:`save` wrote.

    Parameters
    ----------
    path : str, path-like or binary file object
        The file. A file object is read from its current position to its end, and need not be seekable.

    Returns
    -------
    SavedModel
        The model's description, its parameters, and what else determines its results.

    Raises
    ------
    ArgumentError
        If `path` is neither a path nor a binary file object that can be read from.
    ModelFileError
        If the file is broken, truncated or foreign. Until the header is found to describe a model of the file's size,
        only the header is read (at most 1 MB; a malicious one takes 30 MB while it is parsed); after that, at most
        twice the file's size is allocated. The size of a file object is not known before its end: it is read in pieces,
        so that at most twice its size is allocated.
    OSError
        If the file cannot be read; a missing one is a FileNotFoundError.
    """
    header, params = read(path, _check_header)
    cell, batch_first, dropout_key = header.meaning
    return SavedModel(cell, params, batch_first, dropout_key)


def read(path: str | os.PathLike[str] | BinaryIO, check: Check) -> tuple[Header, dict[str, np.ndarray[Any, Any]]]:
    """Read a file that :func:`write` wrote: its checked header, and its tensors; see :func:`load`."""
    file = files.file_object(path, "read")
    if file is not None:
        return _read(file, None, "the content of the file object", check)
    name = files.path_name(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ModelFileError(f"{name!r} is not a model file: it is not a regular file")

    def from_descriptor(descriptor: int) -> tuple[Header, dict[str, np.ndarray[Any, Any]]]:
        return _read(open(descriptor, "rb", closefd=False), os.fstat(descriptor).st_size, repr(name), check)

    # Should it have become a named pipe since it was looked at, this does not wait for a writer.
    return files.with_descriptor(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0), from_descriptor)


def _read(file: Any, size: int | None, name: str, check: Check) -> tuple[Header, dict[str, np.ndarray[Any, Any]]]:
    """Read a file of `size` bytes, or, if that is None, to its end."""
    try:
        return _read_checked(file, size, check)
    except ModelFileError as error:
        raise ModelFileError(f"{name} is not a model file, or it is damaged: {error}") from error


def _read_checked(file: Any, size: int | None, check: Check) -> tuple[Header, dict[str, np.ndarray[Any, Any]]]:
    prefix = files.read(file, PREFIX)
    length = _header_length(prefix, size)
    header = files.read(file, length)
    if len(header) != length:
        raise ModelFileError("it ends within the header")
    found = check(header, size)
    rest = files.read(file, found.length + 1)  # and nothing may come after it
    if len(rest) != found.length:
        there = "more" if len(rest) > found.length else len(rest)
        changed = "it was cut off or changed while it was read: " if size is not None else ""
        raise ModelFileError(f"{changed}its tensors take {found.length} bytes, and {there} are there")
    data = b"".join([prefix, header, rest])
    del rest
    try:
        stored = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise ModelFileError("safetensors cannot read it") from error
    del data  # the peak is here: the file and one copy of its tensors
    # The library takes the bytes for native ones, which they are on a little-endian machine only.
    params = {
        name: stored.pop(name).view(dtype.newbyteorder("<")).astype(dtype) for name, (dtype, _) in found.layout.items()
    }
    if _digest(found.description, params) != found.sha256:
        raise ModelFileError("the checksum does not fit its contents")
    return found, params


def _header_length(prefix: bytes, size: int | None) -> int:
    """Length of the header, given the first bytes of a file and its size if it is known, both of them plausible."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX or length < 2 or (size is not None and length > size - PREFIX):
        raise ModelFileError("it does not start with a safetensors header, or ends within it")
    if length > MAX_HEADER:
        raise ModelFileError(f"its header is longer than {MAX_HEADER} bytes")
    return length


def parse_header(
    header: bytes, key: str, fields: Mapping[int, set[str]], missing: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parse a header: its entries, and the description in its metadata under `key`, of one of the formats `fields`."""
    entries = _parse(header, "header")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or key not in metadata:
        raise ModelFileError(missing)
    description = _parse(metadata[key], "metadata")
    number = description.get("format")
    if type(number) is int and number > max(fields):
        raise ModelFileError("it was written by a newer version of fastlstm")
    if type(number) is not int or description.keys() != fields.get(number):
        raise ModelFileError("its metadata is not that of fastlstm")
    if not isinstance(description["sha256"], str):
        raise ModelFileError("its metadata is not that of fastlstm")
    return entries, description


def _check_header(header: bytes, size: int | None) -> Header:
    """Check the header of a file of `size` bytes, if that is known, against its description."""
    entries, description = parse_header(
        header,
        KEY,
        FIELDS,
        "the metadata of fastlstm.LSTM is missing; LSTM.load_torch reads weights of PyTorch, and"
        " fastlstm.training.Model.load its own files",
    )
    cell, batch_first = cell_from(description["cell"]), description["batch_first"]
    if not isinstance(batch_first, bool):
        raise ModelFileError("its metadata is not that of fastlstm")
    dropout_key = description.get("dropout_key")
    if description["format"] > 1 and (type(dropout_key) is not int or dropout_key < 0):
        raise ModelFileError("its metadata is not that of fastlstm")
    layout = layout_of(cell, len(entries))
    length = spans(entries, layout, None if size is None else size - PREFIX - len(header))
    sha256 = description.pop("sha256")
    return Header((cell, batch_first, dropout_key), layout, description, sha256, length)


def cell_from(fields: Any) -> Cell:
    """Return the cell that is described in a file."""
    # NumPy would take many things for a dtype, some of them large.
    if not isinstance(fields, dict) or fields.get("dtype") not in list(CODES):
        raise ModelFileError("its description of the model is broken")
    unknown = sorted(fields.keys() - {field.name for field in dataclasses.fields(Cell) if field.compare})
    if unknown:
        raise ModelFileError(f"this version does not know {', '.join(map(shown, unknown))} of a model's description")
    try:
        return Cell(**fields)
    except (TypeError, ArgumentError, DTypeError) as error:
        raise ModelFileError("its description of the model is broken, or of a newer version") from error


def layout_of(cell: Cell, most: int) -> Layout:
    """Return the parameters of a cell, at most as many as a file has tensors."""
    # Counted first: the description might claim a billion layers, whose names alone would fill the memory.
    if most < cell.num_layers * cell.num_directions * len(parameters.direction_names(cell, 0, 0)):
        raise ModelFileError("its tensors are not those of the model that it describes")
    return {name: (cell.dtype, shape) for name, shape in parameters.shapes(cell).items()}


def spans(entries: dict[str, Any], layout: Layout, there: int | None) -> int:
    """Check that `entries` are those of `layout`, no more and no less, side by side; return how many bytes.

    If `there` is not None, it is the number of bytes that have to be there.
    """
    if len(entries) != len(layout):
        raise ModelFileError("its tensors are not those of the model that it describes")
    found = []
    for name, (dtype, shape) in layout.items():
        entry = entries.get(name)
        expected = {"dtype": CODES[dtype.name], "shape": list(shape)}
        span = entry.pop("data_offsets", None) if isinstance(entry, dict) else None
        if entry != expected:
            raise ModelFileError("its tensors are not those of the model that it describes")
        if not isinstance(span, list) or [type(offset) for offset in span] != [int, int]:
            raise ModelFileError("its tensors have no place")
        found.append((span[0], span[1], math.prod(shape) * dtype.itemsize))
    position = 0
    for begin, end, length in sorted(found):
        if begin != position or end != begin + length:
            raise ModelFileError("its tensors overlap, leave gaps, or have other lengths than their shapes")
        position = end
    if there is not None and position != there:
        raise ModelFileError(f"its tensors take {position} bytes, and {there} are there")
    return position


def _parse(text: Any, what: str) -> dict[str, Any]:
    """Parse a JSON object, strictly: UTF-8, no name twice, no integer beyond 64 bits."""
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, object_pairs_hook=_unique, parse_int=_integer)
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"its {what} is not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"its {what} is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return result


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("an integer is too long")
    return int(digits)


def _digest(description: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode(), usedforsecurity=False)
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).data)
    return digest.hexdigest()
