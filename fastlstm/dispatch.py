"""From the type of an array to the backend that runs it: one table; backends are loaded at their first use.

Requirements:

- importing it loads neither Numba nor CuPy; a backend's module is imported at its first use;
- no other file asks which backend runs: they call :func:`backend_for` and use its result;
- ``FASTLSTM_BACKEND`` (read once, at import) or :func:`use_backend` force a backend for debugging.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from fastlstm.errors import ArrayTypeError, BackendError

if TYPE_CHECKING:
    from fastlstm.backends.base import Backend

__all__ = ["array_namespace", "backend_for", "backend_named", "forced", "kind_of", "use_backend"]


class Kind(NamedTuple):
    """One kind of array: its library, and the backends that take it, the default first."""

    library: str
    backends: tuple[str, ...]


# The CPU kernels are LLVM intrinsics, which the interpreter cannot run: with the JIT off, the reference runs.
_NUMPY = ("reference",) if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0") else ("cpu", "reference")

TABLE = {
    ("numpy", "ndarray"): Kind("numpy", _NUMPY),
    ("cupy", "ndarray"): Kind("cupy", ("cuda",)),
}
# Subclasses of ndarray whose meaning would be lost silently.
REFUSED = {
    ("numpy", "MaskedArray"): "its mask would be lost; fill it (numpy.ma.filled) and pass lengths for ragged batches",
    ("numpy", "matrix"): "pass numpy.asarray of it",
}
# An object with any of these is an array of another library, which fastlstm.as_array converts.
ARRAY_METHODS = ("__dlpack__", "__cuda_array_interface__", "__array__")
BACKENDS = ("cpu", "cuda", "reference")

_forced: ContextVar[str | None] = ContextVar("fastlstm_backend", default=os.environ.get("FASTLSTM_BACKEND") or None)
forced = _forced.get  # the name of the forced backend, or None
_kinds: dict[type, Kind] = {}
_loaded: dict[str, Backend] = {}


def kind_of(name: str, value: Any) -> Kind:
    """Return the row of the table for `value`, an argument called `name`.

    Raises
    ------
    ArrayTypeError
        If `value` is not an array of a library in the table.
    """
    kind = _kinds.get(type(value))
    if kind is None:
        for base in type(value).__mro__:
            key = (base.__module__.partition(".")[0], base.__name__)
            if key in REFUSED:
                raise ArrayTypeError(f"{name} is a {'.'.join(key)}: {REFUSED[key]}")
            if key in TABLE:
                kind = _kinds[type(value)] = TABLE[key]
                return kind
        example = name if name.isidentifier() else "it"
        shares = any(hasattr(type(value), method) for method in ARRAY_METHODS)
        call = f"fastlstm.as_array({example})" if shares else f"numpy.asarray({example}, dtype=...)"
        raise ArrayTypeError(
            f"{name} must be a NumPy or CuPy array, got {type(value).__module__}.{type(value).__qualname__};"
            f" convert it first, for example with {call}"
        )
    return kind


def backend_for(value: Any) -> Backend:
    """Return the backend that runs arrays such as `value`, importing it at its first use."""
    kind = kind_of("array", value)
    name = _forced.get() or kind.backends[0]
    if name not in kind.backends:
        raise BackendError(
            f"backend {name!r} was forced, but {kind.library} arrays run on {' or '.join(kind.backends)}"
        )
    return _loaded.get(name) or backend_named(name)


def backend_named(name: str) -> Backend:
    """Return the backend called `name`, importing it at its first use.

    Raises
    ------
    BackendError
        If there is no such backend, or it cannot run on this machine; the message says what to install.
    """
    if name not in BACKENDS:
        raise BackendError(f"there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    if name not in _loaded:
        backend = getattr(import_module(f"fastlstm.backends.{name}"), "BACKEND", None)
        if backend is None:  # this thread is importing it: a call interrupts its own import
            raise BackendError(
                f"a signal handler or a finaliser needs backend {name!r}, which the call that it interrupts is"
                " importing; make a call before"
            )
        _loaded[name] = backend
    return _loaded[name]


def library_of(name: str) -> str:
    """Return the array library whose arrays the backend called `name` takes."""
    return next(kind.library for kind in TABLE.values() if name in kind.backends)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend inside a ``with`` block, in this thread or task only.

    Parameters
    ----------
    name : {"reference", "cpu", "cuda"}
        The backend to use; it must take the arrays that it is given.

    Examples
    --------
    >>> import numpy as np, fastlstm
    >>> lstm = fastlstm.LSTM(3, 2, seed=0)
    >>> with fastlstm.use_backend("reference"):
    ...     y, (h_n, c_n) = lstm(np.ones((4, 1, 3), np.float32))
    >>> y.shape
    (4, 1, 2)
    """
    backend_named(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def array_namespace(value: Any) -> Any:
    """Return the module whose functions work on `value`: ``numpy`` or ``cupy``, which its owner has imported."""
    return sys.modules[kind_of("array", value).library]
