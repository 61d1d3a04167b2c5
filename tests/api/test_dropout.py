"""A forward pass that fails leaves the model as it was: the next draws the masks that it would have drawn."""

from __future__ import annotations

import numpy as np
import pytest

from fastlstm import LSTM


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
