"""cuBLAS as CuPy offers it, over NumPy: products by address, and the modes of each handle."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import numpy as np

TF32 = 3  # CUBLAS_TF32_TENSOR_OP_MATH
FAST_BF16, FAST_TF32 = 75, 77  # compute types


def cublas(
    launched: list[str], device: Callable[[], int], error: type[Exception], captures: Callable[[], bool]
) -> types.SimpleNamespace:
    """Make the module: `launched` gains a name at each product, `device` is the current one."""
    pointer_modes: dict[int, int] = {}  # of each handle; 0 is the default
    math_modes: dict[int, int] = {}

    def gemm_of(dtype: Any, round_to: Callable[[np.ndarray], np.ndarray] | None = None) -> Callable[..., None]:
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
            if round_to is not None:
                left, right = map(round_to, (left, right))
            out = by_columns(dtype, c, m, n, ldc)
            scale, keep = by_columns(dtype, alpha, 1, 1, 1)[0, 0], by_columns(dtype, beta, 1, 1, 1)[0, 0]
            with np.errstate(all="ignore"):
                # Summed in float64: what is measured here is what the kernels add, not how NumPy's BLAS sums.
                product = scale * (left.astype(np.float64) @ right.astype(np.float64))
                out[...] = product + keep * out if keep else product

        return gemm

    roundings = {FAST_BF16: bf16, FAST_TF32: tf32}

    def gemm_ex(
        handle, transa, transb, m, n, k, alpha, a, atype, lda, b, btype, ldb, beta, c, ctype, ldc, compute, how
    ):
        if (atype, btype, ctype, how) != (0, 0, 0, -1):
            raise error("CUBLAS_STATUS_NOT_SUPPORTED")
        multiply = gemm_of(np.float32, roundings[compute])
        multiply(handle, transa, transb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc)

    return types.SimpleNamespace(
        CUBLAS_COMPUTE_32F_FAST_16BF=FAST_BF16, CUBLAS_COMPUTE_32F_FAST_TF32=FAST_TF32, CUBLAS_GEMM_DEFAULT=-1,
        gemmEx=gemm_ex,
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
    """Keep 10 of the 23 bits of the fraction: to the nearest, ties away from zero, as cvt.rna.tf32.f32."""
    return rounded_bits(values, np.uint32(0x1000), 13)


def bf16(values: np.ndarray) -> np.ndarray:
    """Keep 7 of the 23 bits of the fraction: to the nearest, ties to even, as cvt.rn.bf16.f32."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return rounded_bits(values, np.uint32(0x7FFF) + (bits >> 16 & 1), 16)


def rounded_bits(values: np.ndarray, add: Any, dropped: int) -> np.ndarray:
    """Add to the bits, then clear the last ones; NaN stays as it is."""
    values = np.ascontiguousarray(values, np.float32)
    bits = (values.view(np.uint32) + add) & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)
    return np.where(np.isnan(values), values, bits.view(np.float32))
