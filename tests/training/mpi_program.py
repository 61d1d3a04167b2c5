"""Data-parallel training: `mpiexec -n 2 python -m mpi4py mpi_program.py` trains one model in two processes."""

import json
import os
import signal
import sys

import numpy as np
from mpi4py import MPI

from fastlstm import LSTM
from fastlstm.training import Adam, Linear, Model, allreduce, fit

comm = MPI.COMM_WORLD
trouble = sys.argv[1] if len(sys.argv) > 1 else ""
rng = np.random.default_rng(0)  # each process has the same data, and takes its part of each batch
x = [rng.normal(size=(steps, 3)) for steps in rng.integers(4, 20, 61)]
y = [np.cumsum(one[:, :1], axis=0) for one in x]

# Its own parameters and seed in each process: those of process 0 are used.
lstm, head = LSTM(3, 16, dtype="float64", seed=comm.rank), Linear(16, 1, dtype="float64", seed=comm.rank)
model = Model(lstm, head, output="sequence", scale=True)
if trouble == "bad input" and comm.rank == 1:
    y[3] = y[3][:-1]


def watch(model, history):
    if comm.rank == 1 and len(history.loss) == 2:
        if trouble == "exception":
            raise RuntimeError("the disk of process 1 is full")
        if trouble == "kill":
            os.kill(os.getpid(), signal.SIGKILL)


history = fit(
    model, x, y, optimiser=Adam(model, lr=0.01), epochs=6, batch_size=7, validation=0.2, schedule="cosine",
    clip_norm=1.0, seed=10 + comm.rank, callback=watch, comm=comm,
)  # fmt: skip

same = allreduce(dict(model.params), comm)  # the mean of equal numbers: the processes have not come apart
assert all(np.array_equal(same[name], value) for name, value in model.params.items())
weighted = allreduce({"a": np.full(3, comm.rank + 1.0)}, comm, weight=comm.rank + 1)
if comm.rank == 0:
    found = {"loss": history.loss, "validation": history.validation_loss, "norm": history.gradient_norm}
    print(json.dumps(found | {"size": comm.size, "weighted": weighted["a"].tolist(), "best": history.best_epoch}))
