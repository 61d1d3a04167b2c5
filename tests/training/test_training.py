"""Losses, the linear layer, clipping and optimisers: what does not fit is refused; the same on CuPy."""

from __future__ import annotations

import re
import subprocess
import sys

import cuda_row
import numpy as np
import pytest
from training_data import classification, masks

from fastlstm import ArgumentError, ArrayTypeError, DTypeError, FastLSTMError, ShapeError
from fastlstm.training import (
    SGD,
    Adam,
    Linear,
    clip_by_global_norm,
    clip_by_value,
    length_mask,
    mean_squared_error,
    softmax_cross_entropy,
)


@pytest.fixture
def rng():
    return np.random.default_rng(20)


# Typed errors

Z, T, Y = np.zeros((4, 3)), np.zeros(4, int), np.zeros((4, 3))
ERRORS = {
    "logits are a list": (lambda: softmax_cross_entropy([[0.0]], T), ArrayTypeError),
    "logits are integers": (lambda: softmax_cross_entropy(Z.astype(int), T), DTypeError),
    "logits are float16": (lambda: softmax_cross_entropy(Z.astype(np.float16), T), DTypeError),
    "logits are a scalar": (lambda: softmax_cross_entropy(np.array(1.0), T), ShapeError),
    "no class": (lambda: softmax_cross_entropy(np.zeros((4, 0)), T), ShapeError),
    "targets are a list": (lambda: softmax_cross_entropy(Z, [0] * 4), ArrayTypeError),
    "targets are too short": (lambda: softmax_cross_entropy(Z, T[:3]), ShapeError),
    "classes are floats": (lambda: softmax_cross_entropy(Z, T.astype(float)), DTypeError),
    "class too large": (lambda: softmax_cross_entropy(Z, T + 3), ArgumentError),
    "class negative": (lambda: softmax_cross_entropy(Z, T - 1), ArgumentError),
    "class beyond int64": (lambda: softmax_cross_entropy(Z, T.astype(np.uint64) + np.uint64(2**64 - 1)), ArgumentError),
    "probabilities of another dtype": (lambda: softmax_cross_entropy(Z, Z.astype(np.float32)), DTypeError),
    "everything masked": (lambda: softmax_cross_entropy(Z, T, T > 0), ArgumentError),
    "nothing to average": (lambda: softmax_cross_entropy(Z[:0], T[:0]), ArgumentError),
    "nothing to average, masked": (lambda: softmax_cross_entropy(Z[:0], T[:0], T[:0] > 0), ArgumentError),
    "mask of logits's shape": (lambda: softmax_cross_entropy(Z, T, Z == 0), ShapeError),
    "mask is a list": (lambda: softmax_cross_entropy(Z, T, [True] * 4), ArrayTypeError),
    "mask of integers": (lambda: softmax_cross_entropy(Z, T, T + 1), DTypeError),
    "negative weight": (lambda: softmax_cross_entropy(Z, T, np.array([1.0, 1.0, 1.0, -1.0])), ArgumentError),
    "NaN weight": (lambda: softmax_cross_entropy(Z, T, np.array([1.0, 1.0, 1.0, np.nan])), ArgumentError),
    "infinite weight": (lambda: softmax_cross_entropy(Z, T, np.array([1.0, 1.0, 1.0, np.inf])), ArgumentError),
    "squared error, another shape": (lambda: mean_squared_error(Y, Y[0]), ShapeError),
    "squared error, another dtype": (lambda: mean_squared_error(Y, Y.astype(np.float32)), DTypeError),
    "squared error of lists": (lambda: mean_squared_error([1.0], [1.0]), ArrayTypeError),
    "squared error of nothing": (lambda: mean_squared_error(Y[:0], Y[:0]), ArgumentError),
    "squared error, all masked": (lambda: mean_squared_error(Y, Y, Y > 0), ArgumentError),
    "squared error, trailing mask": (lambda: mean_squared_error(Y, Y, np.ones(3, bool)), ShapeError),
    "squared error, deep mask": (lambda: mean_squared_error(Y, Y, np.ones((4, 3, 1), bool)), ShapeError),
    "squared error, list mask": (lambda: mean_squared_error(Y, Y, [True] * 4), ArrayTypeError),
    "lengths too long": (lambda: length_mask([4], 3), ArgumentError),
    "lengths negative": (lambda: length_mask([-1], 3), ArgumentError),
    "lengths are floats": (lambda: length_mask([1.0], 3), DTypeError),
    "lengths are a number": (lambda: length_mask(1, 3), ArrayTypeError),
    "lengths are a matrix": (lambda: length_mask([[1]], 3), ShapeError),
    "half a step": (lambda: length_mask([1], 2.5), ArgumentError),
    "no lengths": (lambda: length_mask(None, 3), ArgumentError),
    "linear of no feature": (lambda: Linear(0, 2), ArgumentError),
    "linear of integers": (lambda: Linear(1, 2, dtype=int), DTypeError),
    "linear with a bad seed": (lambda: Linear(1, 2, seed="one"), ArgumentError),
    "linear input of another size": (lambda: Linear(3, 2)(np.zeros((4, 2), np.float32)), ShapeError),
    "linear input of another dtype": (lambda: Linear(3, 2)(np.zeros((4, 3))), DTypeError),
    "linear input is a scalar": (lambda: Linear(3, 2)(np.float32(1.0)), FastLSTMError),
    "linear input is 0-d": (lambda: Linear(3, 2)(np.array(1.0, np.float32)), ShapeError),
    "linear input is a list": (lambda: Linear(3, 2)([1.0, 2.0, 3.0]), ArrayTypeError),
    "linear gradient of another shape": (
        lambda: Linear(3, 2, dtype=float).backward(np.zeros((4, 3)), np.zeros((5, 2))),
        ShapeError,
    ),
    "no parameters": (lambda: SGD({}, 0.1), ArgumentError),
    "parameters are a list": (lambda: SGD([Y], 0.1), ArgumentError),
    "parameters are integers": (lambda: Adam({"w": T}), DTypeError),
    "negative rate": (lambda: SGD({"w": Y}, -0.1), ArgumentError),
    "NaN rate": (lambda: Adam({"w": Y}, np.nan), ArgumentError),
    "rate is a string": (lambda: Adam({"w": Y}, "0.1"), ArgumentError),
    "momentum of one": (lambda: SGD({"w": Y}, 0.1, momentum=1.0), ArgumentError),
    "beta of one": (lambda: Adam({"w": Y}, betas=(0.9, 1.0)), ArgumentError),
    "one beta": (lambda: Adam({"w": Y}, betas=0.9), ArgumentError),
    "eps of zero": (lambda: Adam({"w": Y}, eps=0.0), ArgumentError),
    "negative weight decay": (lambda: Adam({"w": Y}, weight_decay=-1), ArgumentError),
    "clip nothing": (lambda: clip_by_global_norm({}, 1.0), ArgumentError),
    "clip a list": (lambda: clip_by_value([Y], 1.0), ArgumentError),
    "clip integers": (lambda: clip_by_value({"w": T}, 1.0), DTypeError),
    "clip to zero": (lambda: clip_by_global_norm({"w": Y}, 0.0), ArgumentError),
    "clip to NaN": (lambda: clip_by_value({"w": Y}, np.nan), ArgumentError),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error(case):
    call, error = ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert re.search(r"\w{3}", str(caught.value))
    assert not (Z.any() or T.any() or Y.any())


# CuPy


@pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))
def test_cupy_gives_what_numpy_gives(rng):
    linear = Linear(6, 5, dtype=np.float64, seed=0)
    x, (logits, target) = rng.normal(size=(4, 3, 6)), classification(rng, "indices")
    mask = masks(rng, (4, 3))["weights"]

    def run(xp):
        layer = linear.to(xp)
        value, dlogits = softmax_cross_entropy(layer(xp.asarray(x)), xp.asarray(target), xp.asarray(mask))
        error, derror = mean_squared_error(layer(xp.asarray(x)), xp.asarray(logits), xp.asarray(mask > 0))
        grads = layer.backward(xp.asarray(x), dlogits + derror)
        clipped, norm = clip_by_global_norm(clip_by_value(grads.params, 0.1), 0.01)
        Adam(layer.params).step(clipped)
        SGD(layer.params, 0.1, momentum=0.9).step(clipped)
        return {"value": value, "error": error, "norm": norm, "dx": grads.x} | clipped | layer.params

    expected = run(np)
    with cuda_row.installed() as cupy:
        for name, value in run(cupy).items():
            assert isinstance(value, cupy.ndarray), name
            # Sums of some ten terms of order one, in another order.
            np.testing.assert_allclose(cupy.asnumpy(value), expected[name], rtol=0, atol=1e-13, err_msg=name)


def test_the_helpers_load_neither_numba_nor_cupy():
    # In a fresh interpreter, since other tests load them.
    code = "import sys, fastlstm.training; assert not {'numba', 'cupy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)
