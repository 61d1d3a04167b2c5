"""Processes that are given different arguments: one ArgumentError in all of them, before any work."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi_jobs import in_threads, mpiexec

from fastlstm import LSTM, ArgumentError
from fastlstm.training import SGD, Adam, Linear, Model, fit, huber_loss, mean_squared_error, samples
from fastlstm.training.scaler import Scaler

PROGRAM = Path(__file__).with_name("mpi_unequal_program.py")
COUNT = 12


def build(size=4, output="last", scale=False, heads=("a", "b"), **options):
    lstm = LSTM(3, size, dtype="float64", seed=0, **options)
    linear = {name: Linear(size, 1, dtype="float64", seed=1) for name in heads}
    return Model(lstm, linear, output=output, scale=scale)


def stepped(model):
    """Return an optimiser that has made a step."""
    optimiser = Adam(model)
    before = {name: value.copy() for name, value in model.params.items()}
    optimiser.step({name: np.ones_like(value) for name, value in model.params.items()})
    for name, value in before.items():
        model.params[name][...] = value
    return optimiser


def with_state_of_another_gradient(model):
    optimiser = stepped(model)
    state = optimiser.state_dict()
    state["mean"]["lstm.bias_l0"] += 1
    optimiser.load_state_dict(state)
    return optimiser


def with_scaler(mean):
    model = build(scale=True)
    model.scaler = Scaler({"x.mean": np.full(3, mean), "x.deviation": np.ones(3)})
    return model


def with_tied_heads():
    model = build()
    model.heads["b"].params["weight"] = model.heads["a"].params["weight"]
    return model


RNG = np.random.default_rng(3)
X = RNG.normal(size=(5, COUNT, 3))
Y = {"a": X[-1, :, :1].copy(), "b": X[0, :, :1].copy()}
MASK = np.arange(COUNT) > 2
CHANGED = X.copy()
CHANGED[2, 7, 1] += 1e-9
# What processes 0 and 1 are given, and what the message names.
CASES = {
    "epochs": ({}, {"epochs": 3}, "epochs (2 and 3)"),
    "batch size": ({}, {"batch_size": 5}, "batch_size (4 and 5)"),
    "order": ({}, {"shuffle": False}, "shuffle (True and False)"),
    "patience": ({"validation": 0.3}, {"validation": 0.3, "patience": 1}, "patience (None and 1)"),
    "schedule": ({}, {"schedule": "linear"}, "schedule ('constant' and 'linear')"),
    "schedule is a function": ({}, {"schedule": lambda epoch: 1.0}, "schedule ('constant' and a function)"),
    "clipping": ({}, {"clip_norm": 1.0}, "clip_norm (None and 1.0)"),
    "recomputing": ({}, {"recompute": True}, "recompute (False and True)"),
    "loss": ({}, {"loss": huber_loss}, "loss of a (mean_squared_error and huber_loss)"),
    "loss of a head": (
        {}, {"loss": {"a": mean_squared_error, "b": huber_loss}}, "loss of b (mean_squared_error and huber_loss)"),
    "option of the loss": (
        {"loss": functools.partial(huber_loss, delta=1.0)}, {"loss": functools.partial(huber_loss, delta=2.0)},
        "loss of a (huber_loss(delta=1.0) and huber_loss(delta=2.0))"),
    "kind of optimiser": ({}, {"optimiser": lambda model: SGD(model, lr=1e-3)}, "optimiser (Adam and SGD)"),
    "rate": ({}, {"optimiser": lambda model: Adam(model, lr=0.1)}, "optimiser's lr (0.001 and 0.1)"),
    "betas": ({}, {"optimiser": lambda model: Adam(model, betas=(0.8, 0.9))}, "optimiser's betas ((0.9, 0.999) and"),
    "steps before": ({}, {"optimiser": stepped}, "optimiser's steps (0 and 1)"),
    "state": ({"optimiser": stepped}, {"optimiser": with_state_of_another_gradient}, "optimiser's mean (float64 of"),
    "hidden size": ({}, {"model": lambda: build(5)}, "lstm (LSTM(3, 4, dtype=float64) and LSTM(3, 5, dtype=float64))"),
    "dropout": ({}, {"model": lambda: build(num_layers=2, dropout=0.5)}, "dropout=0.5"),
    "output": ({}, {"model": lambda: build(output="mean")}, "output ('last' and 'mean')"),
    "scaling": ({}, {"model": lambda: build(scale=True)}, "scale (False and True)"),
    "order of the heads": ({}, {"model": lambda: build(heads=("b", "a"))}, "heads (a, b and b, a)"),
    "tied parameters": ({}, {"model": with_tied_heads}, "shape (1, 4), the same as a.weight)"),
    "scaler": ({"model": lambda: with_scaler(0.0)}, {"model": lambda: with_scaler(1.0)}, "scaler (float64 of CRC-32"),
    "no scaler yet": ({"model": lambda: with_scaler(0.0)}, {"model": lambda: build(scale=True)}, "scaler (float64 of"),
    "validation": ({}, {"validation": 0.3}, "validation (None and 0.3)"),
    "share for validation": ({"validation": 0.25}, {"validation": 0.5}, "validation (0.25 and 0.5)"),
    "own data for validation": ({"validation": 0.25}, {"validation": (X, Y)}, "validation (0.25 and data)"),
    "data for validation": ({"validation": (X, Y)}, {"validation": (CHANGED, Y)}, "validation's x (float64 of CRC-32"),
    "values": ({}, {"x": CHANGED}, "x (float64 of CRC-32"),
    "number of sequences": (
        {}, {"x": X[:, 1:], "y": {name: y[1:] for name, y in Y.items()}}, "number of sequences (12 and 11)"),
    "targets": ({}, {"y": Y | {"b": Y["b"] + 1}}, "y of b (float64 of CRC-32"),
    "classes": (
        {}, {"y": Y | {"b": np.zeros(COUNT, int)}, "loss": lambda p, t, mask=None: (0.0, p)}, "y of b (float64 of"),
    "mask": ({}, {"mask": MASK}, "mask (None and bool of CRC-32"),
    "lengths": ({}, {"lengths": np.arange(COUNT) % 6}, "lengths (None and int64 of CRC-32"),
    "arrays of the loss": (
        {"loss_arrays": {"weight": np.ones(COUNT)}}, {"loss_arrays": {"weight": np.zeros(COUNT)}},
        "loss_arrays weight (float64 of CRC-32"),
}  # fmt: skip


def weighted(prediction, target, mask=None, weight=None):
    return mean_squared_error(prediction, target, mask)


def train(comm, changes):
    options = {"model": build, "x": X, "y": Y, "optimiser": Adam, "epochs": 2, "batch_size": 4, "seed": 0} | changes
    if "loss_arrays" in options:
        options["loss"] = weighted
    model = options.pop("model")()
    optimiser = options.pop("optimiser")(model)
    before = {name: value.copy() for name, value in model.params.items()}
    try:
        fit(model, options.pop("x"), options.pop("y"), optimiser=optimiser, comm=comm, **options)
    except Exception as error:
        for name, value in model.params.items():
            np.testing.assert_array_equal(value, before[name])
        return error
    return model


@pytest.mark.parametrize("case", CASES)
def test_all_processes_refuse_arguments_that_differ(case):
    one, other, message = CASES[case]
    found = in_threads(3, lambda comm: train(comm, other if comm.rank == 1 else one))
    assert [type(error) for error in found] == [ArgumentError] * 3, found
    assert len({str(error) for error in found}) == 1
    assert message in str(found[0]) and "processes 0 and 1" in str(found[0])


def test_what_has_no_influence_may_differ():
    lengths, mask = np.arange(COUNT) % 6, MASK.astype(float)

    def run(comm):
        fill = np.nan if comm.rank else 0.0
        x = np.where((np.arange(5)[:, None] < lengths)[..., None], X, fill)
        y = {name: np.where(MASK[:, None], value, fill) for name, value in Y.items()}
        x = np.asfortranarray(x).astype(">f8") if comm.rank else x
        options = {} if comm.rank else {"callback": lambda model, history: None}
        schedule = (lambda epoch: 1.0) if comm.rank else (lambda epoch: 0.5)  # the rates are those of process 0
        return train(comm, options | {"x": x, "y": y, "mask": mask, "lengths": lengths, "seed": comm.rank,
                                      "schedule": schedule})  # fmt: skip

    one, other = in_threads(2, run)
    assert isinstance(one, Model) and isinstance(other, Model), (one, other)
    for name, value in one.params.items():
        np.testing.assert_array_equal(other.params[name], value)


def test_of_large_data_evenly_spaced_pieces_are_compared(monkeypatch):
    monkeypatch.setattr(samples, "PIECE", 1)
    monkeypatch.setattr(samples, "LARGE", X.nbytes // 4)
    data = samples.Samples(build(), X, Y)
    seen = np.concatenate([array for name, array in data.contents() if name == "x"]).reshape(-1, 5, 3)
    np.testing.assert_array_equal(seen, X.swapaxes(0, 1)[::4])


@pytest.mark.skipif(sys.platform == "win32", reason="the wheels of MPI have no mpiexec there")
def test_processes_of_mpi_neither_hang_nor_come_apart():
    cases = ["clip_norm", "schedule", "optimiser's lr", "x", "number of sequences", "epochs", "batch_size"]
    cases += ["validation", "hidden_size"]
    status, output, errors, _ = mpiexec(PROGRAM, 2, *cases, seconds=90)
    assert status == 0, errors
    found = json.loads(output)
    same = found.pop("same")
    assert same[0] == same[1] and same[0][0] == ""
    for case in cases:
        (one, _), (other, _) = found[case]
        name = "lstm (LSTM" if case == "hidden_size" else f"{case} ("
        assert one == other and one.startswith("ArgumentError: processes 0 and 1") and name in one, found[case]


@pytest.mark.skipif(sys.platform == "win32", reason="the wheels of MPI have no mpiexec there")
def test_a_process_that_exits_during_the_checks_ends_the_job():
    status, output, errors, _ = mpiexec(PROGRAM, 2, "exit", seconds=60)
    assert status != 0 and output == ""
    assert "process 1 leaves" in errors and "fastlstm: process 1 fails, which ends the job" in errors
