"""What one LSTM is: its sizes, dtype and variant, as one frozen value that every layer below reads."""

from __future__ import annotations

import operator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError, DTypeError

__all__ = ["Cell"]

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


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

    Raises
    ------
    ArgumentError
        If a size is not a positive integer or `dropout` is outside [0, 1).
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

    def __post_init__(self) -> None:
        for name in ("input_size", "hidden_size", "num_layers"):
            object.__setattr__(self, name, _positive_integer(name, getattr(self, name)))
        for name in ("bias", "bidirectional"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_):
                raise ArgumentError(f"{name} must be True or False, got {value!r}")
            object.__setattr__(self, name, bool(value))
        object.__setattr__(self, "dropout", _probability("dropout", self.dropout))
        object.__setattr__(self, "dtype", _float_dtype(self.dtype))

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
        """All fields as plain Python values, for files and messages; ``Cell(**cell.describe())`` is equal."""
        return asdict(self) | {"dtype": self.dtype.name}


def _positive_integer(name: str, value: Any) -> int:
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {value!r}")
    return number


def _probability(name: str, value: Any) -> float:
    try:
        number = -1.0 if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name} must be a number in [0, 1), got {value!r}")
    return number


def _float_dtype(value: Any) -> np.dtype[Any]:
    try:
        if value is None:
            raise TypeError("NumPy takes None for float64")
        dtype: np.dtype[Any] = np.dtype(value).newbyteorder("=")
    except TypeError as error:
        raise DTypeError(f"dtype must be float32 or float64, got {value!r}") from error
    if dtype not in FLOAT_DTYPES:
        raise DTypeError(f"dtype must be float32 or float64, got {dtype.name}")
    return FLOAT_DTYPES[FLOAT_DTYPES.index(dtype)]  # NumPy's own object, as most arrays have it: found by identity
