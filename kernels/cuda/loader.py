"""Read the kernels' files and state how they are compiled; CuPy compiles them, and the tests do, without a GPU."""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

__all__ = [
    "FILES", "HEADERS", "PERSISTENT", "VARIANTS", "kernel_names", "options", "persistent_source", "source", "wide",
]  # fmt: skip

HEADERS = ("common.cuh", "activations.cuh", "cell_step.cuh")
FILES = ("step.cu", "single_step.cu", "ragged.cu", "column_sum.cu")
PERSISTENT = (
    "exchange.cuh",
    "mma.cuh",
    "group.cuh",
    "mma_products.cuh",
    "persistent.cu",
)  # compiled apart: they need more options
# The macros of cell_step.cuh; those from GATE_ACTIVATION on have a value.
VARIANTS = (
    "PEEPHOLE", "NO_FORGET_GATE", "COUPLED", "GATE_ACTIVATION", "CANDIDATE_ACTIVATION", "OUTPUT_ACTIVATION", "CLIP",
    "CELL_CLIP",
)  # fmt: skip

_TYPES = {"float32": "float", "float64": "double"}
_VECTOR_BYTES = 16  # the widest load of a thread


@cache
def source() -> str:
    """Return all kernels but the persistent ones as one text: headers first, each file with its own name and lines."""
    return _text((*HEADERS, *FILES))


@cache
def persistent_source() -> str:
    """Return the persistent kernels as one text; see ``plans.Plan.macros`` for the options that they need besides."""
    return _text((*HEADERS, *PERSISTENT))


def _text(names: tuple[str, ...]) -> str:
    folder = files("fastlstm.kernels.cuda")
    return "".join(f'#line 1 "{name}"\n{(folder / name).read_text(encoding="utf-8")}' for name in names)


@cache
def kernel_names() -> tuple[str, ...]:
    """Return the names of all kernels, in the order of the source."""
    return tuple(re.findall(r'^extern "C" __global__ void (\w+)\(', source(), re.MULTILINE))


def wide(dtype: np.dtype[Any]) -> int:
    """Return how many hidden units a thread can load at once."""
    return _VECTOR_BYTES // dtype.itemsize


def options(dtype: np.dtype[Any], width: int, variant: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the compiler's options for a dtype, a number of hidden units a thread (1 or :func:`wide`) and a variant.

    `variant` is a selection of :data:`VARIANTS`, some as ``NAME=value``, without any, the cell is the plain LSTM; and
    ``RESETS`` (see common.cuh).
    """
    macros = (f"REAL={_TYPES[dtype.name]}", f"WIDTH={width}", *variant)
    return (*(f"-D{macro}" for macro in macros), "--std=c++17")
