"""The memory of a run and of a tape is free as soon as they are dropped, without a garbage collection."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest

from fastlstm import LSTM


@pytest.fixture
def no_collection():
    """Turn the garbage collector off, which would free cycles at some time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_a_run_is_freed_with_its_last_reference(backend, no_collection):
    lstm = LSTM(3, 6, 2, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    x = backend.array(np.ones((2, 3), np.float32))
    run = lstm.unroll(steps=2, batch=2)
    ys = [run.step(x), run.step(x)]
    back = run.backward()
    for y in ys:
        back.step(y)
    grads = back.finish()
    alive = [weakref.ref(run), weakref.ref(back), weakref.ref(run._unrolled)]
    del run, back
    assert [reference() for reference in alive] == [None] * 3
    assert backend.host(grads.params["bias_l0"]).any()


def test_a_tape_is_freed_with_its_last_reference(backend, no_collection):
    lstm = LSTM(3, 6, 2, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    y, _, tape = lstm.forward(backend.array(np.ones((4, 2, 3), np.float32)))
    lstm.backward(tape, y)
    alive = weakref.ref(tape)
    del tape
    assert alive() is None
