"""Gradients from nothing but forward passes: the complex step, central differences, and the loss that both take."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from harness import DROPOUT_SEED, Arrays, BackendUnderTest, Problem, model_of

from fastlstm.backends.base import Dropout
from fastlstm.functional import lstm_forward

COMPLEX_STEP = 1e-100  # its square vanishes, so the imaginary part of the loss is the derivative, rounded once
CENTRAL_STEP = 1e-5


def inputs(p: Problem) -> Arrays:
    """Everything a loss can be differentiated by, under the names of the gradients."""
    assert p.state is not None
    return {"dx": p.x, "dh0": p.state[0], "dc0": p.state[1]} | {f"d{name}": value for name, value in p.params.items()}


def with_inputs(p: Problem, values: Arrays) -> Problem:
    """Put other inputs into a problem."""
    params = {name: values[f"d{name}"] for name in p.params}
    return dataclasses.replace(p, params=params, x=values["dx"], state=(values["dh0"], values["dc0"]))


def loss(p: Problem, y: np.ndarray, h_n: np.ndarray, c_n: np.ndarray) -> Any:
    """Return a loss whose gradients by y, h_n and c_n are those of the problem."""
    return (p.dy * y).sum() + (p.dstate[0] * h_n).sum() + (p.dstate[1] * c_n).sum()


def differentiate(p: Problem, slope: Callable[[Arrays, str, tuple[int, ...]], float]) -> Arrays:
    """Differentiate by every element of every input: `slope` is given the inputs and one element's name and index."""
    values = {name: value.copy() for name, value in inputs(p).items()}
    found = {}
    for name, value in values.items():
        gradient = np.zeros(value.shape)
        for index in np.ndindex(value.shape):
            gradient[index] = slope(values, name, index)
        found[name] = gradient
    return found


def backward_pass(implementation: Any, p: Problem) -> tuple[Arrays, Arrays]:
    """Run a backend below the public functions: its outputs, and its gradients under the names of `inputs`."""
    assert p.state is not None and not p.batch_first
    dropout = Dropout(p.cell.dropout, DROPOUT_SEED) if p.cell.draws else None
    result = implementation.forward(
        p.cell, p.params, p.x, *p.state, p.lengths, dropout, keep_tape=True, resets=p.resets
    )
    grads = implementation.backward(p.cell, p.params, result.tape, p.dy, *p.dstate)
    gradients = {"dx": grads.x, "dh0": grads.h0, "dc0": grads.c0}
    gradients |= {f"d{name}": value for name, value in grads.params.items()}
    return {"y": result.y, "h_n": result.h_n, "c_n": result.c_n}, gradients


def complex_step(implementation: Any, p: Problem) -> Arrays:
    """Differentiate by Im f(v + ih) / h (Squire and Trapp 1998); needs a backend that computes with complex numbers."""
    dropout = Dropout(p.cell.dropout, DROPOUT_SEED) if p.cell.draws else None

    def slope(values: Arrays, name: str, index: tuple[int, ...]) -> float:
        perturbed = {key: value.astype(np.complex128) for key, value in values.items()}
        perturbed[name][index] += 1j * COMPLEX_STEP
        q = with_inputs(p, perturbed)
        result = implementation.forward(
            p.cell, q.params, q.x, *q.state, p.lengths, dropout, keep_tape=False, resets=p.resets
        )
        return loss(p, result.y, result.h_n, result.c_n).imag / COMPLEX_STEP

    return differentiate(p, slope)


def central_differences(backend: BackendUnderTest, p: Problem) -> Arrays:
    """Differentiate by (f(v + h) - f(v - h)) / 2h through the public functions."""

    def value(values: Arrays) -> float:
        q = with_inputs(p, values)
        to = backend.array
        y, (h_n, c_n), _ = lstm_forward(
            {key: to(v) for key, v in q.params.items()}, to(q.x), (to(q.state[0]), to(q.state[1])), p.lengths,
            batch_first=p.batch_first, dropout_seed=DROPOUT_SEED, **model_of(p),
            resets=None if p.resets is None else to(p.resets),
        )  # fmt: skip
        return loss(p, backend.host(y), backend.host(h_n), backend.host(c_n))

    def slope(values: Arrays, name: str, index: tuple[int, ...]) -> float:
        kept = values[name][index]
        values[name][index] = above = kept + CENTRAL_STEP
        upper = value(values)
        values[name][index] = below = kept - CENTRAL_STEP
        lower = value(values)
        values[name][index] = kept
        return (upper - lower) / (above - below)

    return differentiate(p, slope)
