"""What one LSTM is: its sizes, dtype and variant, as one frozen value that every layer below reads."""

from __future__ import annotations

import functools
import math
import operator
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError, DTypeError, refused, shown

__all__ = ["Cell", "integer", "real"]

MAX_LAYERS = 2**20  # more are a mistake, and their names alone would fill the memory
FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
# The fields that make another cell of the LSTM, with the values of the plain one.
VARIANTS: dict[str, Any] = {"peephole": False}


@dataclass(frozen=True)
class Cell:
    """The description of a (stacked, possibly bidirectional) LSTM.

    A cell holds no numbers of the model, only what determines their names and
    shapes and how a backend runs them. A variant of the LSTM is a field here
    that the kernels read; it is not another class.

    Parameters
    ----------
    input_size : int
        Number of input features I, at least 1.
    hidden_size : int
        Number of hidden units H, at least 1.
    num_layers : int
        Number of stacked layers L, at least 1.
    bias : bool
        Whether the pre-activations have a bias.
    dropout : float
        Probability in [0, 1) of dropping an output of every layer but the last, in training only.
    bidirectional : bool
        Whether each layer also runs backwards in time.
    dtype : numpy.dtype
        float32 or float64, the dtype of parameters, inputs and outputs.
    peephole : bool
        Whether the gates also see the cell state: i and f the one before the step, o the new one.

    Raises
    ------
    ArgumentError
        If a size is not a positive integer, or so large that the parameters cannot be addressed, or `dropout` is
        outside [0, 1).
    DTypeError
        If `dtype` is neither float32 nor float64.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    dtype: np.dtype[Any] = FLOAT_DTYPES[0]
    peephole: bool = False

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers"):
            object.__setattr__(self, name, _positive_integer(name, getattr(self, name)))
        for name in ("bias", "bidirectional", "peephole"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise ArgumentError(f"{name} must be True or False, got {shown(value)}")
            object.__setattr__(self, name, bool(value))
        object.__setattr__(self, "dropout", _probability("dropout", self.dropout))
        object.__setattr__(self, "dtype", _float_dtype(self.dtype))
        _check_addressable(self)

    @functools.cached_property
    def calls(self) -> dict[Any, Any]:
        """The calls that were prepared for this cell, by their signatures: see ``calls.py``. No part of its value."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "calls"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def num_directions(self) -> int:
        """Number of directions D of each layer, 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def output_size(self) -> int:
        """Number of features of the output, D * H."""
        return self.num_directions * self.hidden_size

    def layer_input_size(self, layer: int) -> int:
        """Number of features that layer number `layer` reads: I for the first, D * H for the others."""
        return self.input_size if layer == 0 else self.output_size

    def with_dtype(self, dtype: Any) -> Cell:
        """Return the same cell in another dtype."""
        return replace(self, dtype=np.dtype(dtype))

    def describe(self) -> dict[str, Any]:
        """Describe the cell by plain Python values, for files and messages; ``Cell(**cell.describe())`` is equal.

        A variant that is switched off is left out, so that a plain model's file is one that older versions read.
        """
        described = asdict(self) | {"dtype": self.dtype.name}
        return {name: value for name, value in described.items() if name not in VARIANTS or value != VARIANTS[name]}


def integer(value: Any) -> int | None:
    """Return a single integer as Python's, or None if `value` is none: a bool, a float or an array of some axes."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)
    except Exception as error:
        if not refused(value, error):
            raise
        return None


def real(value: Any) -> float:
    """Return a single real number as a float, or NaN if `value` is none, or too large for a float."""
    # float() would take a string, a complex scalar of NumPy with a warning, and an array of one entry.
    if isinstance(value, bool | str | bytes | bytearray | memoryview):
        return math.nan
    try:
        if getattr(value, "ndim", 0) != 0 or getattr(getattr(value, "dtype", None), "kind", "f") not in "iuf":
            return math.nan
        return float(value)
    except Exception as error:
        if not refused(value, error):
            raise
        return math.nan


def _positive_integer(name: str, value: Any) -> int:
    number = integer(value)
    if number is None or number < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {shown(value)}")
    return number


def _check_addressable(cell: Cell) -> None:
    """Refuse sizes whose parameters no machine can address, before anything is made for each of the layers."""
    columns = max(cell.input_size, cell.output_size)
    if cell.num_layers > MAX_LAYERS:
        raise ArgumentError(f"num_layers must be at most {MAX_LAYERS}, got {shown(cell.num_layers)}")
    if 4 * cell.hidden_size * columns * cell.dtype.itemsize > sys.maxsize:
        raise ArgumentError(
            f"input_size and hidden_size are too large: the weights of input_size {shown(cell.input_size)} and"
            f" hidden_size {shown(cell.hidden_size)} cannot be addressed"
        )


def _probability(name: str, value: Any) -> float:
    number = real(value)
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name} must be a number in [0, 1), got {shown(value)}")
    return number


def _float_dtype(value: Any) -> np.dtype[Any]:
    try:
        if value is None:
            raise TypeError("NumPy takes None for float64")
        dtype: np.dtype[Any] = np.dtype(value).newbyteorder("=")
    except Exception as error:
        if not refused(value, error):
            raise
        raise DTypeError(f"dtype must be float32 or float64, got {shown(value)}") from error
    if dtype not in FLOAT_DTYPES:
        raise DTypeError(f"dtype must be float32 or float64, got {dtype.name}")
    return FLOAT_DTYPES[FLOAT_DTYPES.index(dtype)]  # NumPy's own object, as most arrays have it: found by identity
