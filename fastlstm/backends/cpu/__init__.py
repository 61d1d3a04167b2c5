"""NumPy arrays on Numba-compiled kernels."""

from fastlstm.backends.cpu.backend import BACKEND

__all__ = ["BACKEND"]
