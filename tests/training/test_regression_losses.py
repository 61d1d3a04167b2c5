"""The losses of regressions: against finite differences, PyTorch, and what they are defined by."""

from __future__ import annotations

import functools
import re

import cuda_row
import numpy as np
import pytest

from fastlstm import ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import (
    huber_loss,
    logistic_squared_error,
    mean_absolute_error,
    mean_squared_error,
    nash_sutcliffe_loss,
    quantile_loss,
)

SHAPE = (4, 3, 2)
DEVIATION = np.array([[0.3, 1.7], [0.0, 0.9], [2.0, 0.4]])  # (B, K), of (T, B, K)
QUANTILES = 0.1, 0.75
LOSSES = {
    "mean_squared_error": mean_squared_error,
    "mean_absolute_error": mean_absolute_error,
    "huber_loss": huber_loss,
    "huber_loss 0.3": functools.partial(huber_loss, delta=0.3),
    "logistic_squared_error": logistic_squared_error,
    "quantile_loss 0.2": functools.partial(quantile_loss, quantiles=0.2),
    "quantile_loss pair": functools.partial(quantile_loss, quantiles=QUANTILES),
    "nash_sutcliffe_loss": lambda p, t, mask=None: nash_sutcliffe_loss(
        p, t, mask, deviation=np.broadcast_to(DEVIATION.astype(p.dtype), SHAPE)[tuple(map(slice, p.shape))]
    ),
}
# Central differences: a rounding error of 1e-16 * |value| / 1e-6, a truncation error of 1e-12 * |third derivative|.
DIFFERENCE_STEP, DIFFERENCE_ATOL = 1e-6, 1e-8
# Sums of some twenty terms of order one in another order, and of a mean over the roundings of a logistic function.
ROUNDING = {np.dtype(np.float32): 2e-6, np.dtype(np.float64): 1e-14}


@pytest.fixture
def rng():
    return np.random.default_rng(29)


def frozen(value):
    value = np.array(value)
    value.flags.writeable = False
    return value


def masks(rng, kind, dtype=np.float64):
    """No mask, a bool one and weights, over all axes or the leading ones; both leave something out."""
    if kind == "none":
        return None
    shape = SHAPE[:2] if "leading" in kind else SHAPE
    keep = np.arange(np.prod(shape)).reshape(shape) % 3 != 1
    return frozen(keep if "bool" in kind else (keep * rng.uniform(0.5, 2, shape)).astype(dtype))


MASKS = ["none", "bool", "weights", "bool over leading axes", "weights over leading axes"]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_the_slope_of_the_value(rng, name, mask):
    loss, mask = LOSSES[name], masks(rng, mask)
    prediction, target = rng.normal(size=(2, *SHAPE))
    _, gradient = loss(frozen(prediction), frozen(target), mask)
    slope = np.empty(SHAPE)
    for index in np.ndindex(SHAPE):
        values = []
        for sign in (1, -1):
            moved = prediction.copy()
            moved[index] += sign * DIFFERENCE_STEP
            values.append(loss(moved, target, mask)[0])
        slope[index] = (values[0] - values[1]) / (2 * DIFFERENCE_STEP)
    scale = max(1, abs(gradient).max())  # up to 1 / 0.1**2 for a deviation of zero
    np.testing.assert_allclose(gradient, slope, rtol=0, atol=DIFFERENCE_ATOL * scale)


def torch_value(torch, name, prediction, target):
    """Compute the same loss with PyTorch's functions, or as its literature does."""
    f = torch.nn.functional
    if name.startswith("huber_loss"):
        return f.huber_loss(prediction, target, delta=float(name.partition(" ")[2] or 1))
    if name == "mean_absolute_error":
        return f.l1_loss(prediction, target)
    if name == "logistic_squared_error":
        return f.mse_loss(torch.sigmoid(prediction), target)
    if name.startswith("quantile_loss"):
        q = torch.tensor(0.2 if name.endswith("0.2") else QUANTILES, dtype=prediction.dtype)
        error = target - prediction
        return torch.maximum(q * error, (q - 1) * error).mean()
    if name == "nash_sutcliffe_loss":  # as neuralhydrology's MaskedNSELoss
        weights = 1 / (torch.tensor(DEVIATION, dtype=prediction.dtype) + 0.1) ** 2
        return (weights * (prediction - target) ** 2).mean()
    return f.mse_loss(prediction, target)


@pytest.mark.parametrize("name", LOSSES)
def test_value_and_gradient_agree_with_torch(rng, dtype, name):
    torch = pytest.importorskip("torch")
    prediction, target = rng.normal(size=(2, *SHAPE)).astype(dtype)
    prediction[0, 0] = target[0, 0]  # at the kink
    target[1] += 5
    if name.startswith("quantile_loss"):  # torch.maximum takes half of both sides there; zero is within
        prediction[0, 0] += 0.125
    value, gradient = LOSSES[name](frozen(prediction), frozen(target))
    y = torch.tensor(prediction, requires_grad=True)
    expected = torch_value(torch, name, y, torch.tensor(target))
    expected.backward()
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(value, expected.item(), rtol=ROUNDING[dtype])
    scale = abs(y.grad.numpy()).max()  # up to 1 / 0.1**2 for a deviation of zero
    np.testing.assert_allclose(gradient, y.grad.numpy(), rtol=0, atol=ROUNDING[dtype] * max(1, scale))


def test_smooth_l1_is_what_the_docstring_says(rng):
    torch = pytest.importorskip("torch")
    prediction, target = rng.normal(size=(2, 50))
    for beta in (1.0, 0.25):
        expected = torch.nn.functional.smooth_l1_loss(torch.tensor(prediction), torch.tensor(target), beta=beta)
        np.testing.assert_allclose(huber_loss(prediction, target, delta=beta)[0] / beta, expected.item(), rtol=1e-14)


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("name", LOSSES)
def test_masked_entries_have_no_influence(rng, name, mask):
    loss, mask = LOSSES[name], masks(rng, mask)
    prediction, target = rng.normal(size=(2, *SHAPE))
    left_out = np.broadcast_to((mask == 0).reshape(mask.shape + (1,) * (3 - mask.ndim)), SHAPE)
    value, gradient = loss(prediction, target, mask)
    assert gradient[~left_out].all()
    for spoiled in (np.nan, np.inf):
        prediction[left_out] = target[left_out] = spoiled
        again, same = loss(prediction, target, mask)
        assert again == value
        np.testing.assert_array_equal(same, gradient)
        assert not same[left_out].any()


@pytest.mark.parametrize("name", LOSSES)
def test_nan_at_an_entry_that_counts_is_not_hidden(rng, name):
    prediction, target = rng.normal(size=(2, *SHAPE))
    prediction[1, 2, 0] = np.nan
    value, gradient = LOSSES[name](prediction, target)
    assert np.isnan(value)
    assert np.isnan(gradient[1, 2, 0])
    assert np.isnan(gradient).sum() == 1


@pytest.mark.parametrize("name", LOSSES)
def test_byte_order_and_strides_do_not_matter(rng, dtype, name):
    prediction, target = rng.normal(size=(2, *SHAPE)).astype(dtype)
    expected = LOSSES[name](prediction, target)
    swapped = dtype.newbyteorder(">")
    others = prediction.astype(swapped), np.asfortranarray(target).astype(swapped, order="K")
    assert not others[0].dtype.isnative and not others[1].flags.c_contiguous
    found = LOSSES[name](*others)
    assert found[1].dtype == dtype
    # Sums may run in the order of memory.
    np.testing.assert_allclose(found[0], expected[0], rtol=ROUNDING[dtype])
    np.testing.assert_allclose(found[1], expected[1], rtol=ROUNDING[dtype], atol=0)


def test_logits_of_any_size_neither_overflow_nor_cancel(dtype):
    largest = np.finfo(dtype).max
    logits = np.array([largest, -largest, np.inf, -np.inf, 30, -30], dtype)
    value, gradient = logistic_squared_error(logits, np.array([1, 0, 1, 0, 0, 1], dtype))
    np.testing.assert_allclose(value, 2 / 6, rtol=1e-6)
    # At 30, s is 1 to float32's last bit, and its slope, exp(-30), is not zero.
    np.testing.assert_allclose(gradient, np.array([0, 0, 0, 0, 1, -1]) * np.exp(-30.0) / 3, rtol=1e-6)


@pytest.mark.parametrize("quantile", [0.1, 0.5, 0.9])
def test_the_quantile_of_the_targets_has_the_least_loss(rng, quantile):
    targets = np.sort(rng.normal(size=101))
    values = [quantile_loss(np.full(101, guess), targets, quantiles=quantile)[0] for guess in targets]
    assert np.argmin(values) == round(100 * quantile)


def test_one_target_serves_all_quantiles(rng):
    prediction, target = rng.normal(size=(4, 3, 2)), rng.normal(size=(4, 3, 1))
    for mask in (None, np.arange(12).reshape(4, 3) % 2 == 0):
        one = quantile_loss(prediction, target, mask, quantiles=QUANTILES)
        repeated = quantile_loss(prediction, np.repeat(target, 2, axis=2), mask, quantiles=QUANTILES)
        assert one[0] == repeated[0]
        np.testing.assert_array_equal(one[1], repeated[1])


def test_the_value_for_one_whole_series_is_one_minus_nse(rng):
    observed = rng.gamma(2, size=(200, 3))
    simulated = observed + rng.normal(size=(200, 3))
    for series in range(3):
        y, o = simulated[:, series], observed[:, series]
        nse = 1 - ((y - o) ** 2).sum() / ((o - o.mean()) ** 2).sum()
        value, _ = nash_sutcliffe_loss(y, o, deviation=np.array([o.std()]), eps=0.0)
        np.testing.assert_allclose(value, 1 - nse, rtol=1e-12)  # sums of 200 terms


Y, OTHER = frozen(np.ones((4, 3))), frozen(np.zeros((4, 3)))
S = frozen(np.ones(3))
ERRORS = {
    "delta of zero": (lambda: huber_loss(Y, OTHER, delta=0.0), ArgumentError),
    "delta of infinity": (lambda: huber_loss(Y, OTHER, delta=np.inf), ArgumentError),
    "quantile of one": (lambda: quantile_loss(Y, OTHER, quantiles=1.0), ArgumentError),
    "quantile of zero": (lambda: quantile_loss(Y, OTHER, quantiles=(0.5, 0.0, 0.5)), ArgumentError),
    "no quantiles": (lambda: quantile_loss(Y, OTHER, quantiles=()), ShapeError),
    "two quantiles for three": (lambda: quantile_loss(Y, OTHER, quantiles=(0.1, 0.9)), ShapeError),
    "quantiles of a scalar": (lambda: quantile_loss(Y[0, 0:1][0:1].reshape(()), Y[0, 0:1].reshape(()),
                                                    quantiles=(0.1,)), ShapeError),
    "two targets for three": (lambda: quantile_loss(Y, OTHER[:, :2], quantiles=0.5), ShapeError),
    "target without its axis": (lambda: quantile_loss(Y, OTHER[:, 0], quantiles=0.5), ShapeError),
    "one target for a squared error": (lambda: mean_squared_error(Y, OTHER[:, :1]), ShapeError),
    "no deviation fits": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=S[:2]), ShapeError),
    "deviation of more axes": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=Y[None]), ShapeError),
    "deviation of another dtype": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=S.astype("f4")), DTypeError),
    "deviation is a number": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=1.0), ArrayTypeError),
    "negative deviation": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=-0.05 * S), ArgumentError),
    "NaN deviation": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=np.nan * S), ArgumentError),
    "deviation of zero": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=0 * S, eps=0.0), ArgumentError),
    "negative eps": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=S, eps=-0.1), ArgumentError),
    "infinite eps": (lambda: nash_sutcliffe_loss(Y, OTHER, deviation=S, eps=np.inf), ArgumentError),
    **{
        f"{name}: {what}": (lambda loss=loss, arguments=arguments: loss(*arguments), error)
        for name, loss in {"mae": mean_absolute_error, "huber": huber_loss, "logistic": logistic_squared_error,
                           "quantile": quantile_loss}.items()
        for what, arguments, error in (
            ("lists", ([1.0], [1.0]), ArrayTypeError),
            ("integers", (Y.astype(int), OTHER.astype(int)), DTypeError),
            ("mixed dtypes", (Y, OTHER.astype("f4")), DTypeError),
            ("other shape", (Y, OTHER.T), ShapeError),
            ("nothing counts", (Y, OTHER, np.zeros((4, 3), bool)), ArgumentError),
            ("nothing there", (Y[:0], OTHER[:0]), ArgumentError),
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error(case):
    call, error = ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert re.search(r"\w{3}", str(caught.value))


@pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))
@pytest.mark.parametrize("name", LOSSES)
def test_cupy_gives_what_numpy_gives(rng, name):
    prediction, target = rng.normal(size=(2, *SHAPE))
    mask = masks(rng, "weights")
    expected = LOSSES[name](prediction, target, mask)
    with cuda_row.installed() as cupy:
        deviation = cupy.asarray(np.broadcast_to(DEVIATION, SHAPE).copy())
        loss = LOSSES[name] if name != "nash_sutcliffe_loss" else functools.partial(
            nash_sutcliffe_loss, deviation=deviation)  # fmt: skip
        value, gradient = loss(*map(cupy.asarray, (prediction, target, mask)))
        assert isinstance(gradient, cupy.ndarray)
        # Sums of some twenty terms of order one, in another order.
        np.testing.assert_allclose(float(value), expected[0], rtol=1e-13)
        np.testing.assert_allclose(cupy.asnumpy(gradient), expected[1], rtol=0, atol=1e-13)
