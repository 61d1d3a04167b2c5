"""The LSTM for people who live in NumPy and CuPy.

Hand it a NumPy array and it runs Numba-compiled CPU kernels; hand it a CuPy array and it runs CUDA
kernels. The call is the same, the result is the same kind of array, and no deep-learning framework is
involved.

>>> import numpy as np, fastlstm
>>> lstm = fastlstm.LSTM(input_size=3, hidden_size=8, seed=0)
>>> y, (h_n, c_n) = lstm(np.ones((5, 2, 3), np.float32))
>>> y.shape
(5, 2, 8)
"""

from importlib import import_module
from typing import Any

from fastlstm import functional, training
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

__version__ = "0.1.0"

__all__ = [
    "LSTM",
    "ArgumentError",
    "ArrayTypeError",
    "BackendError",
    "DTypeError",
    "FastLSTMError",
    "FrozenError",
    "ModelFileError",
    "ShapeError",
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
