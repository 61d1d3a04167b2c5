"""The CUDA backend as one row of the tests' parametrisation: on a GPU through CuPy, elsewhere on the stand-in."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from host_cuda import FakeCupy, compiler

from fastlstm import calls, dispatch
from fastlstm.backends.cuda import CudaBackend, CupyDevice


@functools.cache
def library() -> Any:
    """The array library: CuPy if it finds a device or FASTLSTM_TEST_GPU asks for it, else the stand-in for it."""
    asked = os.environ.get("FASTLSTM_TEST_GPU", "")
    if asked == "0":
        return FakeCupy(multiprocessors=132)
    try:
        import cupy
    except ImportError:
        if asked:
            raise
        return FakeCupy(multiprocessors=132)
    return cupy if asked or cupy.cuda.is_available() else FakeCupy(multiprocessors=132)


def on_gpu() -> bool:
    """Whether the tests run on a real device."""
    return not isinstance(library(), FakeCupy)


def describe() -> str:
    """What the row runs on, for the report after the run."""
    if on_gpu():
        return f"CuPy {library().__version__} on a GPU"
    launched = library().pool.launched
    names = [f"{name}_{kernel}" for name in ("persistent", "step") for kernel in ("forward", "backward")]
    counts = ", ".join(f"{launched.count(name)} {name}" for name in names)
    return f"the stand-in for CuPy, its kernels compiled for the CPU, {counts}"


def missing() -> str | None:
    """Why the row cannot run, or None."""
    if on_gpu() or compiler():
        return None
    return "there is neither a GPU nor a C++ compiler for the kernels"


@functools.cache
def backend() -> CudaBackend:
    """The backend on that library; called while it is installed."""
    return CudaBackend(CupyDevice())


@contextlib.contextmanager
def installed(xp: Any = None) -> Iterator[Any]:
    """Put a library where fastlstm finds CuPy, for the length of a ``with`` block: the row's own, or a stand-in.

    Prepared calls of the functions hold their backend: another library must not get those of the one before.
    """
    before = sys.modules.get("cupy"), dispatch._loaded.get("cuda")
    calls._cells.clear()
    sys.modules["cupy"] = xp = xp or library()
    try:
        dispatch._loaded["cuda"] = backend() if xp is library() else CudaBackend(CupyDevice())
        yield xp
    finally:
        calls._cells.clear()
        for table, key, value in ((sys.modules, "cupy", before[0]), (dispatch._loaded, "cuda", before[1])):
            if value is None:
                table.pop(key, None)
            else:
                table[key] = value
    if isinstance(xp, FakeCupy):
        assert not xp.pool.overwritten


def array(value: np.ndarray) -> Any:
    """Bring an array to the device, with its strides where CuPy can have them: multiples of the item's size."""
    xp = library()
    plain = not value.dtype.isnative or not value.flags.aligned or any(s % value.itemsize for s in value.strides)
    if value.flags.c_contiguous or plain or not value.size:
        return xp.array(np.asarray(value, value.dtype.newbyteorder("="), order="C"))
    low, high = np.lib.array_utils.byte_bounds(value)
    interface = {
        "shape": ((high - low) // value.itemsize,),
        "typestr": value.dtype.str,
        "data": (low, True),
        "version": 3,
    }
    flat = xp.array(np.asarray(types.SimpleNamespace(__array_interface__=interface)))
    start = value.__array_interface__["data"][0] - low
    if on_gpu():
        return xp.ndarray(value.shape, value.dtype, flat.data + start, value.strides)
    return xp.strided(flat, start // value.itemsize, value.shape, value.strides)


def host(value: Any) -> np.ndarray:
    """Bring a result back to NumPy."""
    assert type(value) is library().ndarray
    return value.get()
