"""The entity-aware LSTM (Kratzert et al. 2019) as a plain LSTM with a mask: a recipe.

Its input gate reads only static features, x_s; the gates f, g and o read only dynamic features, x_d, and h::

    i = sigmoid(W_i x_s + b_i)        f, g, o as in any LSTM, of x_d and h

That is a plain LSTM on [x_d, x_s] whose weights are zero in two places. They stay zero in training if their gradients
are multiplied by the mask; so the variant runs on the kernels as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm import LSTM
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArgumentError, ArrayTypeError, ShapeError

__all__ = ["from_neuralhydrology", "joined", "masked"]

HostArray = np.ndarray[Any, Any]
ORDER = "fog"  # of neuralhydrology's dynamic gates
# Its names of the weights, and the number of axes of each.
NAMES = {"input_gate.weight": 2, "input_gate.bias": 1, "dynamic_gates.weight_ih": 2, "dynamic_gates.weight_hh": 2,
         "dynamic_gates.bias": 1}  # fmt: skip


def from_neuralhydrology(state_dict: Mapping[str, HostArray], prefix: str = "") -> tuple[LSTM, dict[str, HostArray]]:
    """Build the model of the weights of neuralhydrology's EA-LSTM, and the mask of its parameters.

    Parameters
    ----------
    state_dict : mapping of str to numpy.ndarray
        ``input_gate.weight`` (H, S), ``input_gate.bias`` (H,), ``dynamic_gates.weight_ih`` (D, 3H),
        ``dynamic_gates.weight_hh`` (H, 3H) and ``dynamic_gates.bias`` (3H,), after `prefix`.
    prefix : str
        Common prefix of these names.

    Returns
    -------
    lstm : LSTM
        A model of D + S inputs and H units, for :func:`joined` input.
    mask : dict of str to numpy.ndarray
        For each parameter, 1 where it is free and 0 where it stays zero.

    Raises
    ------
    ArgumentError
        If a name is missing.
    ArrayTypeError, DTypeError, ShapeError
        If the arrays do not fit each other.
    """
    missing = [name for name in NAMES if prefix + name not in state_dict]
    if missing:
        raise ArgumentError(f"state_dict lacks {', '.join(prefix + name for name in missing)}")
    for name, axes in NAMES.items():
        array = state_dict[prefix + name]
        if kind_of(prefix + name, array).library != "numpy":
            raise ArrayTypeError(f"{prefix}{name} must be a NumPy array: convert it with .get()")
        if array.ndim != axes or (name.startswith("dynamic") and array.shape[-1] % 3):
            raise ShapeError(f"{prefix}{name} is no array of an EA-LSTM, got shape {array.shape}")
    static, bias = state_dict[f"{prefix}input_gate.weight"], state_dict[f"{prefix}input_gate.bias"]
    w, u, b = (
        np.split(state_dict[f"{prefix}dynamic_gates.{name}"], 3, -1) for name in ("weight_ih", "weight_hh", "bias")
    )
    (hidden, features), dynamic = static.shape, len(w[0])
    nothing = np.zeros((hidden, features), static.dtype)
    gates = {gate: (np.hstack([w[k].T, nothing]), u[k].T, b[k]) for k, gate in enumerate(ORDER)}
    free = {gate: (np.hstack([np.ones_like(w[k].T), nothing]), np.ones_like(u[k]), np.ones_like(b[k]))
            for k, gate in enumerate(ORDER)}  # fmt: skip
    gates["i"] = np.hstack([np.zeros((hidden, dynamic), static.dtype), static]), np.zeros_like(u[0]), bias
    free["i"] = np.hstack([np.zeros((hidden, dynamic), static.dtype), nothing + 1]), np.zeros_like(u[0]), bias * 0 + 1
    return LSTM.from_gates(gates), LSTM.from_gates(free).params


def joined(x_d: HostArray, x_s: HostArray) -> HostArray:
    """Put the static features (B, S) beside the dynamic ones (T, B, D), at each time step."""
    return np.concatenate([x_d, np.broadcast_to(x_s, (len(x_d), *x_s.shape))], axis=2)


def masked(grads: Mapping[str, HostArray], mask: Mapping[str, HostArray]) -> dict[str, HostArray]:
    """Multiply gradients by the mask, so that an optimiser leaves the zeros unchanged."""
    return {name: grad * mask[name] for name, grad in grads.items()}
