"""The gate step of the LSTM, forward and backward, on one vector of hidden units.

The equations are those of :mod:`fastlstm.backends.reference`, in the same symbols. On the tape, a vector
of units keeps its five values side by side, :data:`TAPE` vectors: i, f, g, o and c.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.activations import sigmoid, tanh
from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.simd import fma, load, load_first, offset, store

__all__ = ["GATES", "TAPE", "gates_again", "gates_backward", "gates_forward"]

GATES = 4  # i, f, g, o
TAPE = 5  # i, f, g, o, c


@routine(inline=True)
def gates_forward(a_i, a_f, a_g, a_o, c_prev):
    """Activate the gates and update the cell state; what is left is h = o tanh(c).

    Parameters
    ----------
    a_i, a_f, a_g, a_o : Vector
        The pre-activations.
    c_prev : Vector
        The cell state before.

    Returns
    -------
    tuple of Vector
        i, f, g, o, c.
    """
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), tanh(a_g), sigmoid(a_o)
    return i, f, g, o, fma(f, c_prev, i * g)


@routine(inline=True)
def gates_again(a, width, units, c, tape):
    """Activate pre-activations and put the known cell state beside them: the tape, rebuilt.

    Parameters
    ----------
    a : pointer, IN
        Four vectors of `width` lanes, the pre-activations.
    width : int
        Lanes of a vector.
    units : int
        Lanes that are units; the others become harmless constants, as in the forward pass.
    c : Vector
        The cell state after this step.
    tape : pointer, OUT
        Five vectors: i, f, g, o, c.
    """
    store(tape, sigmoid(load_first(a, units)))
    store(offset(tape, width), sigmoid(load_first(offset(a, width), units)))
    store(offset(tape, 2 * width), tanh(load_first(offset(a, 2 * width), units)))
    store(offset(tape, 3 * width), sigmoid(load_first(offset(a, 3 * width), units)))
    store(offset(tape, 4 * width), c)


@routine(inline=True)
def gates_backward(dh, dc, tape, width, c_prev):
    """Take the gradients by h and c back through one gate step.

    Parameters
    ----------
    dh, dc : Vector
        The loss's gradients by h and c of this time step.
    tape : pointer, IN
        Five vectors of `width` lanes: i, f, g, o, c.
    width : int
        Lanes of a vector.
    c_prev : Vector
        The cell state before.

    Returns
    -------
    tuple of Vector
        The gradients by the pre-activations, i, f, g, o, and by `c_prev`.
    """
    i, f = load(tape), load(offset(tape, width))
    g, o = load(offset(tape, 2 * width)), load(offset(tape, 3 * width))
    tanh_c = tanh(load(offset(tape, 4 * width)))
    dc = fma(dh * o, 1.0 - tanh_c * tanh_c, dc)
    da_i = dc * g * (i * (1.0 - i))
    da_f = dc * c_prev * (f * (1.0 - f))
    da_g = dc * i * (1.0 - g * g)
    da_o = dh * tanh_c * (o * (1.0 - o))
    return da_i, da_f, da_g, da_o, dc * f
