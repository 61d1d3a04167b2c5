"""Memory kept by the CPU backend between calls is bounded in bytes, for calls of any sizes and lengths."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm import LSTM
from fastlstm.backends import ragged
from fastlstm.backends.cpu import rows
from fastlstm.backends.cpu.workspace import POOL, SCRATCH, Pool, Scratch, Workspace

MIB = 1 << 20
EXAMPLES = int(os.environ.get("FASTLSTM_TEST_EXAMPLES", "0"))
# Of each kind; more than are prepared at a time, and what is kept of one call grows with its number of steps.
CALLS, STEPS = max(100, EXAMPLES), 20_000


def ragged_inference(lstm, x, turn):
    lstm(x, lengths=np.array([STEPS - turn, 3, 1]))


def ragged_training(lstm, x, turn):
    y, _, tape = lstm.forward(x, lengths=np.array([STEPS - turn, 3, 1]))
    lstm.backward(tape, y)


def equal_inference(lstm, x, turn):
    lstm(x[turn:])


def equal_training(lstm, x, turn):
    y, _, tape = lstm.forward(x[turn:, :2])
    lstm.backward(tape, y)


def other_batches(lstm, x, turn):
    lstm(x.reshape(1, -1, 1)[:, : STEPS + turn])


KINDS = {
    "ragged inference": ragged_inference,
    "ragged training": ragged_training,
    "equal inference": equal_inference,
    "equal training": equal_training,
    "other batches": other_batches,
}


def kept():
    gc.collect()
    SCRATCH._idle.clear()
    POOL.clear()
    return tracemalloc.get_traced_memory()[0]


def growth(kind, bidirectional):
    """Bytes that calls, each of another size, leave behind: NumPy's arrays and all objects of Python.

    Without the pool and the scratch, whose bounds have tests of their own.
    """
    call = KINDS[kind]
    lstm = LSTM(1, 1, bidirectional=bidirectional, seed=0)
    x = np.random.default_rng(0).normal(size=(STEPS, 3, 1)).astype(np.float32)
    with fastlstm.use_backend("cpu"):
        call(lstm, x, CALLS)
        tracemalloc.start()
        before = kept()
        for turn in range(CALLS):
            call(lstm, x, turn)
        return kept() - before


@pytest.mark.parametrize("bidirectional", [False, True], ids=["", "bidirectional"])
@pytest.mark.parametrize("kind", KINDS)
def test_calls_of_many_sizes_keep_little_memory(kind, bidirectional):
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    path = os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, kind, str(int(bidirectional))], env=os.environ | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # A list of row numbers of one call has 160 kB; of all, 16 MB.
    assert int(done.stdout) < 3 * MIB


@pytest.mark.parametrize("kind", ["equal", "places", "index", "call"])
def test_memory_kept_for_equal_lengths_is_bounded(kind):
    make, kept = {
        "equal": (ragged._equal, ragged._kept_equal),
        "places": (lambda steps, batch: ragged._equal_places(steps, batch, True), ragged._kept_equal_places),
        "index": (lambda steps, batch: rows.Rows(None, steps, batch).index(True), rows._kept_index),
        "call": (_call, rows._kept_index),
    }[kind]
    kept.cache_clear()
    small, large = ragged.KEPT_BYTES // 8 // 4, ragged.KEPT_BYTES // 8
    for steps, batch in ((large, 1), (1, large), (large // 50, 50)):
        make(steps, batch)
    assert kept.cache_info().currsize == 0, "too large to be kept"
    make(small, 1)
    make(small, 1)
    assert kept.cache_info().currsize == 1 and kept.cache_info().hits == 1, "small ones are found again"
    assert kept.cache_parameters()["maxsize"] * ragged.KEPT_BYTES <= 2 * MIB


def _call(steps, batch):
    lstm = LSTM(1, 1, seed=0)
    with fastlstm.use_backend("cpu"):
        lstm(np.zeros((steps, batch, 1), np.float32))


@pytest.mark.parametrize("size", [0, 1, 1000, Pool.LEAST // 3, Pool.LEAST - 64, Pool.LEAST])
def test_scratch_of_many_calls_at_once_is_bounded_in_bytes(size):
    scratch, workspace = Scratch(), Workspace(np.dtype(np.uint8), (size,))
    lent = [scratch.borrow(workspace) for _ in range(3000 if size < 1001 else 10)]
    for memory in lent:
        scratch.give_back(workspace, memory)
    kept = scratch._idle.get(workspace, [])
    assert sum(memory.nbytes for memory in kept) <= Pool.LEAST
    assert len(kept) >= (1 if size < Pool.LEAST else 0)


if __name__ == "__main__":
    sys.stdout.write(str(growth(sys.argv[1], sys.argv[2] == "1")))
