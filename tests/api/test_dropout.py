"""A forward pass that fails leaves the model as it was: the next draws the masks that it would have drawn."""

from __future__ import annotations

import numpy as np
import pytest

from fastlstm import LSTM
from fastlstm.cell import Cell
from fastlstm.functional import lstm_forward
from fastlstm.parameters import initialise


def fail(*_args, **_kwargs):
    raise MemoryError("no room")


@pytest.mark.parametrize("kind", ["bad argument", "out of memory"])
def test_a_failed_forward_pass_does_not_use_up_its_masks(backend, monkeypatch, kind):
    lstm = LSTM(3, 16, num_layers=2, dropout=0.5, seed=0)
    if backend.name == "cuda":
        lstm = lstm.to(__import__("cupy"))
    x = backend.array(np.ones((4, 5, 3), np.float32))
    y, _, tape = LSTM._from(lstm.cell, lstm.params, False, lstm._dropout_key).forward(x)
    expected = backend.host(y)
    if kind == "bad argument":
        with pytest.raises(TypeError):
            lstm.forward([1.0])
    else:
        with monkeypatch.context() as patched:
            patched.setattr(type(tape.call.prepared), "forward", fail)
            with pytest.raises(MemoryError):
                lstm.forward(x)
    first, second = (backend.host(lstm.forward(x)[0]) for _ in range(2))
    np.testing.assert_array_equal(first, expected)
    assert not np.array_equal(first, second)


def test_the_functions_draw_other_masks_at_each_call_unless_a_seed_is_given(backend):
    params = {name: backend.array(value) for name, value in initialise(Cell(3, 16, 2), seed=0).items()}
    x = backend.array(np.ones((4, 5, 3), np.float32))

    def draw(**seed):
        return backend.host(lstm_forward(params, x, dropout=0.5, **seed)[0])

    drawn = [draw() for _ in range(3)] + [draw(dropout_seed=None), draw(dropout_seed=0), draw(dropout_seed=1)]
    assert len({y.tobytes() for y in drawn}) == len(drawn)
    np.testing.assert_array_equal(draw(dropout_seed=1), drawn[-1])
