"""Closed loops: a model whose next input depends on its last output, one time step at a time, forward and back.

::

    run = lstm.unroll(state, steps=T, batch=B)
    for t in range(T):
        h = run.step(x)  # (B, H)
        x = ...          # the next input, which depends on h
    back = run.backward(dstate)
    for t in reversed(range(T)):
        dx = back.step(dh)  # the loss's gradient by h of step t to that by its x
        dh = ...            # what dx means for the h before, and the loss's own part
    grads = back.finish()

The memory of a run is allocated once, and on the CPU the weights are packed once; a step back computes the gradients
by the gates, the states and the input alone, and ``finish`` those by the weights, one product over all steps. The
exceptions are `RNN`, `layer_norm`, `proj_size`, `recurrent_dropout`, `zoneout`, `peephole` with `block_size`, and the
backend ``reference``. There, each step is a call of its own, with a tape of its own: each step back adds its part of
the gradients by the weights, which takes more time, and ``finish`` returns the sums.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from fastlstm import checks, dispatch
from fastlstm.backends.base import Array, Dropout, Params, State, Unrolled
from fastlstm.cell import Cell, integer
from fastlstm.errors import ArgumentError, shown
from fastlstm.frozen import FrozenParams

__all__ = [
    "Run", "RunBackward", "RunGradients", "StaysHere", "begin", "check_room", "draws", "positive",
]  # fmt: skip


class StaysHere:
    """What keeps addresses of its own memory: a copy, in this process or another, would use the original's."""

    _instead = ""

    def _refuse(self, *_: Any) -> NoReturn:
        name = type(self).__name__.partition("_")[0].lower()
        reason = "belongs to the process that made it: it can be neither pickled nor copied"
        raise ArgumentError(f"a {name} {reason}{self._instead}")

    __reduce__ = __copy__ = __deepcopy__ = _refuse


@dataclass(frozen=True, repr=False, eq=False)
class RunGradients:
    """The gradients of the loss by a run's initial state and by the parameters.

    Attributes
    ----------
    state : tuple of array
        ``(dh0, dc0)``, by the initial states, (L, B, H) each; of a plain RNN dh0 alone.
    params : dict of str to array
        By each parameter, under its name.
    """

    state: Any
    params: Params

    def __repr__(self) -> str:
        return f"<Gradients by the initial state and {len(self.params)} parameters>"


class Run(StaysHere):
    """Steps of a model, each of which may depend on the one before; made by :meth:`fastlstm.LSTM.unroll`.

    One thread at a time may use it. It can be neither pickled nor copied: ``run.state`` can.

    Attributes
    ----------
    steps : int
        How many steps it has room for.
    batch : int
        The number of sequences B.
    taken : int
        How many steps were taken.
    """

    def __init__(self, model: Any, params: Mapping[str, Array], unrolled: Unrolled, steps: int, batch: int) -> None:
        self.steps, self.batch, self.taken = steps, batch, 0
        self._model, self._params, self._unrolled = model, params, unrolled
        # No reference to the way back, which refers to the run: a cycle keeps the tape until garbage collection.
        self._has_turned = False
        self._like = params["weight_hh_l0"]
        self._x_shape = (batch, model.cell.input_size)

    def step(self, x_t: Array) -> Array:
        """Advance by one time step.

        Parameters
        ----------
        x_t : array, (B, I)
            The input at this step; it is copied.

        Returns
        -------
        array, (B, H)
            The output at this step: the hidden state of the last layer.

        Raises
        ------
        ArgumentError
            If there is no room for another step, or the way back has begun.
        ShapeError, DTypeError, ArrayTypeError
            If `x_t` does not fit.
        """
        if self._has_turned:
            raise ArgumentError("the run's way back has begun: start a new run from run.state")
        if self.taken >= self.steps:
            raise ArgumentError(f"the run has room for {self.steps} steps: start a new one from run.state")
        y = self._unrolled.step(checks.array("x_t", x_t, self._like, self._x_shape, "(B, I)"))
        self.taken += 1
        return y

    @property
    def state(self) -> Any:
        """The state ``(h, c)`` after the last step, (L, B, H) each; of a plain RNN h alone; copies."""
        return _of_caller(self._model.cell, self._unrolled.state())

    def backward(self, dstate: Any = None) -> RunBackward:
        """Start the way back, once; no further step can be taken then.

        Parameters
        ----------
        dstate : tuple of array, optional
            ``(dh_n, dc_n)``, the loss's gradients by the state after the last step; either may be None. For a plain
            RNN dh_n alone.

        Raises
        ------
        ArgumentError
            If it has begun before, or the model's parameters are no longer those of the run's start.
        ShapeError, DTypeError, ArrayTypeError
            If `dstate` does not fit.
        """
        if self._has_turned:
            raise ArgumentError("the run's way back has begun already")
        cell: Cell = self._model.cell
        if cell.nonlinearity and dstate is not None:
            dstate = checks.h_alone("dstate", dstate), None
        dh, dc = checks.state_gradient(cell, dstate, self.batch, self._like)
        self.check_parameters()
        self._unrolled.begin_back(dh, dc)
        self._has_turned = True
        return RunBackward(self, self._unrolled)

    def check_parameters(self) -> None:
        """Refuse parameters that have changed since the run's start."""
        given = self._model.params
        if given is self._params:  # frozen
            return
        xp = dispatch.array_namespace(self._like)
        for name, value in self._params.items():
            now = given.get(name)
            if type(now) is not type(value) or not bool(xp.array_equal(now, value, equal_nan=True)):
                raise ArgumentError(f"parameter {name} has changed since the run began: its steps were others")

    def __repr__(self) -> str:
        return f"<Run of B={self.batch}, {self.taken} of {self.steps} steps taken>"


class RunBackward(StaysHere):
    """The way back through a run, from its last step to its first; made by :meth:`Run.backward`.

    Attributes
    ----------
    left : int
        How many steps are left.
    """

    def __init__(self, run: Run, unrolled: Unrolled) -> None:
        self.left = run.taken
        self._run, self._unrolled = run, unrolled
        self._y_shape = (run.batch, run._model.cell.output_size)

    def step(self, dh_t: Array | None) -> Array:
        """Take the gradients back through one time step.

        Parameters
        ----------
        dh_t : array, (B, H), or None
            The loss's gradient by the output of the last step that is left; None for zero. It includes the part through
            the inputs of later steps, but not the part through the model's own state, which the run adds.

        Returns
        -------
        array, (B, I)
            The loss's gradient by the input of that step.

        Raises
        ------
        ArgumentError
            If no step is left.
        ShapeError, DTypeError, ArrayTypeError
            If `dh_t` does not fit.
        """
        if self.left == 0:
            raise ArgumentError(f"all {self._run.taken} steps that were taken have been taken back")
        if dh_t is not None:
            dh_t = checks.array("dh_t", dh_t, self._run._like, self._y_shape, "(B, H)")
        dx = self._unrolled.step_back(dh_t)
        self.left -= 1
        return dx

    @property
    def state(self) -> Any:
        """The gradients ``(dh, dc)`` by the state before the step that was taken back last, (L, B, H) each; copies.

        That h is counted as the model's own state alone, without its part in the output of the step before. Of a plain
        RNN dh alone.
        """
        return _of_caller(self._run._model.cell, self._unrolled.state_gradient())

    def finish(self) -> RunGradients:
        """Return the gradients by the initial state and by the parameters.

        Those by the weights are one product over all steps, except where each step is a call of its own: see
        :mod:`fastlstm.unroll`.

        Raises
        ------
        ArgumentError
            If steps are left, or the model's parameters are no longer those of the run's start.
        """
        if self.left:
            raise ArgumentError(f"{self.left} of {self._run.taken} steps have not been taken back")
        self._run.check_parameters()
        return RunGradients(self.state, self._unrolled.finish())

    def __repr__(self) -> str:
        return f"<RunBackward of B={self._run.batch}, {self.left} of {self._run.taken} steps left>"


def _of_caller(cell: Cell, pair: State) -> Any:
    """Return a state as the model takes and returns it: that of a plain RNN, which has no c, as h alone."""
    return pair[0] if cell.nonlinearity else pair


def positive(name: str, value: Any) -> int:
    """Check a number of steps or sequences."""
    number = integer(value)
    if number is None or number < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {shown(value)}")
    return number


def check_room(cell: Cell, steps: int, batch: int) -> None:
    """Refuse a run whose memory no machine can address."""
    # A step keeps x, and in each layer h, c, five values of each cell in whole vectors, and two masks. Of a few steps
    # there are up to three times as many: in whole chunks, and one more.
    numbers = cell.input_size + cell.num_layers * 9 * (cell.hidden_size + 16)
    if 3 * steps * batch * numbers * cell.dtype.itemsize > sys.maxsize:
        raise ArgumentError(f"steps and batch are too large: {shown(steps)} and {shown(batch)} cannot be addressed")


def draws(cell: Cell) -> bool:
    """Say whether training draws random masks, between layers or within them."""
    within = getattr(cell, "recurrent_dropout", 0.0), *getattr(cell, "zoneout", (0.0, 0.0))
    return (cell.dropout > 0 and cell.num_layers > 1) or max(within) > 0


def begin(model: Any, state: State | None, steps: Any, batch: Any, dropout: Dropout | None) -> Run:
    """Check the arguments of ``LSTM.unroll``, and begin a run."""
    cell: Cell = model.cell
    checks.direction(cell)
    steps, batch = positive("steps", steps), positive("batch", batch)
    check_room(cell, steps, batch)
    params = checks.params(cell, model.params)
    like = params["weight_hh_l0"]
    h0, c0 = checks.state(cell, state, batch, like)
    if not isinstance(params, FrozenParams):
        xp = dispatch.array_namespace(like)
        params = {name: xp.array(value) for name, value in params.items()}
    unrolled = dispatch.backend_for(like).unroll(cell, params, steps, batch, h0, c0, dropout)
    return Run(model, params, unrolled, steps, batch)
