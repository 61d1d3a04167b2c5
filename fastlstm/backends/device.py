"""The one object through which the CUDA backend reaches a GPU, and CuPy behind it.

The backend's host code asks for nothing that is not in :class:`Device`. So it runs on any object that
offers the same: the tests have one whose memory is NumPy's and whose kernels are the same files, compiled
for the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.errors import BackendError
from fastlstm.kernels.cuda import loader

__all__ = ["CupyDevice", "Device", "Kernel"]

# Called with grid, block and arguments: arrays, which arrive as pointers, and integers, which arrive as 64 bits.
Kernel: TypeAlias = Callable[[tuple[int, ...], tuple[int, ...], tuple[Any, ...]], None]


class Device(Protocol):
    """A GPU: memory, kernels and products. All work goes to the caller's current stream, and nothing waits for it."""

    xp: Any  # the module whose arrays live there

    def of(self, array: Array) -> AbstractContextManager[Any]:
        """Make the device that holds `array` the current one inside a ``with`` block."""
        ...

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        """Copy an array from the host."""
        ...

    def aligned(self, array: Array) -> bool:
        """Whether the array's first element lies at a multiple of 16 bytes."""
        ...

    def kernel(self, name: str, dtype: np.dtype[Any], width: int) -> Kernel:
        """Return a kernel, compiled at its first use (see ``kernels/cuda/loader.py``)."""
        ...

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        rows: int | None = None,
        a_row: int = 0,
        out_row: int = 0,
        transpose_a: bool = False,
        transpose_b: bool = False,
        accumulate: bool = False,
    ) -> None:
        """Write the product of two C-contiguous matrices, neither of them empty, to `out`, or add it there.

        `rows` restricts it to so many rows of the product, which come from row `a_row` of `a` on and go to
        row `out_row` of `out` on; offsets in place of slices, which would cost more than the call itself.
        """
        ...


class CupyDevice:
    """CuPy: its memory pool, its cache of compiled kernels, and the cuBLAS handle it keeps for each device."""

    def __init__(self) -> None:
        self.xp = _cupy()
        cublas = self.xp.cuda.cublas
        self._handle = self.xp.cuda.device.get_cublas_handle
        self._operation = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}
        self._gemm = {"float32": cublas.sgemm, "float64": cublas.dgemm}
        self._factors = {name: np.array([0, 1], name) for name in self._gemm}  # cuBLAS reads them on the host
        self.kernel = cache(self._kernel)

    def of(self, array: Array) -> AbstractContextManager[Any]:
        """See :class:`Device`."""
        device: AbstractContextManager[Any] = array.device
        return device

    def upload(self, host: np.ndarray[Any, Any]) -> Array:
        """See :class:`Device`; CuPy copies it through pinned memory, so that this does not wait."""
        return self.xp.asarray(host)

    def aligned(self, array: Array) -> bool:
        """See :class:`Device`."""
        return bool(array.data.ptr % 16 == 0)

    def _kernel(self, name: str, dtype: np.dtype[Any], width: int) -> Kernel:
        kernel: Kernel = self._module(dtype, width).get_function(name)
        return kernel

    @cache  # noqa: B019, there is one such object, and it lives as long as the process
    def _module(self, dtype: np.dtype[Any], width: int) -> Any:
        return self.xp.RawModule(code=loader.source(), options=loader.options(dtype, width))

    def matmul(
        self,
        a: Array,
        b: Array,
        out: Array,
        *,
        rows: int | None = None,
        a_row: int = 0,
        out_row: int = 0,
        transpose_a: bool = False,
        transpose_b: bool = False,
        accumulate: bool = False,
    ) -> None:
        """See :class:`Device`. One cuBLAS call, in full precision of the dtype.

        cuBLAS counts by columns, where a matrix stored by rows is its own transpose: the product is asked
        for as out^T = b^T a^T.
        """
        (b_columns, b_rows), size = b.shape, a.dtype.itemsize
        columns, inner = (b_columns, b_rows) if transpose_b else (b_rows, b_columns)
        if rows is None:
            rows = a.shape[1] if transpose_a else a.shape[0]
        factors = self._factors[a.dtype.name].ctypes.data
        self._gemm[a.dtype.name](
            self._handle(), self._operation[transpose_b], self._operation[transpose_a], columns, rows, inner,
            factors + size, b.data.ptr, b.shape[1], a.data.ptr + a_row * a.shape[1] * size, a.shape[1],
            factors + size * accumulate, out.data.ptr + out_row * columns * size, columns,
        )  # fmt: skip


def _cupy() -> Any:
    """Import CuPy and make sure that it can work here."""
    how = 'pip install "fastlstm[cuda13]" (or [cuda12], as the driver allows)'
    try:
        cupy = import_module("cupy")
    except ImportError as error:
        raise BackendError(f"the CUDA backend needs CuPy, which cannot be imported here ({error}): {how}") from error
    try:
        cupy.cuda.runtime.getDeviceCount()  # raises if there is none
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise BackendError(f"CuPy {cupy.__version__} finds no CUDA device it can use here: {error}") from error
    try:
        cupy.cuda.cublas.getVersion  # noqa: B018, the attribute loads the library
        cupy.cuda.nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        raise BackendError(f"CuPy {cupy.__version__} lacks libraries of the CUDA toolkit ({error}): {how}") from error
    return cupy
