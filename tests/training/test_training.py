"""Losses, the linear layer, clipping and optimisers: against finite differences, PyTorch and their own definitions."""

from __future__ import annotations

import copy
import re
import subprocess
import sys

import cuda_row
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from fastlstm import ArgumentError, ArrayTypeError, DTypeError, FastLSTMError, ShapeError
from fastlstm.training import (
    SGD,
    Adam,
    AdamW,
    Linear,
    clip_by_global_norm,
    clip_by_value,
    length_mask,
    mean_squared_error,
    softmax_cross_entropy,
)

DTYPES = [np.float32, np.float64]
# Central differences with a step of 1e-6 carry a rounding error of 1e-16 * |value| / 1e-6 and a truncation error of
# 1e-12 * |third derivative|: 1e-8 leaves a hundredfold for values of order one.
DIFFERENCE_STEP, DIFFERENCE_ATOL = 1e-6, 1e-8
# Sums of some ten terms in another order: a few roundings of 2**-53 or 2**-24 relative to the largest term.
ROUNDING = {np.float32: 2e-6, np.float64: 1e-14}
# Fifty optimiser steps, each with some ten roundings of 1e-16, on parameters of order one.
OPTIMISER_ATOL = 1e-12


@pytest.fixture
def rng():
    return np.random.default_rng(20)


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


TARGETS = ["indices", "one-hot", "probabilities", "unnormalised"]
MASKS = ["none", "bool", "weights"]


# Losses


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


# Linear


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("leading", [(), (4,), (4, 3), (2, 0)])
def test_linear_agrees_with_torch(rng, dtype, bias, leading):
    torch = pytest.importorskip("torch")
    linear = Linear(5, 2, bias, dtype=dtype, seed=1)
    peer = torch.nn.Linear(5, 2, bias, dtype=getattr(torch, np.dtype(dtype).name))
    peer.load_state_dict({name: torch.tensor(value) for name, value in linear.params.items()})
    x, dy = rng.normal(size=(*leading, 5)).astype(dtype), rng.normal(size=(*leading, 2)).astype(dtype)
    peer_x = torch.tensor(x, requires_grad=True)
    peer_y = peer(peer_x)
    peer_y.backward(torch.tensor(dy))
    before = copy.deepcopy(linear.params)
    y, grads = linear(frozen(x)), linear.backward(frozen(x), frozen(dy))
    atol = 10 * ROUNDING[dtype]  # up to twelve terms of order one in a sum
    assert y.dtype == grads.x.dtype == dtype
    np.testing.assert_allclose(y, peer_y.detach().numpy(), rtol=0, atol=atol)
    np.testing.assert_allclose(grads.x, peer_x.grad.numpy(), rtol=0, atol=atol)
    assert grads.params.keys() == linear.params.keys() == before.keys()
    for name, value in peer.named_parameters():
        np.testing.assert_allclose(grads.params[name], value.grad.numpy(), rtol=0, atol=atol)
        np.testing.assert_array_equal(linear.params[name], before[name])


def test_linear_gradients_are_slopes(rng):
    linear = Linear(4, 3, dtype=np.float64, seed=0)
    x, dy = rng.normal(size=(5, 2, 4)), rng.normal(size=(5, 2, 3))
    grads = linear.backward(x, dy)
    np.testing.assert_allclose(
        grads.x, numerical_gradient(lambda x: (linear(x) * dy).sum(), x), rtol=0, atol=DIFFERENCE_ATOL
    )
    for name, param in linear.params.items():

        def loss(value, name=name):
            moved = Linear(4, 3, dtype=np.float64)
            moved.params = linear.params | {name: value}
            return (moved(x) * dy).sum()

        slope = numerical_gradient(loss, param)
        np.testing.assert_allclose(grads.params[name], slope, rtol=0, atol=DIFFERENCE_ATOL)


def test_linear_takes_any_strides_and_byte_order(rng):
    linear = Linear(3, 2, dtype=np.float64, seed=0)
    x, dy = rng.normal(size=(5, 4, 3)), rng.normal(size=(5, 4, 2))
    y, grads = linear(x), linear.backward(x, dy)
    strided = np.asfortranarray(x)[::-1][::-1], dy.swapaxes(0, 1).copy().swapaxes(0, 1)
    assert not any(value.flags.c_contiguous for value in strided)
    swapped = x.astype(">f8"), dy.astype(">f8")
    for x_, dy_ in (strided, swapped):
        np.testing.assert_allclose(linear(x_), y, rtol=0, atol=1e-14)
        again = linear.backward(x_, dy_)
        np.testing.assert_allclose(again.x, grads.x, rtol=0, atol=1e-14)
        np.testing.assert_allclose(again.params["weight"], grads.params["weight"], rtol=0, atol=1e-14)


def test_linear_initialisation_is_uniform_and_seeded():
    weight = Linear(16, 4000, seed=3).params["weight"]
    assert abs(weight).max() <= 0.25
    # The variance of a uniform in ±b is b²/3; over 64000 draws it is within 2 % of that (four standard errors).
    assert weight.var() == pytest.approx(0.25**2 / 3, rel=0.02)
    np.testing.assert_array_equal(weight, Linear(16, 4000, seed=3).params["weight"])
    assert (weight != Linear(16, 4000, seed=4).params["weight"]).any()
    assert repr(Linear(16, 4, bias=False)) == "Linear(16, 4, bias=False, dtype=float32)"


def test_a_moved_linear_shares_nothing():
    linear = Linear(3, 2, seed=0)
    moved = linear.to(np)
    for name, value in linear.params.items():
        np.testing.assert_array_equal(moved.params[name], value)
        moved.params[name] += 1
        assert (moved.params[name] != value).all()
    for wrong in (None, "numpy", re):
        with pytest.raises(ArrayTypeError, match=r"to\(\)"):
            linear.to(wrong)


# Optimisers

PEERS = {
    "SGD": (lambda p: SGD(p, 0.1), "SGD", {"lr": 0.1}),
    "SGD momentum": (lambda p: SGD(p, 0.1, momentum=0.9), "SGD", {"lr": 0.1, "momentum": 0.9}),
    "Adam": (Adam, "Adam", {}),
    "Adam options": (
        lambda p: Adam(p, 0.03, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
        "Adam",
        {"lr": 0.03, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
    "AdamW": (AdamW, "AdamW", {}),
    "AdamW options": (
        lambda p: AdamW(p, 0.03, betas=(0.5, 0.9), eps=1e-3, weight_decay=0.1),
        "AdamW",
        {"lr": 0.03, "betas": (0.5, 0.9), "eps": 1e-3, "weight_decay": 0.1},
    ),
}


def some_params(rng, dtype=np.float64):
    return {"weight": rng.normal(size=(4, 3)).astype(dtype), "bias": rng.normal(size=4).astype(dtype)}


@pytest.mark.parametrize("peer", PEERS)
def test_optimisers_follow_torch_step_for_step(rng, peer):
    torch = pytest.importorskip("torch")
    make, name, options = PEERS[peer]
    params = some_params(rng)
    tensors = {key: torch.tensor(value, requires_grad=True) for key, value in params.items()}
    arrays = dict(params)
    optimiser, oracle = make(params), getattr(torch.optim, name)(tensors.values(), **options)
    for step in range(50):
        grads = some_params(rng)
        for key, tensor in tensors.items():
            tensor.grad = torch.tensor(grads[key])
        if step == 25:  # a learning rate schedule
            optimiser.lr = oracle.param_groups[0]["lr"] = optimiser.lr / 3
        oracle.step()
        optimiser.step({key: frozen(value) for key, value in grads.items()})
        for key, tensor in tensors.items():
            assert params[key] is arrays[key]
            np.testing.assert_allclose(params[key], tensor.detach().numpy(), rtol=0, atol=OPTIMISER_ATOL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("peer", PEERS)
def test_optimiser_state_continues_where_it_was_saved(rng, peer, dtype):
    make = PEERS[peer][0]
    params = some_params(rng, dtype)
    optimiser = make(params)
    history = [some_params(rng, dtype) for _ in range(6)]
    for grads in history[:3]:
        optimiser.step(grads)
    saved, copied = optimiser.state_dict(), copy.deepcopy(params)
    untouched = copy.deepcopy(saved)
    for grads in history[3:]:
        optimiser.step(grads)
    again = make(copied)
    again.load_state_dict(saved)
    for grads in history[3:]:
        again.step(grads)
    np.testing.assert_equal(saved, untouched)
    assert saved["steps"] == 3
    for name, value in params.items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(copied[name], value)


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (lambda grads: grads.pop("bias"), ArgumentError),
        (lambda grads: grads.update(other=np.zeros(4)), ArgumentError),
        (lambda grads: grads.update(bias=np.zeros(5)), ShapeError),
        (lambda grads: grads.update(bias=np.zeros((4, 1))), ShapeError),
        (lambda grads: grads.update(bias=np.zeros(4, np.float32)), DTypeError),
        (lambda grads: grads.update(bias=[0.0] * 4), ArrayTypeError),
        (lambda grads: grads.update(bias=np.ma.zeros(4)), ArrayTypeError),
    ],
)
def test_a_wrong_gradient_changes_nothing(rng, peer, spoil, error):
    params = some_params(rng)
    optimiser = PEERS[peer][0](params)
    optimiser.step(some_params(rng))
    before, state = copy.deepcopy(params), optimiser.state_dict()
    grads = some_params(rng)
    spoil(grads)
    with pytest.raises(error):
        optimiser.step(grads)
    np.testing.assert_equal(params, before)
    np.testing.assert_equal(optimiser.state_dict(), state)


def test_parameters_that_cannot_be_changed_in_place_are_refused(rng):
    for spoil, error in ((frozen, ArrayTypeError), (lambda p: p.astype(">f8"), DTypeError)):
        params = some_params(rng)
        before = copy.deepcopy(params)
        optimiser = SGD(params, 0.1)
        params["bias"] = spoil(params["bias"])
        with pytest.raises(error, match="bias"):
            optimiser.step(some_params(rng))
        np.testing.assert_equal(params, before)


def test_a_wrong_optimiser_state_changes_nothing(rng):
    params = some_params(rng)
    optimiser = Adam(params)
    optimiser.step(some_params(rng))
    state = optimiser.state_dict()
    for wrong in (None, {}, state | {"steps": -1}, state | {"more": 1}, state | {"mean": {}}):
        with pytest.raises(ArgumentError):
            optimiser.load_state_dict(wrong)
    with pytest.raises(ShapeError):
        optimiser.load_state_dict(state | {"square": state["square"] | {"bias": np.zeros(9)}})
    np.testing.assert_equal(optimiser.state_dict(), state)


# Clipping


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3, np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm_clipping_agrees_with_torch(rng, dtype, max_norm):
    torch = pytest.importorskip("torch")
    grads = {name: frozen(value) for name, value in some_params(rng, dtype).items()}
    tensors = {name: torch.zeros(value.shape, dtype=getattr(torch, value.dtype.name)) for name, value in grads.items()}
    for name, tensor in tensors.items():
        tensor.grad = torch.tensor(grads[name])
    expected = torch.nn.utils.clip_grad_norm_(tensors.values(), max_norm)
    clipped, norm = clip_by_global_norm(grads, max_norm)
    np.testing.assert_allclose(norm, expected.item(), rtol=ROUNDING[dtype])
    for name, tensor in tensors.items():
        assert clipped[name].dtype == dtype
        assert not np.shares_memory(clipped[name], grads[name])
        np.testing.assert_allclose(clipped[name], tensor.grad.numpy(), rtol=ROUNDING[dtype])


@given(
    values=hnp.arrays(
        np.float32,
        st.integers(1, 20),
        elements=st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100),
    ),
    max_norm=st.floats(0.125, 128),
)
def test_clipped_gradients_point_the_same_way_and_are_short_enough(values, max_norm):
    clipped, norm = clip_by_global_norm({"a": values[:1], "b": values[1:]}, max_norm)
    joined = np.concatenate([clipped["a"], clipped["b"]]).astype(float)
    exact = np.linalg.norm(values.astype(float))
    assert norm == pytest.approx(exact, rel=1e-12)
    # One rounding of the factor and one per entry, at 2**-24 each; denormal entries round by up to 2**-150.
    assert np.linalg.norm(joined) <= max_norm * (1 + 2**-22) + 1e-40
    expected = values * min(1.0, max_norm / (exact + 1e-6))
    np.testing.assert_allclose(joined, expected, rtol=2**-22, atol=1e-40)
    if exact < 0.99 * max_norm:
        np.testing.assert_array_equal(joined, values)


def test_clipping_of_gradients_that_are_not_finite_is_as_documented():
    grads = {"a": np.array([1.0, np.nan]), "b": np.array([2.0])}
    clipped, norm = clip_by_global_norm(grads, 1.0)
    assert np.isnan([norm, *clipped["a"], *clipped["b"]]).all()
    clipped, norm = clip_by_global_norm({"a": np.array([1.0, np.inf]), "b": np.array([2.0])}, 1.0)
    assert norm == np.inf
    np.testing.assert_equal([*clipped["a"], *clipped["b"]], [0.0, np.nan, 0.0])
    np.testing.assert_equal(clip_by_value(grads, 0.5)["a"], [0.5, np.nan])


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_clipping(rng, dtype):
    grads = {name: frozen(value) for name, value in some_params(rng, dtype).items()}
    for name, value in clip_by_value(grads, 0.5).items():
        assert value.dtype == dtype
        np.testing.assert_array_equal(value, np.maximum(np.minimum(grads[name], 0.5), -0.5))


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
