"""The threads of one kernel call: where they run, what happens to their errors, and how many they are."""

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
from fastlstm.backends import calls, workers
from fastlstm.backends.packing import Packing
from fastlstm.backends.workers import release, reserve, run_each, run_team
from fastlstm.kernels.cpu.backward import layer_backward
from fastlstm.kernels.cpu.forward import layer_forward
from fastlstm.kernels.cpu.jit import compile_for, kernel
from fastlstm.kernels.cpu.simd import address, offset
from fastlstm.kernels.cpu.team import (
    MAILBOX,
    _fetch_add,
    _load_atomic,
    barrier,
    dismiss,
    share_rows,
    summon,
    take,
    this_call,
)

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


@pytest.mark.parametrize("recompute", [False, True])
def test_no_worker_waits_while_a_kernel_is_compiled(model, monkeypatch, recompute):
    (lstm, x), events, kernels = model, [], (layer_forward, layer_backward)

    def note_compile(kernel, arguments):
        events.append(kernel.__name__)
        compile_for(kernel, arguments)

    def note_reserve(count):
        events.append("reserved")
        return reserve(count)

    def train():
        with use_backend("cpu"):
            y, _, tape = lstm.forward(x, recompute=recompute)
            lstm.backward(tape, y)

    monkeypatch.setattr(calls, "_compiled", set())
    monkeypatch.setattr(calls, "reserve", note_reserve)
    monkeypatch.setattr(calls, "compile_for", note_compile)
    monkeypatch.setattr(calls.Trials, "pick", lambda self, kind, ways: 0)
    fastlstm.set_num_threads(1)
    train()
    signatures = [list(kernel.signatures) for kernel in kernels]
    events.clear()
    fastlstm.set_num_threads(2)
    train()
    assert events == ["layer_forward", "reserved", "layer_backward", "reserved"]
    assert [kernel.signatures for kernel in kernels] == signatures, "what is compiled is what is called"
    train()
    assert events[4:] == ["reserved", "reserved"]


@needs_cores
def test_a_worker_is_kept_off_the_core_from_which_it_is_called():
    allowed = os.sched_getaffinity(0)
    for core in allowed:
        time.sleep(0.05)  # the worker falls asleep
        os.sched_setaffinity(0, {core})
        os.sched_setaffinity(0, allowed)  # this thread stays where it is for now, and may run anywhere
        here, there = run_each(lambda thread: os.sched_getaffinity(0), 2)
        assert here == allowed, "the caller's own cores are its own affair"
        assert len(there) == len(allowed) - 1
        assert there < allowed


@needs_cores
@pytest.mark.parametrize("pause", [0.0, 0.05])
def test_a_worker_keeps_to_the_cores_of_its_caller(pause):
    """Also one that is still awake from a call by somebody who had other cores."""
    allowed = os.sched_getaffinity(0)
    try:
        for cores in (allowed, {min(allowed)}, {max(allowed)}):
            os.sched_setaffinity(0, cores)
            here, there = run_each(lambda thread: os.sched_getaffinity(0), 2)
            assert here == cores and there <= cores
            time.sleep(pause)
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
        run_each(work, 2)
    assert done == [1 - failing]
    assert run_each(lambda thread: threading.get_ident(), 2) != [threading.get_ident()] * 2, "the worker is idle again"


def test_each_is_run_though_there_are_not_so_many_workers():
    assert run_each(lambda number: number**2, 7) == [number**2 for number in range(7)]


def test_calls_at_once_never_have_more_workers_than_are_allowed():
    inside, most, found = [], [], []

    def work(number):
        inside.append(number)
        most.append(len(inside))
        time.sleep(0.005)
        inside.remove(number)
        return number

    threads = [threading.Thread(target=lambda: found.append(run_each(work, 2))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [[0, 1]] * 4
    assert max(most) <= 4 + 1, "four callers, and one worker between them"


def test_a_worker_is_called_awake_and_asleep_and_for_work_of_pythons_between(model):
    lstm, x = model
    expected = train(lstm, x)
    for pause in (0.0, 1e-4, 1e-3, 3e-3, 0.02):
        for _ in range(5):
            assert run_each(lambda number: number, 2) == [0, 1]
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
        workers = reserve(2)
        try:
            run_team(each_after_the_other, (found,), workers)
            assert found.tolist() == [0, 1, 2]
        finally:
            release(workers)


@kernel
def take_all(found, done, patience, team, thread):
    """Take the items of some rounds; in each, another thread waits with its first for all else to be done."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    items, threads = found.shape[1], team.shape[0] - 1
    for turn in range(found.shape[0]):
        so_far = offset(address(done), turn)
        while True:
            item = take(items, team, thread, turn)
            if item < 0:
                break
            found[turn, item] += 1 + 10 * thread
            _fetch_add(so_far, 1)
            spins = 0
            while turn % threads == thread and _load_atomic(so_far) < items and spins < patience:
                spins += 1
        barrier(team, thread)
    if thread == 0:
        dismiss(team)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_a_slow_thread_did_not_begin_is_taken_by_others(threads):
    fastlstm.set_num_threads(threads)
    takers = who_takes(threads, items=11, rounds=12, patience=100_000_000)
    for turn, by in enumerate(takers):
        assert np.count_nonzero(by == turn % threads) <= 1 or threads == 1


def test_two_who_reach_for_the_last_item_at_once_do_not_both_get_it():
    who_takes(threads=2, items=1, rounds=50_000, patience=0)


def who_takes(threads, items, rounds, patience):
    """Have threads take items; return who took each, (rounds, items)."""
    found, done = np.zeros((rounds, items), np.int64), np.zeros(rounds, np.int64)
    workers = reserve(threads - 1)
    try:
        run_team(take_all, (found, done, patience), workers)
    finally:
        release(workers)
    np.testing.assert_array_equal(found % 10, 1)  # each item once
    np.testing.assert_array_equal(done, items)
    return found // 10


@kernel
def rows_of_each(offsets, lengths, first_step, last_step, team, found):
    """Note which rows of some steps each thread of a team would have."""
    for thread in range(team.shape[0] - 1):
        found[thread] = share_rows(offsets, lengths, first_step, last_step, team, thread)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "lengths", [[30] * 13, [9, 30, 1, 17, 0, 23, 30, 12, 5, 28, 3, 3, 29], [30, *[1] * 40], [0, 0]]
)
def test_rows_are_divided_so_that_the_threads_have_about_as_many_steps(lengths, threads):
    packing = Packing.of(np.array(lengths), 30, len(lengths))
    steps = packing.offsets.size - 1
    team, found = np.zeros((1 + threads, 8), np.int64), np.zeros((threads, 2), np.int64)
    for first, last in [(0, steps), *((step, min(step + 7, steps)) for step in range(0, steps, 7))]:
        rows_of_each(packing.offsets, packing.lengths, first, last, team, found)
        of_each_row = np.clip(packing.lengths - first, 0, last - first)
        before = np.cumsum([0, *of_each_row[of_each_row > 0]])  # the steps before each row
        assert (found[0, 0], found[-1, 1]) == (0, before.size - 1), "each row is somebody's"
        assert (found[1:, 0] == found[:-1, 1]).all() and (found[:, 1] >= found[:, 0]).all(), "and nobody else's"
        for thread, row in enumerate(found[:, 0]):
            off = np.abs(before - before[-1] * thread // threads)
            assert off[row] == off.min(), "no other row to begin with would divide them better"


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

    workers = reserve(1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_team(broken, (), workers)
    finally:
        release(workers)
    assert len(workers) == 1
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
    assert workers._teams
    for team in workers._teams.values():
        left = team.copy()
        assert (left[2:, MAILBOX] != 0).all()
        left[2:, MAILBOX] = 0
        assert not left.any()
