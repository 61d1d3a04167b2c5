"""Files that other software wrote: opened for random reading, and named in every error that they cause.

A format is read in two steps. First the names of all tensors and where they lie; then only the tensors that are asked
for. So a checkpoint of a large model costs no more memory than the LSTM inside it.
"""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np

from fastlstm import files
from fastlstm.errors import ArgumentError, BackendError, DTypeError, FastLSTMError, ModelFileError, shown

__all__ = ["PathOrFile", "Source", "Tensor", "broken_if", "check_readable", "need", "read_tensors", "with_source"]

PathOrFile = str | os.PathLike[str] | IO[bytes]
HostArray = np.ndarray[Any, Any]
_Result = TypeVar("_Result")

# Errors that zipfile, struct and json raise for a damaged file.
_DAMAGE = (
    ArithmeticError, AttributeError, EOFError, LookupError, NotImplementedError, RecursionError, RuntimeError,
    TypeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


class Source(NamedTuple):
    """An open file, its size in bytes, and its name for messages."""

    file: IO[bytes]
    size: int
    name: str

    def head(self, count: int) -> bytes:
        """Return the first bytes of the file."""
        self.file.seek(0)
        return self.file.read(count)


class Tensor(NamedTuple):
    """One tensor of a file, not read yet.

    `read` returns the bytes of the storage, which holds `length` numbers. The tensor starts at number `offset` of them;
    its strides count numbers, as PyTorch's do. A `dtype` that NumPy does not have is given by its name alone.
    """

    dtype: np.dtype[Any] | str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    length: int
    read: Callable[[], bytes]


def check_readable(name: str, value: Any, other: str) -> None:
    """Check that an argument is a path or a file object, where a call takes something else too.

    Raises
    ------
    ArgumentError
        With the name of the argument, and `other`, the third thing that it may be.
    """
    if not isinstance(value, str | bytes | os.PathLike) and not callable(getattr(value, "read", None)):
        raise ArgumentError(f"{name} must be a path, a binary file object or {other}, got {shown(value)}")


def with_source(path: Any, work: Callable[[Source], _Result]) -> _Result:
    """Open a file, call `work` with it, and close it.

    Parameters
    ----------
    path : str, path-like or binary file object
        The file. A file object is read from its current position to its end first.
    work : callable
        Function of the :class:`Source`.

    Returns
    -------
    object
        The result of `work`.

    Raises
    ------
    ArgumentError
        If `path` is neither a path nor a binary file object that can be read from.
    ModelFileError
        If `path` names no regular file, or `work` finds the file broken or foreign; the message names the file.
    OSError
        If the file cannot be opened.
    """
    given = files.file_object(path, "read")
    if given is not None:
        pieces = iter(lambda: files.read(given, files.PIECE), b"")
        data = io.BytesIO(b"".join(pieces))
        return _named(work, Source(data, data.getbuffer().nbytes, "the content of the file object"))
    name = files.path_name(path)
    if not stat.S_ISREG(os.stat(name).st_mode):
        raise ModelFileError(f"{name!r} is not a model file: it is not a regular file")

    def opened(descriptor: int) -> _Result:
        with open(descriptor, "rb", closefd=False) as file:
            return _named(work, Source(file, os.fstat(descriptor).st_size, repr(name)))

    # Should it have become a named pipe since it was looked at, this does not wait for a writer.
    return files.with_descriptor(name, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0), opened)


def _named(work: Callable[[Source], _Result], source: Source) -> _Result:
    try:
        return work(source)
    except ModelFileError as error:
        raise ModelFileError(f"{source.name} cannot be read: {error}") from error


@contextmanager
def broken_if(what: str) -> Iterator[None]:
    """Convert the standard library's errors for a damaged file to a ModelFileError that names `what`."""
    try:
        yield
    except FastLSTMError:
        raise
    except _DAMAGE as error:
        raise ModelFileError(f"{what} is damaged ({type(error).__name__}: {error})") from error
    except OSError as error:
        # A seek before the file's start, or an error of HDF5's, which has no number; others are the system's.
        if error.errno != errno.EINVAL and not (error.errno is None and type(error) is OSError):
            raise
        raise ModelFileError(f"{what} is damaged ({error})") from error


def read_tensors(source: Source, tensors: Mapping[str, Tensor], prefix: str = "") -> dict[str, HostArray]:
    """Read tensors as new arrays in native byte order.

    No more is allocated than a few times the file's size: a tensor whose strides repeat the same numbers could claim
    any size.

    Raises
    ------
    DTypeError
        If NumPy does not have a tensor's dtype.
    ModelFileError
        If a tensor reaches beyond its storage, or the tensors are larger than the file.
    """
    arrays, allowed = {}, 4 * source.size + 2**16
    for name, tensor in tensors.items():
        if isinstance(tensor.dtype, str):
            raise DTypeError(f"{prefix}{name} has dtype {tensor.dtype}: convert it to float32 before saving")
        size = tensor.dtype.itemsize
        allowed -= math.prod(tensor.shape) * size
        if allowed < 0:
            raise ModelFileError(f"its tensors are larger than the file: {prefix}{name} has shape {tensor.shape}")
        _check_place(prefix + name, tensor)
        with broken_if(f"the storage of {prefix}{name}"):
            data = tensor.read()
            if len(data) < tensor.length * size:
                raise ModelFileError(f"the storage of {prefix}{name} is cut off")
            storage = np.frombuffer(data, tensor.dtype, tensor.length)[tensor.offset :]
            strides = [stride * size for stride in tensor.strides]
            view = np.lib.stride_tricks.as_strided(storage, tensor.shape, strides)
            arrays[name] = view.astype(tensor.dtype.newbyteorder("="), order="C")
    return arrays


def _check_place(name: str, tensor: Tensor) -> None:
    numbers = (tensor.offset, tensor.length, *tensor.shape, *tensor.strides)
    if len(tensor.shape) != len(tensor.strides) or len(tensor.shape) > 32 or min(numbers) < 0:
        raise ModelFileError(f"{name} has an impossible shape, stride or offset")
    last = tensor.offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True))
    if (0 not in tensor.shape and last >= tensor.length) or tensor.offset > tensor.length:
        raise ModelFileError(f"{name} reaches beyond its storage")


def need(module: str, extra: str) -> Any:
    """Import a package that only this format needs.

    Raises
    ------
    BackendError
        If it is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise BackendError(f'this needs {module}: pip install "fastlstm[{extra}]"') from error
