"""The figures of scaling out: counted from the model, computed from committed measurements."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest

from fastlstm import LSTM

ROOT = Path(__file__).parents[2]
MACHINES = sorted(path.parent.name for path in ROOT.glob("benchmarks/results/*/table-1-thread.json"))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("scaling_out", ROOT / "benchmarks" / "scaling_out.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_bytes_are_those_of_the_models_gradients(script):
    lstm = LSTM(5, 7, seed=0)
    y, _, tape = lstm.forward(np.ones((3, 2, 5), np.float32))
    grads = lstm.backward(tape, y)
    work = script.Work(3, 2, 5, 7, 1.0)
    assert work.gradients == sum(value.nbytes for value in grads.params.values())
    assert work.data == 3 * 2 * 5 * 4


def test_allreduce_counts_latencies_and_bytes(script):
    network = script.Network("", latency=1.0, bandwidth=10.0)
    assert network.allreduce(100, 1) == 0
    assert network.allreduce(100, 2) == 2 * 1 + 2 * 50 / 10
    assert network.allreduce(100, 4) == 2 * 2 + 2 * 75 / 10
    work = script.Work(3, 64, 5, 7, 1.0)
    assert work.efficiency(network, 1) == 1
    shares = [work.efficiency(network, workers) for workers in (1, 2, 16, 1000)]
    assert shares == sorted(shares, reverse=True)
    fast = script.Network("", latency=0.0, bandwidth=1e30)
    assert work.most_workers(fast) == 64, "no more workers than rows"
    assert work.most_workers(network) == 1


@pytest.mark.parametrize("machine", MACHINES)
def test_seconds_are_the_medians_of_committed_results(script, machine):
    rows = json.loads((ROOT / "benchmarks" / "results" / machine / "table-1-thread.json").read_text())["rows"]
    for kind in ("train", "infer"):
        works = script.measured(machine, kind)
        assert works
        for work in works:
            (seconds,) = [
                row["sides"]["fastlstm"]["seconds"]
                for row in rows
                if row["work"] == {"steps": work.steps, "batch": work.batch, "inputs": work.inputs,
                                   "hidden": work.hidden, "dtype": "float32", "kind": kind, "lengths": None}
            ]  # fmt: skip
            assert work.seconds == statistics.median(seconds)
    lines = script.training_table(machine).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + len(script.measured(machine, "train"))
    assert script.inference_table(machine).count("\n") == 1 + len(script.measured(machine, "infer"))
