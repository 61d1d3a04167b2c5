"""The linear layer: against PyTorch and finite differences."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from training_data import DIFFERENCE_ATOL, ROUNDING, frozen, numerical_gradient

from fastlstm import ArrayTypeError
from fastlstm.training import Linear

DTYPES = [np.float32, np.float64]


@pytest.fixture
def rng():
    return np.random.default_rng(20)


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
