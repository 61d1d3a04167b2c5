"""Shared by the tests of compiled loops: callers in nopython mode, models, and the arrays of a step."""

from __future__ import annotations

import numpy as np
import pytest
from numba import njit, prange
from variants import DETERMINISTIC

from fastlstm import LSTM, compiled
from fastlstm.backends.cpu.unroll import can_unroll


@njit(nogil=True)
def closed_loop(kit, x, h, c, y, h_next, c_next, steps):
    """The next input is the first part of the last output."""
    for _ in range(steps):
        compiled.step(kit, x, h, c, y, h_next, c_next)
        h, h_next = h_next, h
        c, c_next = c_next, c
        for b in range(x.shape[0]):
            for k in range(x.shape[1]):
                x[b, k] = y[b, k]


@njit
def one_simulation(kit, x, y, steps):
    shape = (kit.layers, x.shape[0], kit.hidden)
    h, c = np.zeros(shape, x.dtype), np.zeros(shape, x.dtype)
    h_next, c_next = np.empty(shape, x.dtype), np.empty(shape, x.dtype)
    closed_loop(kit, x.copy(), h, c, y, h_next, c_next, steps)


@njit(parallel=True)
def simulate_at_once(kit, x, outputs, steps):
    for n in prange(x.shape[0]):
        one_simulation(kit, x[n], outputs[n], steps)


@njit
def forth_and_back(kit, tape, x, dy, y, dx, dh, dc, gradients):
    for t in range(len(x)):
        compiled.step_taped(kit, tape, t, x[t], y[t])
    tape.dh[:], tape.dc[:] = dh, dc
    for t in range(len(x) - 1, -1, -1):
        compiled.step_back(kit, tape, t, dy[t], dx[t])
    compiled.finish(kit, tape, gradients)


@njit(parallel=True)
def train_at_once(kit, tapes, x, dy, y, dx, zero, gradients):
    """Run n has arrays x[n], dy[n], ..., and a tape of its own."""
    for n in prange(x.shape[0]):
        forth_and_back(kit, tapes[n], x[n], dy[n], y[n], dx[n], zero, zero, gradients[n])


def model_of(dtype, inputs, hidden, layers=1, **options):
    """A model whose biases and peepholes are drawn, too."""
    lstm, rng = LSTM(inputs, hidden, layers, dtype=dtype, seed=0, **options), np.random.default_rng(1)
    for value in lstm.params.values():
        value[...] = rng.uniform(-0.5, 0.5, value.shape)
    return lstm


def arrays(lstm, batch, seed=0):
    """x, h, c, y, h_next and c_next of a step."""
    cell, rng = lstm.cell, np.random.default_rng(seed)
    shapes = (batch, cell.input_size), *[(cell.num_layers, batch, cell.hidden_size)] * 2
    x, h, c = (rng.uniform(-1, 1, shape).astype(cell.dtype) for shape in shapes)
    # NaN, not whatever memory holds: an element that is not written is seen, and a cast of it does not warn.
    y = np.full((batch, cell.hidden_size), np.nan, cell.dtype)
    return x, h, c, y, np.full_like(h, np.nan), np.full_like(c, np.nan)


STEP_VARIANTS = [
    pytest.param(options, id=name) for name, options in DETERMINISTIC if can_unroll(LSTM(3, 6, seed=0, **options).cell)
]
OTHER_VARIANTS = [
    pytest.param(options, id=name)
    for name, options in DETERMINISTIC
    if not can_unroll(LSTM(3, 6, seed=0, **options).cell)
]
