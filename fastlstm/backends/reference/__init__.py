r"""The LSTM in plain NumPy, one time step written like the equations.

This is the oracle: in float64 every other backend is compared with it, and its own gradients are proved
by complex-step differentiation. It also runs where Numba's compiler is switched off.

Forward, for one sequence (Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000),
where :math:`a_t = W_{ih} x_t + W_{hh} h_{t-1} + b` holds the pre-activations of the four gates i, f, g, o:

.. math::

    i_t &= \sigma(a^i_t)  &  f_t &= \sigma(a^f_t)  &  g_t &= \tanh(a^g_t)  &  o_t &= \sigma(a^o_t) \\
    c_t &= f_t c_{t-1} + i_t g_t  &  h_t &= o_t \tanh(c_t)

Backward, where :math:`d\,v` is the derivative of the loss by :math:`v`. The state's gradient arrives from
above (:math:`dy_t`) and from the next time step (:math:`dh_t`, :math:`dc_t`):

.. math::

    dh_t &\mathrel{+}= dy_t  &  dc_t &\mathrel{+}= dh_t\, o_t\, (1 - \tanh^2 c_t) \\
    da^o_t &= dh_t \tanh(c_t)\; o_t (1 - o_t)  &  da^f_t &= dc_t\, c_{t-1}\; f_t (1 - f_t) \\
    da^i_t &= dc_t\, g_t\; i_t (1 - i_t)  &  da^g_t &= dc_t\, i_t\; (1 - g_t^2) \\
    dc_{t-1} &= dc_t\, f_t  &  dh_{t-1} &= W_{hh}^\top da_t  \qquad dx_t = W_{ih}^\top da_t \\
    dW_{ih} &= \sum_t da_t x_t^\top  &  dW_{hh} &= \sum_t da_t h_{t-1}^\top  \qquad db = \sum_t da_t

With peepholes (Gers, Schraudolph and Schmidhuber 2002), where each unit's weights :math:`p` are those of its own gates:

.. math::

    a^i_t &\mathrel{+}= p_i\, c_{t-1}  &  a^f_t &\mathrel{+}= p_f\, c_{t-1}  &  a^o_t &\mathrel{+}= p_o\, c_t \\
    dc_t &\mathrel{+}= da^o_t\, p_o  &  dc_{t-1} &\mathrel{+}= da^i_t\, p_i + da^f_t\, p_f \\
    dp_i &= \sum_t da^i_t\, c_{t-1}  &  dp_f &= \sum_t da^f_t\, c_{t-1}  &  dp_o &= \sum_t da^o_t\, c_t

Here :math:`da^o_t` comes first, since :math:`dc_t` takes its share of it before :math:`da^i_t`, :math:`da^f_t` and
:math:`da^g_t` are computed.

The slip found in common write-ups is in the derivatives of the activations. They are written here with
the *activated* values: at the candidate :math:`1 - g^2`, not :math:`1 - \tanh^2(g)`, which would apply
the tanh twice; and at each gate :math:`s (1 - s)` with :math:`s` the gate's own output.
"""

from fastlstm.backends.reference.backend import BACKEND, ReferenceBackend
from fastlstm.backends.reference.cell import cell_backward, cell_forward, sigmoid

__all__ = ["BACKEND", "ReferenceBackend", "cell_backward", "cell_forward", "sigmoid"]
