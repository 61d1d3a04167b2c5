"""An LSTM for NumPy and CuPy arrays, without a deep-learning framework.

NumPy arrays run on CPU kernels compiled by Numba, CuPy arrays on CUDA kernels. The calls are the same, and results are
arrays of the same library as the inputs.

>>> import numpy as np, fastlstm
>>> lstm = fastlstm.LSTM(input_size=3, hidden_size=8, seed=0)
>>> y, (h_n, c_n) = lstm(np.ones((5, 2, 3), np.float32))
>>> y.shape
(5, 2, 8)
"""

from importlib import import_module
from typing import Any

from fastlstm import functional, training
from fastlstm.arrays import as_array
from fastlstm.backends.threads import get_num_threads, set_num_threads
from fastlstm.dispatch import use_backend
from fastlstm.errors import (
    ArgumentError,
    ArrayTypeError,
    BackendError,
    DTypeError,
    FastLSTMError,
    FrozenError,
    ModelFileError,
    ShapeError,
)
from fastlstm.lstm import LSTM
from fastlstm.rnn import RNN

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "RNN",
    "ArgumentError",
    "ArrayTypeError",
    "BackendError",
    "DTypeError",
    "FastLSTMError",
    "FrozenError",
    "ModelFileError",
    "ShapeError",
    "as_array",
    "functional",
    "get_num_threads",
    "set_num_threads",
    "training",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Import :mod:`fastlstm.compiled` when it is used: it needs Numba, which is not loaded before it has to be."""
    if name == "compiled":
        return import_module("fastlstm.compiled")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
