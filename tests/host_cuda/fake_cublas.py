"""cuBLAS as CuPy offers it, over NumPy: products by address, and the modes of each handle."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

TF32 = 3  # CUBLAS_TF32_TENSOR_OP_MATH


def cublas(
    launched: list[str], device: Callable[[], int], error: type[Exception], captures: Callable[[], bool]
) -> types.SimpleNamespace:
    """Make the module: `launched` gains a name at each product, `device` is the current one."""
    pointer_modes: dict[int, int] = {}  # of each handle; 0 is the default
    math_modes: dict[int, int] = {}

    def gemm_of(dtype: Any) -> Callable[..., None]:
        def gemm(handle, transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc):
            if handle != device() + 1000:
                raise ValueError("a cuBLAS handle of another device")
            if captures():
                raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
            launched.append("product")
            if pointer_modes.get(handle):
                raise error("cudaErrorIllegalAddress: the factors were expected in the device's memory")
            left = by_columns(dtype, a, k, m, lda).T if transa else by_columns(dtype, a, m, k, lda)
            right = by_columns(dtype, b, n, k, ldb).T if transb else by_columns(dtype, b, k, n, ldb)
            if math_modes.get(handle) == TF32 and dtype is np.float32:
                left, right = map(tf32, (left, right))
            out = by_columns(dtype, c, m, n, ldc)
            scale, keep = by_columns(dtype, alpha, 1, 1, 1)[0, 0], by_columns(dtype, beta, 1, 1, 1)[0, 0]
            with np.errstate(all="ignore"):
                # Summed in float64: what is measured here is what the kernels add, not how NumPy's BLAS sums.
                product = scale * (left.astype(np.float64) @ right.astype(np.float64))
                out[...] = product + keep * out if keep else product

        return gemm

    return types.SimpleNamespace(
        CUBLAS_OP_N=0, CUBLAS_OP_T=1, CUBLAS_POINTER_MODE_HOST=0, CUBLAS_POINTER_MODE_DEVICE=1, CUBLAS_DEFAULT_MATH=0,
        getVersion=lambda handle: 130000, sgemm=gemm_of(np.float32), dgemm=gemm_of(np.float64),
        getPointerMode=lambda handle: pointer_modes.get(handle, 0), setPointerMode=pointer_modes.__setitem__,
        getMathMode=lambda handle: math_modes.get(handle, 0), setMathMode=math_modes.__setitem__,
    )  # fmt: skip


def by_columns(dtype: Any, address: int, rows: int, columns: int, leading: int) -> np.ndarray:
    """View a matrix that is stored by columns."""
    assert leading >= rows > 0 and columns > 0
    size = np.dtype(dtype).itemsize
    interface = {"shape": (rows, columns), "typestr": np.dtype(dtype).str, "data": (address, False),
                 "strides": (size, leading * size), "version": 3}  # fmt: skip
    return np.asarray(types.SimpleNamespace(__array_interface__=interface))


def tf32(values: np.ndarray) -> np.ndarray:
    """Keep 10 of the 23 bits of the fraction."""
    return (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
