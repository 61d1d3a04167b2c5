"""Whole models and their training; or, for a loop of your own, losses, a linear layer, clipping and optimisers.

:class:`Model` is LSTM, head and scaling in one object and one file, and :func:`fit` trains it:

>>> import numpy as np
>>> from fastlstm import LSTM
>>> from fastlstm.training import Linear, Model, fit
>>> x = np.random.default_rng(0).normal(size=(10, 64, 3)).astype(np.float32)  # 10 time steps, 64 sequences
>>> model = Model(LSTM(3, 8, seed=0), Linear(8, 1, seed=1), scale=True)
>>> history = fit(model, x, x[-1, :, 0], epochs=5, validation=0.25, clip_norm=1.0, seed=0)
>>> model.predict(x).shape
(64, 1)

All of them work on NumPy and CuPy arrays. A loss returns its value together with its gradient, so one step of training
reads from top to bottom:

>>> from fastlstm.training import Adam, Linear, clip_by_global_norm, join, mean_squared_error
>>> lstm, head = LSTM(3, 8, seed=0), Linear(8, 1, seed=1)
>>> optimiser = Adam(join(lstm=lstm, head=head), lr=0.05)
>>> x, target = np.ones((5, 2, 3), np.float32), np.ones((5, 2, 1), np.float32)
>>> losses = []
>>> for _ in range(30):
...     y, _, tape = lstm.forward(x)
...     loss, dprediction = mean_squared_error(head(y), target)
...     head_grads = head.backward(y, dprediction)
...     lstm_grads = lstm.backward(tape, head_grads.x, input_gradient=False)  # x is data
...     grads, norm = clip_by_global_norm(join(lstm=lstm_grads, head=head_grads), 1.0)
...     optimiser.step(grads)
...     losses.append(float(loss))
>>> losses[-1] < 0.01 * losses[0]
True
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastlstm.training.cell_1997 import initialise_1997
from fastlstm.training.clipping import clip_by_global_norm, clip_by_value
from fastlstm.training.joined import Joined, join
from fastlstm.training.linear import Linear, LinearGrads
from fastlstm.training.losses import length_mask, mean_squared_error, softmax_cross_entropy
from fastlstm.training.optimisers import SGD, Adam, AdamW
from fastlstm.training.regression import (
    huber_loss,
    logistic_squared_error,
    mean_absolute_error,
    nash_sutcliffe_loss,
    quantile_loss,
)

if TYPE_CHECKING:
    from fastlstm.training.fitting import fit
    from fastlstm.training.history import History
    from fastlstm.training.model import Model
    from fastlstm.training.reduction import allreduce

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "History",
    "Joined",
    "Linear",
    "LinearGrads",
    "Model",
    "allreduce",
    "clip_by_global_norm",
    "clip_by_value",
    "fit",
    "huber_loss",
    "initialise_1997",
    "join",
    "length_mask",
    "logistic_squared_error",
    "mean_absolute_error",
    "mean_squared_error",
    "nash_sutcliffe_loss",
    "quantile_loss",
    "softmax_cross_entropy",
]

# Whole models are loaded when they are used: their modules take an eighth of the time of importing fastlstm.
_LATER = {"History": "history", "Model": "model", "allreduce": "reduction", "fit": "fitting"}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
