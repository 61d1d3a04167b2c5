"""Paths and file objects: checks before reading and writing, and files that are whole or absent after an interrupt.

An interrupt (Ctrl-C, an exception from a signal handler) can come between any two bytecodes, also between opening a
file and storing its descriptor. So

- a descriptor is stored by the C code that opens it, and dropped by the C code that closes it, in
  :func:`with_descriptor`;
- the name of a temporary file is chosen before the file exists, and removed whatever happened, in :func:`replace`;
- both cleanups run twice: if the first is interrupted, the second is not, and if it is not, the second does nothing.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import secrets
import stat
from collections.abc import Callable
from typing import Any, TypeVar

from fastlstm.errors import ArgumentError, shown

__all__ = ["file_object", "path_name", "read", "replace", "with_descriptor", "write"]

PIECE = 2**20  # bytes that are read at once: what is allocated follows what is there, not what a header claims

_Result = TypeVar("_Result")


def file_object(path: Any, method: str) -> Any:
    """Return `path` if it is a binary file object, or None if it is to be opened by its name.

    Parameters
    ----------
    path : object
        The argument of the caller.
    method : {"read", "write"}
        How it will be used.

    Raises
    ------
    ArgumentError
        If it is neither, or a file object that is closed, in text mode, or open for the other direction only.
    """
    if isinstance(path, str | bytes | os.PathLike):
        return None
    if isinstance(path, io.TextIOBase):
        raise _text_mode(method)
    if not callable(getattr(path, method, None)):
        raise ArgumentError(f"path must be a path or a binary file object with {method}(), got {shown(path)}")
    if getattr(path, "closed", False) is True:
        raise ArgumentError("the file object is closed")
    ability = {"read": "readable", "write": "writable"}[method]
    if getattr(path, ability, lambda: True)() is False:
        raise ArgumentError(f"the file object is not {ability}: open it in another mode")
    return path


def _text_mode(method: str) -> ArgumentError:
    mode = {"read": "rb", "write": "wb"}[method]
    return ArgumentError(f"the file object is in text mode: open it in binary mode, with mode {mode!r}")


def path_name(path: Any) -> str:
    """Return a path as a string that the system can take.

    Raises
    ------
    ArgumentError
        If it is no path, has a NUL in it, or cannot be encoded for the file system.
    """
    try:
        name = os.fsdecode(path)
        os.fsencode(name)
    except (TypeError, UnicodeError) as error:
        raise ArgumentError(f"path cannot be used as the name of a file: {shown(path)}") from error
    if "\0" in name:
        raise ArgumentError(f"path must not contain the character NUL, got {shown(name)}")
    return name


def read(file: Any, count: int) -> bytes:
    """Read `count` bytes from a binary file object, or fewer if it ends before."""
    pieces: list[bytes] = []
    while count > 0:
        piece = file.read(min(count, PIECE))
        if isinstance(piece, str):
            raise _text_mode("read")
        if piece is None:
            raise BlockingIOError(errno.EAGAIN, "the file object has nothing to read yet: use a blocking one")
        if not isinstance(piece, bytes | bytearray | memoryview):
            raise ArgumentError(f"read() of the file object must return bytes, got {type(piece).__qualname__}")
        if not len(piece):
            break
        pieces.append(bytes(piece))
        count -= len(pieces[-1])
    return b"".join(pieces)


def write(file: Any, data: bytes) -> None:
    """Write all of `data` to a binary file object, also to an unbuffered one that takes a part at a time."""
    begun = False
    while data:
        try:
            written = file.write(data)
        except TypeError as error:
            if begun:
                raise
            raise _text_mode("write") from error
        begun = True
        if not isinstance(written, int):
            if written is None and isinstance(file, io.RawIOBase):
                raise BlockingIOError(errno.EAGAIN, "the file object takes no more bytes now: use a blocking one")
            return  # objects that do not count what they write are taken to write all
        if written <= 0:
            raise OSError(errno.EIO, "the file object takes no more bytes")
        data = data[written:]


def with_descriptor(name: str, flags: int, work: Callable[[int], _Result], mode: int = 0o666) -> _Result:
    """Open a file, call `work` with its descriptor, and close it, whatever bytecode is interrupted.

    Parameters
    ----------
    name, flags, mode
        As for :func:`os.open`.
    work : callable
        What to do with the open descriptor.

    Returns
    -------
    object
        What `work` returns.
    """
    opened: list[int] = []
    try:
        try:
            # One call of C code: between os.open() and an assignment, an interrupt would lose the descriptor.
            opened.extend(map(os.open, (name,), (flags | getattr(os, "O_BINARY", 0),), (mode,)))
            return work(opened[0])
        finally:
            _close(opened)
    finally:
        _close(opened)


def _close(opened: list[int]) -> None:
    """Close what is in the list. Taking it out and closing it is one call of C code, so it is never closed twice."""
    while opened:
        any(map(os.close, map(list.pop, (opened,))))


def replace(target: str, data: bytes) -> None:
    """Replace the file `target` by `data`, all of it or nothing, also if the power fails.

    Raises
    ------
    OSError
        If the file cannot be written, or `target` is there and is no regular file.
    """
    target = os.path.realpath(target)
    permissions = _permissions(target)
    folder = os.path.dirname(target)
    # The name does not contain the target's name, which may be as long as the file system allows.
    temporary = os.path.join(folder, f".fastlstm-{secrets.token_hex(16)}.tmp")
    try:
        try:
            _create(temporary, target, data)
            if permissions is not None:
                os.chmod(temporary, permissions)
            os.replace(temporary, target)
        finally:
            _remove(temporary)
    finally:
        _remove(temporary)
    _sync_folder(folder)


def _create(temporary: str, target: str, data: bytes) -> None:
    """Write and sync a new file."""

    def fill(descriptor: int) -> None:
        rest = memoryview(data)  # no buffered file: one that an interrupt leaves behind would flush into nowhere
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)

    try:
        # Opened by hand: the system then applies umask and default ACLs as to any new file; tempfile would not.
        with_descriptor(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, fill)
    except OSError as error:
        if error.filename == temporary:
            error.filename = target  # the name that the caller knows
        raise


def _remove(temporary: str) -> None:
    """Remove the temporary file if it is there: not yet created, or renamed, is as well."""
    try:
        os.unlink(temporary)
    except OSError as error:
        if error.errno is None:  # not the system's: a signal handler may raise a TimeoutError
            raise


def _permissions(target: str) -> int | None:
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
    """Sync the folder, so that the renaming lasts. Windows cannot open folders; some file systems cannot sync them."""
    if not hasattr(os, "O_DIRECTORY"):
        return

    def sync(descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise

    # A folder that one may write to but not list cannot be opened.
    with contextlib.suppress(PermissionError):
        with_descriptor(folder, os.O_RDONLY | os.O_DIRECTORY, sync)
