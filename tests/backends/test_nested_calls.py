"""Calls within calls, by signal handlers and finalisers, and forks during calls: each in a process of its own."""

from __future__ import annotations

import os
import sys

import pytest
from own_process import EXAMPLES, run_script

WITHIN = """
event, what = sys.argv[1:3]
from fastlstm.backends.cpu import thread_pool
from fastlstm.kernels.cpu import small_batch

def call_again():
    assert infer() == EXPECTED

def fork():
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        forked.append(True)

forked = []
step = 20 if what == "fork" else int(sys.argv[3])
count = at_event(-1, None, infer, event)
for number in range(0, count, step):
    small_batch._prepared.clear()
    for lstm, _ in PROBLEMS:
        lstm.cell.calls.clear()  # the call is prepared anew
    found = []
    at_event(number, call_again if what == "call" else fork, lambda: found.append(infer()), event)
    if forked:
        os._exit(0 if found == [EXPECTED] and has_team() else 3)
    assert found == [EXPECTED] and has_team(), number
print(count)
"""


@pytest.mark.parametrize(("event", "step"), [("line", 1), ("opcode", 1 if EXAMPLES >= 1000 else 5)])
def test_a_signal_handler_or_a_finaliser_may_make_a_call_at_any_point_of_another(event, step):
    assert int(run_script(WITHIN, event, "call", step, timeout=600)) > 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_may_fork_at_any_point_of_a_call():
    assert int(run_script(WITHIN, "opcode", "fork", timeout=600)) > 50


HANDLER = """
import signal
calls = []
rng = np.random.default_rng(0)
def call(*_):
    calls.append(infer() == EXPECTED)
    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
assert has_team()  # all kernels are there: what comes while they are compiled has a test of its own
signal.signal(signal.SIGALRM, call)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
until = time.monotonic() + 1
while time.monotonic() < until:
    assert infer() == EXPECTED
signal.signal(signal.SIGALRM, signal.SIG_IGN)
assert all(calls) and has_team()
print(len(calls))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no timer that interrupts")
def test_a_signal_handler_makes_calls():
    for seconds in (1e-4, 1e-3, 3e-3, 1e-2):  # among them, such as come while the worker's code is loaded
        assert int(run_script(HANDLER, seconds)) > 50


# As a signal handler in the first call, whose kernels are compiled or loaded.
COMPILING = """
import signal, sys
import numpy as np
import fastlstm
from fastlstm import BackendError, LSTM, use_backend

fastlstm.set_num_threads(2)
lstm, x = LSTM(5, 7, seed=0), np.ones((3, 2, 5), np.float32)
fastlstm.dispatch.backend_named("cpu")  # an import cannot be entered again

from fastlstm.kernels.cpu import kernel_cache
kernel_cache.folders = kernel_cache.folders[:1]  # where nothing is: kernels beside the sources would be found

def infer():
    with use_backend("cpu"):
        return lstm(x)[0].tobytes()

def call(*_):
    try:
        calls.append(infer())
    except BackendError as error:
        assert "compile" in str(error)
        refused.append(error)
    if len(calls) + len(refused) < 5:
        signal.setitimer(signal.ITIMER_REAL, 0.05)

calls, refused = [], []
signal.signal(signal.SIGALRM, call)
signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
first = infer()
signal.signal(signal.SIGALRM, signal.SIG_IGN)
assert (calls or refused) and {*calls, first} == {infer()}
print(len(calls), len(refused))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no timer that interrupts")
@pytest.mark.parametrize("seconds", [0.02, 0.4])  # a first call takes 0.8 s or more
def test_a_signal_handler_makes_a_call_while_the_first_one_compiles(tmp_path, monkeypatch, seconds):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    run_script(COMPILING, seconds, prelude="")


FORKS = """
import threading
stop = threading.Event()
def work():
    while not stop.is_set():
        assert infer() == EXPECTED
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for _ in range(20):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        os._exit(0 if has_team() and has_team() else 3)
stop.set()
for thread in threads:
    thread.join()
assert has_team()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_may_fork_while_other_threads_make_calls():
    run_script("import warnings; warnings.simplefilter('ignore')\n" + FORKS)
