"""The CPU backend: NumPy arrays on kernels compiled by Numba."""

from fastlstm.backends.cpu.backend import BACKEND

__all__ = ["BACKEND"]
