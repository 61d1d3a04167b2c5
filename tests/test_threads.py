"""Several user threads at once: one model shared by all gives each of them what it gives alone, to the bit."""

from __future__ import annotations

import contextvars
import sys
import threading
import time

import numpy as np
import pytest
from harness import Case, problem, results
from tolerances import assert_identical

from fastlstm import LSTM

THREADS, CALLS = 6, 8


@pytest.fixture
def eager_switching():
    """Let the interpreter change threads a thousand times as often as it does."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work):
    """Run work(k) in THREADS threads, started together, with this thread's backend; return or raise what they did."""
    barrier, found, errors = threading.Barrier(THREADS), {}, []

    def run(k):
        try:
            barrier.wait(timeout=60)
            found[k] = work(k)
        except BaseException as error:
            errors.append(error)

    contexts = [contextvars.copy_context() for _ in range(THREADS)]
    threads = [threading.Thread(target=contexts[k].run, args=(run, k), daemon=True) for k in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return [found[k] for k in range(THREADS)]


CASES = [Case(6, 3, 4, 5, 2, True, lengths="zeros"), Case(8, 24, 32, 64), Case(2, 3, 4, 5)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_share_a_model(backend, dtype, case, eager_switching):
    problems = [problem(Case(**(vars(case) | {"seed": k}))).astype(dtype) for k in range(THREADS)]
    lstm = LSTM(case.inputs, case.hidden, case.layers, bidirectional=case.bidirectional, dtype=dtype, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})

    def work(k):
        p = problems[k]
        state, dstate = (tuple(map(backend.array, pair)) for pair in (p.state, p.dstate))
        y, (h_n, c_n), tape = lstm.forward(backend.array(p.x), state, p.lengths)
        found = results(backend, y, h_n, c_n, lstm.backward(tape, backend.array(p.dy), dstate))
        if not case.bidirectional:
            found["step"] = backend.host(lstm.step(backend.array(p.x[0]), state)[0])
        return found | {"inference": backend.host(lstm(backend.array(p.x), state, p.lengths)[0])}

    serial = [work(k) for k in range(THREADS)]
    for repeated in at_once(lambda k: [work(k) for _ in range(CALLS)]):
        assert_identical(repeated[0], repeated[-1])
    for together in (at_once(work), at_once(work)):
        for found, expected in zip(together, serial, strict=True):
            assert_identical(found, expected)


class SlowToCount(LSTM):
    """A model that takes its time between reading the key of the next masks and writing the one after it."""

    @property
    def _dropout_key(self):
        key = self.__dict__["key"]
        time.sleep(1e-3)
        return key

    @_dropout_key.setter
    def _dropout_key(self, key):
        self.__dict__["key"] = key


def test_threads_never_draw_the_same_mask(backend, eager_switching):
    lstm = SlowToCount(3, 8, 2, dropout=0.5, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    x = backend.array(np.ones((20, 4, 3), np.float32))
    found = at_once(lambda k: [backend.host(lstm.forward(x)[0]).tobytes() for _ in range(CALLS)])
    assert len({y for calls in found for y in calls}) == THREADS * CALLS
