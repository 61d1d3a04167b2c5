"""Sequences as users of scikit-learn hold them: arrays, nested lists, and lists of arrays of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError, DTypeError, ShapeError

__all__ = ["axes", "listed", "one"]

Array = np.ndarray[Any, Any]


def listed(x: Any) -> list[Any] | None:
    """Return a list of sequences as one, or None if `x` is one array, or what scikit-learn makes one of."""
    of_objects = isinstance(x, np.ndarray) and x.dtype == object and x.ndim == 1
    if not (of_objects or isinstance(x, list | tuple)) or not len(x):
        return None
    found = list(x)
    if not all(hasattr(sequence, "shape") for sequence in found):
        return None
    if all(len(sequence.shape) == 2 for sequence in found) or len({sequence.shape for sequence in found}) > 1:
        return found
    return None


def axes(x: Any) -> int | None:
    """Return how many axes an array or nested list has, None for anything else."""
    if isinstance(x, list | tuple):
        try:
            return np.ndim(x)
        except ValueError:  # lists of different lengths, of which scikit-learn says what is wrong
            return None
    found: int | None = getattr(x, "ndim", None)
    return found


def one(number: int, sequence: Any, dtype: np.dtype[Any], channels_first: bool) -> Array:
    """Return a sequence as (T, C) in `dtype`."""
    try:
        found: Array = np.asarray(sequence, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise DTypeError(f"X[{number}] must be an array of numbers") from error
    if found.ndim not in (1, 2):
        raise ShapeError(f"X[{number}] must have shape (T, C), got {found.shape}")
    if not np.isfinite(found).all():
        raise ArgumentError(f"X[{number}] has NaN or infinite values: fill them first")
    if found.ndim == 1:
        return found[:, None]
    return found.T if channels_first else found
