"""How a kernel is compiled and cached.

Numba's on-disk cache looks at the file of the function that it caches, and does not notice a change in
another file that this one calls. The kernels call each other across files, so the stamp that decides
whether a cached kernel is fresh is taken over all of them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit, types

from fastlstm.kernels.cpu.simd import VECTOR_BYTES

__all__ = ["cache_folder", "kernel", "routine"]


def _stamp() -> str:
    digest = hashlib.sha256(str(VECTOR_BYTES).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _stamp()


def kernel(function: Callable[..., None]) -> Any:
    """Compile a kernel at its first call, without the GIL, and keep it on disk for the next process.

    Where no folder can be written, it is compiled in every process.
    """
    dispatcher = njit(nogil=True, no_cfunc_wrapper=True, error_model="numpy")(function)
    try:
        dispatcher.enable_caching()
    except RuntimeError:  # Numba found no folder that it may write
        return dispatcher
    dispatcher._cache._cache_file._source_stamp = _STAMP
    return dispatcher


def routine(function: Callable[..., Any] | None = None, *, inline: bool = False) -> Any:
    """Compile a function that kernels call, once for each dtype; with `inline`, into each of its callers.

    Left to itself, Numba compiles a function anew for every constant that it is called with.
    """
    if function is None:
        return functools.partial(routine, inline=inline)
    dispatcher = njit(forceinline=inline, no_cpython_wrapper=True, no_cfunc_wrapper=True, error_model="numpy")(function)
    resolve = dispatcher.get_call_template

    def resolve_plain(args: Any, kws: Any) -> Any:
        return resolve(tuple(map(types.unliteral, args)), {name: types.unliteral(t) for name, t in dict(kws).items()})

    dispatcher.get_call_template = resolve_plain
    return dispatcher


def cache_folder(dispatcher: Any) -> str | None:
    """Return the folder in which a kernel is cached, None if it is not."""
    return getattr(dispatcher._cache, "cache_path", None)
