"""Gradient clipping, against the exploding gradients of long sequences; see [1]_.

.. [1] R. Pascanu, T. Mikolov, Y. Bengio: On the difficulty of training recurrent neural networks. ICML 2013.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.training import arguments

__all__ = ["clip_by_global_norm", "clip_by_value"]


def clip_by_global_norm(grads: Mapping[str, Array], max_norm: float) -> tuple[dict[str, Array], Any]:
    """Scale all gradients by one factor so that their joint Euclidean norm is at most `max_norm`.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, that of ``torch.nn.utils.clip_grad_norm_``.

    Parameters
    ----------
    grads : mapping of str to array
        The gradients, of any shapes; they are not changed.
    max_norm : float
        The largest norm to let pass, above zero.

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
        Before any work, if `grads` is empty or holds anything but float arrays, or `max_norm` is not positive.

    Examples
    --------
    >>> clipped, norm = clip_by_global_norm({"a": np.array([3.0]), "b": np.array([-4.0])}, max_norm=1.0)
    >>> float(norm), clipped["a"].round(4), clipped["b"].round(4)
    (5.0, array([0.6]), array([-0.8]))
    """
    checked = arguments.gradients(grads)
    max_norm = arguments.number("max_norm", max_norm, above=0.0)
    xp = array_namespace(next(iter(checked.values())))
    # Overflow to infinity and NaN from 0 * inf are the documented results, not accidents to warn about.
    with np.errstate(over="ignore", invalid="ignore"):
        norm = xp.sqrt(sum(xp.square(value, dtype=np.float64).sum() for value in checked.values()))
        factor = xp.minimum(max_norm / (norm + 1e-6), 1.0)
        # The cast keeps float32 gradients float32: a float64 scalar array would promote them.
        return {name: value * factor.astype(value.dtype) for name, value in checked.items()}, norm


def clip_by_value(grads: Mapping[str, Array], limit: float) -> dict[str, Array]:
    """Limit every entry of every gradient to ``[-limit, limit]``; NaN stays NaN.

    Parameters
    ----------
    grads : mapping of str to array
        The gradients, of any shapes; they are not changed.
    limit : float
        The largest absolute value to let pass, above zero.

    Returns
    -------
    dict of str to array
        New arrays under the same names, with the dtypes of `grads`.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        Before any work, if `grads` is empty or holds anything but float arrays, or `limit` is not positive.

    Examples
    --------
    >>> clip_by_value({"a": np.array([0.5, -7.0])}, limit=1.0)
    {'a': array([ 0.5, -1. ])}
    """
    checked = arguments.gradients(grads)
    limit = arguments.number("limit", limit, above=0.0)
    return {name: array_namespace(value).clip(value, -limit, limit) for name, value in checked.items()}
