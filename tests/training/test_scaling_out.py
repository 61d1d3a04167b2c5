"""The figures of scaling out: counted from the model, computed from committed measurements."""

from __future__ import annotations

import numpy as np
import scaling_out

from fastlstm import LSTM
from fastlstm.bench.work import Work


def test_bytes_are_those_of_the_models_gradients():
    lstm = LSTM(5, 7, seed=0)
    y, _, tape = lstm.forward(np.ones((3, 2, 5), np.float32))
    grads = lstm.backward(tape, y)
    assert scaling_out.gradients(Work(3, 2, 5, 7)) == sum(value.nbytes for value in grads.params.values())


def test_allreduce_counts_latencies_and_bytes():
    network = scaling_out.Network("", latency=1.0, bandwidth=10.0)
    assert network.allreduce(100, 1) == 0
    assert network.allreduce(100, 2) == 2 * 1 + 2 * 50 / 10
    assert network.allreduce(100, 4) == 2 * 2 + 2 * 75 / 10
    assert scaling_out.efficiency(100, 1.0, network, 1) == 1
    shares = [scaling_out.efficiency(100, 1.0, network, workers) for workers in (1, 2, 16, 1000)]
    assert shares == sorted(shares, reverse=True)
    work, fast = Work(3, 64, 5, 7), scaling_out.Network("", latency=0.0, bandwidth=1e30)
    assert scaling_out.most_workers(work, 1.0, fast) == 64, "no more workers than rows"
    assert scaling_out.most_workers(work, 1.0, network) == 1
