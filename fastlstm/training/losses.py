"""Losses. Each returns its value together with its gradient, and can leave out positions by a mask.

The value is a scalar of the array library in the input's dtype; ``float(value)`` reads it. On a GPU, checking class
indices and masks reads one number back, which waits for the current stream; with probabilities as targets and no mask,
nothing waits.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, DTypeError, ShapeError, refused
from fastlstm.training import arguments

__all__ = ["length_mask", "mean_squared_error", "pair", "softmax_cross_entropy"]


def softmax_cross_entropy(logits: Array, targets: Array, mask: Array | None = None) -> tuple[Any, Array]:
    """Cross-entropy between softmax(logits) and the targets, averaged over positions, and its gradient.

    With p = softmax(logits) over the last axis, targets t and weights w (from `mask`, or one)::

        value   = -sum(w * sum_k t_k log p_k) / sum(w)
        dlogits =  w * (p * sum_k t_k - t) / sum(w)

    where log p_k = z_k - log(sum_j exp(z_j)), with z = logits - max(logits), so that nothing overflows.

    Parameters
    ----------
    logits : array, (..., K)
        Unnormalised log-probabilities of K classes, float32 or float64.
    targets : array, (...) of integers or (..., K)
        The class of each position, in 0..K-1; or its probabilities, in the dtype of `logits`, or one-hot in
        any integer or bool dtype.
    mask : array, (...), optional
        Which positions count: bool, or non-negative weights in the dtype of `logits`. What stands at a
        position of weight zero (NaN, or a class such as -1) has no influence, and its gradient is zero.

    Returns
    -------
    value : scalar of the array library
        The mean loss in nats.
    dlogits : array, (..., K)
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no position counts: then the mean is not defined.

    Examples
    --------
    >>> value, dlogits = softmax_cross_entropy(np.zeros((2, 4)), np.array([3, 0]), mask=np.array([True, False]))
    >>> print(f"{value:.6f}")  # log(4)
    1.386294
    >>> dlogits[0]
    array([ 0.25,  0.25,  0.25, -0.75])
    """
    logits = arguments.floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"logits must have shape (..., K) with at least one class, got {tuple(logits.shape)}")
    xp = array_namespace(logits)
    targets, indexed = _checked_targets(targets, logits)
    scale, active = _position_weights(mask, logits, logits.shape[:-1])
    if indexed:
        if active is not None:
            targets = xp.where(active, targets, 0)
        if bool(((targets < 0) | (targets >= logits.shape[-1])).any()):
            raise ArgumentError(f"targets must be in 0..K-1 = 0..{logits.shape[-1] - 1} at every position that counts")
    elif active is not None:
        targets = xp.where(active[..., None], targets, 0)
    if active is not None:
        logits = xp.where(active[..., None], logits, 0)

    z = logits - logits.max(axis=-1, keepdims=True)
    p = xp.exp(z)
    total = p.sum(axis=-1, keepdims=True)
    p /= total
    log_p = z - xp.log(total)
    if indexed:
        losses = -xp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
        p -= targets[..., None] == xp.arange(logits.shape[-1])
    else:
        # A class of probability zero contributes nothing even where log p is -inf.
        losses = -(targets * xp.where(targets == 0, 0, log_p)).sum(axis=-1)
        p *= targets.sum(axis=-1, keepdims=True)
        p -= targets
    p *= scale[..., None]
    return (losses * scale).sum(), p


def mean_squared_error(prediction: Array, target: Array, mask: Array | None = None) -> tuple[Any, Array]:
    """Mean of the squared differences, and its gradient.

    With weights w (from `mask`, or one), broadcast over the axes that the mask does not have::

        value       = sum(w * (prediction - target)**2) / sum(w)
        dprediction = 2 * w * (prediction - target) / sum(w)

    Parameters
    ----------
    prediction : array, any shape
        The predictions, float32 or float64.
    target : array, shaped as `prediction`
        The true values, in the same dtype.
    mask : array, shaped as `prediction` or as its leading axes, optional
        Which entries count: bool, or non-negative weights in the dtype of `prediction`. What stands at an
        entry of weight zero (such as NaN) has no influence, and its gradient is zero.

    Returns
    -------
    value : scalar of the array library
        The mean squared error.
    dprediction : array, shaped as `prediction`
        Its gradient.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, or no entry counts: then the mean is not defined.

    Examples
    --------
    >>> value, dprediction = mean_squared_error(np.array([1.0, 2.0, np.nan]), np.zeros(3), np.array([1.0, 1.0, 0.0]))
    >>> float(value), dprediction
    (2.5, array([1., 2., 0.]))
    """
    prediction, target, scale = pair(prediction, target, mask)
    difference = prediction - target
    return (scale * difference * difference).sum(), 2 * scale * difference


def pair(prediction: Any, target: Any, mask: Any, one_target: bool = False) -> tuple[Array, Array, Array]:
    """Check what a loss of a regression is given; where the weight is zero, both arrays are zero in the result.

    Parameters
    ----------
    prediction : array, any shape
        The predictions, float32 or float64.
    target : array, shaped as `prediction`
        The true values, in the same dtype.
    mask : array or None, shaped as `prediction` or as its leading axes
        Which entries count: bool, or non-negative weights in the dtype of `prediction`.
    one_target : bool
        Whether the last axis of `target` may be 1, for all predictions of a position.

    Returns
    -------
    prediction, target : array
        In native byte order.
    scale : array
        The weight of each entry divided by the sum of all; it broadcasts to `prediction`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        If an argument does not fit, or no entry counts.
    """
    prediction = arguments.floating("prediction", prediction)
    target = arguments.floating("target", arguments.same_library("target", target, "prediction", prediction))
    if target.dtype != prediction.dtype:
        raise DTypeError(f"target has dtype {target.dtype}, but prediction is {prediction.dtype}: convert one of them")
    if target.shape != prediction.shape and not (one_target and target.shape == (*prediction.shape[:-1], 1)):
        other = f" or {(*prediction.shape[:-1], 1)}" if one_target and prediction.ndim else ""
        raise ShapeError(
            f"target must be shaped as prediction, {tuple(prediction.shape)}{other}, got {tuple(target.shape)}"
        )
    covered = prediction.ndim
    if mask is not None:
        covered = arguments.same_library("mask", mask, "prediction", prediction).ndim
    scale, active = _position_weights(mask, prediction, prediction.shape[:covered])
    scale = scale.reshape(scale.shape + (1,) * (prediction.ndim - scale.ndim))
    # The mean also runs over the axes that the mask does not have.
    scale = scale / max(1, int(np.prod(prediction.shape[covered:])))
    if active is not None:
        xp = array_namespace(prediction)
        active = active.reshape(scale.shape)
        prediction, target = xp.where(active, prediction, 0), xp.where(active, target, 0)
    return prediction, target, scale


def length_mask(lengths: Any, steps: int, batch_first: bool = False) -> np.ndarray[Any, Any]:
    """Return the mask of the positions inside each sequence of a ragged batch.

    Parameters
    ----------
    lengths : (B,) integers
        The length of each sequence, in 0..T; read on the host, like the `lengths` of :class:`fastlstm.LSTM`.
    steps : int
        Number of time steps T.
    batch_first : bool
        Whether the mask is (B, T).

    Returns
    -------
    numpy.ndarray of bool, (T, B) or (B, T)
        True before each length. For CuPy losses, move it with ``cupy.asarray``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        If `lengths` are not integers in 0..T, `steps` is no integer of at least 0, or `batch_first` is no bool.

    Examples
    --------
    >>> length_mask([2, 0, 3], steps=3).astype(int)
    array([[1, 0, 1],
           [1, 0, 1],
           [0, 0, 1]])
    """
    batch_first = checks.flag("batch_first", batch_first)
    if lengths is None:
        raise ArgumentError("lengths must be given")
    try:
        batch = len(lengths)
    except Exception as error:  # such as that of a 0-d array: what it is shows below
        if not refused(lengths, error):
            raise
        batch = 0
    steps = arguments.count("steps", steps, most=sys.maxsize // max(8, batch))  # what can be addressed
    checked = checks.lengths(lengths, steps, batch)
    assert checked is not None
    mask: np.ndarray[Any, Any] = np.arange(steps)[:, None] < checked
    return mask.T if batch_first else mask


def _checked_targets(targets: Any, logits: Array) -> tuple[Array, bool]:
    """Return the targets, probabilities in the dtype of `logits`, and whether they are class indices."""
    arguments.same_library("targets", targets, "logits", logits)
    if targets.shape == logits.shape[:-1]:
        if targets.dtype.kind not in "iu":
            raise DTypeError(
                f"targets shaped {tuple(targets.shape)} are classes and must be integers, got {targets.dtype}"
            )
        return targets.astype(np.int64), True
    if targets.shape != logits.shape:
        raise ShapeError(
            f"targets must have shape (...) = {tuple(logits.shape[:-1])} or (..., K) = {tuple(logits.shape)},"
            f" got {tuple(targets.shape)}"
        )
    if targets.dtype.kind not in "iub" and targets.dtype.newbyteorder("=") != logits.dtype:
        raise DTypeError(f"targets have dtype {targets.dtype}, but logits are {logits.dtype}: convert one of them")
    return targets.astype(logits.dtype), False


def _position_weights(mask: Any, values: Array, shape: tuple[int, ...]) -> tuple[Array, Array | None]:
    """Return each position's weight divided by the sum of all, in the dtype of `values`, and where it is not zero."""
    xp = array_namespace(values)
    if mask is None:
        positions = int(np.prod(shape))
        if positions == 0 or values.size == 0:
            raise ArgumentError(f"there is nothing to average over: the input has shape {tuple(values.shape)}")
        return xp.full(shape, 1 / positions, dtype=values.dtype), None
    arguments.same_library("mask", mask, "the input", values)
    if mask.shape != shape:
        raise ShapeError(f"mask must have shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask.dtype.kind != "b" and mask.dtype.newbyteorder("=") != values.dtype:
        raise DTypeError(f"mask must be bool or {values.dtype}, got {mask.dtype}")
    weights = mask.astype(np.float64)
    total = weights.sum()
    if values.size == 0 or not 0.0 < float(total) < np.inf or float(weights.min()) < 0.0:
        raise ArgumentError("mask must have finite weights of at least zero, and one above zero")
    return (weights / total).astype(values.dtype), weights > 0
