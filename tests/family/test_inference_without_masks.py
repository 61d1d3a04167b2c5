"""Recurrent dropout is for training only: in inference, the model is the one without it, on the same kernels."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from harness import Case, problem
from tolerances import assert_identical

from fastlstm import LSTM

FIELDS = [{}, {"coupled": True}, {"peephole": True}, {"proj_size": 3}, {"zoneout": (0.2, 0.3)}]


def results_of(backend, model, p):
    """Return what all calls for inference return, on the host."""
    x, state = backend.array(p.x), tuple(map(backend.array, p.state))
    y, (h, c) = model(x, state, p.lengths, resets=backend.array(p.resets))
    h_t, (h_1, c_1) = model.step(x[0], state)
    return {name: backend.host(value) for name, value in
            (("y", y), ("h", h), ("c", c), ("h_t", h_t), ("h_1", h_1), ("c_1", c_1))}  # fmt: skip


@pytest.mark.parametrize("frozen", [False, True], ids=["live", "frozen"])
@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_inference_is_that_of_the_model_without_recurrent_dropout(backend, dtype, fields, frozen):
    if frozen and not backend.is_numpy:
        pytest.skip("only models of NumPy arrays can be frozen")
    case = Case(5, 4, 3, 12, 2, lengths="zeros", resets=True, fields=tuple(fields.items()))
    p, found = problem(case).astype(dtype), []
    for probability in (0.4, 0.0):
        model = LSTM(3, 12, 2, dtype=dtype, recurrent_dropout=probability, **fields)
        model.params.update({name: backend.array(value) for name, value in p.params.items()})
        model = model.freeze() if frozen else model
        found.append((results_of(backend, model, p), model.plan(backend.array(p.x), p.lengths)))
    assert_identical(found[0][0], found[1][0])
    assert re.sub("; in training.*", "", found[0][1]) == found[1][1]


def test_a_model_keeps_its_recurrent_dropout_in_training(backend, dtype):
    model = LSTM(3, 12, 2, dtype=dtype, recurrent_dropout=0.4, seed=0)
    x = np.ones((5, 4, 3), dtype)
    if not backend.is_numpy:
        model, x = model.to(__import__("cupy")), backend.array(x)
    inferred = backend.host(model(x)[0])
    first, second = (backend.host(model.forward(x)[0]) for _ in range(2))
    assert not np.array_equal(first, inferred) and not np.array_equal(first, second)


def test_the_cell_of_inference_keeps_everything_else():
    cell = LSTM(3, 12, 2, recurrent_dropout=0.4, dropout=0.2, zoneout=(0.1, 0.2), precision="tf32").cell
    assert cell.in_inference == dataclasses.replace(cell, recurrent_dropout=0.0)
    assert cell.in_inference.precision == "tf32" and cell.in_inference.in_inference is cell.in_inference
    assert cell.in_inference is cell.in_inference  # so that the calls that are prepared for it are kept
