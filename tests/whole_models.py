"""Small whole models, and data for them."""

from __future__ import annotations

import io

import numpy as np

from fastlstm import LSTM
from fastlstm.training import Linear, Model
from fastlstm.training.scaler import Scaler

OUTPUTS = ["last", "mean", "sequence"]


def build(output="last", several=False, batch_first=False, dtype=np.float64, **options):
    size = 10 if several else 5
    lstm = LSTM(3, 5, bidirectional=several, batch_first=batch_first, dtype=dtype, seed=1, **options)
    lstms = [lstm, LSTM(size, 4, 2, bidirectional=True, batch_first=batch_first, dtype=dtype, seed=2)]
    size = 8 if several else 5
    heads = {"flow": Linear(size, 2, dtype=dtype, seed=3), "level": Linear(size, 1, bias=False, dtype=dtype, seed=4)}
    model = Model(lstms if several else lstm, heads if several else heads["flow"], output=output)
    draw = np.random.default_rng(5)
    for value in model.params.values():  # a fresh model's biases are constant
        value[...] += draw.normal(size=value.shape, scale=0.3).astype(dtype)
    return model


def scaled(model, rng):
    """Give a model a scaler."""
    sizes = {"x": 3} | {name: head.params["weight"].shape[0] for name, head in model.heads.items()}
    arrays = {}
    for name, size in sizes.items():
        arrays[f"{name}.mean"] = rng.normal(size=size).astype(model.dtype)
        arrays[f"{name}.deviation"] = rng.uniform(0.5, 2, size).astype(model.dtype)
    model.scale, model.scaler = True, Scaler(arrays)
    return model


def data(rng, model, steps=6, batch=4):
    x = rng.normal(size=(steps, batch, 3)).astype(model.dtype)
    return x.swapaxes(0, 1).copy() if model.batch_first else x


def named(model, values):
    return {"head": values} if model.single_head else values


# Files


def saved(model):
    file = io.BytesIO()
    model.save(file)
    return file.getvalue()


def assert_same(one, other):
    assert repr(one) == repr(other)
    assert list(one.params) == list(other.params)
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value, strict=True)
    assert (one.scaler is None) == (other.scaler is None)
    for name, value in ({} if one.scaler is None else one.scaler.arrays).items():
        np.testing.assert_array_equal(other.scaler.arrays[name], value, strict=True)
