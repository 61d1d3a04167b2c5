"""A series cut into windows, for :class:`fastlstm.sklearn.LSTMForecaster`."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.utils.validation import check_array

from fastlstm.errors import ShapeError

__all__ = ["series", "split"]

Array = np.ndarray[Any, Any]


def series(X: Any, least: int, channels: int | None = None) -> Array:
    """Check a series of at least so many values, and of `channels` if it is given; return it as (T, C)."""
    found: Array = check_array(X, ensure_2d=False, allow_nd=True, dtype=np.float64)
    found = found[:, None] if found.ndim == 1 else found
    if found.ndim != 2 or len(found) < least:
        raise ShapeError(f"a series must have shape (T,) or (T, C) with T >= {least}, got {np.shape(X)}")
    if channels not in (None, found.shape[1]):
        raise ShapeError(f"the series must have {channels} channels as that of the training, got {found.shape[1]}")
    return found


def split(given: Array, window: int, horizon: int) -> tuple[Array, Array]:
    """Return all windows of a series, (n, window, C), and the values after each, (n, horizon, C)."""
    views = np.lib.stride_tricks.sliding_window_view(given, window + horizon, axis=0).swapaxes(1, 2)
    return views[:, :window], views[:, window:]
