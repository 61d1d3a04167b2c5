"""Optimisers over a dict of parameters, which they change in place.

They hold no more than the dict and their own state, so a model of several parts takes one optimiser over the
union, ``Adam(lstm.params | head.params)``: the union refers to the same arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array, Params
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, ArrayTypeError
from fastlstm.training import arguments

__all__ = ["SGD", "Adam"]


class Optimiser:
    """What all optimisers share: the checks, and arrays of state beside each parameter.

    Parameters
    ----------
    params : dict of str to array
        The parameters, changed in place by :meth:`step`.
    lr : float
        The learning rate; it may be set anew between steps, as ``optimiser.lr``.
    slots : tuple of str
        Names of the state arrays that stand beside each parameter, zero at first.
    """

    def __init__(self, params: Params, lr: float, slots: tuple[str, ...]) -> None:
        self.params = params
        self.lr = arguments.number("lr", lr, least=0.0)
        self.steps = 0
        checked = arguments.gradients(params)
        self._slots = {slot: {name: array_namespace(p).zeros_like(p) for name, p in checked.items()} for slot in slots}

    def step(self, grads: Mapping[str, Array]) -> None:
        """Take one step, changing the parameters in place.

        Parameters
        ----------
        grads : mapping of str to array
            The gradient of each parameter, under its name, of its shape, dtype and library; not changed.
            Values are not checked: NaN goes into the parameters, as in PyTorch.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            Before any parameter or state has changed, if a gradient is missing, unknown or does not fit.
        """
        checked = self._fitting("gradient", grads)
        self.steps += 1
        for name, param in self.params.items():
            self._update(name, param, checked[name])

    def _update(self, name: str, param: Array, grad: Array) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: ``steps``, and per kind of state a dict of arrays by parameter name."""
        slots = {slot: {name: value.copy() for name, value in arrays.items()} for slot, arrays in self._slots.items()}
        return {"steps": self.steps} | slots

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` returned; it is copied.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            Before anything has changed, if the state does not fit the parameters.
        """
        if not isinstance(state, Mapping) or state.keys() != {"steps", *self._slots}:
            raise ArgumentError(f"state must have the keys {', '.join(['steps', *self._slots])}")
        steps = arguments.count("steps", state["steps"])
        slots = {slot: self._fitting(slot, state[slot]) for slot in self._slots}
        self._slots = {slot: {name: value.copy() for name, value in arrays.items()} for slot, arrays in slots.items()}
        self.steps = steps

    def _fitting(self, kind: str, arrays: Any) -> dict[str, Array]:
        """Check that `arrays` fit the parameters one by one, and that these can be changed in place."""
        if not isinstance(arrays, Mapping) or arrays.keys() != self.params.keys():
            given = arrays.keys() if isinstance(arrays, Mapping) else ()
            missing, unknown = sorted(self.params.keys() - given), sorted(given - self.params.keys())
            raise ArgumentError(
                f"each parameter needs one {kind}, under its name;"
                f" missing: {', '.join(missing) or 'none'}; unknown: {', '.join(map(str, unknown)) or 'none'}"
            )
        checked = {}
        for name, param in self.params.items():
            arguments.floating(f"parameter {name}", param)
            if not getattr(param.flags, "writeable", True):  # CuPy has no read-only arrays
                raise ArrayTypeError(f"parameter {name} is read-only: replace it with a copy")
            checked[name] = checks.array(f"{kind} {name}", arrays[name], param, param.shape, "of its parameter")
        return checked


class SGD(Optimiser):
    """Stochastic gradient descent, with momentum as in ``torch.optim.SGD``.

    For parameter p and gradient g::

        v = momentum * v + g
        p = p - lr * v

    Parameters
    ----------
    params : dict of str to array
        The parameters, float32 or float64; changed in place by :meth:`step`.
    lr : float
        The learning rate, at least zero; it may be set anew between steps.
    momentum : float
        How much of the last step is repeated, in [0, 1).

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        If an argument does not fit.

    Examples
    --------
    >>> params = {"w": np.array([1.0, 2.0])}
    >>> SGD(params, lr=0.5).step({"w": np.array([1.0, -1.0])})
    >>> params["w"]
    array([0.5, 2.5])
    """

    def __init__(self, params: Params, lr: float, momentum: float = 0.0) -> None:
        self.momentum = arguments.number("momentum", momentum, least=0.0, below=1.0)
        super().__init__(params, lr, ("velocity",) if self.momentum else ())

    def _update(self, name: str, param: Array, grad: Array) -> None:
        if self.momentum:
            velocity = self._slots["velocity"][name]
            velocity *= self.momentum
            velocity += grad
            grad = velocity
        param -= self.lr * grad


class Adam(Optimiser):
    """Adam (Kingma and Ba 2015, algorithm 1), as in ``torch.optim.Adam``.

    For parameter p and gradient g at step t = 1, 2, ...::

        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    Parameters
    ----------
    params : dict of str to array
        The parameters, float32 or float64; changed in place by :meth:`step`.
    lr : float
        The learning rate, at least zero; it may be set anew between steps.
    betas : tuple of float
        Decay rates of the two running means, each in [0, 1).
    eps : float
        Added to the denominator, above zero.
    weight_decay : float
        Weight of the L2 penalty, at least zero. Its gradient passes through the running means, unlike AdamW's.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        If an argument does not fit.

    Examples
    --------
    >>> params = {"w": np.array([1.0, 2.0])}
    >>> optimiser = Adam(params, lr=0.1)
    >>> optimiser.step({"w": np.array([0.001, -1000.0])})  # the first step has size lr, whatever the gradient's
    >>> params["w"].round(4)
    array([0.9, 2.1])
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ArgumentError(f"betas must be a pair of numbers, got {betas!r}")
        self.betas = tuple(arguments.number("betas", beta, least=0.0, below=1.0) for beta in betas)
        self.eps = arguments.number("eps", eps, above=0.0)
        self.weight_decay = arguments.number("weight_decay", weight_decay, least=0.0)
        super().__init__(params, lr, ("mean", "square"))

    def _update(self, name: str, param: Array, grad: Array) -> None:
        beta1, beta2 = self.betas
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        mean, square = self._slots["mean"][name], self._slots["square"][name]
        mean *= beta1
        mean += (1 - beta1) * grad
        square *= beta2
        square += (1 - beta2) * grad * grad
        denominator = array_namespace(param).sqrt(square)
        denominator /= np.sqrt(1 - beta2**self.steps).item()
        denominator += self.eps
        param -= self.lr / (1 - beta1**self.steps) * mean / denominator
