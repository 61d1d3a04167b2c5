"""The low-memory mode: the tape keeps h and c alone, and the gradients are the same to the last bit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fastlstm import LSTM, ArgumentError, use_backend
from fastlstm.backends.cpu.workspace import POOL

# Of a training call beyond inputs, outputs and parameters, in numbers per hidden unit, step, sequence, layer and
# direction: what the docstring of LSTM.forward promises; test_memory.py has the bound without `recompute`.
PROMISED = 4.25
# Steps and sequences so many that a chunk of the backward pass is a quarter, or an eighth, of the steps; units that are
# no whole vector of any width; more inputs and units than the tile takes at a time.
SIZES = {"few rows": (30, 5, 5, 11, 2), "many rows": (70, 9, 4, 19, 1), "long products": (6, 3, 150, 133, 1)}


@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_the_same_bits(dtype, sizes, ragged):
    steps, batch, inputs, hidden, layers = SIZES[sizes]
    rng = np.random.default_rng(0)
    model = LSTM(inputs, hidden, layers, bidirectional=True, dtype=dtype, seed=1)
    x = rng.normal(size=(steps, batch, inputs)).astype(dtype)
    x[1, 0, 0] = np.inf  # saturates gates; a lane beyond the units that is not kept apart makes it NaN
    dy = rng.normal(size=(steps, batch, 2 * hidden)).astype(dtype)
    lengths = rng.integers(0, steps + 1, batch) if ragged else None
    with use_backend("cpu"):  # the others keep the gates in either mode
        y, state, tape = model.forward(x, lengths=lengths)
        again_y, again_state, again_tape = model.forward(x, lengths=lengths, recompute=True)
        grads, again = model.backward(tape, dy), model.backward(again_tape, dy)
    pairs = [(y, again_y), *zip(state, again_state, strict=True), (grads.x, again.x)]
    pairs += [*zip(grads.state, again.state, strict=True)]
    pairs += [(grads.params[name], again.params[name]) for name in grads.params]
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)


def test_memory_of_a_training_call(dtype):
    steps, batch, inputs, hidden = 400, 16, 8, 64
    model = LSTM(inputs, hidden, bidirectional=True, dtype=dtype, seed=0)
    x, dy = np.ones((steps, batch, inputs), dtype), np.ones((steps, batch, 2 * hidden), dtype)

    def train():
        y, _, tape = model.forward(x, recompute=True)
        grads = model.backward(tape, dy)
        return y.nbytes + grads.x.nbytes

    with use_backend("cpu"):
        outputs = train()  # compiles, and fills the caches
        POOL.clear()  # what is kept already would not be counted
        tracemalloc.start()
        try:
            train()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    weights = sum(value.nbytes for value in model.params.values())
    packed = steps * batch * inputs * np.dtype(dtype).itemsize  # the reverse direction's copy of x
    used = (peak - outputs - 4 * weights - packed) / (steps * batch * hidden * 2 * np.dtype(dtype).itemsize)
    assert 2.0 < used <= PROMISED  # less than h and c would mean that this measures something else


@pytest.mark.parametrize("value", [1, "yes", None, np.ones(1)])
def test_values_that_are_not_booleans_are_refused(value):
    model = LSTM(2, 3)
    with pytest.raises(ArgumentError, match="recompute must be True or False"):
        model.forward(np.zeros((4, 1, 2), np.float32), recompute=value)
