"""Data, masks and numerical gradients for tests of losses and layers."""

from __future__ import annotations

import numpy as np

# Central differences with a step of 1e-6 carry a rounding error of 1e-16 * |value| / 1e-6 and a truncation error of
# 1e-12 * |third derivative|: 1e-8 leaves a hundredfold for values of order one.
DIFFERENCE_STEP, DIFFERENCE_ATOL = 1e-6, 1e-8
# Sums of some ten terms in another order: a few roundings of 2**-53 or 2**-24 relative to the largest term.
ROUNDING = {np.float32: 2e-6, np.float64: 1e-14}


def frozen(value):
    """Copy to a read-only array: a function that accepts it cannot have changed its input."""
    value = np.array(value)
    value.flags.writeable = False
    return value


def numerical_gradient(function, x):
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        moved = [x.copy(), x.copy()]
        for side, sign in zip(moved, (1, -1), strict=True):
            side[index] += sign * DIFFERENCE_STEP
        gradient[index] = (function(moved[0]) - function(moved[1])) / (2 * DIFFERENCE_STEP)
    return gradient


def masks(rng, shape, dtype=np.float64):
    """No mask, a bool one and weights; both leave something out and keep something."""
    keep = np.arange(np.prod(shape)).reshape(shape) % 3 != 1
    return {"none": None, "bool": keep, "weights": (keep * rng.uniform(0.5, 2, shape)).astype(dtype)}


def classification(rng, kind, dtype=np.float64, shape=(4, 3), classes=5):
    logits = rng.normal(size=(*shape, classes)).astype(dtype)
    indices = rng.integers(classes, size=shape)
    targets = {
        "indices": indices,
        "one-hot": np.eye(classes, dtype=int)[indices],
        "probabilities": rng.dirichlet(np.ones(classes), shape).astype(dtype),
        "unnormalised": rng.uniform(0, 2, (*shape, classes)).astype(dtype),
    }
    return logits, targets[kind]
