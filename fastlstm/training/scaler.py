"""Scaling of inputs and targets to mean 0 and standard deviation 1, as a part of a model."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace

__all__ = ["Scaler"]


class Scaler:
    """Means and standard deviations of a model's inputs and targets; measured by :func:`fastlstm.training.fit`.

    Parameters
    ----------
    arrays : mapping of str to array
        ``x.mean`` and ``x.deviation`` (I,), and for each head with targets that are scaled ``<head>.mean`` and
        ``<head>.deviation`` (K,). Deviations are above zero.
    """

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self.arrays = dict(arrays)

    @property
    def heads(self) -> tuple[str, ...]:
        """The heads with targets that are scaled."""
        return tuple(name.removesuffix(".mean") for name in self.arrays if name.endswith(".mean") and name != "x.mean")

    def scale(self, name: str, values: Array) -> Array:
        """Scale inputs (`name` is ``x``) or the targets of a head; those of a head that has no scale stay as they are.

        The scaled values have mean 0 and deviation 1 over the data that was measured.
        """
        if f"{name}.mean" not in self.arrays:
            return values
        return (values - self.arrays[f"{name}.mean"]) / self.arrays[f"{name}.deviation"]

    def restore(self, name: str, values: Array) -> Array:
        """Bring scaled targets back to their units."""
        if f"{name}.mean" not in self.arrays:
            return values
        return values * self.arrays[f"{name}.deviation"] + self.arrays[f"{name}.mean"]

    def to(self, library: ModuleType) -> Scaler:
        """Copy the scaler to another array library."""
        # By way of the host: CuPy's arrays have `get` for that, and NumPy's are there.
        return Scaler({name: library.array(getattr(a, "get", lambda a=a: a)()) for name, a in self.arrays.items()})

    def __repr__(self) -> str:
        return f"Scaler({', '.join(['x', *self.heads])})"


class Moments:
    """Mean and standard deviation by column, of data that comes in pieces: all of it once, then all of it again.

    Two passes, because the difference of two sums of squares would cancel. Sums are float64.
    """

    def __init__(self, columns: int) -> None:
        self.count = 0.0
        self.sums: Any = np.zeros(columns)
        self.squares: Any = np.zeros(columns)

    def add(self, rows: Array) -> None:
        """Take rows (..., columns) in the first pass."""
        flat = rows.reshape(-1, rows.shape[-1])
        self.count += len(flat)
        self.sums = self.sums + _host(flat.sum(axis=0, dtype=np.float64))

    def add_again(self, rows: Array) -> None:
        """Take the same rows in the second pass."""
        flat = rows.reshape(-1, rows.shape[-1])
        xp = array_namespace(rows)
        difference = flat.astype(np.float64) - xp.asarray(self.mean)
        self.squares = self.squares + _host((difference * difference).sum(axis=0))

    @property
    def mean(self) -> np.ndarray[Any, Any]:
        """Mean of each column."""
        found: np.ndarray[Any, Any] = self.sums / max(self.count, 1.0)
        return found

    def deviation(self, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
        """Deviation of each column; 1 where it is none, beyond the rounding of the values."""
        found = np.sqrt(self.squares / max(self.count, 1.0))
        constant = found <= 8 * np.finfo(dtype).eps * np.abs(self.mean)
        return np.where(constant | (found < np.finfo(dtype).tiny), 1.0, found)


def _host(values: Any) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = getattr(values, "get", lambda: values)()
    return found
