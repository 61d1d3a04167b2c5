"""Training of which process 1 has one other argument each time: `mpiexec -n 2 python mpi_unequal_program.py`."""

import json
import sys

import numpy as np
from mpi4py import MPI

from fastlstm import LSTM
from fastlstm.training import Adam, Linear, Model, fit

comm = MPI.COMM_WORLD
rng = np.random.default_rng(0)
x = rng.normal(size=(5, 64, 3))
shard = np.random.default_rng(comm.rank).normal(size=x.shape)  # of each process its own


def leave(prediction, target, mask=None):
    sys.exit("process 1 leaves")


def run(case=""):
    """Train, in process 1 with the other argument; return the error and the sum of the parameters."""
    other = comm.rank == 1
    size = 9 if other and case == "hidden_size" else 8
    model = Model(LSTM(3, size, dtype="f8", seed=0), Linear(size, 1, dtype="f8", seed=1))
    options = {"epochs": 2, "batch_size": 16, "seed": 0, "optimiser": Adam(model, lr=0.1 if other else 0.01)}
    changed = {"clip_norm": 0.001, "schedule": "linear", "epochs": 5, "batch_size": 64, "validation": 0.3}
    if case != "optimiser's lr":
        options["optimiser"].lr = 0.01
    if other and case in changed:
        options[case] = changed[case]
    if other and case == "exit":
        options["loss"] = leave
    given = shard if case == "x" else x[:, :33] if other and case == "number of sequences" else x
    try:
        fit(model, given, given[-1, :, :1].copy(), comm=comm, **options)
    except Exception as error:
        return [f"{type(error).__name__}: {error}", None]
    return ["", sum(float(value.sum()) for value in model.params.values())]


found = {case: comm.gather(run(case), 0) for case in sys.argv[1:]}
found["same"] = comm.gather(run(), 0)
if comm.rank == 0:
    print(json.dumps(found))
