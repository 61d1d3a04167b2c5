"""The truncated gradient against two computations of other kinds, which keep no tape.

The first is that of the paper (Hochreiter and Schmidhuber 1997, equations 19 to 28): derivatives of the cell states by
the weights are carried forward in time. In the second, h before each step is given to a model as an input, so that the
whole gradient of that model is the truncated one of the first.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastlstm import LSTM
from fastlstm.functional import lstm_backward, lstm_forward

ATOL = 1e-12  # sums of some hundred numbers of order one, in float64, in another order
OF_1997 = {"activations": ("sigmoid", "1997", "1997"), "truncated": True, "dtype": np.float64}


@pytest.fixture
def rng():
    return np.random.default_rng(1997)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def gradients(backend, model, x, dy, state=None):
    """Return output, gradient by x, that by c0, and those by the parameters, in NumPy."""
    params = {name: backend.array(value) for name, value in model.params.items()}
    state = None if state is None else tuple(map(backend.array, state))
    y, _, tape = lstm_forward(params, backend.array(x), state, cell=model.cell)
    grads = lstm_backward(params, tape, backend.array(dy))
    of_params = {name: backend.host(value) for name, value in grads.params.items()}
    return backend.host(y), backend.host(grads.x), backend.host(grads.state[1]), of_params


def carried_forward(weights, x, dy, hidden, size, forget_gate):
    """Return the gradient by all weights of one sequence, (rows, I + H + 1), and the output of each step.

    `weights` are the rows of the gates i, f, g and o, where those of i, f and o are shared by `size` units each.
    """
    shared, block = hidden // size, np.arange(hidden) // size
    sizes = [shared, shared * forget_gate, hidden, shared]
    rows_i, rows_f, rows_g, rows_o = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    h, c, found, outputs = np.zeros(hidden), np.zeros(hidden), np.zeros_like(weights), []
    by_i, by_f, by_g = (np.zeros((hidden, weights.shape[1])) for _ in "ifg")  # derivatives of each c
    for t in range(len(x)):
        source = np.concatenate([x[t], h, [1.0]])
        a = weights @ source
        i, o = sigmoid(a[rows_i])[block], sigmoid(a[rows_o])[block]
        f = sigmoid(a[rows_f])[block] if forget_gate else np.ones(hidden)
        g = 4 * sigmoid(a[rows_g]) - 2
        by_f = f[:, None] * by_f + (c * f * (1 - f))[:, None] * source
        by_i = f[:, None] * by_i + (g * i * (1 - i))[:, None] * source
        by_g = f[:, None] * by_g + (i * (2 - g) * (2 + g) / 4)[:, None] * source
        c = f * c + i * g
        squashed = 2 * sigmoid(c) - 1
        h = o * squashed
        outputs.append(h)
        by_c = dy[t] * o * (1 - squashed**2) / 2
        found[rows_g] += by_c[:, None] * by_g
        for unit in range(hidden):
            found[rows_i[block[unit]]] += by_c[unit] * by_i[unit]
            if forget_gate:
                found[rows_f[block[unit]]] += by_c[unit] * by_f[unit]
            found[rows_o[block[unit]]] += dy[t, unit] * squashed[unit] * o[unit] * (1 - o[unit]) * source
    return found, np.array(outputs)


@pytest.mark.parametrize("forget_gate", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_derivatives_carried_forward_give_the_truncated_gradient(backend, rng, size, forget_gate):
    model = LSTM(4, 6, forget_gate=forget_gate, block_size=size, seed=rng, **OF_1997)
    for value in model.params.values():
        value[...] += rng.normal(size=value.shape) * 0.5
    x, dy = rng.normal(size=(9, 1, 4)), rng.normal(size=(9, 1, 6))
    y, _, _, grads = gradients(backend, model, x, dy)

    def joined(arrays):
        return np.c_[arrays["weight_ih_l0"], arrays["weight_hh_l0"], arrays["bias_l0"]]

    expected, outputs = carried_forward(joined(model.params), x[:, 0], dy[:, 0], 6, size, forget_gate)
    np.testing.assert_allclose(y[:, 0], outputs, rtol=0, atol=ATOL)
    np.testing.assert_allclose(joined(grads), expected, rtol=0, atol=ATOL)


VARIANTS = (
    {},
    {"peephole": True},
    {"peephole": True, "block_size": 2},
    {"coupled": True, "clip": 0.5},
    {"cell_clip": 0.2},
    {"activations": ("hard_sigmoid", "relu", "softsign")},
    {"proj_size": 3},
    {"forget_gate": False, "proj_size": 2, "peephole": True},
)


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_h_as_an_input_gives_the_truncated_gradient(backend, rng, fields):
    # Not with layer norm, which normalises the products with x and with h each by itself.
    model = LSTM(4, 6, truncated=True, dtype=np.float64, seed=rng, **fields)
    for value in model.params.values():
        value[...] += rng.normal(size=value.shape) * 0.3
    size = model.cell.h_size
    whole = LSTM(4 + size, 6, dtype=np.float64, seed=0, **fields)
    for name, value in model.params.items():
        if name not in ("weight_ih_l0", "weight_hh_l0"):
            whole.params[name] = value.copy()
    whole.params["weight_ih_l0"] = np.c_[model.params["weight_ih_l0"], model.params["weight_hh_l0"]]
    whole.params["weight_hh_l0"] = np.zeros_like(model.params["weight_hh_l0"])

    x, dy = rng.normal(size=(9, 5, 4)), rng.normal(size=(9, 5, size))
    state = rng.normal(size=(1, 5, size)), rng.normal(size=(1, 5, 6))
    y, dx, dc0, grads = gradients(backend, model, x, dy, state)
    before = np.concatenate([state[0], y[:-1]])
    again, dx_again, dc0_again, expected = gradients(backend, whole, np.concatenate([x, before], axis=2), dy, state)
    expected["weight_ih_l0"], expected["weight_hh_l0"] = np.split(expected["weight_ih_l0"], [4], axis=1)
    found = {"y": (y, again), "dx": (dx, dx_again[..., :4]), "dc0": (dc0, dc0_again)}
    for name, (one, other) in (found | {name: (grads[name], expected[name]) for name in grads}).items():
        np.testing.assert_allclose(one, other, rtol=0, atol=ATOL, err_msg=name)
