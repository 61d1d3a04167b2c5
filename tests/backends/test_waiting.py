"""No call waits without limit: each possible hang runs in a process of its own, which has to end in time."""

from __future__ import annotations

import importlib.util
import os
import sys

import pytest
from own_process import PRELUDE, run_script

PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "gevent, but for threads": "from gevent import monkey; monkey.patch_all(thread=False)",
    "gevent, with subprocesses and queues": "from gevent import monkey; monkey.patch_all(queue=True, subprocess=True)",
    "eventlet": "import warnings; warnings.simplefilter('ignore'); import eventlet; eventlet.monkey_patch()",
}
SPAWN = {
    "gevent": "import gevent; gevent.joinall(several := [gevent.spawn(train) for _ in range(4)]);"
    " found = [one.value for one in several]",
    "eventlet": "found = [one.wait() for one in [eventlet.spawn(train) for _ in range(4)]]",
}
GREEN = """
assert has_team(), "which needs no thread of Python's"
{spawn}
assert found == [TRAINED] * 4
assert has_team()
if hasattr(os, "fork"):
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0
    else:
        os._exit(0 if has_team() else 3)
"""


@pytest.mark.parametrize("when", ["before the import", "after the import", "after the first call"])
@pytest.mark.parametrize("patch", PATCHES)
def test_green_threads(patch, when):
    library = patch.partition(",")[0]
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: it comes with the extra `test`")
    script, patching = GREEN.format(spawn=SPAWN[library]), PATCHES[patch] + "\n"
    prelude = {
        "before the import": patching + PRELUDE,
        "after the import": "import fastlstm\n" + patching + PRELUDE,
        "after the first call": PRELUDE + "assert has_team()\n" + patching,
    }[when]
    run_script(script, prelude=prelude)


# --- the interpreter exits ----------------------------------------------------------------------------------

AT_EXIT = {
    "finaliser of a global": "_last = Last()",
    "finaliser of a thread's": """
import threading
local = threading.local()
local.last = Last()
""",
    "finaliser in a cycle": """
import gc
gc.disable()
last = Last()
last.itself = last
del last
""",
    "exit function": "import atexit; atexit.register(Last().__del__)",
    "exit function, before ours": "sys.modules['early'].function = Last().__del__",
}
EARLY = """
import atexit, sys, types
early = sys.modules["early"] = types.SimpleNamespace(function=lambda: None)
atexit.register(lambda: early.function())
"""
LAST = """
class Last:
    # Modules may be gone when it is called.
    def __del__(self, problems=PROBLEMS, expected=EXPECTED, write=os.write):
        same = b"".join(lstm(x)[0].tobytes() for lstm, x in problems) == expected
        write(1, b"same" if same else b"other")

assert has_team()
"""


@pytest.mark.parametrize("what", AT_EXIT)
def test_a_call_while_the_interpreter_exits(what):
    for _ in range(3):
        assert "same" in run_script(LAST + AT_EXIT[what], prelude=EARLY + PRELUDE)


DAEMON = """
import threading
def work():
    while True:
        infer()
threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
time.sleep(0.3)
"""


def test_the_interpreter_exits_while_daemon_threads_make_calls():
    for _ in range(3):
        run_script(DAEMON)


# --- threads that cannot be had, or do not answer -----------------------------------------------------------

# Another user may not be allowed to read the modules that compiling imports, nor kernels that are kept.
READY = """
assert has_team() and train() == TRAINED
without_workers()
"""
NO_THREAD = {
    "processes": """
import resource
if os.getuid() == 0:
    os.setuid(54321)  # the limit does not hold for root
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
""",
    "memory": """
import resource, threading
threading.stack_size(1 << 32)
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), -1))
""",
}
WITHOUT = """
import threading
started = False
try:
    threading.Thread(target=int).start()
    started = True
except RuntimeError:
    pass
assert not started, "the limit holds"
from fastlstm.backends.cpu import thread_pool
seen = os.listdir("/proc/self/fd")
real, starts = thread_pool._start_thread, []
thread_pool._start_thread = lambda *given: starts.append(given) or real(*given)
begin = time.monotonic()
for _ in range(50):
    assert infer() == EXPECTED
    assert train() == TRAINED
seconds = time.monotonic() - begin
assert served() == 0 and thread_pool.available(1) == 0
assert len(starts) <= 2 + seconds, "it is not tried at each call"
assert os.listdir("/proc/self/fd") == seen and len(thread_pool._workers) == 1
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")
@pytest.mark.parametrize("what", NO_THREAD)
def test_without_threads_there_is_one(what):
    run_script(READY + NO_THREAD[what] + WITHOUT)


LATER = """
from fastlstm.backends.cpu import thread_pool
real = thread_pool._start_thread
thread_pool._start_thread = lambda *_: thread_pool._NO_THREAD
assert infer() == EXPECTED and served() == 0
thread_pool._start_thread = real
assert infer() == EXPECTED and served() == 0, "not tried again at once"
time.sleep(1.1)
assert has_team()
"""


def test_a_second_later_it_is_tried_again():
    run_script(LATER)


SILENT = """
from fastlstm.backends.cpu import thread_pool
from fastlstm.kernels.cpu.worker import ABSENT, ASLEEP, IDLE, LOCK, STATE, UNSTARTED

# One that is said to sleep, and does not wake.
silent = thread_pool._Worker()
silent.words[STATE] = ASLEEP
thread_pool._workers.append(silent)
for lstm, x in PROBLEMS:
    silent.words[STATE] = ASLEEP
    begin = time.monotonic()
    with use_backend("cpu"):
        lstm(x)
    assert 0.05 < time.monotonic() - begin < 5
    assert silent.words[STATE] == ABSENT
begin = time.monotonic()
assert infer() == EXPECTED
assert time.monotonic() - begin < 0.5, "nor is it called again"
assert thread_pool.available(1) == 0

# A thread that is started, and does not come.
without_workers()
real, thread_pool._start_thread = thread_pool._start_thread, lambda *_: 1
begin = time.monotonic()
assert infer() == EXPECTED and served() == 0
assert 0.5 < time.monotonic() - begin < 10
thread_pool._start_thread = real
time.sleep(1.1)
assert has_team()

# One that wakes too late.
(worker,) = thread_pool._workers
while worker.words[STATE] != ASLEEP:
    time.sleep(0.01)
worker.words[STATE] = ABSENT
assert infer() == EXPECTED
thread_pool._function("PyThread_release_lock", None, thread_pool.ctypes.c_void_p)(worker.words[LOCK])
while worker.words[STATE] == ABSENT:
    time.sleep(0.001)
assert has_team()

# Two threads for one mailbox.
without_workers()
worker = thread_pool._Worker()
thread_pool._workers.append(worker)
entry = thread_pool.serve(0, thread_pool.FIND)
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    real(entry, worker.address)
time.sleep(0.2)
assert len(os.listdir("/proc/self/task")) == before + 1
assert has_team()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_a_worker_that_does_not_answer_is_not_waited_for():
    run_script(SILENT)


STARVED = """
from fastlstm.backends.cpu import thread_pool
from fastlstm.kernels.cpu.worker import THREAD_ID
core = {min(os.sched_getaffinity(0))}
os.sched_setaffinity(0, core)
assert has_team() and infer() == EXPECTED
try:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
except PermissionError:
    print("not allowed")
    sys.exit()
assert all(os.sched_getscheduler(worker.words[THREAD_ID]) == os.SCHED_OTHER for worker in thread_pool._workers)
# At first the worker is awake, but does not run: it is waited for at barriers. Then it is asleep, and has to wake.
for _ in range(5):
    assert infer() == EXPECTED
    time.sleep(0.1)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler"), reason="there are no such schedulers here")
def test_a_worker_that_runs_only_while_its_caller_sleeps_is_not_starved():
    if "not allowed" in run_script(STARVED, timeout=30):
        pytest.skip("this user may not have a thread that precedes all others")


# --- what the threads are -----------------------------------------------------------------------------------

PATCHED = """
import _thread, threading, queue

def never(*_, **__):
    raise AssertionError("not to be used")

_thread.start_new_thread = threading._start_new_thread = threading.Thread.start = never
threading.Lock = threading.RLock = _thread.allocate_lock = queue.SimpleQueue = never
"""


def test_workers_need_nothing_of_python_s_threads():
    run_script(PATCHED + "assert has_team()\nassert train() == TRAINED\n")
