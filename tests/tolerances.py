"""Every tolerance of the test suite, in one table, each with its reason; and the one way to compare.

Errors are normalised: the largest absolute difference, divided by the largest absolute value of the true
array. An element that is small only because its summands cancel is then not asked for digits that no
summation order could give it. NaN and Inf must stand in the same places, and an array that should be zero
must be exactly zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

EPS = {np.dtype(np.float32): float(np.finfo(np.float32).eps), np.dtype(np.float64): float(np.finfo(np.float64).eps)}


class Bound(NamedTuple):
    """The largest normalised error allowed, per dtype; None where the claim is made for one dtype only."""

    float64: float | None
    float32: float | None
    reason: str


BOUNDS = {
    "torch": Bound(
        1e-10,
        None,
        "float64, torch's own LSTM: the same sums in another order, over at most 65 steps; in practice 1e-14."
        " float32 is held to TORCH_RATIO in place of a fixed bound",
    ),
    "loop": Bound(
        1e-12,
        None,
        "float64 against torch's autograd through 12 steps of a closed loop: the same sums in another order",
    ),
    "long": Bound(
        1e-12,
        None,
        "float64 over up to 65,537 steps: gradients are sums of as many terms, rounded at sqrt(65,537) * 1e-16",
    ),
    "onnxruntime": Bound(
        None,
        2e-6,
        "two float32 implementations with different sigmoid, tanh and summation order, over at most 17 steps",
    ),
    "scalar loop": Bound(
        1e-13,
        None,
        "the same equations in float64, summed one by one, over at most 5 steps; sigmoid by tanh in place of exp",
    ),
    "complex step": Bound(
        1e-13,
        None,
        "the complex step has no truncation error: what is left is the rounding of at most some hundred float64 sums",
    ),
    "central differences": Bound(
        1e-8,
        None,
        "a step of 1e-5 truncates at 1e-10 times the third derivative and rounds at 1e-16 / 1e-5",
    ),
    "layer norm": Bound(
        1e-9,
        2e-3,
        "as agreement; but where h has few features, the normalised W_hh h hardly depends on its size, so that the"
        " gradient by h is a difference of numbers up to 1 / sqrt(1e-5) times larger, at each of some steps",
    ),
    "agreement": Bound(
        1e-12,
        5e-6,
        "against the float64 reference: rounds of sums over K <= 100 units, T*B <= 250 rows, carried through T steps",
    ),
    "tf32": Bound(
        None,
        4e-3,
        "factors of 11 significant bits, each off by 2^-12 on average and 2^-11 at most: 1e-3 a product at most, of"
        " random sign within a sum; carried through T <= 6 steps",
    ),
    "bf16": Bound(
        None,
        3e-2,
        "factors of 8 significant bits: eight times TF32's error",
    ),
    "saturated": Bound(
        1e-10,
        None,
        "gradients at pre-activations of some 1e5, each rounded a few times at 1e-11; a saturated gate's"
        " derivative is e^-|a|, so the absolute error of a becomes the relative one of a gradient",
    ),
    "streaming": Bound(
        8 * EPS[np.dtype(np.float64)],
        8 * EPS[np.dtype(np.float32)],
        "a small batch may take another kernel, with another order of summation: a few ulp, carried through 12 steps",
    ),
    "alone": Bound(
        16 * EPS[np.dtype(np.float64)],
        16 * EPS[np.dtype(np.float32)],
        "a matrix product over fewer rows may sum in another order (BLAS does): a few ulp, carried through the steps",
    ),
    "chunked gradients": Bound(
        128 * EPS[np.dtype(np.float64)],
        64 * EPS[np.dtype(np.float32)],
        "the parameters' gradients are sums over T*B products, here grouped by chunk: another order of summation; and"
        " at H = 1 a gradient is one number left of some that cancel: half an ulp on the weights moves it by 100 eps",
    ),
}

# Our float32 error may be this many times torch's own, both against float64, plus some eps, because torch's error may
# happen to be zero where ours is one rounding: a few for the outputs and states, which are sums of one sign or
# bounded by one; twice as many for gradients, which at H = 1 are one number that is left of 64 that cancel. Where so
# much cancels, a rounding decides how far off either is: torch's error is the largest over some orders of the inputs,
# if that in the given order is too small.
TORCH_RATIO = 2.0
TORCH_EXTRA_EPS = {"outputs": 4.0, "gradients": 8.0}

# claim, backend, dtype -> the largest normalised error seen and the array it was seen in; printed after the run.
measured: dict[tuple[str, str, str], tuple[float, str]] = {}


def normalised_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest true value; infinite if shapes, NaN, Inf or an all-zero array differ."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if actual.shape != expected.shape:
        return np.inf
    finite = np.isfinite(expected)
    if not np.array_equal(actual[~finite], expected[~finite], equal_nan=True) or not np.isfinite(actual[finite]).all():
        return np.inf
    difference = np.abs(actual[finite] - expected[finite]).max(initial=0.0)
    if difference == 0.0:
        return 0.0
    scale = np.abs(expected[finite]).max(initial=0.0)
    return float(difference / scale) if scale else np.inf


def record(claim: str, backend: str, dtype: np.dtype, name: str, error: float) -> None:
    """Remember the largest error of a claim for the table after the run."""
    key = (claim, backend, np.dtype(dtype).name)
    if error >= measured.get(key, (0.0, ""))[0]:
        measured[key] = (error, name)


def assert_close(
    claim: str, actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], *, backend: str, dtype: np.dtype
) -> None:
    """Assert that all arrays agree within the claim's bound, and that `actual` has the model's dtype."""
    assert actual.keys() == expected.keys()
    bound = getattr(BOUNDS[claim], np.dtype(dtype).name)
    for name, value in actual.items():
        assert value.dtype == dtype, f"{name} has dtype {value.dtype}"
        error = normalised_error(value, expected[name])
        record(claim, backend, dtype, name, error)
        assert error <= bound, f"{name}: error {error:.3g} is above {bound:.3g} ({claim})"


def assert_identical(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> None:
    """Assert that all arrays have the same dtype, shape and bits; any NaN equals any other."""
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.dtype == expected[name].dtype, name
        np.testing.assert_array_equal(value, expected[name], err_msg=name, strict=True)
