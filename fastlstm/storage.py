"""Model files: the safetensors format, checked before it is read and replaced whole when it is written.

The parameters are the file's tensors, under their names in :mod:`fastlstm.parameters`, so every tool that reads
safetensors reads them. What the tensors do not show stands in the metadata under ``fastlstm``, as JSON::

    {"format": 1, "cell": {...}, "batch_first": false, "sha256": "..."}

``cell`` is :meth:`fastlstm.cell.Cell.describe`. ``sha256`` is the digest of the rest of this description (as JSON with
sorted keys and no blanks) followed by the bytes of all tensors, ordered by name; it finds a flipped bit in the weights,
which the format itself would not. The same model always gives the same bytes.

Nothing in a file is trusted: the header is capped, parsed and held against the sizes that the description gives
and against the file's own size, and only then is the rest read. Nothing in it is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from fastlstm import parameters
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, DTypeError, ModelFileError

__all__ = ["load", "save"]

FORMAT = 1
KEY = "fastlstm"
CODES = {"float32": "F32", "float64": "F64"}  # dtypes, and what safetensors calls them
PREFIX = 8  # bytes before the header: its length, little-endian
MAX_HEADER = 2**20  # bytes: about 10,000 tensors, and parsing it cannot take much memory
MAX_DIGITS = 19  # of an integer in the header: 64 bits; Python's would have no end


class _Header(NamedTuple):
    """What the header of a valid file says."""

    cell: Cell
    batch_first: bool
    description: dict[str, Any]  # all that stands in the metadata, but for the digest
    sha256: str


def save(
    path: str | os.PathLike[str], cell: Cell, params: Mapping[str, np.ndarray[Any, Any]], batch_first: bool
) -> None:
    """Write a model to a file, all of it or nothing.

    The file is written beside its destination, synced, and renamed over it; then the folder is synced. Whatever goes
    wrong before the renaming, an earlier file stays as it was, and the temporary file is removed (a killed
    process leaves it behind, as ``.fastlstm-*.tmp``).

    Parameters
    ----------
    path : str or path-like
        Where to write. An existing file is replaced, and its permissions are kept; a symbolic link stays one,
        and the file that it names is replaced.
    cell : Cell
        The model's description.
    params : mapping of str to numpy.ndarray
        The parameters, of the names, shapes and dtype that `cell` asks for.
    batch_first : bool
        Whether the model's input and output are (B, T, features).

    Raises
    ------
    OSError
        If the file cannot be written, or `path` is there and is no regular file.
    ModelFileError
        If there are too many parameters for the header of a model file.
    """
    # Copies, so that a thread which trains on meanwhile cannot come between the digest and the bytes.
    little = cell.dtype.newbyteorder("<")
    tensors = {name: np.array(params[name], dtype=little, order="C") for name in parameters.shapes(cell)}
    description: dict[str, Any] = {"format": FORMAT, "cell": cell.describe(), "batch_first": batch_first}
    description["sha256"] = _digest(description, tensors)
    data = safetensors.numpy.save(tensors, metadata={KEY: json.dumps(description)})
    length = _header_length(data[:PREFIX], len(data))
    _check_header(data[PREFIX : PREFIX + length], len(data))  # what load would refuse is never written
    _replace(os.path.realpath(os.fsdecode(path)), data)


def load(path: str | os.PathLike[str]) -> tuple[Cell, dict[str, np.ndarray[Any, Any]], bool]:
    """Read a model from a file that :func:`save` wrote.

    Parameters
    ----------
    path : str or path-like
        The file.

    Returns
    -------
    cell : Cell
        The model's description.
    params : dict of str to numpy.ndarray
        The parameters: writeable arrays in native byte order that own their memory.
    batch_first : bool
        As it was saved.

    Raises
    ------
    ModelFileError
        If the file is broken, truncated or foreign. Before the header was found to describe a model of just the
        file's size, that header alone has been read (at most 1 MB; a malicious one takes 30 MB while it is parsed);
        after that, at most twice the file's size is allocated.
    OSError
        If the file cannot be read; a missing one is a FileNotFoundError.
    """
    name = os.fsdecode(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ModelFileError(f"{name!r} is not a model file: it is not a regular file")
    with open(name, "rb", opener=_open_at_once) as file:
        try:
            return _read(file)
        except ModelFileError as error:
            raise ModelFileError(f"{name!r} is not a model file, or it is damaged: {error}") from error


def _open_at_once(name: str, flags: int) -> int:
    """Open a file; should it have become a named pipe since it was looked at, do not wait for a writer."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _read(file: BinaryIO) -> tuple[Cell, dict[str, np.ndarray[Any, Any]], bool]:
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(PREFIX)
    header = file.read(_header_length(prefix, size))
    cell, batch_first, description, sha256 = _check_header(header, size)

    data = b"".join([prefix, header, file.read(size - PREFIX - len(header))])
    if len(data) != size:
        raise ModelFileError("it was cut off while it was read")
    try:
        stored = safetensors.numpy.load(data)
    except SafetensorError as error:
        raise ModelFileError("safetensors cannot read it") from error
    del data  # the peak is here: the file and one copy of its tensors
    # The library takes the bytes for native ones, which they are on a little-endian machine only.
    little = cell.dtype.newbyteorder("<")
    params = {name: stored.pop(name).view(little).astype(cell.dtype) for name in parameters.shapes(cell)}
    if _digest(description, params) != sha256:
        raise ModelFileError("the checksum does not fit its contents")
    return cell, params, batch_first


def _header_length(prefix: bytes, size: int) -> int:
    """Length of the header, given the first bytes of a file and its size, both of them plausible."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < PREFIX or not 2 <= length <= size - PREFIX:
        raise ModelFileError("it does not start with a safetensors header, or ends within it")
    if length > MAX_HEADER:
        raise ModelFileError(f"its header is longer than {MAX_HEADER} bytes")
    return length


def _check_header(header: bytes, size: int) -> _Header:
    """Hold the header of a file of `size` bytes against all that it has to be."""
    entries = _parse(header, "header")
    metadata = entries.pop("__metadata__", None)
    if not isinstance(metadata, dict) or KEY not in metadata:
        raise ModelFileError(
            "the metadata of fastlstm is missing; for weights of PyTorch, use safetensors.numpy.load_file and"
            " LSTM.from_torch_state_dict"
        )
    description = _parse(metadata[KEY], "metadata")
    if type(description.get("format")) is int and description["format"] > FORMAT:
        raise ModelFileError("it was written by a newer version of fastlstm")
    if description.keys() != {"format", "cell", "batch_first", "sha256"} or description["format"] != FORMAT:
        raise ModelFileError("its metadata is not that of fastlstm")
    cell, batch_first = _cell(description["cell"]), description["batch_first"]
    if not isinstance(batch_first, bool) or not isinstance(description["sha256"], str):
        raise ModelFileError("its metadata is not that of fastlstm")
    _check_tensors(entries, cell, size - PREFIX - len(header))
    sha256 = description.pop("sha256")
    return _Header(cell, batch_first, description, sha256)


def _cell(fields: Any) -> Cell:
    # NumPy would take many things for a dtype, some of them large.
    if not isinstance(fields, dict) or fields.get("dtype") not in list(CODES):
        raise ModelFileError("its description of the model is broken")
    try:
        return Cell(**fields)
    except (TypeError, ArgumentError, DTypeError) as error:
        raise ModelFileError("its description of the model is broken, or of a newer version") from error


def _check_tensors(entries: dict[str, Any], cell: Cell, size: int) -> None:
    """Check that `entries` are the parameters of `cell`, no more and no less, side by side in `size` bytes."""
    # Counted first: the description might claim a billion layers, whose names alone would fill the memory.
    if len(entries) != cell.num_layers * cell.num_directions * len(parameters.direction_names(cell, 0, 0)):
        raise ModelFileError("its tensors are not those of the model that it describes")
    spans = []
    for name, shape in parameters.shapes(cell).items():
        entry = entries.get(name)
        expected = {"dtype": CODES[cell.dtype.name], "shape": list(shape)}
        span = entry.pop("data_offsets", None) if isinstance(entry, dict) else None
        if entry != expected:
            raise ModelFileError("its tensors are not those of the model that it describes")
        if not isinstance(span, list) or [type(offset) for offset in span] != [int, int]:
            raise ModelFileError("its tensors have no place")
        spans.append((span[0], span[1], math.prod(shape) * cell.dtype.itemsize))
    position = 0
    for begin, end, length in sorted(spans):
        if begin != position or end != begin + length:
            raise ModelFileError("its tensors overlap, leave gaps, or have other lengths than their shapes")
        position = end
    if position != size:
        raise ModelFileError(f"its tensors take {position} bytes, and {size} are there")


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


def _replace(target: str, data: bytes) -> None:
    """Put `data` in the place of the file `target`, whole, and see to it that it stays there when the power fails."""
    mode = _mode(target)
    folder = os.path.dirname(target)
    # The name owes nothing to the target's, which may be as long as the file system allows.
    temporary = os.path.join(folder, f".fastlstm-{secrets.token_hex(8)}.tmp")
    # Opened by hand: the system then applies umask and default ACLs as to any new file; tempfile would not.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        descriptor = os.open(temporary, flags, 0o666)
    except OSError as error:
        error.filename = target  # the name that the caller knows
        raise
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            os.chmod(temporary, mode)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(folder)


def _mode(target: str) -> int | None:
    """Permissions of the file that is to be replaced, None if there is none."""
    try:
        mode = os.stat(target).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), target)
    if not stat.S_ISREG(mode):  # a rename would put a file in the place of a pipe, or of /dev/null
        raise OSError(errno.EINVAL, "is not a regular file", target)
    return stat.S_IMODE(mode)


def _sync_folder(folder: str) -> None:
    """Make the renaming last, where the system can: Windows opens no folders, some file systems sync none."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that one may write to but not list
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
