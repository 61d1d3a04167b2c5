"""Reads the kernels' files and says how they are compiled; CuPy compiles them, and the tests do, without a GPU."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

__all__ = ["FILES", "HEADER", "kernel_names", "options", "source", "wide"]

HEADER = "common.cuh"
FILES = ("gates.cu", "pack.cu", "reduce.cu")

_TYPES = {"float32": "float", "float64": "double"}
_VECTOR_BYTES = 16  # the widest load of a thread


@cache
def source() -> str:
    """Return all kernels as one text: the header first, and each file's own name and line numbers in messages."""
    folder = files("fastlstm.kernels.cuda")
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in (HEADER, *FILES))


@cache
def kernel_names() -> tuple[str, ...]:
    """Return the names of all kernels, in the order of the source."""
    return tuple(re.findall(r'^extern "C" __global__ void (\w+)\(', source(), re.MULTILINE))


def wide(dtype: np.dtype[Any]) -> int:
    """Return how many hidden units a thread can load at once."""
    return _VECTOR_BYTES // dtype.itemsize


def options(dtype: np.dtype[Any], width: int) -> tuple[str, ...]:
    """Return the compiler's options for one dtype and number of hidden units a thread (1 or :func:`wide`)."""
    return (f"-DREAL={_TYPES[dtype.name]}", f"-DWIDTH={width}", "--std=c++17")
