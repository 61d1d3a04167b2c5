"""Gradient clipping, against the exploding gradients of long sequences; see [1]_.

Where parameters are tied (one array under two names), the array's gradient is the sum of those of its names. Pass the
parameters, ``params=...``, to have that sum clipped, as PyTorch does, and not each of its terms.

.. [1] R. Pascanu, T. Mikolov, Y. Bengio: On the difficulty of training recurrent neural networks. ICML 2013.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ShapeError
from fastlstm.training import arguments, tied

__all__ = ["clip_by_global_norm", "clip_by_value"]


def clip_by_global_norm(
    grads: Mapping[str, Array] | Any, max_norm: float, *, params: Mapping[str, Array] | Any = None
) -> tuple[dict[str, Array], Any]:
    """Scale all gradients by one factor so that their joint Euclidean norm is at most `max_norm`.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, that of ``torch.nn.utils.clip_grad_norm_``.

    Parameters
    ----------
    grads : mapping of str to array, or what has one as its `params`
        The gradients, of any shapes; they are not changed.
    max_norm : float
        The largest norm to let pass, above zero.
    params : mapping of str to array, or what has one as its `params`, optional
        The parameters, if some are tied: the sum of the gradients of one array is clipped, and returned under the
        first of its names; under the others stand zeros.

    Returns
    -------
    clipped : dict of str to array
        New arrays under the same names, with the dtypes of `grads`.
    norm : float64 scalar of the array library
        The norm before clipping, summed in float64. It is not checked: as in PyTorch, a NaN anywhere makes
        the norm and every clipped gradient NaN, and an infinite entry makes the norm infinite, its own
        clipped value NaN and all finite ones zero.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        Before any work, if `grads` is empty or holds anything but float arrays, `max_norm` is not positive, or
        `params` do not fit.

    Examples
    --------
    >>> clipped, norm = clip_by_global_norm({"a": np.array([3.0]), "b": np.array([-4.0])}, max_norm=1.0)
    >>> float(norm), clipped["a"].round(4), clipped["b"].round(4)
    (5.0, array([0.6]), array([-0.8]))
    """
    max_norm = arguments.number("max_norm", max_norm, above=0.0)
    checked = arguments.arrays("grads", "gradient", grads)
    first, like = next(iter(checked.items()))
    for name, value in checked.items():
        arguments.same_library(f"gradient {name}", value, f"gradient {first}", like)
    checked = _summed(checked, params)
    xp = array_namespace(like)
    # Overflow to infinity and NaN from 0 * inf are the documented results, not accidents to warn about.
    with np.errstate(over="ignore", invalid="ignore"):
        norm = xp.sqrt(sum(xp.square(value, dtype=np.float64).sum() for value in checked.values()))
        factor = xp.minimum(max_norm / (norm + 1e-6), 1.0)
        # The cast keeps float32 gradients float32: a float64 scalar array would promote them.
        return {name: value * factor.astype(value.dtype) for name, value in checked.items()}, norm


def clip_by_value(
    grads: Mapping[str, Array] | Any, limit: float, *, params: Mapping[str, Array] | Any = None
) -> dict[str, Array]:
    """Limit every entry of every gradient to ``[-limit, limit]``; NaN stays NaN.

    Parameters
    ----------
    grads : mapping of str to array, or what has one as its `params`
        The gradients, of any shapes; they are not changed.
    limit : float
        The largest absolute value to let pass, above zero.
    params
        As for :func:`clip_by_global_norm`.

    Returns
    -------
    dict of str to array
        New arrays under the same names, with the dtypes of `grads`.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        Before any work, if `grads` is empty or holds anything but float arrays, `limit` is not positive, or `params`
        do not fit.

    Examples
    --------
    >>> clip_by_value({"a": np.array([0.5, -7.0])}, limit=1.0)
    {'a': array([ 0.5, -1. ])}
    """
    limit = arguments.number("limit", limit, above=0.0)
    checked = _summed(arguments.arrays("grads", "gradient", grads), params)
    with np.errstate(over="ignore"):  # a limit beyond the range of float32 limits nothing
        return {name: array_namespace(value).clip(value, -limit, limit) for name, value in checked.items()}


def _summed(grads: dict[str, Array], params: Any) -> dict[str, Array]:
    """Put the sum of the gradients of each tied array under the first of its names, and zeros under the others."""
    if params is None:
        return grads
    checked = arguments.arrays("params", "parameter", params)
    arguments.same_names("gradient", grads, checked)
    for name, grad in grads.items():
        arguments.same_library(f"gradient {name}", grad, f"parameter {name}", checked[name])
        if grad.shape != checked[name].shape:
            raise ShapeError(f"gradient {name} must have shape {checked[name].shape}, got {grad.shape}")
    sums = tied.add(tied.first_names(arguments.mapping("params", params)), grads)
    return {
        name: sums[name] if name in sums else array_namespace(grad).zeros_like(grad) for name, grad in grads.items()
    }
