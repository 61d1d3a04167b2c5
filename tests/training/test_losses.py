"""Losses: against finite differences, PyTorch and their own definitions."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from training_data import DIFFERENCE_ATOL, ROUNDING, classification, frozen, masks, numerical_gradient

from fastlstm.training import length_mask, mean_squared_error, softmax_cross_entropy

DTYPES = [np.float32, np.float64]


@pytest.fixture
def rng():
    return np.random.default_rng(20)


TARGETS = ["indices", "one-hot", "probabilities", "unnormalised"]
MASKS = ["none", "bool", "weights"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("targets", TARGETS)
def test_cross_entropy_gradient_is_the_slope_of_its_value(rng, targets, mask):
    logits, target = classification(rng, targets)
    mask = masks(rng, (4, 3))[mask]
    _, gradient = softmax_cross_entropy(frozen(logits), frozen(target), None if mask is None else frozen(mask))
    slope = numerical_gradient(lambda z: softmax_cross_entropy(z, target, mask)[0], logits)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=DIFFERENCE_ATOL)


@pytest.mark.parametrize("mask", ["none", "bool", "weights", "bool over leading axes", "weights over leading axes"])
def test_squared_error_gradient_is_the_slope_of_its_value(rng, mask):
    prediction, target = rng.normal(size=(2, 4, 3, 2))
    kind, _, leading = mask.partition(" over ")
    mask = masks(rng, (4, 3) if leading else (4, 3, 2))[kind]
    _, gradient = mean_squared_error(frozen(prediction), frozen(target), None if mask is None else frozen(mask))
    slope = numerical_gradient(lambda y: mean_squared_error(y, target, mask)[0], prediction)
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=DIFFERENCE_ATOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_cross_entropy_agrees_with_torch(rng, dtype, targets):
    torch = pytest.importorskip("torch")
    logits, target = classification(rng, targets, dtype, shape=(50,))
    value, gradient = softmax_cross_entropy(logits, target)
    z = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(z, torch.tensor(target))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=ROUNDING[dtype])
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_squared_error_agrees_with_torch(rng, dtype):
    torch = pytest.importorskip("torch")
    prediction, target = rng.normal(size=(2, 4, 3, 2)).astype(dtype)
    value, gradient = mean_squared_error(prediction, target)
    y = torch.tensor(prediction, requires_grad=True)
    expected = torch.nn.functional.mse_loss(y, torch.tensor(target))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=ROUNDING[dtype])
    np.testing.assert_allclose(gradient, y.grad.numpy(), rtol=0, atol=ROUNDING[dtype])


@pytest.mark.parametrize("mask", ["bool", "weights"])
@pytest.mark.parametrize("targets", ["indices", "probabilities"])
def test_masked_positions_of_a_classification_have_no_influence(rng, targets, mask):
    logits, target = classification(rng, targets)
    mask = masks(rng, (4, 3))[mask]
    kept = mask > 0
    value, gradient = softmax_cross_entropy(logits, target, mask)
    logits[~kept] = np.nan
    target[~kept] = -100 if targets == "indices" else np.nan
    spoiled_value, spoiled_gradient = softmax_cross_entropy(logits, target, mask)
    assert spoiled_value == value
    np.testing.assert_array_equal(spoiled_gradient, gradient)
    assert not spoiled_gradient[~kept].any()
    selected_value, selected_gradient = softmax_cross_entropy(
        logits[kept], target[kept], None if mask.dtype == bool else mask[kept]
    )
    np.testing.assert_allclose(value, selected_value, rtol=ROUNDING[np.float64])
    np.testing.assert_allclose(gradient[kept], selected_gradient, rtol=0, atol=ROUNDING[np.float64])


@pytest.mark.parametrize("mask", ["bool", "weights"])
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 2)])
def test_masked_positions_of_a_regression_have_no_influence(rng, shape, mask):
    prediction, target = rng.normal(size=(2, 4, 3, 2))
    mask = masks(rng, shape)[mask]
    kept = mask > 0
    value, gradient = mean_squared_error(prediction, target, mask)
    for spoiled in (np.nan, np.inf):
        prediction[~kept], target[~kept] = spoiled, spoiled
        spoiled_value, spoiled_gradient = mean_squared_error(prediction, target, mask)
        assert spoiled_value == value
        np.testing.assert_array_equal(spoiled_gradient, gradient)
        assert not spoiled_gradient[~kept].any()
    weights = np.broadcast_to(mask.reshape(mask.shape + (1,) * (3 - mask.ndim)), prediction.shape)[kept]
    np.testing.assert_allclose(value, np.average((prediction[kept] - target[kept]) ** 2, weights=weights), rtol=1e-14)


def test_nan_at_a_position_that_counts_is_not_hidden(rng):
    logits, target = classification(rng, "indices")
    logits[1, 2] = np.nan
    value, gradient = softmax_cross_entropy(logits, target)
    assert np.isnan(value)
    assert np.isnan(gradient[1, 2]).all()
    assert np.isfinite(np.delete(gradient.reshape(-1, 5), 5, axis=0)).all()
    value, gradient = mean_squared_error(np.array([np.nan, 1.0]), np.zeros(2))
    assert np.isnan(value)
    np.testing.assert_array_equal(np.isnan(gradient), [True, False])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_survives_extreme_logits(dtype):
    largest = np.finfo(dtype).max / 4
    logits = np.array([[largest, 0, -largest], [-largest, -largest, -largest]], dtype)
    value, gradient = softmax_cross_entropy(logits, np.array([0, 1]))
    np.testing.assert_allclose(value, np.log(3) / 2, rtol=ROUNDING[dtype])
    np.testing.assert_allclose(gradient, [[0, 0, 0], [1 / 6, -1 / 3, 1 / 6]], rtol=0, atol=ROUNDING[dtype])
    ruled_out = np.array([[0, -np.inf, 0]], dtype)
    for targets in (np.array([0]), np.array([[0.5, 0, 0.5]], dtype)):
        value, gradient = softmax_cross_entropy(ruled_out, targets)
        np.testing.assert_allclose(value, np.log(2), rtol=ROUNDING[dtype])
        assert gradient[0, 1] == 0


def test_the_mean_of_many_float32_values_is_exact_to_rounding():
    prediction = np.full((1 << 20, 3), 0.1, np.float32)
    value, _ = mean_squared_error(prediction, np.zeros_like(prediction))
    # Some roundings of 2**-24 each: adding three million terms one by one would be off by far more.
    np.testing.assert_allclose(value, np.float64(np.float32(0.1)) ** 2, rtol=4 * 2**-24)


FLOATS = st.floats(-50, 50, width=32)


@given(
    logits=hnp.arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5)), elements=FLOATS),
    shift=FLOATS,
    scale=st.floats(0.125, 8),
    data=st.data(),
)
def test_cross_entropy_invariants(logits, shift, scale, data):
    positions, classes = logits.shape
    targets = data.draw(hnp.arrays(np.int64, positions, elements=st.integers(0, classes - 1)))
    weights = data.draw(hnp.arrays(np.float64, positions, elements=st.floats(0.125, 8)))
    value, gradient = softmax_cross_entropy(logits, targets, weights)
    assert value >= 0
    # Values of up to 100 with roundings of 1e-16 each.
    np.testing.assert_allclose(gradient.sum(axis=-1), 0, atol=1e-13)
    for other in (
        softmax_cross_entropy(logits + shift, targets, weights),
        softmax_cross_entropy(logits, targets, weights * scale),
        softmax_cross_entropy(logits, np.eye(classes)[targets], weights),
    ):
        np.testing.assert_allclose(other[0], value, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(other[1], gradient, rtol=0, atol=1e-12)


@given(st.data())
def test_length_mask_is_true_inside_each_length(data):
    steps = data.draw(st.integers(0, 7))
    lengths = data.draw(st.lists(st.integers(0, steps), max_size=5))
    mask = length_mask(lengths, steps)
    assert mask.shape == (steps, len(lengths))
    assert mask.tolist() == [[t < length for length in lengths] for t in range(steps)]
    np.testing.assert_array_equal(length_mask(np.array(lengths, int), steps, batch_first=True), mask.T)
