"""What a compiled step does not do: allocate, grow, or hold the interpreter's lock."""

from __future__ import annotations

import resource
import threading
import time

import numpy as np
import pytest
from harness import BackendUnderTest

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

from loop_tools import arrays, closed_loop, forth_and_back, model_of
from numba import njit
from numba.core.runtime import _nrt_python, rtsys

from fastlstm import compiled


@njit
def allocate(times):
    total = 0.0
    for n in range(times):
        total += np.full(n + 3, 1.0)[n]
    return total


def test_nothing_is_allocated_in_a_step():
    lstm = model_of(np.float32, 3, 20, 2)
    kit = lstm.compiled()
    tape, gradients = kit.tape(50, 2), kit.gradients()
    given = arrays(lstm, 2)
    x, dy = np.ones((50, 2, 3), np.float32), np.ones((50, 2, 20), np.float32)
    y, dx, zero = np.empty_like(dy), np.empty_like(x), np.zeros((2, 2, 20), np.float32)
    counts, with_others = [], []
    was_counting = _nrt_python.memsys_stats_enabled()
    _nrt_python.memsys_enable_stats()
    try:
        for steps in (1, 50):  # the arguments of a call from Python take some, whatever the steps
            before = rtsys.get_allocation_stats().alloc
            closed_loop(kit, *given, steps)
            forth_and_back(kit, tape, x[:steps], dy[:steps], y[:steps], dx[:steps], zero, zero, gradients)
            counts.append(rtsys.get_allocation_stats().alloc - before)
            allocate(steps)
            with_others.append(rtsys.get_allocation_stats().alloc - before)
    finally:
        if not was_counting:
            _nrt_python.memsys_disable_stats()
    assert counts[0] == counts[1] and with_others[1] == with_others[0] + 49, (counts, with_others)


def test_a_million_steps_take_no_more_memory():
    lstm = model_of(np.float32, 1, 4, 2)
    kit, given = lstm.compiled(), arrays(lstm, 1)
    tape, x, y = kit.tape(10, 1), given[0], given[3]
    closed_loop(kit, *given, 1000)
    run_windows(kit, tape, x, y, np.empty_like(x), kit.gradients(), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    closed_loop(kit, *given, 1_000_000)
    run_windows(kit, tape, x, y, np.empty_like(x), kit.gradients(), 20_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2048  # kilobytes


@njit
def run_windows(kit, tape, x, y, dx, gradients, windows):
    for _ in range(windows):
        for t in range(tape.steps):
            compiled.step_taped(kit, tape, t, x, y)
        for t in range(tape.steps - 1, -1, -1):
            compiled.step_back(kit, tape, t, y, dx)
        compiled.finish(kit, tape, gradients)
        tape.h[:, 0], tape.c[:, 0] = tape.h[:, tape.steps], tape.c[:, tape.steps]


def test_the_interpreter_is_free_meanwhile():
    lstm = model_of(np.float32, 3, 20)
    kit, given = lstm.compiled(), arrays(lstm, 2)
    closed_loop(kit, *given, 1)
    thread = threading.Thread(target=closed_loop, args=(kit, *given, 3_000_000))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20
