"""Small models and data for the training loop."""

from __future__ import annotations

import numpy as np

from fastlstm import LSTM
from fastlstm.training import Linear, Model


def build(output="last", batch_first=False, outputs=1, dtype=np.float64, **options):
    lstm = LSTM(3, 6, bidirectional=True, batch_first=batch_first, dtype=dtype, seed=1)
    return Model(lstm, Linear(12, outputs, dtype=dtype, seed=2), output=output, **options)


def problem(rng, output="last", batch_first=False, dtype=np.float64, count=20, steps=7):
    """Return inputs, and targets that an LSTM can learn."""
    x = rng.normal(size=(steps, count, 3)).astype(dtype)
    y = np.cumsum(x[..., :1], axis=0) * 0.3 if output == "sequence" else x.mean(axis=(0, 2))[:, None]
    if batch_first:
        return x.swapaxes(0, 1).copy(), (y.swapaxes(0, 1).copy() if output == "sequence" else y)
    return x, y


def params_of(model):
    return {name: value.copy() for name, value in model.params.items()}


def assert_same_params(one, other):
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value, err_msg=name)
