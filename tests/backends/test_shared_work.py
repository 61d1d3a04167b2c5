"""How the threads of a team share work: items that are taken, and rows that are divided by their steps."""

from __future__ import annotations

import numpy as np
import pytest

import fastlstm
from fastlstm.backends.cpu.rows import Rows
from fastlstm.backends.cpu.thread_pool import NO_TEAM, available, run_team
from fastlstm.kernels.cpu.atomics import fetch_add, load_atomic
from fastlstm.kernels.cpu.jit import kernel
from fastlstm.kernels.cpu.ragged import rows_of, share_rows
from fastlstm.kernels.cpu.thread_team import THREADS, barrier, dismiss, summon, take
from fastlstm.kernels.cpu.vector import address, offset
from fastlstm.kernels.cpu.worker import this_call


@pytest.fixture(autouse=True)
def two_threads():
    """Allow two threads, whatever the number of cores; and as before in the end."""
    fastlstm.set_num_threads(2)
    yield
    fastlstm.set_num_threads(None)


@kernel
def take_all(found, done, patience, team, thread):
    """Take the items of some rounds; in each, another thread waits with its first for all else to be done."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    items, threads = found.shape[1], team[1, THREADS]
    for turn in range(found.shape[0]):
        so_far = offset(address(done), turn)
        while True:
            item = take(items, team, thread, turn)
            if item < 0:
                break
            found[turn, item] += 1 + 10 * thread
            fetch_add(so_far, 1)
            spins = 0
            while turn % threads == thread and load_atomic(so_far) < items and spins < patience:
                spins += 1
        barrier(team, thread)
    if thread == 0:
        dismiss(team)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_items_that_a_slow_thread_has_not_begun_are_taken_by_others(threads):
    fastlstm.set_num_threads(threads)
    patience = 100_000_000 if threads > 1 else 0  # spins, which one thread alone would wait in vain
    takers = who_takes(threads, items=11, rounds=12, patience=patience)
    for turn, by in enumerate(takers):
        assert np.count_nonzero(by == turn % threads) <= 1 or threads == 1


def test_two_threads_do_not_both_take_the_last_item():
    who_takes(threads=2, items=1, rounds=50_000, patience=0)


def who_takes(threads, items, rounds, patience):
    """Have threads take items; return who took each, (rounds, items)."""
    found, done = np.zeros((rounds, items), np.int64), np.zeros(rounds, np.int64)
    if threads == 1:
        take_all(found, done, patience, NO_TEAM.copy(), 0)  # which `take` writes to: kernels do not call it alone
    else:
        assert run_team(take_all, (found, done, patience), available(threads - 1))[1] == threads
    np.testing.assert_array_equal(found % 10, 1)  # each item once
    np.testing.assert_array_equal(done, items)
    return found // 10


@kernel
def rows_of_each(index, batch, steps, first_step, last_step, team, found):
    """Note which rows of some steps each thread of a team would have."""
    for thread in range(found.shape[0]):
        first, last = share_rows(rows_of(index, batch, steps, 0), first_step, last_step, team, thread)
        found[thread, 0], found[thread, 1] = first, last


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize(
    "lengths", [[30] * 13, [9, 30, 1, 17, 0, 23, 30, 12, 5, 28, 3, 3, 29], [30, *[1] * 40], [0, 0]]
)
def test_rows_are_divided_so_that_the_threads_have_about_as_many_steps(lengths, threads):
    rows = Rows(np.array(lengths), 30, len(lengths))
    steps, index = rows.longest, rows.index(False)
    in_order = np.sort(lengths)[::-1]
    team, found = np.zeros((1 + threads, 8), np.int64), np.zeros((threads, 2), np.int64)
    team[1:, THREADS] = threads
    for first, last in [(0, steps), *((step, min(step + 7, steps)) for step in range(0, steps, 7))]:
        rows_of_each(index, len(lengths), steps, first, last, team, found)
        of_each_row = np.clip(in_order - first, 0, last - first)
        before = np.cumsum([0, *of_each_row[of_each_row > 0]])  # the steps before each row
        assert (found[0, 0], found[-1, 1]) == (0, before.size - 1), "each row has a thread"
        assert (found[1:, 0] == found[:-1, 1]).all() and (found[:, 1] >= found[:, 0]).all(), "no share overlaps another"
        for thread, row in enumerate(found[:, 0]):
            off = np.abs(before - before[-1] * thread // threads)
            assert off[row] == off.min(), "no other row to begin with would divide them better"
