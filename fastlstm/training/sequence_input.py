"""Sequences as users of scikit-learn hold them: arrays, nested lists, and lists of arrays of different lengths."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError, DTypeError, ShapeError

__all__ = ["arrays", "axes", "listed"]

Array = np.ndarray[Any, Any]


def listed(x: Any, table: bool = False) -> list[Any] | None:
    """Return a list of sequences as one, or None if `x` is one array, or what scikit-learn makes one of.

    With `table`, a list of 1-D arrays of one length is a table, too: its arrays are rows.
    """
    of_objects = isinstance(x, np.ndarray) and x.dtype == object and x.ndim == 1
    if not (of_objects or isinstance(x, list | tuple)) or not len(x):
        return None
    found = list(x)
    if not all(hasattr(sequence, "shape") for sequence in found):
        return None
    if len({sequence.shape for sequence in found}) > 1:
        return found
    return found if len(found[0].shape) == 2 or (len(found[0].shape) == 1 and not table) else None


def axes(x: Any) -> int | None:
    """Return how many axes an array or nested list has, None for anything else."""
    if isinstance(x, list | tuple):
        try:
            return np.ndim(x)
        except ValueError:  # lists of different lengths, of which scikit-learn says what is wrong
            return None
    found: int | None = getattr(x, "ndim", None)
    return found


def arrays(listed: list[Any], dtype: np.dtype[Any], channels_first: bool) -> list[Array]:
    """Return sequences as arrays (T_i, C) in `dtype`, of which all have as many channels C as the first."""
    found = [_one(k, sequence, dtype, channels_first) for k, sequence in enumerate(listed)]
    features = found[0].shape[1]
    for k, sequence in enumerate(found):
        if sequence.shape[1] != features:
            raise ShapeError(f"X[{k}] must have {features} channels as X[0], got {sequence.shape[1]}")
    return found


def _one(number: int, sequence: Any, dtype: np.dtype[Any], channels_first: bool) -> Array:
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
