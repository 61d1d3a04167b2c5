"""What a training loop needs beside the LSTM: losses, a linear layer, gradient clipping, optimisers.

All of it works on NumPy and CuPy arrays alike, through the array's own methods and library. A loss returns
its value together with its gradient, so one step of training reads from top to bottom:

>>> import numpy as np
>>> from fastlstm import LSTM
>>> from fastlstm.training import Adam, Linear, clip_by_global_norm, join, mean_squared_error
>>> lstm, head = LSTM(3, 8, seed=0), Linear(8, 1, seed=1)
>>> optimiser = Adam(join(lstm=lstm, head=head), lr=0.05)
>>> x, target = np.ones((5, 2, 3), np.float32), np.ones((5, 2, 1), np.float32)
>>> losses = []
>>> for _ in range(30):
...     y, _, tape = lstm.forward(x)
...     loss, dprediction = mean_squared_error(head(y), target)
...     head_grads = head.backward(y, dprediction)
...     lstm_grads = lstm.backward(tape, head_grads.x)
...     grads, norm = clip_by_global_norm(join(lstm=lstm_grads, head=head_grads), 1.0)
...     optimiser.step(grads)
...     losses.append(float(loss))
>>> losses[-1] < 0.01 * losses[0]
True
"""

from fastlstm.training.cell_1997 import initialise_1997
from fastlstm.training.clipping import clip_by_global_norm, clip_by_value
from fastlstm.training.joined import Joined, join
from fastlstm.training.linear import Linear, LinearGrads
from fastlstm.training.losses import length_mask, mean_squared_error, softmax_cross_entropy
from fastlstm.training.optimisers import SGD, Adam

__all__ = [
    "SGD",
    "Adam",
    "Joined",
    "Linear",
    "LinearGrads",
    "clip_by_global_norm",
    "clip_by_value",
    "initialise_1997",
    "join",
    "length_mask",
    "mean_squared_error",
    "softmax_cross_entropy",
]
