"""CuPy arrays on the kernels in ``kernels/cuda``: ``backend.py`` runs one layer, ``device.py`` reaches the GPU."""

from __future__ import annotations

from typing import Any

from fastlstm.backends.cuda.backend import CudaBackend
from fastlstm.backends.cuda.device import CupyDevice

__all__ = ["CudaBackend", "CupyDevice"]


def __getattr__(name: str) -> Any:
    """Make ``BACKEND`` when it is asked for: importing this package needs no CuPy."""
    if name == "BACKEND":
        return CudaBackend(CupyDevice())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
