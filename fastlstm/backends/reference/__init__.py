r"""The LSTM in plain NumPy, one time step written like the equations.

This is the oracle: in float64 every other backend is compared with it, and its own gradients are tested by complex-step
differentiation. It also runs where Numba's compiler is switched off.

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

The family
----------

Every variant is a change of these lines, and they may be combined. Blocks: with ``block_size=S``, unit :math:`v` has
the gates of its block :math:`j = \lfloor v / S \rfloor`, and the gradient of a gate is the sum over its block.

*Peepholes* (Gers, Schraudolph and Schmidhuber 2002); each unit's weights :math:`p` are those of its own gates:

.. math::

    a^i_t &\mathrel{+}= p_i\, c_{t-1}  &  a^f_t &\mathrel{+}= p_f\, c_{t-1}  &  a^o_t &\mathrel{+}= p_o\, c_t \\
    dc_t &\mathrel{+}= da^o_t\, p_o  &  dc_{t-1} &\mathrel{+}= da^i_t\, p_i + da^f_t\, p_f \\
    dp_i &= \sum_t da^i_t\, c_{t-1}  &  dp_f &= \sum_t da^f_t\, c_{t-1}  &  dp_o &= \sum_t da^o_t\, c_t

A gate that a block shares sees the cell states of all its units, :math:`a^i_j \mathrel{+}= \sum_{v \in j} p_{i,v}\,
c_v`, and :math:`da^i` is the sum over the block in the lines above; so with f and o.

Here :math:`da^o_t` comes first, since :math:`dc_t` takes its share of it before :math:`da^i_t`, :math:`da^f_t` and
:math:`da^g_t` are computed.

*Without a forget gate* (Hochreiter and Schmidhuber 1997), :math:`f_t = 1`: the constant error carousel. *Coupled*
(Greff et al. 2017), :math:`f_t = 1 - i_t`, so that :math:`di_t = dc_t\,(g_t - c_{t-1})`.

*The squashing functions of 1997* are :math:`g = 4\sigma(a^g) - 2 = 2 \tanh(a^g / 2)` with
:math:`g' = (2 - g)(2 + g) / 4`, and :math:`H(c) = 2\sigma(c) - 1 = \tanh(c / 2)` with :math:`H' = (1 - H^2) / 2`.
Any other activation likewise enters with its derivative as a function of the activated value.

*Truncated* (their appendix A.1): :math:`dh_{t-1} = 0`. Errors travel back in time in :math:`c` alone; the weights
still learn from :math:`h_{t-1}` as an input. By the paper :math:`dx` is 0 too; here it is :math:`W_{ih}^\top da`, so
that stacked layers learn.

*Clips*: pre-activations, after bias and peepholes, are clipped to :math:`\pm` ``clip`` and :math:`c_t` to :math:`\pm`
``cell_clip``; the gradient of a clipped value is zero. The peephole of :math:`o` sees the clipped :math:`c_t`.

*Projection* (Sak, Senior and Beaufays 2014): :math:`h_t = W_{hr}\,m_t` of :math:`m_t = o_t \tanh c_t`, and backward
:math:`dW_{hr} = \sum_t dh_t\, m_t^\top`; :math:`dm_t = W_{hr}^\top dh_t` stands for :math:`dh_t` in :math:`dc_t` and
:math:`da^o_t`.

*Layer norm* (Ba, Kiros and Hinton 2016), where :math:`N(v) = (v - \bar v) / \sqrt{\mathrm{var}(v) + 10^{-5}}` over the
rows of one sequence, :math:`\gamma` are gains and :math:`\beta` is a bias:

.. math::

    a_t = \gamma_{ih} N(W_{ih} x_t) + \gamma_{hh} N(W_{hh} h_{t-1}) + b
    \qquad h_t = o_t \tanh(\gamma_c N(c_t) + \beta_c)

and backward, with :math:`n = N(v)` and :math:`d = \gamma\, dN`, :math:`dv = (d - \bar d - n\, \overline{d\, n}) /
\sqrt{\mathrm{var}(v) + 10^{-5}}`. The stored :math:`c_t` is not normalised.

*Recurrent dropout* (Gal and Ghahramani 2016): :math:`W_{hh} (m\, h_{t-1})` with one mask :math:`m` a sequence, whose
elements are 0 or :math:`1 / (1 - p)`; in training only. *Zoneout* (Krueger et al. 2017): :math:`c_t` and :math:`h_t`
become :math:`z\, c_{t-1} + (1 - z)\, c_t` and likewise for h, where the elements of z are 0 or 1 at random in
training, and their expectation in inference; :math:`h_t` is computed from the :math:`c_t` before that. Backward,
recurrent dropout gives :math:`dh_{t-1} = m\,(W_{hh}^\top da_t)` and :math:`dW_{hh} = \sum_t da_t (m\, h_{t-1})^\top`;
zoneout adds :math:`z\, dh_t` to :math:`dh_{t-1}` (not if truncated) and :math:`z\, dc_t` to :math:`dc_{t-1}`, and the
lines above take :math:`(1 - z)\, dh_t` and :math:`(1 - z)\, dc_t` of what arrives from above and from later.

*Resets*: where they are true, :math:`h_{t-1} = c_{t-1} = 0`, and no gradient passes.

*A plain RNN* (Elman 1990): :math:`h_t = \phi(W_{ih} x_t + W_{hh} h_{t-1} + b)`, :math:`da_t = dh_t\, \phi'`.

Slips in common write-ups
-------------------------

- The derivatives of the activations are written here with the *activated* values: at the candidate :math:`1 - g^2`,
  not :math:`1 - \tanh^2(g)`, which would apply the tanh twice, nor :math:`1 - \tanh(g)`; at each gate :math:`s (1 -
  s)` with :math:`s` the gate's own output, not its pre-activation.
- Gates are sigmoids: they are parts of one, which a relu is not. What comes out of the cell is in (-1, 1), so that no
  cross-entropy can be taken of h itself.
- The cell of 1997 has no forget gate; that is of 2000.
- The next layer is given h, not c.
- In PyTorch's order i, f, g, o is what other sources call i, f, c, o or i, f, o, g: rows must be moved, not renamed.
"""

from fastlstm.backends.reference.backend import BACKEND, ReferenceBackend
from fastlstm.backends.reference.cell import cell_backward, cell_forward, sigmoid

__all__ = ["BACKEND", "ReferenceBackend", "cell_backward", "cell_forward", "sigmoid"]
