"""Optimisers over a mapping of parameters, which they change in place.

They hold the mapping, or the model that has it, and their own state; the arrays are looked up by name at each step. So
a model of several parts takes one optimiser over ``join(lstm=lstm, head=head)``, see :func:`join`, and an array that is
replaced in a model is trained on, with the state of its name.

Tied parameters, which are one array under two names, have one gradient, the sum of those of its names, and are changed
once a step, as in PyTorch. Arrays that share a part of their memory are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, ArrayTypeError, shown
from fastlstm.training import arguments, tied
from fastlstm.training.arguments import Number

__all__ = ["SGD", "Adam", "AdamW"]

Parameters = Mapping[str, Array] | Any  # or a model, which has the mapping as its `params`
MOST_STEPS = 2**53  # as a float, the number is exact


class Optimiser:
    """Base class of the optimisers: checks, and arrays of state for each parameter.

    Parameters
    ----------
    params : model, or mapping of str to array
        The parameters, changed in place by :meth:`step`: a model such as :class:`fastlstm.LSTM` or :class:`Linear`,
        several that :func:`join` joins, or a mapping.

        They are looked up at each step. Pass the model, and parameters that are replaced later are trained on, also
        after ``lstm.params = {...}``. Pass a mapping such as ``lstm.params``, and arrays that are replaced in it are,
        but not a new mapping of the model. A dict made for the optimiser, ``{**a.params, **b.params}`` or ``a.params |
        b.params``, misses arrays that are replaced in the models, and drops one of two parameters with the same name:
        use :func:`join`.
    lr : float
        The learning rate; it may be set anew between steps, as ``optimiser.lr``.
    slots : tuple of str
        Names of the state arrays of each parameter, zero at first.
    """

    lr = Number(least=0.0)

    def __init__(self, params: Parameters, lr: float, slots: tuple[str, ...]) -> None:
        self.lr = lr
        self.steps = 0
        self._source = params
        found = arguments.arrays("params", "parameter", params)
        self._seen = dict(self.params)  # the arrays that were last looked at
        self._first = tied.first_names(self._seen)  # of each name, the first of the same array: they have one state
        self._slots = {
            slot: {name: array_namespace(p).zeros_like(p) for name, p in found.items() if self._first[name] == name}
            for slot in slots
        }

    def __getstate__(self) -> dict[str, Any]:
        """Leave out which arrays were tied: copies of tied arrays may not be, and are checked again."""
        return self.__dict__ | {"_seen": {}}

    @property
    def params(self) -> Mapping[str, Array]:
        """The parameters, as they are now."""
        return arguments.mapping("params", self._source)

    def step(self, grads: Mapping[str, Array] | Any) -> None:
        """Take one step, changing the parameters in place.

        Parameters
        ----------
        grads : mapping of str to array, or what has one as its `params`
            The gradient of each parameter, under its name, of its shape, dtype and library; not changed.
            Values are not checked: NaN goes into the parameters, as in PyTorch.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            Before any parameter or state has changed, if a gradient is missing, unknown or does not fit, or the
            parameters are others than the optimiser has a state for.
        """
        params = self._current_params()
        checked = _fitting("gradient", arguments.mapping("grads", grads), params)
        sums = tied.add(self._first, checked)
        self.steps += 1
        for name, grad in sums.items():
            self._update(name, params[name], grad)

    def check(self) -> None:
        """Check that a step can be made.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            If the parameters are read-only, as those of a frozen model, or others than the optimiser has a state for.
        """
        self._current_params()

    def _update(self, name: str, param: Array, grad: Array) -> None:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state: ``steps``, and per kind of state a dict of arrays by parameter name."""
        slots = {
            slot: {name: arrays[first].copy() for name, first in self._first.items()}
            for slot, arrays in self._slots.items()
        }
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
        params = self._current_params()
        steps = arguments.count("steps", state["steps"], most=MOST_STEPS)
        slots = {slot: self._one_each(slot, _fitting(slot, state[slot], params)) for slot in self._slots}
        self._slots = {slot: {name: value.copy() for name, value in arrays.items()} for slot, arrays in slots.items()}
        self.steps = steps

    def _one_each(self, slot: str, arrays: dict[str, Array]) -> dict[str, Array]:
        """Check that tied parameters have the same state; return one for each array, under its first name."""
        for name, first in self._first.items():
            one, other = arrays[first], arrays[name]
            if name != first and not bool(array_namespace(one).array_equal(one, other, equal_nan=True)):
                raise ArgumentError(f"{slot} differs between {first} and {name}, which are the same array here")
        return {name: value for name, value in arrays.items() if self._first[name] == name}

    def _current_params(self) -> dict[str, Array]:
        """Look the parameters up, and check that they can be changed in place and are those of the state."""
        params = dict(self.params)
        if params.keys() != self._first.keys():
            changed = ", ".join(sorted(params.keys() ^ self._first.keys()))
            raise ArgumentError(f"parameters came or went since the optimiser was made: {changed}; make a new one")
        for name, param in params.items():
            arguments.floating(f"parameter {name}", param)
            if not getattr(param.flags, "writeable", True):  # CuPy has no read-only arrays
                raise ArrayTypeError(f"parameter {name} is read-only: replace it with a copy")
            for slot, arrays in self._slots.items():
                state = arrays[self._first[name]]
                checks.array(f"parameter {name}", param, state, state.shape, f"of its {slot} in the optimiser")
        if any(param is not self._seen.get(name) for name, param in params.items()):
            self._look_at_ties(params)
        return params

    def _look_at_ties(self, params: dict[str, Array]) -> None:
        first = tied.first_names(params)
        for name, other in first.items():
            if other != self._first[name]:
                raise ArgumentError(
                    f"parameter {name} is the same array as {other} now, and was as {self._first[name]} when the"
                    " optimiser was made: make a new one"
                )
        self._seen = params


def _fitting(kind: str, arrays: Any, params: Mapping[str, Array]) -> dict[str, Array]:
    """Check that `arrays` fit the parameters one by one."""
    arguments.same_names(kind, arrays, params)
    return {
        name: checks.array(f"{kind} {name}", arrays[name], param, param.shape, "of its parameter")
        for name, param in params.items()
    }


class SGD(Optimiser):
    """Stochastic gradient descent, with momentum as in ``torch.optim.SGD``.

    For parameter p and gradient g::

        v = momentum * v + g
        p = p - lr * v

    Parameters
    ----------
    params : model, or mapping of str to array
        The parameters, float32 or float64; changed in place by :meth:`step`. A model such as :class:`fastlstm.LSTM`,
        several models that :func:`join` joins, or a mapping. They are looked up at each step, so an array that is
        replaced in a model is trained on; one that is replaced in a model after ``a.params | b.params`` was made is
        not, nor is it seen that both had a parameter of the same name, which such a union drops in silence.
        Of tied parameters (one array under two names) the gradients are added, and one step is made.
    lr : float
        The learning rate, at least zero; it may be set anew between steps, as the other options.
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

    def __init__(self, params: Parameters, lr: float, momentum: float = 0.0) -> None:
        momentum = arguments.number("momentum", momentum, least=0.0, below=1.0)
        super().__init__(params, lr, ("velocity",) if momentum else ())
        self.momentum = momentum

    @property
    def momentum(self) -> float:
        """How much of the last step is repeated."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float) -> None:
        value = arguments.number("momentum", value, least=0.0, below=1.0)
        if value and not self._slots:
            raise ArgumentError("momentum was zero when the optimiser was made: make a new one")
        self._momentum = value

    def _update(self, name: str, param: Array, grad: Array) -> None:
        if self._slots:
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
    params, lr
        As for :class:`SGD`.
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

    eps = Number(above=0.0)
    weight_decay = Number(least=0.0)

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        super().__init__(params, lr, ("mean", "square"))

    @property
    def betas(self) -> tuple[float, float]:
        """Decay rates of the two running means."""
        return self._betas

    @betas.setter
    def betas(self, value: tuple[float, float]) -> None:
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise ArgumentError(f"betas must be a pair of numbers, got {shown(value)}")
        one, other = (arguments.number("betas", beta, least=0.0, below=1.0) for beta in value)
        self._betas = one, other

    def _update(self, name: str, param: Array, grad: Array) -> None:
        if self.weight_decay:
            grad = grad + self.weight_decay * param
        self._move(name, param, grad)

    def _move(self, name: str, param: Array, grad: Array) -> None:
        beta1, beta2 = self.betas
        mean, square = self._slots["mean"][name], self._slots["square"][name]
        mean *= beta1
        mean += (1 - beta1) * grad
        square *= beta2
        square += (1 - beta2) * grad * grad
        denominator = array_namespace(param).sqrt(square)
        denominator /= np.sqrt(1 - beta2**self.steps).item()
        denominator += self.eps
        param -= self.lr / (1 - beta1**self.steps) * mean / denominator


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), as in ``torch.optim.AdamW``.

    Before Adam's step, which then has no L2 penalty, each parameter shrinks by itself::

        p = p - lr * weight_decay * p

    Parameters
    ----------
    params, lr, betas, eps
        As for :class:`Adam`.
    weight_decay : float
        How much the parameters shrink at a step, relative to `lr`; at least zero.

    Raises
    ------
    ArgumentError, DTypeError, ArrayTypeError
        If an argument does not fit.

    Examples
    --------
    >>> params = {"w": np.array([1.0, 2.0])}
    >>> optimiser = AdamW(params, lr=0.1, weight_decay=0.5)
    >>> optimiser.step({"w": np.array([0.0, 0.0])})  # without a gradient, only the decay is left
    >>> params["w"]
    array([0.95, 1.9 ])
    """

    def __init__(
        self,
        params: Parameters,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def _update(self, name: str, param: Array, grad: Array) -> None:
        param *= 1 - self.lr * self.weight_decay
        self._move(name, param, grad)
