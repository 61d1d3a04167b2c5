"""After a call that was interrupted anywhere, the next call has all its workers and the right bits."""

from __future__ import annotations

import signal

import pytest
from own_process import EXAMPLES, run_script

EVERYWHERE = """
event, fresh = sys.argv[1], sys.argv[2] == "fresh"

class Interrupt(BaseException):
    pass

def interrupt():
    raise Interrupt

assert infer() == EXPECTED
if fresh:
    WATCHED &= {"thread_pool.py"}
    without_workers()
count, interrupted = at_event(-1, None, infer, event), 0
for number in range(count):
    if fresh:
        without_workers()
    try:
        at_event(number, interrupt, infer, event)
    except Interrupt:
        interrupted += 1
    assert has_team(), f"after an interrupt at {event} {number}"
assert train() == TRAINED
print(interrupted, count)
"""


@pytest.mark.parametrize("workers", ["started", "fresh"])
@pytest.mark.parametrize("event", ["line", "opcode"])
def test_after_an_interrupt_at_any_point_the_next_call_has_all_its_workers(event, workers):
    interrupted, points = map(int, run_script(EVERYWHERE, event, workers, timeout=600).split())
    # What a call does depends a little on the calls before it: its last points may not come.
    assert interrupted > 0.8 * points > 20


HANDLERS_ERROR = """
from fastlstm import BackendError
kind, fresh = {"BackendError": BackendError, "TimeoutError": TimeoutError}[sys.argv[1]], sys.argv[2] == "fresh"

def fail():
    raised.append(number)
    raise kind("of a signal handler")

assert infer() == EXPECTED
if fresh:
    WATCHED &= {"thread_pool.py"}
    without_workers()
raised, found = [], []
count = at_event(-1, None, infer, "line")
for number in range(count):
    if fresh:
        without_workers()
    try:
        at_event(number, fail, infer, "line")
    except kind:
        found.append(number)
assert found == raised, sorted(set(raised) - set(found))
assert train() == TRAINED and has_team()
print(len(found), count)
"""


@pytest.mark.parametrize("workers", ["started", "fresh"])
@pytest.mark.parametrize("kind", ["BackendError", "TimeoutError"])
def test_an_error_that_a_signal_handler_raises_at_any_point_reaches_the_caller(kind, workers):
    found, points = map(int, run_script(HANDLERS_ERROR, kind, workers, timeout=600).split())
    assert found > 0.8 * points > 20


KEYS = """
from fastlstm.mask_keys import MaskKeys

class Interrupt(BaseException):
    pass

def interrupt():
    raise Interrupt

# The first call fails, so that its key is given back; the second one takes that, the third a fresh one.
def calls(keys, taken):
    given_back = keys.take()
    keys.give_back(given_back)
    taken.append(keys.take())
    taken.append(keys.take())

keys = MaskKeys(0)
count = at_event(-1, None, lambda: calls(keys, []))
for number in range(count):
    keys, taken = MaskKeys(0), []
    try:
        at_event(number, interrupt, lambda: calls(keys, taken))
    except Interrupt:
        pass
    calls(keys, taken)
    assert len(set(taken)) == len(taken), (number, taken)
    keys, taken = MaskKeys(0), []
    at_event(number, lambda: calls(keys, taken), lambda: calls(keys, taken))
    assert len(set(taken)) == len(taken) == 4, (number, taken)
print(count)
"""


def test_no_mask_key_is_taken_twice_after_interrupts_or_nested_calls():
    assert int(run_script(KEYS)) > 30


DROPOUT = """
lstm, x = LSTM(3, 8, 2, dropout=0.5, seed=0), np.ones((20, 4, 3), np.float32)
WATCHED = {"lstm.py", "mask_keys.py"}

class Interrupt(BaseException):
    pass

def interrupt():
    raise Interrupt

seen = set()
count = at_event(-1, None, lambda: lstm.forward(x))
for number in range(count):
    try:
        at_event(number, interrupt, lambda: lstm.forward(x))
    except Interrupt:
        pass
    y = lstm.forward(x)[0].tobytes()
    assert y not in seen, number
    seen.add(y)
print(count)
"""


def test_no_two_calls_draw_the_same_masks_though_others_are_broken_off():
    assert int(run_script(DROPOUT)) > 10


RANDOM = """
import signal
from fastlstm.backends.cpu.thread_pool import _workers

class Interrupt(BaseException):
    pass

def interrupt(*_):
    raise Interrupt

interrupts, rng = int(sys.argv[1]), np.random.default_rng(int(sys.argv[2]))
assert has_team()
signal.signal(signal.SIGALRM, interrupt)
threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
came = lost = wrong = 0
for number in range(interrupts):
    lstm, x = PROBLEMS[number % 3]
    try:
        with use_backend("cpu"):
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 3e-3))
            until = time.monotonic() + 5
            while time.monotonic() < until:
                lstm(x)
    except Interrupt:
        came += 1
    if number % 10 == 0 or number == interrupts - 1:
        lost += not has_team()
        wrong += train() != TRAINED
assert threads is None or len(os.listdir("/proc/self/task")) == threads, "no other thread is started"
assert len(_workers) == 1
print(came, lost, wrong)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer that interrupts")
def test_random_interrupts_lose_no_worker_and_no_bit():
    interrupts = max(300, 5 * EXAMPLES)
    came, lost, wrong = map(int, run_script(RANDOM, interrupts, 0, timeout=120 + interrupts / 10).split())
    assert (lost, wrong) == (0, 0)
    assert came == interrupts
