"""Losses of regressions beside the squared error. Each returns its value together with its gradient.

What :mod:`fastlstm.training.losses` says holds here too: entries may be left out by a mask, and the value is a scalar
of the array library in the input's dtype. Where a loss has a kink, its gradient there is zero, as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, DTypeError, ShapeError, shown
from fastlstm.training import arguments
from fastlstm.training.losses import pair

__all__ = ["huber_loss", "logistic_squared_error", "mean_absolute_error", "nash_sutcliffe_loss", "quantile_loss"]


def mean_absolute_error(prediction: Array, target: Array, mask: Array | None = None) -> tuple[Any, Array]:
    """Mean of the absolute differences, and its gradient.

    With weights w (from `mask`, or one) and d = prediction - target::

        value       = sum(w * |d|) / sum(w)
        dprediction = w * sign(d) / sum(w)

    Parameters
    ----------
    prediction, target, mask
        As for :func:`mean_squared_error`.

    Returns
    -------
    value : scalar of the array library
        The mean absolute error.
    dprediction : array, shaped as `prediction`
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no entry counts.

    Examples
    --------
    >>> value, dprediction = mean_absolute_error(np.array([1.0, -3.0]), np.zeros(2))
    >>> float(value), dprediction
    (2.0, array([ 0.5, -0.5]))
    """
    prediction, target, scale = pair(prediction, target, mask)
    xp = array_namespace(prediction)
    difference = prediction - target
    return (scale * abs(difference)).sum(), scale * xp.sign(difference)


def huber_loss(prediction: Array, target: Array, mask: Array | None = None, *, delta: float = 1.0) -> tuple[Any, Array]:
    """Squared for small differences, absolute for large ones, and its gradient; see [1]_.

    With weights w (from `mask`, or one) and d = prediction - target::

        l(d)        = d**2 / 2                    where |d| < delta
                      delta * (|d| - delta / 2)   elsewhere
        value       = sum(w * l(d)) / sum(w)
        dprediction = w * clip(d, -delta, delta) / sum(w)

    It is ``torch.nn.functional.huber_loss``; with a `delta` of 1 also ``smooth_l1_loss``, which for another `beta` is
    this loss with ``delta=beta``, divided by `beta`.

    Parameters
    ----------
    prediction, target, mask
        As for :func:`mean_squared_error`.
    delta : float
        From where on the loss is absolute, above zero and finite.

    Returns
    -------
    value : scalar of the array library
        The mean loss.
    dprediction : array, shaped as `prediction`
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no entry counts.

    References
    ----------
    .. [1] P. J. Huber: Robust estimation of a location parameter. Ann. Math. Statist. 35, 1964.

    Examples
    --------
    >>> value, dprediction = huber_loss(np.array([0.5, -3.0]), np.zeros(2))
    >>> float(value), dprediction
    (1.3125, array([ 0.25, -0.5 ]))
    """
    delta = _finite("delta", delta)
    prediction, target, scale = pair(prediction, target, mask)
    xp = array_namespace(prediction)
    difference = prediction - target
    slope = xp.clip(difference, -delta, delta)
    # slope * (d - slope / 2) is d**2 / 2 where slope = d, and delta * (|d| - delta / 2) where |slope| = delta.
    return (scale * slope * (difference - slope / 2)).sum(), scale * slope


def logistic_squared_error(logits: Array, target: Array, mask: Array | None = None) -> tuple[Any, Array]:
    """Mean of the squared differences between the logistic function of the logits and the target, and its gradient.

    With weights w (from `mask`, or one) and s = 1 / (1 + exp(-logits))::

        value   = sum(w * (s - target)**2) / sum(w)
        dlogits = 2 * w * (s - target) * s * (1 - s) / sum(w)

    It is the loss of the first LSTMs, whose output units are logistic; it vanishes for logits of large magnitude.

    Parameters
    ----------
    logits : array, any shape
        What the logistic function is taken of, float32 or float64.
    target : array, shaped as `logits`
        The true values, in the same dtype.
    mask : array, shaped as `logits` or as its leading axes, optional
        As for :func:`mean_squared_error`.

    Returns
    -------
    value : scalar of the array library
        The mean squared error.
    dlogits : array, shaped as `logits`
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no entry counts.

    Examples
    --------
    >>> value, dlogits = logistic_squared_error(np.array([0.0, 1000.0]), np.array([1.0, 1.0]))
    >>> float(value), dlogits
    (0.125, array([-0.125,  0.   ]))
    """
    logits, target, scale = pair(logits, target, mask)
    xp = array_namespace(logits)
    small = xp.exp(-abs(logits))  # in 0..1, so that nothing overflows and 1 - s is exact where s is near 1
    difference = xp.where(logits >= 0, 1, small) / (1 + small) - target
    slope = small / ((1 + small) * (1 + small))
    return (scale * difference * difference).sum(), 2 * scale * difference * slope


def quantile_loss(
    prediction: Array, target: Array, mask: Array | None = None, *, quantiles: Any = 0.5
) -> tuple[Any, Array]:
    """Quantile (pinball) loss, and its gradient; see [1]_.

    With weights w (from `mask`, or one), e = target - prediction and the quantile q of each entry::

        value       = sum(w * max(q * e, (q - 1) * e)) / sum(w)
        dprediction = w * (-q where e > 0, 1 - q where e < 0, 0 where e = 0) / sum(w)

    The q-quantile of the targets makes it least; with q = 1/2 it is half the mean absolute error.

    Parameters
    ----------
    prediction : array, any shape, or (..., Q) with Q quantiles
        The predictions, float32 or float64.
    target : array, shaped as `prediction`, or (..., 1)
        The true values, in the same dtype; with a last axis of 1, one for all quantiles.
    mask : array, shaped as `prediction` or as its leading axes, optional
        As for :func:`mean_squared_error`.
    quantiles : float, or tuple or list of Q floats
        In (0, 1): the quantile of all entries, or of each entry of the last axis.

    Returns
    -------
    value : scalar of the array library
        The mean loss.
    dprediction : array, shaped as `prediction`
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no entry counts.

    References
    ----------
    .. [1] R. Koenker, G. Bassett: Regression quantiles. Econometrica 46, 1978.

    Examples
    --------
    >>> value, dprediction = quantile_loss(np.zeros((1, 2)), np.array([[1.0]]), quantiles=(0.1, 0.9))
    >>> float(value), dprediction
    (0.5, array([[-0.05, -0.45]]))
    """
    several = isinstance(quantiles, tuple | list)
    listed = list(quantiles) if several else [quantiles]
    checked = [arguments.number("quantiles", quantile, above=0.0, below=1.0) for quantile in listed]
    prediction, target, scale = pair(prediction, target, mask, one_target=True)
    if several and (prediction.ndim == 0 or prediction.shape[-1] != len(checked)):
        raise ShapeError(
            f"prediction must have shape (..., Q) = (..., {len(checked)}), got {tuple(prediction.shape)}:"
            " one entry for each quantile"
        )
    xp = array_namespace(prediction)
    q = xp.asarray(checked if several else checked[0], dtype=prediction.dtype)
    difference = target - prediction
    slope = xp.where(difference > 0, -q, 1 - q) * abs(xp.sign(difference))  # zero at zero, and NaN stays NaN
    return -(scale * slope * difference).sum(), scale * slope


def nash_sutcliffe_loss(
    prediction: Array, target: Array, mask: Array | None = None, *, deviation: Array, eps: float = 0.1
) -> tuple[Any, Array]:
    """Squared error relative to the variance of each series, and its gradient: the NSE loss of [1]_.

    With weights w (from `mask`, or one) and the standard deviation s of the series that an entry belongs to::

        value       = sum(w * (prediction - target)**2 / (s + eps)**2) / sum(w)
        dprediction = 2 * w * (prediction - target) / (s + eps)**2 / sum(w)

    For one whole series and an `eps` of zero, the value is 1 - NSE, where NSE is the efficiency of Nash and Sutcliffe
    (1970): one minus the mean squared error divided by the variance of the targets.

    Parameters
    ----------
    prediction, target, mask
        As for :func:`mean_squared_error`.
    deviation : array
        The standard deviation of the targets of each series, over all of its training period and not only this batch;
        at least zero, in the dtype of `prediction`. It broadcasts to `prediction`: (B, K) for (T, B, K) and (B, K).
    eps : float
        Added to the deviation, so that a series that hardly changes does not outweigh all others; at least zero.

    Returns
    -------
    value : scalar of the array library
        The mean loss.
    dprediction : array, shaped as `prediction`
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no entry counts.

    References
    ----------
    .. [1] F. Kratzert et al.: Towards learning universal, regional, and local hydrological behaviors via machine
       learning applied to large-sample datasets. Hydrol. Earth Syst. Sci. 23, 2019.

    Examples
    --------
    >>> target = np.array([[0.0], [2.0], [4.0]])  # one series of three steps
    >>> value, _ = nash_sutcliffe_loss(target + 1, target, deviation=target.std(axis=0), eps=0.0)
    >>> print(f"NSE = {1 - value:.4f}")  # 1 - 1 / (8 / 3)
    NSE = 0.6250
    """
    eps = _finite("eps", eps, zero=True)
    prediction, target, scale = pair(prediction, target, mask)
    arguments.same_library("deviation", deviation, "prediction", prediction)
    if deviation.dtype.newbyteorder("=") != prediction.dtype:
        raise DTypeError(f"deviation has dtype {deviation.dtype}, but prediction is {prediction.dtype}")
    shape, whole = deviation.shape, prediction.shape
    if len(shape) > len(whole) or any(a not in (1, b) for a, b in zip(shape[::-1], whole[::-1], strict=False)):
        raise ShapeError(f"deviation must broadcast to prediction, {tuple(whole)}, got {tuple(shape)}")
    spread = deviation.astype(prediction.dtype) + prediction.dtype.type(eps)
    if not (bool((deviation >= 0).all()) and bool((spread > 0).all()) and bool((spread < np.inf).all())):
        raise ArgumentError("deviation must be finite and at least zero, and above zero where eps is zero")
    difference = (prediction - target) / spread
    return (scale * difference * difference).sum(), 2 * scale * difference / spread


def _finite(name: str, value: Any, zero: bool = False) -> float:
    number = arguments.number(name, value, **({"least": 0.0} if zero else {"above": 0.0}))
    if number == np.inf:
        raise ArgumentError(f"{name} must be finite, got {shown(value)}")
    return number
