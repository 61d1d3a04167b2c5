"""Runs scripts that could hang, or that change their process, in a process of their own with a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from harness import BackendUnderTest

EXAMPLES = int(os.environ.get("FASTLSTM_TEST_EXAMPLES", "0"))  # of generated tests: those here are longer, too

# `infer()` and `train()` return the bits of calls for which a team is planned, and had: in one direction, in both
# directions, and of a step of a small batch. `has_team()` says whether they are right, and made with all workers.
PRELUDE = """
import os, sys, time
import numpy as np
import fastlstm
from fastlstm import LSTM, use_backend
from fastlstm.backends.cpu.autotune import Trials

Trials.pick = lambda self, kind, ways: 0

def problem(inputs, hidden, steps, batch, bidirectional):
    rng = np.random.default_rng(0)
    lstm = LSTM(inputs, hidden, bidirectional=bidirectional, seed=0)
    return lstm, rng.normal(size=(steps, batch, inputs)).astype(np.float32)

PROBLEMS = [problem(16, 64, 10, 64, False), problem(32, 64, 24, 8, True), problem(128, 512, 1, 4, False)]

def infer():
    with use_backend("cpu"):
        return b"".join(lstm(x)[0].tobytes() for lstm, x in PROBLEMS)

def train():
    found = []
    with use_backend("cpu"):
        for lstm, x in PROBLEMS:
            y, _, tape = lstm.forward(x)
            found += [y, lstm.backward(tape, y).x]
    return b"".join(array.tobytes() for array in found)

def served():
    from fastlstm.backends.cpu.thread_pool import _workers
    from fastlstm.kernels.cpu.worker import SERVED
    return sum(worker.words[SERVED] for worker in _workers)

def has_team():
    "Say whether calls have all their workers."
    from fastlstm.backends.cpu.thread_pool import _workers, available
    from fastlstm.kernels.cpu.worker import ASLEEP, IDLE, STATE
    before = served()
    same = infer() == EXPECTED
    return same and served() == before + 3 and available(1) == 1 and _workers[0].words[STATE] in (IDLE, ASLEEP)

fastlstm.set_num_threads(1)
EXPECTED, TRAINED = infer(), train()
fastlstm.set_num_threads(2)
with use_backend("cpu"):
    PLANS = [lstm.plan(x) for lstm, x in PROBLEMS]
assert all(words in plan for words, plan in zip(["2 threads", "both directions at once", "2 threads"], PLANS)), PLANS

def without_workers():
    "Be as a process is before its first call. Workers that were there sleep forever."
    from fastlstm.backends.cpu.thread_pool import _shelves, _workers
    _workers.clear()
    _shelves.clear()

# What keeps something between calls.
WATCHED = {
    "thread_pool.py", "launch.py", "workspace.py", "calls.py", "prepared_call.py", "layer.py", "small_batch.py",
    "mask_keys.py",
}

def at_event(number, action, call, event="opcode"):
    "Call something, and act before the number-th bytecode or line of the watched files; return how many there were."
    count = 0

    def local(frame, found, argument):
        nonlocal count
        if found == event:
            count += 1
            if count - 1 == number:
                sys.settrace(None)
                action()
        return local

    def begin(frame, found, argument):
        if os.path.basename(frame.f_code.co_filename) not in WATCHED:
            return None
        frame.f_trace_opcodes = event == "opcode"
        return local

    sys.settrace(begin)
    try:
        call()
    finally:
        sys.settrace(None)
    return count
"""


def run_script(script: str, *arguments: object, timeout: float = 120.0, prelude: str = PRELUDE) -> str:
    """Run Python in a process of its own, which has to end in time and well; return what it writes."""
    if missing := BackendUnderTest("cpu").missing:
        pytest.skip(str(missing))
    command = [sys.executable, "-P", "-X", "faulthandler", "-c", prelude + script, *map(str, arguments)]
    own = {"start_new_session": True} if hasattr(os, "killpg") else {}  # so that its children end with it
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **own) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if own else process.kill()
            output, errors = process.communicate()
            pytest.fail(f"hangs: no end within {timeout} s\n{output}\n{errors}")
    assert process.returncode == 0, f"{process.returncode}\n{output}\n{errors}"
    return output
