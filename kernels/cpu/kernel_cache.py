"""Compiled kernels on disk: one file for each kernel, signature and processor.

A file is used only if it is undamaged and up to date: it has the SHA-256 of its content and of a key, and the key
covers the sources of all kernels, the versions of Python, Numba and llvmlite, the processor and the kernel's signature.
One flipped bit in machine code could crash the process that runs it. A file with any fault counts as missing: the
kernel is compiled again, and the file replaced.

Numba's own cache does not check its files, and does not notice a change in another file that a kernel calls.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pkgutil
import shutil
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from numba import config

from fastlstm.errors import KernelCacheWarning

__all__ = ["SOURCES", "announce", "describe", "folder", "folders", "problem", "read", "used", "write"]

_MAGIC = b"fastlstm kernel\n"
_DIGEST = hashlib.sha256().digest_size
_MOST_BYTES = 64 << 20  # of a file: the largest kernel takes 0.5 MiB
_HERE = Path(__file__).parent


def _hash_sources() -> bytes | None:
    """Return the SHA-256 of all kernel sources; None if the source of a module cannot be read, as in a zip of .pyc."""
    try:
        files = [file for file in resources.files(__package__).iterdir() if file.name.endswith(".py")]
        found = sorted((file.name, file.read_bytes()) for file in files)
    except Exception:  # each import system has its own; without sources there is no cache, and no other harm
        return None
    modules = {module.name for module in pkgutil.iter_modules(sys.modules[__package__].__path__)}
    if not found or not modules <= {name.removesuffix(".py") for name, _ in found}:
        return None
    digest = hashlib.sha256()
    for name, source in found:
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.digest()


SOURCES = _hash_sources()


def _candidates() -> Iterator[Path]:
    # Different versions that share a folder must not replace each other's kernels.
    name = "fastlstm_" + hashlib.sha256(os.fsencode(_HERE)).hexdigest()[:16]
    if config.CACHE_DIR:
        yield Path(config.CACHE_DIR) / name
    yield _HERE / "__pycache__"
    if os.name == "nt":
        home = os.environ.get("LOCALAPPDATA", "")
    elif sys.platform == "darwin":
        home = os.path.expanduser("~/Library/Caches")
    else:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(home):
        yield Path(home) / "fastlstm" / name


def _absolute(paths: Iterator[Path]) -> Iterator[Path]:
    for path in paths:
        with contextlib.suppress(OSError):  # the working directory has been removed
            yield path.absolute()


# Read from in turn, and written to the first that can be: NUMBA_CACHE_DIR, beside the kernels, the user's own.
folders: tuple[Path, ...] = tuple(_absolute(_candidates())) if SOURCES else ()
used: dict[Path, None] = {}  # the folders from which kernels were read or into which they were written, in order
gathering = False  # whether a kernel that is read from a later folder is also written to the first, see `gather`
problem: str | None = None  # why kernels are not kept, once a save has failed; no further one is tried then


def folder() -> Path | None:
    """Return the folder to which kernels are written, None if no folder is writeable."""
    if problem is None:
        for candidate in folders:
            with contextlib.suppress(OSError):
                candidate.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=candidate).close()
                return candidate
    return None


def describe() -> str:
    """Describe where kernels are kept, or why they are not."""
    found = folder()
    if found is not None:
        return str(found)
    if SOURCES is None:
        return "none: the sources of the kernels cannot be read, so kernels are compiled in every process"
    return f"none: {problem or 'no folder can be written'}, so kernels are compiled in every process"


def elsewhere() -> str | None:
    """Say where kernels are that are not in the folder of ``NUMBA_CACHE_DIR``, None if it has them or is not set."""
    others = [path for path in used if config.CACHE_DIR and path != folders[0]]
    return f"{folders[0].parent} cannot be written; they are in {', '.join(map(str, others))}" if others else None


def read(name: str, key: bytes) -> bytes | None:
    """Return the content of the file `name` if it was written with the same key and is undamaged, else None."""
    for candidate in folders:
        found = _content(candidate / name)
        if found is None or not found.startswith(_MAGIC):
            continue
        start = len(_MAGIC) + _DIGEST
        payload = found[start:]
        if hashlib.sha256(key + payload).digest() == found[len(_MAGIC) : start]:
            if gathering and candidate != folders[0] == folder():
                write(name, key, payload)
            else:
                used[candidate] = None
            return payload
    return None


@contextlib.contextmanager
def gather() -> Iterator[None]:
    """Have all kernels that are read or written in the first folder, if it can be, so that it can be copied alone."""
    global gathering  # noqa: PLW0603
    gathering = True
    try:
        yield
    finally:
        gathering = False


def _content(path: Path) -> bytes | None:
    try:
        status = path.stat()
        # Opening a pipe would block.
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST_BYTES:
            return None
        return path.read_bytes()
    except (OSError, MemoryError):
        return None


def write(name: str, key: bytes, payload: bytes) -> None:
    """Write a kernel to the first writeable folder; warn once per process if there is none."""
    global problem  # noqa: PLW0603
    if problem is not None or not folders:
        return
    content = _MAGIC + hashlib.sha256(key + payload).digest() + payload
    failures = []
    for candidate in folders:
        try:
            _replace(candidate / name, content)
            used[candidate] = None
            return
        except OSError as error:
            failures.append(f"{candidate}: {error.strerror or error}")
    problem = "; ".join(failures)
    warnings.warn(
        f"fastlstm cannot keep its compiled kernels ({problem}), so every process compiles them anew, which takes some"
        " seconds. Set NUMBA_CACHE_DIR to a folder that can be written.",
        KernelCacheWarning,
        stacklevel=2,
    )


def _replace(path: Path, content: bytes) -> None:
    """Write a file in one step: other processes see the old one or the new one, and a failure leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
            shutil.rmtree(path)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


_announced = threading.Lock()  # taken once


def announce(*, kept: bool = True, silently: bool = False) -> None:
    """Print on stderr, once per process, that kernels are compiled and how to avoid it; `silently`, never print it.

    Parameters
    ----------
    kept : bool
        Whether kernels are kept on disk at all.
    silently : bool
        Whether to count it as said.
    """
    if not _announced.acquire(blocking=False) or silently:
        return
    if os.environ.get("FASTLSTM_QUIET", "0") not in {"", "0"}:
        return
    where = folder() if kept else None
    then = (
        f"and keeps them in {where}; `fastlstm warm` does so ahead"
        if where
        else "in every process, see `fastlstm info`"
    )
    with contextlib.suppress(AttributeError, OSError, ValueError):  # no stderr, or one that is closed
        sys.stderr.write(
            f"fastlstm compiles its kernels, some seconds each, {then}. FASTLSTM_QUIET=1 hides this line.\n"
        )
        sys.stderr.flush()
