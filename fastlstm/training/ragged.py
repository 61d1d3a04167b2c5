"""Converting lists of sequences of different lengths to one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError

__all__ = ["checked", "pad", "stack"]


def checked(name: str, sequences: Sequence[Any], like: Array, columns: int) -> list[Array]:
    """Check a list of sequences (T_i, columns) of the library and dtype of `like`; return them in native byte order."""
    if not sequences:
        raise ArgumentError(f"{name} must have at least one sequence")
    return [
        checks.array(f"{name}[{k}]", sequence, like, (None, columns), "(T, features)")
        for k, sequence in enumerate(sequences)
    ]


def stack(sequences: Sequence[Array], lengths: np.ndarray[Any, Any]) -> Array:
    """Return sequences (T_i, ...) as one array (T, B, ...), zero past each length."""
    first = sequences[0]
    shape = (int(lengths.max(initial=0)), len(sequences), *first.shape[1:])
    padded = array_namespace(first).zeros(shape, dtype=first.dtype)
    for b, sequence in enumerate(sequences):
        padded[: len(sequence), b] = sequence
    return padded


def pad(name: str, sequences: Sequence[Any], like: Array, columns: int) -> tuple[Array, np.ndarray[Any, Any]]:
    """Check a list of sequences (T_i, columns) and return them as one array (T, B, columns), and their lengths."""
    found = checked(name, sequences, like, columns)
    lengths = np.array([len(sequence) for sequence in found], dtype=np.int64)
    return stack(found, lengths), lengths
