"""A model and a problem on a stand-in for CuPy, with all calls, for the tests of the CUDA backend."""

from __future__ import annotations

import numpy as np
from harness import Case, problem

from fastlstm import LSTM

RAGGED = Case(6, 5, 3, 8, 2, True, lengths="zeros", dropout=0.3)
WHOLE = Case(6, 5, 3, 5, 2, True)


class Run:
    """A model and a problem on a library, with all calls."""

    def __init__(self, xp, case, dtype=np.float32):
        p = problem(case).astype(dtype)
        self.lengths = p.lengths
        self.lstm = LSTM(case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, dtype=dtype,
                         dropout=case.dropout, seed=0)  # fmt: skip
        self.lstm.params.update({name: xp.array(value) for name, value in p.params.items()})
        self.x, self.dy = xp.array(p.x), xp.array(p.dy)
        self.state, self.dstate = (tuple(map(xp.array, pair)) for pair in (p.state, p.dstate))

    def __call__(self):
        self.lstm._dropout_key = 7
        y, state, tape = self.lstm.forward(self.x, self.state, self.lengths)
        grads = self.lstm.backward(tape, self.dy, self.dstate)
        return [y, *state, grads.x, *grads.state, *grads.params.values()]


def on_host(arrays):
    return {str(k): value.get() for k, value in enumerate(arrays)}
