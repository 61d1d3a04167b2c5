"""The activations that a cell may have, on vectors: their values, and their slopes in terms of the values.

No gradient passes a clipped pre-activation. It is recognised on the tape by its activated value, which is that of the
bound. A pre-activation within the bounds may round to the same value; on the tape it is then moved by the smallest
relative step, towards zero or away from it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numba import types

from fastlstm.kernels.cpu.activations import number, sigmoid, tanh
from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.vector_arithmetic import select

__all__ = ["Activation", "activation", "clamped", "like"]


class Activation(NamedTuple):
    """Routines on vectors."""

    value: Any  # of the pre-activations
    noted: Any  # of pre-activations and values: what the tape keeps
    slope: Any  # of what the tape keeps


@routine(inline=True)
def like(vector, value):
    """Put a number into all lanes of a vector like another."""
    return select(vector < 0.0, value, value)


@routine(inline=True)
def clamped(a, bound):
    """Return `a` clipped to [-bound, bound]; NaN stays NaN."""
    a = select(a > bound, bound, a)
    return select(a < -bound, -bound, a)


@routine(inline=True)
def _relu(a):
    return select(a < 0.0, 0.0, a)


@routine(inline=True)
def _hard_sigmoid(a):
    return select(a < -2.5, 0.0, select(a > 2.5, 1.0, a * 0.2 + 0.5))


@routine(inline=True)
def _softsign(a):
    return a / (1.0 + abs(a))


@routine(inline=True)
def _identity(a):
    return a


@routine(inline=True)
def _candidate_1997(a):
    return 2.0 * tanh(0.5 * a)


@routine(inline=True)
def _output_1997(c):
    return tanh(0.5 * c)


@routine(inline=True)
def _slope_of_sigmoid(s):
    return s * (1.0 - s)


@routine(inline=True)
def _slope_of_tanh(s):
    return 1.0 - s * s


@routine(inline=True)
def _slope_of_relu(s):
    return select(s > 0.0, 1.0, 0.0)


@routine(inline=True)
def _slope_of_hard_sigmoid(s):
    return select(s > 0.0, select(s < 1.0, like(s, 0.2), 0.0), 0.0)


@routine(inline=True)
def _slope_of_softsign(s):
    below = 1.0 - abs(s)
    return below * below


@routine(inline=True)
def _slope_of_identity(s):
    return like(s, 1.0)


@routine(inline=True)
def _slope_of_candidate_1997(s):
    return (2.0 - s) * (2.0 + s) * 0.25


@routine(inline=True)
def _slope_of_output_1997(s):
    return (1.0 - s * s) * 0.5


@routine(inline=True)
def _as_it_is(a, s):
    return s


_FUNCTIONS = {
    "sigmoid": (sigmoid, _slope_of_sigmoid),
    "tanh": (tanh, _slope_of_tanh),
    "relu": (_relu, _slope_of_relu),
    "hard_sigmoid": (_hard_sigmoid, _slope_of_hard_sigmoid),
    "softsign": (_softsign, _slope_of_softsign),
    "identity": (_identity, _slope_of_identity),
    "1997": (_candidate_1997, _slope_of_candidate_1997),
}
_SATURATES = {"hard_sigmoid": 2.5}  # clips beyond this change nothing
_INWARDS = number({types.float32: 1.0 - 2.0**-23, types.float64: 1.0 - 2.0**-52})
_OUTWARDS = number({types.float32: 1.0 + 2.0**-22, types.float64: 1.0 + 2.0**-51})


def activation(name: str, clip: float | None = None, *, of_output: bool = False) -> Activation:
    """Make the routines of an activation, of a gate or the candidate with a clip; `of_output` those of the output."""
    value, slope = (_output_1997, _slope_of_output_1997) if of_output and name == "1997" else _FUNCTIONS[name]
    if clip is None or clip >= _SATURATES.get(name, float("inf")):
        return Activation(value, _as_it_is, slope)

    @routine(inline=True)
    def bounded(a):
        return value(clamped(a, clip))

    @routine(inline=True)
    def noted(a, s):
        high, low = value(like(s, clip)), value(like(s, -clip))
        # The value of the upper bound is positive, that of the lower one negative or, of a sigmoid, positive.
        inner_low = select(low < 0.0, low * _INWARDS(low), low * _OUTWARDS(low))
        told_apart = select(s < high, s, high * _INWARDS(high))
        told_apart = select(told_apart > low, told_apart, inner_low)
        return select(abs(a) < clip, told_apart, s)

    @routine(inline=True)
    def inside(s):
        high, low = value(like(s, clip)), value(like(s, -clip))
        return select(s > low, select(s < high, slope(s), 0.0), 0.0)

    return Activation(bounded, noted, inside)
