"""The truncated gradient against two computations that share nothing with the backward pass.

One is the recursion forwards in time of Hochreiter and Schmidhuber (1997), equations 19 to 28: each unit carries the
derivatives of its cell state by its weights, and no error travels back. The other feeds the outputs of a first pass
to a second as plain inputs: then the full gradient of the second is the truncated one of the first.
"""

from __future__ import annotations

import numpy as np
import pytest

from fastlstm import LSTM

HIDDEN, INPUTS, STEPS, BATCH = 6, 4, 9, 5
# Sums of some hundred float64 products of size about 1, in another order: 1e-13 at most; a wrong term is near 1.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
FIELDS = [
    {},
    {"peephole": True},
    {"peephole": True, "block_size": 2},
    {"forget_gate": False, "block_size": 2},
    {"coupled": True, "clip": 0.5},
    {"cell_clip": 0.2},
    {"activations": ("hard_sigmoid", "relu", "softsign")},
    {"proj_size": 3},
    {"peephole": True, "block_size": 3, "forget_gate": False, "activations": ("sigmoid", "1997", "1997"),
     "proj_size": 2},
]  # fmt: skip


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def model_of(rng, **fields):
    """Return a model whose parameters are large enough for every term to count."""
    model = LSTM(INPUTS, HIDDEN, truncated=True, dtype=np.float64, seed=1, **fields)
    for value in model.params.values():
        value[...] += 0.4 * rng.normal(size=value.shape)
    return model


def train(backend, model, x, dy, state=None):
    """Run a training call on a backend; return y, and the gradients by parameters, input and state, on the host."""
    with backend.active():
        there = LSTM._from(model.cell, {name: backend.array(value) for name, value in model.params.items()}, False, 0)
        y, _, tape = there.forward(backend.array(x), state and tuple(map(backend.array, state)))
        grads = there.backward(tape, backend.array(dy))
        by_params = {name: backend.host(value) for name, value in grads.params.items()}
        return backend.host(y), by_params, backend.host(grads.x), tuple(map(backend.host, grads.state))


def forward_mode(params, x, dy, size, forget_gate):
    """Return y of one sequence, and the gradient by [W_ih W_hh b] by the paper's recursion."""
    weights = np.column_stack([params["weight_ih_l0"], params["weight_hh_l0"], params["bias_l0"]])
    block, blocks = np.arange(HIDDEN) // size, HIDDEN // size
    rows, start = {}, 0
    for gate, count in (("i", blocks), ("f", blocks * forget_gate), ("g", HIDDEN), ("o", blocks)):
        rows[gate] = start + (np.arange(HIDDEN) if gate == "g" else block)
        start += count
    gradient, ys = np.zeros_like(weights), []
    h, c = np.zeros(HIDDEN), np.zeros(HIDDEN)
    by_i, by_f, by_g = np.zeros((3, HIDDEN, weights.shape[1]))  # of each c by its weights, from all steps so far
    for t in range(len(x)):
        source = np.concatenate([x[t], h, [1.0]])
        a = weights @ source
        i, o = sigmoid(a[rows["i"]]), sigmoid(a[rows["o"]])
        f = sigmoid(a[rows["f"]]) if forget_gate else np.ones(HIDDEN)
        s = sigmoid(a[rows["g"]])
        g = 4 * s - 2
        by_i = f[:, None] * by_i + np.outer(g * i * (1 - i), source)
        by_f = f[:, None] * by_f + np.outer(c * f * (1 - f), source)
        by_g = f[:, None] * by_g + np.outer(4 * i * s * (1 - s), source)
        c = f * c + i * g
        squashed = 2 * sigmoid(c) - 1
        h = o * squashed
        ys.append(h)
        error = (dy[t] * o * (1 - squashed**2) / 2)[:, None]
        np.add.at(gradient, rows["o"], np.outer(dy[t] * squashed * o * (1 - o), source))
        np.add.at(gradient, rows["i"], error * by_i)
        np.add.at(gradient, rows["g"], error * by_g)
        if forget_gate:
            np.add.at(gradient, rows["f"], error * by_f)
    return np.stack(ys), gradient


@pytest.mark.parametrize("forget_gate", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_are_those_of_the_recursion_forwards_in_time(backend, size, forget_gate):
    rng = np.random.default_rng([1997, size, forget_gate])
    model = model_of(rng, forget_gate=forget_gate, block_size=size, activations=("sigmoid", "1997", "1997"))
    x, dy = rng.normal(size=(STEPS, 1, INPUTS)), rng.normal(size=(STEPS, 1, HIDDEN))
    y_expected, expected = forward_mode(model.params, x[:, 0], dy[:, 0], size, forget_gate)
    y, by_params, _, by_state = train(backend, model, x, dy)
    found = np.column_stack([by_params[name] for name in ("weight_ih_l0", "weight_hh_l0", "bias_l0")])
    np.testing.assert_allclose(y[:, 0], y_expected, **TOLERANCE)
    np.testing.assert_allclose(found, expected, **TOLERANCE)
    np.testing.assert_array_equal(by_state[0], 0.0)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_gradients_are_the_full_ones_of_a_second_pass(backend, fields):
    rng = np.random.default_rng(20)
    model = model_of(rng, **fields)
    features = model.cell.h_size
    x, dy = rng.normal(size=(STEPS, BATCH, INPUTS)), rng.normal(size=(STEPS, BATCH, features))
    h0, c0 = rng.normal(size=(1, BATCH, features)), rng.normal(size=(1, BATCH, HIDDEN))
    second = LSTM(INPUTS + features, HIDDEN, dtype=np.float64, seed=1, **fields)
    for name, value in model.params.items():
        if name not in ("weight_ih_l0", "weight_hh_l0"):
            second.params[name][...] = value
    second.params["weight_ih_l0"][...] = np.hstack([model.params["weight_ih_l0"], model.params["weight_hh_l0"]])
    second.params["weight_hh_l0"][...] = 0.0
    y, by_params, by_x, by_state = train(backend, model, x, dy, (h0, c0))
    fed = np.concatenate([x, np.concatenate([h0, y[:-1]])], 2)
    y_second, expected, by_fed, by_second_state = train(backend, second, fed, dy, (h0, c0))
    by_ih = expected["weight_ih_l0"]
    pairs = {"weight_ih_l0": by_ih[:, :INPUTS], "weight_hh_l0": by_ih[:, INPUTS:]}
    for name, value in by_params.items():
        np.testing.assert_allclose(value, pairs.get(name, expected[name]), **TOLERANCE, err_msg=name)
    np.testing.assert_allclose(y, y_second, **TOLERANCE)
    np.testing.assert_allclose(by_x, by_fed[..., :INPUTS], **TOLERANCE)
    np.testing.assert_allclose(by_state[1], by_second_state[1], **TOLERANCE)
