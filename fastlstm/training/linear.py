"""A linear layer, such as the one that turns hidden states into predictions."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from fastlstm import checks, parameters
from fastlstm.backends.base import Array, Params
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, ArrayTypeError, ShapeError, shown
from fastlstm.training import arguments

__all__ = ["Linear", "LinearGrads"]


class LinearGrads(NamedTuple):
    """The gradients of the loss by a linear layer's input and parameters."""

    x: Array  # (..., in_features)
    params: Params  # by parameter name, shaped as the parameters


class Linear:
    """The map ``y = x @ weight.T + bias`` over the last axis, as ``torch.nn.Linear``.

    Parameters
    ----------
    in_features, out_features : int
        Sizes of the last axis of input and output.
    bias : bool
        Whether to add a bias.
    dtype : dtype
        float32 or float64: the dtype of parameters, inputs and outputs.
    seed : None, int, SeedSequence, BitGenerator or Generator
        Determines the initial parameters, uniform in ±1/sqrt(in_features), as for :func:`numpy.random.default_rng`.

    Attributes
    ----------
    params : dict of str to array
        The live parameters: ``weight`` (out, in) and ``bias`` (out,). Change their contents, or replace them.

    Raises
    ------
    ArgumentError, DTypeError
        If a size is not a positive integer or too large, `bias` is no bool, `seed` suits no generator or `dtype` is
        neither float32 nor float64.

    Examples
    --------
    >>> linear = Linear(3, 2, dtype=np.float64, seed=0)
    >>> x = np.ones((5, 4, 3))
    >>> linear(x).shape
    (5, 4, 2)
    >>> grads = linear.backward(x, np.ones((5, 4, 2)))
    >>> grads.x.shape, grads.params["bias"]
    ((5, 4, 3), array([20., 20.]))
    """

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, dtype: Any = np.float32, seed: Any = None
    ) -> None:
        columns = arguments.count("in_features", in_features, least=1)
        rows = arguments.count("out_features", out_features, least=1)
        if rows * columns > sys.maxsize // 8:  # drawn in float64
            raise ArgumentError(f"a weight of {shown(rows)} x {shown(columns)} numbers cannot be addressed")
        cell = Cell(1, 1, bias=bias, dtype=dtype)  # a flag and a dtype have the same rules here
        rng = parameters.generator(seed)
        bound = 1.0 / np.sqrt(columns)
        self.params: Params = {"weight": rng.uniform(-bound, bound, (rows, columns)).astype(cell.dtype)}
        if cell.bias:
            self.params["bias"] = rng.uniform(-bound, bound, rows).astype(cell.dtype)

    def __call__(self, x: Array) -> Array:
        """Apply the layer.

        Parameters
        ----------
        x : array, (..., in_features)
            The input, of the parameters' library and dtype.

        Returns
        -------
        array, (..., out_features)

        Raises
        ------
        ShapeError, DTypeError, ArrayTypeError
            Before any work, if `x` does not fit.
        """
        weight, bias = self._checked_params()
        y = self._checked_input(x, weight) @ weight.T
        return y if bias is None else y + bias

    def backward(self, x: Array, dy: Array) -> LinearGrads:
        """Back-propagate through ``y = linear(x)``.

        Parameters
        ----------
        x : array, (..., in_features)
            The input of the forward pass.
        dy : array, (..., out_features)
            The loss's gradient by `y`.

        Returns
        -------
        LinearGrads
            ``grads.x``, shaped as `x`, and ``grads.params[name]``, summed over all leading axes.

        Raises
        ------
        ShapeError, DTypeError, ArrayTypeError
            Before any work, if an argument does not fit.
        """
        weight, bias = self._checked_params()
        x = self._checked_input(x, weight)
        rows, columns = weight.shape
        dy = checks.array("dy", dy, weight, (*x.shape[:-1], rows), "(..., out_features)")
        flat_dy = dy.reshape(-1, rows)
        grads = {"weight": flat_dy.T @ x.reshape(-1, columns)}
        if bias is not None:
            grads["bias"] = flat_dy.sum(axis=0)
        return LinearGrads(dy @ weight, grads)

    def to(self, library: ModuleType) -> Linear:
        """Copy the layer to another array library.

        Parameters
        ----------
        library : module
            ``numpy`` or ``cupy``. With ``cupy``, the parameters go to the current device.

        Returns
        -------
        Linear
            The same layer; it shares nothing with this one.
        """
        if getattr(library, "__name__", None) not in ("numpy", "cupy"):
            raise ArrayTypeError(f"to() takes the module numpy or cupy, got {shown(library)}")
        self._checked_params()
        moved = copy.copy(self)
        # By way of the host: CuPy's arrays have `get` for that, and NumPy's are there.
        moved.params = {name: library.array(getattr(p, "get", lambda p=p: p)()) for name, p in self.params.items()}
        return moved

    def _checked_params(self) -> tuple[Array, Array | None]:
        params = arguments.mapping("params", self.params)
        if "weight" not in params or not params.keys() <= {"weight", "bias"}:
            raise ArgumentError(f"params must be weight and, if there is one, bias, got {', '.join(params)}")
        weight = arguments.floating("weight", params["weight"])
        if weight.ndim != 2:
            raise ShapeError(f"weight must have shape (out_features, in_features), got {tuple(weight.shape)}")
        if "bias" not in params:
            return weight, None
        return weight, checks.array("bias", params["bias"], weight, weight.shape[:1], "(out_features,)")

    @staticmethod
    def _checked_input(x: Any, weight: Array) -> Array:
        arguments.same_library("x", x, "weight", weight)
        if x.ndim == 0:
            raise ShapeError("x must have shape (..., in_features), got a scalar")
        return checks.array("x", x, weight, (*(None,) * (x.ndim - 1), weight.shape[1]), "(..., in_features)")

    def __repr__(self) -> str:
        weight = self.params["weight"]
        bias = "" if "bias" in self.params else ", bias=False"
        return f"Linear({weight.shape[1]}, {weight.shape[0]}{bias}, dtype={weight.dtype})"
