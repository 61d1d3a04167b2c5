"""Products of a small batch with unpacked matrices, for the backward pass."""

from __future__ import annotations

from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.vector import address, fill, lanes_of, load, load_first, offset, splat, store, store_first
from fastlstm.kernels.cpu.vector_arithmetic import fma

__all__ = ["clear", "copy_or_clear", "product"]


@routine
def copy_or_clear(source, target, size):
    """Copy an array of so many elements; one of none stands for zeros."""
    for n in range(0, size, lanes_of(target)):
        left = size - n
        store_first(offset(target, n), load_first(offset(address(source), n), left if source.size else 0), left)


@routine
def clear(target, size):
    """Set so many elements to zero."""
    for n in range(0, size, lanes_of(target)):
        store_first(offset(target, n), fill(target, 0.0), size - n)


_TOGETHER = 4  # rows of B that are read side by side


@routine
def product(m, k, n, a, a_row, a_k, b, b_row, c):
    """Compute C = A @ B, (m, k) times (k, n), on unpacked matrices: B, if large, is read once from end to end.

    Parameters
    ----------
    m, k, n : int
        Sizes, at least 1.
    a : pointer, IN
        Element (i, j) of A is ``a[i * a_row + j * a_k]``.
    b : pointer, IN
        Row j of B starts at ``b[j * b_row]``.
    c : pointer, OUT
        C, without padding.
    """
    together = k // _TOGETHER * _TOGETHER
    for j in range(0, together, _TOGETHER):
        for i in range(m):
            _four_rows(n, offset(a, i * a_row + j * a_k), a_k, offset(b, j * b_row), b_row, offset(c, i * n), j > 0)
    for j in range(together, k):
        for i in range(m):
            _one_row(n, splat(offset(a, i * a_row + j * a_k)), offset(b, j * b_row), offset(c, i * n), j > 0)


@routine(inline=True)
def _four_rows(n, a, a_k, b, b_row, c, add):
    """Compute a[0] b[0] + ... + a[3] b[3] for rows of n elements; add it to c, or store it there."""
    width = lanes_of(c)
    f0, f1, f2, f3 = splat(a), splat(offset(a, a_k)), splat(offset(a, 2 * a_k)), splat(offset(a, 3 * a_k))
    b1, b2, b3 = offset(b, b_row), offset(b, 2 * b_row), offset(b, 3 * b_row)
    whole = n // width * width
    for column in range(0, whole, width):
        total = f0 * load(offset(b, column))
        total = fma(f1, load(offset(b1, column)), total)
        total = fma(f2, load(offset(b2, column)), total)
        total = fma(f3, load(offset(b3, column)), total)
        here = offset(c, column)
        store(here, total + load(here) if add else total)
    if whole < n:
        rest = n - whole
        total = f0 * load_first(offset(b, whole), rest)
        total = fma(f1, load_first(offset(b1, whole), rest), total)
        total = fma(f2, load_first(offset(b2, whole), rest), total)
        total = fma(f3, load_first(offset(b3, whole), rest), total)
        here = offset(c, whole)
        store_first(here, total + load_first(here, rest) if add else total, rest)


@routine(inline=True)
def _one_row(n, factor, b, c, add):
    """Compute factor times a row of n elements; add it to c, or store it there."""
    width = lanes_of(c)
    whole = n // width * width
    for column in range(0, whole, width):
        product, here = factor * load(offset(b, column)), offset(c, column)
        store(here, product + load(here) if add else product)
    if whole < n:
        rest, here = n - whole, offset(c, whole)
        product = factor * load_first(offset(b, whole), rest)
        store_first(here, product + load_first(here, rest) if add else product, rest)
