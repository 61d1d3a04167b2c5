"""The threads of one kernel call: their cores, their errors, and their number."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from harness import BackendUnderTest

import fastlstm
from fastlstm import LSTM, use_backend
from fastlstm.backends.cpu import thread_pool
from fastlstm.backends.cpu.launch import AtOnce
from fastlstm.backends.cpu.thread_pool import NO_TEAM, available, new_records, run_at_once, run_team
from fastlstm.kernels.cpu.atomics import fetch_add, load_atomic
from fastlstm.kernels.cpu.jit import kernel
from fastlstm.kernels.cpu.thread_team import (
    MAILBOX,
    MEMBER,
    RECORD_ROWS,
    THREADS,
    WANTED,
    barrier,
    dismiss,
    record,
    summon,
)
from fastlstm.kernels.cpu.vector import address, offset
from fastlstm.kernels.cpu.worker import SERVED, THREAD_ID, size_of_call, this_call

needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="threads are on Linux's two cores"
)


@pytest.fixture(autouse=True)
def two_threads():
    """Allow two threads, whatever the number of cores; and as before in the end."""
    fastlstm.set_num_threads(2)
    yield
    fastlstm.set_num_threads(None)


@pytest.fixture
def model():
    """A model and an input that two threads share."""
    if missing := BackendUnderTest("cpu").missing:
        pytest.skip(str(missing))
    lstm = LSTM(16, 64, seed=0)
    x = np.random.default_rng(0).normal(size=(40, 64, 16)).astype(np.float32)
    with use_backend("cpu"):
        assert "2 threads" in lstm.plan(x)
    return lstm, x


def train(lstm, x):
    """Return the bits of a training call's results."""
    with use_backend("cpu"):
        y, _, tape = lstm.forward(x)
        return np.concatenate([y.ravel(), lstm.backward(tape, y).x.ravel()]).tobytes()


@kernel
def note_thread(found, team, thread):
    """Note which threads are there."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    found[thread] += 1
    barrier(team, thread)
    if thread == 0:
        dismiss(team)


def team_of(threads):
    """Run a kernel on a team; return how many threads it had."""
    found = np.zeros(threads, np.int64)
    _, had = run_team(note_thread, (found,), available(threads - 1))
    assert found.tolist() == [1] * had + [0] * (threads - had)
    return had


def served():
    """How many calls of kernels workers have had, all in all."""
    return sum(worker.words[SERVED] for worker in thread_pool._workers)


def test_a_call_with_a_plan_for_two_threads_has_two(model):
    lstm, x = model
    train(lstm, x)
    before = served()
    train(lstm, x)
    assert served() > before


@needs_cores
def test_a_worker_is_kept_off_the_core_from_which_it_is_called():
    allowed = os.sched_getaffinity(0)
    for core in allowed:
        time.sleep(0.05)  # the worker falls asleep
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, allowed)  # this thread stays where it is for now, and may run anywhere
        assert team_of(2) == 2
        there = os.sched_getaffinity(thread_pool._workers[0].words[THREAD_ID])
        assert os.sched_getaffinity(0) == allowed, "the caller's own cores are its own affair"
        assert len(there) == len(allowed) - 1
        assert there < allowed


@needs_cores
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_a_worker_keeps_to_the_cores_of_its_caller(pause, monkeypatch):
    """Also one that is still awake from a call by a thread with other cores."""
    monkeypatch.setattr(thread_pool, "_CALLS_BETWEEN_PLACINGS", 0)
    allowed = os.sched_getaffinity(0)
    team_of(2)
    try:
        for cores in (allowed, {min(allowed)}, {max(allowed)}):
            os.sched_setaffinity(0, cores)
            thread_pool._workers[0].calls = 0
            team_of(2)
            assert os.sched_getaffinity(thread_pool._workers[0].words[THREAD_ID]) <= cores
            time.sleep(pause)
    finally:
        os.sched_setaffinity(0, allowed)


@kernel
def square(number, found, busy, patience, team, thread):
    """Square a number, once `busy` calls at once are running or patience has ended; leave the call if thread is -1."""
    if thread < 0:
        call, arguments = this_call()
        record(team, call, arguments, size_of_call())
        return
    found[number] = number * number
    fetch_add(address(busy), 1)
    spins = 0
    while load_atomic(address(busy)) < busy[1] and spins < patience:
        spins += 1
    found[-1] += spins == patience


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("calls", [1, 2, 7])
def test_recorded_calls_are_all_run_though_there_are_not_so_many_threads(threads, calls):
    fastlstm.set_num_threads(threads)
    found, busy = np.zeros(calls + 1, np.int64), np.array([0, min(threads, calls)])
    records = new_records(calls)
    for number in range(calls):
        square(number, found, busy, 1_000_000_000, records[number], -1)
        assert not found.any(), "only recorded"
    run_at_once(records)
    assert found[:-1].tolist() == [number**2 for number in range(calls)]
    assert found[-1] == 0, "so many at once as there are threads"


def test_the_arguments_of_a_record_have_room():
    assert RECORD_ROWS * 64 >= 17 * 8 + 3000


def test_calls_together_give_the_bits_of_calls_one_after_the_other():
    if missing := BackendUnderTest("cpu").missing:
        pytest.skip(str(missing))
    lstm = LSTM(32, 64, bidirectional=True, seed=0)
    x = np.random.default_rng(0).normal(size=(200, 8, 32)).astype(np.float32)
    with use_backend("cpu"):
        assert "both directions at once" in lstm.plan(x)
        before = served()
        found = train(lstm, x)
        assert served() > before
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(AtOnce, "run", lambda self: None)
            assert train(lstm, x) != found, "the directions are run together"
        fastlstm.set_num_threads(1)
        assert train(lstm, x) == found


@kernel
def wait_for_a_sign(sign, patience, team, thread):
    """Stay inside on all threads until sign[0] is set; count them in sign[1]."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    fetch_add(offset(address(sign), 1), 1)
    spins = 0
    while load_atomic(address(sign)) == 0 and spins < patience:
        spins += 1
    if thread == 0:
        dismiss(team)


@pytest.mark.parametrize("limit", [2, 3])
def test_calls_at_once_never_have_more_workers_than_are_allowed(limit):
    fastlstm.set_num_threads(5)
    assert team_of(5) == 5
    fastlstm.set_num_threads(limit)
    sign, had = np.zeros(2, np.int64), []
    wait_for_a_sign(np.ones(2, np.int64), 0, NO_TEAM, 0)  # compiles

    def call():
        had.append(run_team(wait_for_a_sign, (sign, 10_000_000_000), available(1))[1])

    threads = [threading.Thread(target=call) for _ in range(limit - 1)]
    try:
        for number, thread in enumerate(threads, 1):
            thread.start()
            while sign[1] < 2 * number:
                time.sleep(0.001)
        assert available(1) == 0, "each of the calls has one"
        found = np.zeros(2, np.int64)
        assert run_team(note_thread, (found,), 1)[1] == 1
    finally:
        sign[0] = 1
        for thread in threads:
            thread.join(timeout=60)
    assert had == [2] * (limit - 1)
    assert team_of(limit) == limit


def test_a_worker_is_called_awake_and_asleep(model):
    lstm, x = model
    expected = train(lstm, x)
    for pause in (0.0, 1e-4, 1e-3, 3e-3, 0.02):
        for _ in range(5):
            assert team_of(2) == 2
            assert train(lstm, x) == expected
            time.sleep(pause)


@kernel
def each_after_the_other(found, team, thread):
    """Write, thread by thread with some time between, how many have written before; the first begins."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    for turn in range(found.size):
        barrier(team, thread)
        if turn == thread:
            for n in range(100_000_000 * (thread > 0)):
                found[thread] = found[thread - 1] + (n & 1)
    if thread == 0:
        dismiss(team)


def test_a_kernel_ends_when_all_threads_have_ended_theirs():
    fastlstm.set_num_threads(3)
    for _ in range(3):
        found = np.zeros(3, np.int64)
        assert run_team(each_after_the_other, (found,), available(2))[1] == 3
        assert found.tolist() == [0, 1, 2]


def test_an_idle_worker_sleeps(model):
    lstm, x = model
    train(lstm, x)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.1


def test_a_kernel_that_cannot_be_called_leaves_the_workers_for_the_next(model):
    lstm, x = model
    expected = train(lstm, x)

    def broken(*arguments):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_team(broken, (), available(1))
    assert team_of(2) == 2
    assert train(lstm, x) == expected
    time.sleep(0.02)
    assert train(lstm, x) == expected


def test_more_threads_than_cores_run_one_after_the_other(model):
    lstm, x = model
    expected = train(lstm, x)
    fastlstm.set_num_threads(4)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    try:
        if allowed:
            os.sched_setaffinity(0, {min(allowed)})
        for _ in range(3):
            assert train(lstm, x) == expected
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)


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


def test_a_call_leaves_the_team_as_it_found_it(model):
    train(*model)
    train(*model)
    teams = [team for shelf in thread_pool._shelves.values() for team in shelf]
    assert teams
    for team in teams:
        left = team.copy()
        assert (left[2:, MAILBOX] != 0).all() and left[0, WANTED] > 0 and (left[1:, THREADS] <= len(left) - 1).all()
        left[:, [MAILBOX, MEMBER, THREADS]] = left[0, WANTED] = 0
        assert not left.any()
    assert NO_TEAM.tolist() == [[0] * 8, [0] * THREADS + [1] + [0] * (7 - THREADS)]
