"""Shared by the tests of ``LSTM.unroll``: models and problems, and what their results are called."""

from __future__ import annotations

import numpy as np

from fastlstm import LSTM


def draw(rng, backend, dtype, *shape):
    return backend.array(rng.uniform(-1, 1, shape).astype(dtype))


def model_of(backend, dtype, inputs, hidden, layers=1, **options):
    """A model on the backend whose biases and peepholes are drawn, too."""
    lstm, rng = LSTM(inputs, hidden, layers, dtype=dtype, seed=0, **options), np.random.default_rng(1)
    for name, value in lstm.params.items():
        lstm.params[name] = backend.array(rng.uniform(-0.5, 0.5, value.shape).astype(dtype))
    return lstm


def state_sizes(cell):
    return getattr(cell, "h_size", cell.hidden_size), getattr(cell, "c_size", cell.hidden_size)


def given(lstm, backend, steps, batch):
    """x, the state, dy and the gradients by the last state of a problem."""
    cell, rng = lstm.cell, np.random.default_rng(2)
    x = draw(rng, backend, cell.dtype, steps, batch, cell.input_size)
    dy = draw(rng, backend, cell.dtype, steps, batch, cell.output_size)
    states = [draw(rng, backend, cell.dtype, cell.num_layers, batch, size) for size in state_sizes(cell) * 2]
    return x, tuple(states[:2]), dy, tuple(states[2:])


def named(backend, ys, state, dxs, grads):
    found = {"y": np.stack([backend.host(y) for y in ys]), "dx": np.stack([backend.host(dx) for dx in dxs])}
    found |= {"h_n": state[0], "c_n": state[1], "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    return {name: value if name in ("y", "dx") else backend.host(value) for name, value in found.items()}


def by_steps(lstm, backend, x, state, dy, dstate):
    """Every result of an open loop, taken step by step."""
    run = lstm.unroll(state, steps=len(x), batch=x.shape[1])
    ys = [run.step(x_t) for x_t in x]
    last, back = run.state, run.backward(dstate)
    dxs = [back.step(dy[t]) for t in reversed(range(len(x)))][::-1]
    return named(backend, ys, last, dxs, back.finish())


def at_once(lstm, backend, x, state, dy, dstate):
    y, last, tape = lstm.forward(x, state)
    grads = lstm.backward(tape, dy, dstate)
    return named(backend, y, last, grads.x, grads)
