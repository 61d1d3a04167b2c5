"""Models and ways of calling them, for tests of prepared calls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm import LSTM

CPU = BackendUnderTest("cpu")
needs_cpu = pytest.mark.skipif(bool(CPU.missing), reason=str(CPU.missing))


class Given(NamedTuple):
    """The arguments of a call, as a caller has them."""

    params: dict
    x: object
    state: object = None
    dy: object = None
    lengths: object = None


class Model(NamedTuple):
    """What makes a model, and how it is called."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    options: dict = {}  # noqa: RUF012  # of LSTM's constructor
    batch_first: bool = False
    batched: bool = True
    ragged: bool = False
    frozen: bool = False
    stated: bool = True

    def new(self, dtype):
        """A model that was never called: nothing is prepared for it."""
        return LSTM(self.inputs, self.hidden, batch_first=self.batch_first, dtype=dtype, seed=0, **self.options)

    def given(self, dtype, backend, seed=0):
        """Arguments of calls; others for another seed."""
        rng, lstm = np.random.default_rng([seed, *self[:4]]), self.new(dtype)
        outer = (self.batch, self.steps) if self.batch_first else (self.steps, self.batch)
        outer, middle = (outer, (self.batch,)) if self.batched else (outer[:1], ())

        def draw(*shape):
            return backend.array(rng.normal(size=shape).astype(dtype))

        params = {name: backend.array(rng.normal(size=value.shape).astype(dtype) / 3)
                  for name, value in lstm.params.items()}  # fmt: skip
        h, c = ((lstm.cell.num_layers * lstm.cell.num_directions, *middle, n)
                for n in (lstm.cell.h_size, lstm.cell.c_size))  # fmt: skip
        return Given(
            params, draw(*outer, self.inputs), (draw(*h), draw(*c)) if self.stated else None,
            draw(*outer, lstm.cell.output_size), rng.integers(0, self.steps + 1, self.batch) if self.ragged else None,
        )  # fmt: skip


def host(backend, named):
    return {name: backend.host(value) for name, value in named.items()}


def gradients(grads):
    return {"dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]} | {
        f"d{name}": value for name, value in grads.params.items()
    }


def infer(lstm, given):
    lstm.params = given.params
    y, (h_n, c_n) = lstm(given.x, given.state, given.lengths)
    return {"y": y, "h_n": h_n, "c_n": c_n}


def train(lstm, given, **options):
    lstm.params = given.params
    y, (h_n, c_n), tape = lstm.forward(given.x, given.state, given.lengths, **options)
    return {"y": y, "h_n": h_n, "c_n": c_n} | gradients(lstm.backward(tape, given.dy))


def step(lstm, given):
    lstm.params = given.params
    first = (slice(None), 0) if lstm.batch_first and given.x.ndim == 3 else 0
    h, (h_n, c_n) = lstm.step(given.x[first], given.state)
    return {"h": h, "h_n": h_n, "c_n": c_n}


def frozen_if(model, lstm, given):
    """Freeze parameters for a model that is frozen."""
    if not model.frozen:
        return given
    lstm.params = given.params
    return given._replace(params=lstm.freeze().params)


def named(given):
    return {"x": given.x, "dy": given.dy, "h0": given.state[0], "c0": given.state[1]} | given.params


def error_of(call):
    with pytest.raises(fastlstm.FastLSTMError) as found:
        call()
    return type(found.value), str(found.value)
