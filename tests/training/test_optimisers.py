"""Optimisers and the clipping of gradients: against PyTorch and their own definitions."""

from __future__ import annotations

import copy

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from training_data import ROUNDING, frozen

from fastlstm import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import SGD, Adam, AdamW, clip_by_global_norm, clip_by_value

DTYPES = [np.float32, np.float64]
# Fifty optimiser steps, each with some ten roundings of 1e-16, on parameters of order one.
OPTIMISER_ATOL = 1e-12


@pytest.fixture
def rng():
    return np.random.default_rng(20)


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
