"""``RNN.unroll``: a plain RNN's states are h alone, as in all its calls."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_close
from unroll_tools import draw

from fastlstm import RNN, ArgumentError, ShapeError


def problem(backend, dtype, nonlinearity):
    rnn, rng = RNN(3, 6, 2, nonlinearity, dtype=dtype, seed=0), np.random.default_rng(1)
    for name, value in rnn.params.items():
        rnn.params[name] = draw(rng, backend, dtype, *value.shape)
    shapes = (5, 4, 3), (2, 4, 6), (5, 4, 6), (2, 4, 6)
    return rnn, *(draw(rng, backend, dtype, *shape) for shape in shapes)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_steps_of_a_plain_rnn_give_what_one_call_gives(backend, dtype, nonlinearity):
    rnn, x, h0, dy, dh_n = problem(backend, dtype, nonlinearity)
    y, h_n, tape = rnn.forward(x, h0)
    grads = rnn.backward(tape, dy, dh_n)
    run = rnn.unroll(h0, steps=5, batch=4)
    ys = [run.step(x_t) for x_t in x]
    last, back = run.state, run.backward(dh_n)
    dxs = [back.step(d) for d in dy[::-1]][::-1]
    before, found = back.state, back.finish()
    host = backend.host
    assert last.shape == before.shape == found.state.shape == (2, 4, 6)
    assert_close(
        "agreement",
        {"y": np.stack([host(y_t) for y_t in ys]), "h_n": host(last), "dx": np.stack([host(dx) for dx in dxs]),
         "dh0": host(found.state), "back.state": host(before)} | {k: host(v) for k, v in found.params.items()},
        {"y": host(y), "h_n": host(h_n), "dx": host(grads.x), "dh0": host(grads.state),
         "back.state": host(grads.state)} | {k: host(v) for k, v in grads.params.items()},
        backend=backend.name, dtype=dtype,
    )  # fmt: skip


def test_calls_steps_and_runs_of_a_plain_rnn_hand_their_states_on(backend, dtype):
    rnn, x, h0, *_ = problem(backend, dtype, "tanh")
    expected, whole = rnn(x, h0)
    _, h = rnn(x[:2], h0)
    run = rnn.unroll(h, steps=2, batch=4)
    for x_t in x[2:4]:
        run.step(x_t)
    y, h = rnn.step(x[4], run.state)
    found = {"y": backend.host(y), "h": backend.host(h)}
    assert_close(
        "streaming",
        found,
        {"y": backend.host(expected[4]), "h": backend.host(whole)},
        backend=backend.name,
        dtype=dtype,
    )


def test_a_pair_of_states_of_a_plain_rnn_is_refused(backend):
    rnn, x, h0, _, dh_n = problem(backend, np.float32, "tanh")
    with pytest.raises(ArgumentError, match="state of a plain RNN is one array"):
        rnn.unroll((h0, h0[..., :0]), steps=2, batch=4)
    with pytest.raises(ShapeError, match="h0"):
        rnn.unroll(h0[:1], steps=2, batch=4)
    run = rnn.unroll(steps=1, batch=4)
    run.step(x[0])
    with pytest.raises(ArgumentError, match="dstate of a plain RNN is one array"):
        run.backward((dh_n, None))
    with pytest.raises(ShapeError, match="dh_n"):
        run.backward(dh_n[:1])
    back = run.backward()
    back.step(None)
    assert back.state.shape == (2, 4, 6)
