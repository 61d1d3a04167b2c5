"""The largest errors of the CPU kernels' sigmoid and tanh, against float64 and mpmath."""

from __future__ import annotations

import os

import mpmath
import numpy as np
import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

from fastlstm.kernels.cpu.activations import sigmoid_array, tanh_array

PART = 1 << 22
# Every 1021st float32, a prime: no pattern of mantissas is left out. With 1, every float32 in some minutes.
STRIDE = int(os.environ.get("FASTLSTM_TEST_STRIDE", "1021"))
KERNELS = {"sigmoid": sigmoid_array, "tanh": tanh_array}
# What is promised, in units of the last place. Half of one is what correct rounding would give.
ULPS = {"sigmoid": 3.0, "tanh": 2.0}
EXACT = {"sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)), "tanh": mpmath.tanh}


def apply(name, x):
    padded = np.concatenate([x, np.zeros(-x.size % 64, x.dtype)])
    y = np.empty_like(padded)
    KERNELS[name](padded, y)
    return y[: x.size]


def float64(name, x):
    """The float64 value, whose own error is a millionth of a float32 ulp."""
    if name == "tanh":
        return np.tanh(x)
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1, e) / (1 + e)


@pytest.mark.parametrize("name", ULPS)
def test_float32_error_over_all_bit_patterns(name):
    worst, low, high = 0.0, np.inf, -np.inf
    for start in range(0, 1 << 32, PART * STRIDE):
        x = np.arange(start, min(start + PART * STRIDE, 1 << 32), STRIDE, dtype=np.uint32).view(np.float32)
        x = x[np.isfinite(x)]
        if not x.size:
            continue
        y, exact = apply(name, x), float64(name, x.astype(np.float64))
        error = np.abs(y - exact) / np.spacing(np.abs(exact).astype(np.float32))
        worst = max(worst, float(error.max()))
        low, high = min(low, float(y.min())), max(high, float(y.max()))
    assert 0.5 <= worst <= ULPS[name]
    assert (low, high) == ((0.0, 1.0) if name == "sigmoid" else (-1.0, 1.0))


@pytest.mark.parametrize("name", ULPS)
def test_float64_error_against_mpmath(name):
    rng = np.random.default_rng(0)
    spread = rng.choice([-1, 1], 6000) * 10.0 ** rng.uniform(-12, 1.6, 6000)
    x = np.concatenate([rng.uniform(-3, 3, 6000), rng.uniform(-40, 40, 2000), spread, [-745.0, -709.5, 20.0]])
    y = apply(name, x)
    with mpmath.workdps(40):
        exact = [EXACT[name](mpmath.mpf(float(v))) for v in x]
        errors = [
            float(abs(mpmath.mpf(float(found)) - true) / mpmath.mpf(float(np.spacing(abs(float(true))))))
            for found, true in zip(y, exact, strict=True)
        ]
    assert 0.5 <= max(errors) <= ULPS[name], x[int(np.argmax(errors))]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_limits_zeros_and_nan_are_exact(dtype):
    x = np.array([np.inf, -np.inf, 0.0, -0.0, np.nan, np.finfo(dtype).max, np.finfo(dtype).min], dtype)
    sigmoid, tanh = apply("sigmoid", x), apply("tanh", x)
    np.testing.assert_array_equal(sigmoid, np.array([1, 0, 0.5, 0.5, np.nan, 1, 0], dtype))
    np.testing.assert_array_equal(tanh, np.array([1, -1, 0, 0, np.nan, 1, -1], dtype))
    assert np.signbit(tanh[3]) and not np.signbit(tanh[2])
    tiny = np.array([np.finfo(dtype).smallest_subnormal, -np.finfo(dtype).tiny], dtype)
    np.testing.assert_array_equal(apply("tanh", tiny), tiny)
