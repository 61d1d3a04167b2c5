"""The threads of one kernel call: where they run, what happens to their errors, and how many they are."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm.backends.threads import run_team

needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="threads are on Linux's two cores"
)


@pytest.fixture(autouse=True)
def two_threads():
    """Allow two threads, whatever the number of cores; and as before in the end."""
    fastlstm.set_num_threads(2)
    yield
    fastlstm.set_num_threads(None)


def run(work, threads=2):
    """Run work(thread) in a team, as a kernel that takes nothing else would be run."""
    return run_team(lambda size: (), lambda counters, thread, size: work(thread), threads)


@needs_cores
def test_a_worker_is_kept_off_the_core_from_which_it_is_handed_its_job():
    allowed, found = os.sched_getaffinity(0), {}

    def work(thread):
        found[thread] = os.sched_getaffinity(0)

    for core in allowed:
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, allowed)  # this thread stays where it is for now, and may run anywhere
        assert run(work) == 2
        assert found[0] == allowed, "the caller's own cores are its own affair"
        assert len(found[1]) == len(allowed) - 1
        assert found[1] < allowed


@needs_cores
def test_a_worker_keeps_to_the_cores_of_its_caller():
    allowed, found = os.sched_getaffinity(0), {}

    def work(thread):
        found[thread] = os.sched_getaffinity(0)

    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert run(work) == 2
        assert found == {0: {min(allowed)}, 1: {min(allowed)}}
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_in_any_thread_is_raised_when_all_are_done(failing):
    done = []

    def work(thread):
        if thread == failing:
            raise ZeroDivisionError
        time.sleep(0.02)
        done.append(thread)

    with pytest.raises(ZeroDivisionError):
        run(work)
    assert done == [1 - failing]
    assert run(lambda thread: None) == 2, "the worker is idle again"


def test_calls_at_once_never_have_more_workers_than_are_allowed():
    sizes, inside, most = [], [], []

    def work(thread):
        inside.append(thread)
        most.append(len(inside))
        time.sleep(0.005)
        inside.remove(thread)

    threads = [threading.Thread(target=lambda: sizes.append(run(work))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(sizes) == 4
    assert max(most) <= 4 + 1, "four callers, and one worker between them"


# In a process of its own: libraries that other tests load have threads that do not bear a fork.
FORK = """
import os

import numpy as np

import fastlstm
from fastlstm import LSTM, use_backend

fastlstm.set_num_threads(2)
x = np.random.default_rng(0).normal(size=(40, 64, 16)).astype(np.float32)
lstm = LSTM(16, 64, seed=0)

def train():
    with use_backend("cpu"):
        assert "2 threads" in lstm.plan(x)
        y, _, tape = lstm.forward(x)
        return np.concatenate([y.ravel(), lstm.backward(tape, y).x.ravel()]).tobytes()

before = train()
if child := os.fork():
    assert os.waitpid(child, 0)[1] == 0
else:
    os._exit(0 if train() == before else 3)
assert train() == before
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own():
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    done = subprocess.run([sys.executable, "-P", "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
