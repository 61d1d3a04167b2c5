"""Training in several processes: communicators of threads, and real ones under mpiexec, of which one process dies."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from mpi_jobs import in_threads, mpiexec

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError
from fastlstm.training import Adam, Linear, Model, allreduce, fit
from fastlstm.training.reduction import broadcast

PROGRAM = Path(__file__).parent / "mpi_program.py"
# Gradients of a batch as a sum of two or three parts, in float64, through 60 steps of Adam.
SAME = {"rtol": 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_allreduce_is_the_weighted_mean(dtype, size):
    rng = np.random.default_rng(size)
    grads = [{"a": rng.normal(size=(3, 2)).astype(dtype), "b": rng.normal(size=4).astype(dtype)} for _ in range(size)]
    weights = [3.0, 0.0, 5.0][:size]
    if size > 1:
        grads[1]["a"][0, 0] = np.nan  # a weight of zero: it has no say
    found = in_threads(size, lambda comm: allreduce(grads[comm.rank], comm, weights[comm.rank]))
    for name in "ab":
        counted = [(g[name], w) for g, w in zip(grads, weights, strict=True) if w]
        expected = sum(g * w for g, w in counted) / sum(weights)
        for result in found:
            assert result[name].dtype == dtype and result[name].shape == expected.shape
            # Two products, a sum and a division.
            np.testing.assert_allclose(result[name], expected, rtol=4 * np.finfo(dtype).eps, atol=0)
            np.testing.assert_array_equal(result[name], found[0][name])


def test_gradients_meet_by_name_in_any_order(dtype):
    def run(comm):
        grads = {"b": np.full(3, 100, dtype), "a": np.ones(2, dtype), "c": np.full((1, 2), 10, dtype)}
        params = {name: value + comm.rank for name, value in grads.items()}
        names = list(grads) if comm.rank == 0 else ["c", "a", "b"]
        found = allreduce({name: grads[name] for name in names}, comm)
        broadcast({name: params[name] for name in names}, comm)
        assert list(found) == names
        return found, params

    for found in (values for result in in_threads(2, run) for values in result):
        for name, value in {"a": 1, "b": 100, "c": 10}.items():
            np.testing.assert_array_equal(found[name], np.full_like(found[name], value))


def test_nothing_counts_anywhere():
    (found,) = in_threads(1, lambda comm: allreduce({"a": np.full(2, np.nan)}, comm, 0.0))
    np.testing.assert_array_equal(found["a"], [0, 0])


def build(output, dropout=0.0, seed=1):
    lstm = LSTM(3, 6, 2, dropout=dropout, dtype="float64", seed=seed)
    return Model(lstm, Linear(6, 1, dtype="float64", seed=seed), output=output, scale=True)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("output", ["last", "sequence"])
def test_several_processes_train_as_one_does(output, size):
    rng = np.random.default_rng(71)
    x, lengths = rng.normal(size=(9, 20, 3)), rng.integers(1, 10, 20)
    y = np.cumsum(x[..., :1], axis=0) if output == "sequence" else x.mean(axis=(0, 2))[:, None]
    mask = rng.uniform(size=y.shape[:-1]) < 0.6
    mask[..., :3] = False  # with one or two sequences each, some parts of batches have nothing that counts
    y[~mask] = np.nan

    def run(comm, seed=1):
        model = build(output, seed=seed)
        history = fit(model, x, y, lengths=lengths, mask=mask, optimiser=Adam(model, lr=0.01), epochs=5, batch_size=4,
                      validation=0.2, clip_norm=0.5, seed=seed, comm=comm)  # fmt: skip
        return model, history

    model, history = run(None)
    found = in_threads(size, lambda comm: run(comm, seed=1 + comm.rank))  # process 0 decides
    for other, record in found:
        for name in ("loss", "validation_loss", "gradient_norm"):
            np.testing.assert_allclose(getattr(record, name), getattr(history, name), **SAME)
        assert record.best_epoch == history.best_epoch
        for name, value in model.params.items():
            np.testing.assert_allclose(other.params[name], value, **SAME)
            np.testing.assert_array_equal(other.params[name], found[0][0].params[name])


def test_dropout_masks_differ_between_processes_and_are_one_again_after_it():
    x = np.random.default_rng(0).normal(size=(5, 8, 3))
    keys = {}

    def run(comm):
        model = build("last", dropout=0.5, seed=comm.rank)

        def watch(model, history):
            keys[comm.rank] = model.lstms["lstm"]._dropout_key

        fit(model, x, np.ones((8, 1)), epochs=2, batch_size=4, callback=watch, comm=comm)
        return model.lstms["lstm"]._dropout_key

    start = build("last", dropout=0.5, seed=0).lstms["lstm"]._dropout_key
    assert set(in_threads(2, run)) == {start + 4}  # two epochs of two batches
    assert keys[0] == start + 4 and keys[0] != keys[1]


def test_a_refusal_in_one_process_is_one_in_all():
    x, y = np.zeros((4, 6, 3)), np.zeros((6, 1))

    def run(comm):
        fit(build("last"), x, y.astype("f4") if comm.rank == 1 else y, epochs=1, comm=comm)

    found = in_threads(3, run)
    assert isinstance(found[1], DTypeError)
    for other in (found[0], found[2]):
        assert isinstance(other, ArgumentError) and "process 1" in str(other) and "float32" in str(other)


def test_all_processes_refuse_a_frozen_model():
    found = in_threads(2, lambda comm: fit(build("last").freeze(), np.zeros((4, 6, 3)), np.zeros((6, 1)), comm=comm))
    assert [type(error) for error in found] == [ArrayTypeError] * 2, found


def test_one_message_a_step():
    x = np.zeros((4, 12, 3))
    jobs = []

    def run(comm):
        jobs.append(comm.job)
        fit(build("last"), x, np.zeros((12, 1)), epochs=3, batch_size=4, comm=comm)

    in_threads(2, run)
    assert jobs[0].messages == 9  # one for each of 3 x 3 batches, none for their losses


# mpiexec


@pytest.mark.skipif(sys.platform == "win32", reason="the wheels of MPI have no mpiexec there")
def test_two_processes_of_mpi_have_the_losses_of_one():
    results = []
    for size in (1, 2):
        status, output, errors, _ = mpiexec(PROGRAM, size)
        assert status == 0, errors
        results.append(json.loads(output))
    one, two = results
    assert (one.pop("size"), two.pop("size")) == (1, 2)
    assert (one.pop("weighted"), two.pop("weighted")) == ([1, 1, 1], pytest.approx([5 / 3] * 3, rel=1e-15))
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, **SAME, err_msg=name)
    assert one["loss"][-1] < one["loss"][0]


@pytest.mark.skipif(sys.platform == "win32", reason="the wheels of MPI have no mpiexec there")
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("exception", "the disk of process 1 is full"),
        ("kill", r"(?i)killed|signal 9|terminat"),
        ("bad input", r"process 1 of the communicator cannot train: ShapeError"),
    ],
    ids=["exception", "kill", "bad input"],
)
def test_a_process_that_fails_ends_the_job_with_a_message(trouble, message):
    status, output, errors, _ = mpiexec(PROGRAM, 2, trouble, seconds=90)
    assert status != 0
    assert re.search(message, output + errors), (status, output, errors)
    assert '"loss"' not in output
    if trouble == "exception":
        assert "fastlstm: process 1 fails, which ends the job" in errors
