"""Files of ``torch.save``, ``.pt`` and ``.pth``, without PyTorch; and ``.safetensors`` files of any producer.

A ``.pt`` file is a zip archive: ``data.pkl`` describes the tensors, ``data/0``, ``data/1`` ... are the storages that
they are views of. Several tensors may share a storage: cuDNN's flattened weights, for example, are slices of one.
Before version 1.6, PyTorch wrote pickles and storages one after the other.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np

from fastlstm.errors import ArgumentError, ModelFileError, shown
from fastlstm.interchange import torch
from fastlstm.interchange.source import HostArray, PathOrFile, Source, Tensor, broken_if, read_tensors, with_source
from fastlstm.interchange.torch_pickle import Storage, Stored, unpickle

__all__ = ["load_arrays", "load_state_dict"]

MAX_HEADER = 2**25  # bytes of the header of a safetensors file: some 300,000 tensors
MOST_CHARACTERS = 2**24  # of all names together
MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of PyTorch before 1.6
SAFETENSORS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8",
    "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip


def load_state_dict(path: PathOrFile, prefix: str = "") -> dict[str, HostArray]:
    """Read the weights of one LSTM from a file of ``torch.save`` or a ``.safetensors`` file.

    Parameters
    ----------
    path : str, path-like or binary file object
        The file.
    prefix : str
        Common prefix of the names, such as ``"lstm."``. Keys of nested dictionaries are joined by dots:
        ``"state_dict.lstm."``.

    Returns
    -------
    dict of str to numpy.ndarray
        Argument of :func:`fastlstm.interchange.from_torch_state_dict`, with the same prefix.

    Raises
    ------
    ArgumentError
        If there is no LSTM under the prefix; the message lists the LSTMs and the names that the file has.
    DTypeError
        If NumPy does not have the dtype of the weights.
    ModelFileError
        If the file is damaged, of another kind, or refers to anything that tensors do not need.
    OSError
        If the file cannot be opened.
    """
    torch.check_prefix(prefix)

    def read(source: Source) -> dict[str, HostArray]:
        tensors = _tensors(source)
        _check_there(tensors, prefix, source.name)
        chosen = torch.select(tensors, prefix)
        return {prefix + name: array for name, array in read_tensors(source, chosen, prefix).items()}

    return with_source(path, read)


def load_arrays(path: PathOrFile, prefix: str = "") -> dict[str, HostArray]:
    """Read every tensor whose name begins with `prefix`, and remove the prefix; for the layers beside an LSTM.

    Parameters and errors are those of :func:`load_state_dict`; there may be no tensor at all.
    """
    torch.check_prefix(prefix)

    def read(source: Source) -> dict[str, HostArray]:
        found = {name: tensor for name, tensor in _tensors(source).items() if name.startswith(prefix)}
        arrays = read_tensors(source, found)
        return {name.removeprefix(prefix): array for name, array in arrays.items()}

    return with_source(path, read)


def _check_there(names: Iterable[str], prefix: str, where: str) -> None:
    """Say which LSTMs there are, if there is none under the prefix."""
    matches = [match[1] for match in map(re.compile(r"(.*?)weight_ih(?:_l0)?").fullmatch, names) if match]
    if prefix in matches:
        return
    lstms, names = sorted(set(matches)), sorted(names)
    if lstms:
        found = ", ".join(f"prefix={name!r}" for name in lstms[:20]) + ", ..." * (len(lstms) > 20)
        raise ArgumentError(f"{where} has no LSTM with prefix={prefix!r}; the recurrent modules in it have {found}")
    listed = ", ".join(names[:20]) + ", ..." * (len(names) > 20) if names else "none"
    raise ArgumentError(f"{where} has no LSTM: weight_ih_l0 is missing; its tensors are {listed}")


def _tensors(source: Source) -> dict[str, Tensor]:
    """Return every tensor of a file of any of the formats, by its name."""
    head = source.head(512)
    if head[:4] == b"PK\x03\x04":
        return _of_archive(source)
    if head[257:262] == b"ustar":
        raise ModelFileError("it is a tar archive, as PyTorch wrote before version 0.1.10: load and save it with torch")
    if head[:1] == b"\x80":
        return _of_pickles(source)
    if head[8:9] == b"{":
        return _of_safetensors(source)
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        raise ModelFileError("it is an HDF5 file: LSTM.from_keras reads Keras's")
    raise ModelFileError("it is neither a file of torch.save nor a safetensors file")


def _flat(value: Any) -> dict[str, Stored]:
    """Return the tensors in dictionaries inside each other, their keys joined by dots."""
    if isinstance(value, Stored):
        raise ModelFileError("it holds one tensor, not a state dict")
    found: dict[str, Stored] = {}
    waiting: list[tuple[str, Any]] = [("", value)]
    left = MOST_CHARACTERS
    while waiting:
        before, inner = waiting.pop()
        left -= 1 + len(before)
        if left < 0:
            raise ModelFileError("its dictionaries have too many names, or hold each other")
        if isinstance(inner, Stored):
            if before in found:
                raise ModelFileError(f"two tensors have the name {before[:200]}")
            found[before] = inner
        elif isinstance(inner, dict):
            waiting += [(f"{before}.{key}" if before else str(key), item) for key, item in inner.items()
                        if isinstance(item, dict | Stored) and isinstance(key, str | int)]  # fmt: skip
    return dict(reversed(found.items()))


# --- torch.save since 1.6: a zip archive ------------------------------------------------------------------------------


def _of_archive(source: Source) -> dict[str, Tensor]:
    with broken_if("its zip archive"):
        archive = zipfile.ZipFile(source.file)
        entries = {info.filename: info for info in archive.infolist()}
    records = [name for name in entries if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(records) != 1:
        raise ModelFileError(_kind_of_archive(entries))
    root = records[0].partition("/")[0]
    if f"{root}/constants.pkl" in entries or any(name.startswith(f"{root}/code/") for name in entries):
        raise ModelFileError(
            "it is a TorchScript archive, which holds code; save the weights alone, with"
            " torch.save(torch.jit.load(path).state_dict(), new_path)"
        )

    def record(name: str) -> bytes:
        info = entries.get(f"{root}/{name}")
        if info is None:
            raise ModelFileError(f"its record {name[:200]} is missing")
        # PyTorch never compresses; refusing compression bounds the size by that of the file.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > source.size:
            raise ModelFileError(f"its record {name[:200]} is compressed, or larger than the file")
        with broken_if(f"its record {name[:200]}"):
            return archive.read(info)

    order = record("byteorder") if f"{root}/byteorder" in entries else b"little"
    if order not in (b"little", b"big"):
        raise ModelFileError("its byte order is unknown")
    stored = _flat(unpickle(io.BytesIO(record("data.pkl"))))
    return {
        name: _tensor(tensor, "<" if order == b"little" else ">", lambda key: record(f"data/{key}"))
        for name, tensor in stored.items()
    }


def _kind_of_archive(entries: Mapping[str, Any]) -> str:
    """Describe a zip archive without data.pkl."""
    if "config.json" in entries and "model.weights.h5" in entries:
        return "it is a file of Keras: LSTM.from_keras reads it"
    if any(name.endswith(".npy") for name in entries):
        return "it is a file of numpy.savez: use LSTM.from_torch_state_dict(numpy.load(path))"
    if any(name.rpartition("/")[2] in ("archive_format", "serialized_exported_program.json") for name in entries):
        return "it is an archive of torch.export, which holds a program: save the state dict"
    return "it is a zip archive without one data.pkl, so none of torch.save"


def _tensor(stored: Stored, order: Literal["<", ">"], read: Any) -> Tensor:
    """Describe a tensor of a pickle; `read` returns the bytes of the storage of a key."""
    storage = stored.storage
    try:
        dtype: Any = np.dtype(stored.dtype).newbyteorder(order)
    except TypeError:  # bfloat16
        return Tensor(stored.dtype, stored.shape, stored.strides, stored.offset, storage.length, lambda: b"")
    count = storage.length if storage.dtype is not None else storage.length // dtype.itemsize
    return Tensor(dtype, stored.shape, stored.strides, stored.offset, count, lambda: read(storage.key))


# --- torch.save before 1.6: pickles, then the storages ----------------------------------------------------------------


def _of_pickles(source: Source) -> dict[str, Tensor]:
    source.file.seek(0)
    file = _Clipped(source)
    if unpickle(file) != MAGIC:
        raise ModelFileError("it is a pickle, but none of torch.save")
    protocol, system = unpickle(file), unpickle(file)
    if protocol != 1001 or not isinstance(system, dict):
        raise ModelFileError("it is of an unknown version of torch.save")
    storages: dict[str, Storage] = {}
    stored, keys = _flat(unpickle(file, storages)), unpickle(file)
    order: Literal["<", ">"] = "<" if system.get("little_endian", True) else ">"
    places = _places(source, keys, storages)

    def read(key: str) -> bytes:
        start, length = places[key]
        source.file.seek(start)
        return source.file.read(length)

    return {name: _tensor(tensor, order, read) for name, tensor in stored.items()}


class _Clipped:
    """A file that never reads more bytes at once than it has: a pickle may ask for any number."""

    def __init__(self, source: Source) -> None:
        self._file, self._size = source.file, source.size
        self.readline, self.tell = source.file.readline, source.file.tell

    def read(self, count: int) -> bytes:
        return self._file.read(min(count, self._size))


def _places(source: Source, keys: Any, storages: Mapping[str, Storage]) -> dict[str, tuple[int, int]]:
    """Return the place of each storage: its first byte, and the number of bytes."""
    places = {}
    position = source.file.tell()
    for key in keys if isinstance(keys, list) else ():
        source.file.seek(position)
        count = int.from_bytes(source.file.read(8), "little")
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or storage.dtype is None or storage.length != count:
            # Without its dtype, there is no telling where the next one begins.
            raise ModelFileError("it has a storage that its pickle does not describe")
        size = 2 if storage.dtype == "bfloat16" else np.dtype(storage.dtype).itemsize
        places[key] = (position + 8, count * size)
        position += 8 + count * size
        if position > source.size:
            raise ModelFileError("its storages are cut off")
    if places.keys() != storages.keys():
        raise ModelFileError("some of its storages are missing")
    return places


# --- safetensors ------------------------------------------------------------------------------------------------------


def _of_safetensors(source: Source) -> dict[str, Tensor]:
    length = int.from_bytes(source.head(8), "little")
    if length > min(MAX_HEADER, source.size - 8):
        raise ModelFileError("its safetensors header is cut off, or too long")
    with broken_if("its safetensors header"):
        entries = json.loads(source.file.read(length).decode("utf-8"))
        if not isinstance(entries, dict):
            raise ModelFileError("its safetensors header is no JSON object")
        said = entries.get("__metadata__")
        if isinstance(said, dict) and any(str(name).startswith("fastlstm") for name in said):
            raise ModelFileError("it was written by fastlstm: LSTM.load or fastlstm.training.Model.load reads it")
        return {
            name: _of_entry(source, name, entry, 8 + length)
            for name, entry in entries.items()
            if name != "__metadata__"
        }


def _of_entry(source: Source, name: str, entry: Any, start: int) -> Tensor:
    code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, begin, end]
    if not isinstance(code, str) or any(type(n) is not int or n < 0 for n in numbers) or end > source.size - start:
        raise ModelFileError(f"the entry of {name[:200]} is damaged")
    shape, dtype = tuple(shape), SAFETENSORS.get(code)
    count = math.prod(shape)
    if dtype is not None and count * np.dtype(dtype).itemsize != end - begin:
        raise ModelFileError(f"{name[:200]} has shape {shown(shape)}, and {end - begin} bytes")
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))

    def read() -> bytes:
        source.file.seek(start + begin)
        return source.file.read(end - begin)

    return Tensor(np.dtype(dtype) if dtype else code, shape, strides, 0, count, read)
