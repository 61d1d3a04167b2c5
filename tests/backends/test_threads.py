"""Several user threads that share one model get results that are bit-identical to those of one thread."""

from __future__ import annotations

import contextvars
import copy
import pickle
import sys
import threading

import numpy as np
import pytest
from harness import Case, problem, results
from tolerances import assert_identical

from fastlstm import LSTM
from fastlstm.mask_keys import MaskKeys

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
@pytest.mark.sampled
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


def test_threads_never_draw_the_same_mask(backend, eager_switching):
    lstm = LSTM(3, 8, 2, dropout=0.5, seed=0)
    lstm.params.update({name: backend.array(value) for name, value in lstm.params.items()})
    x = backend.array(np.ones((20, 4, 3), np.float32))
    found = at_once(lambda k: [backend.host(lstm.forward(x)[0]).tobytes() for _ in range(CALLS)])
    assert len({y for calls in found for y in calls}) == THREADS * CALLS


def test_no_two_threads_take_the_same_key(eager_switching):
    keys = MaskKeys(2**62)

    def work(k):
        taken = []
        for n in range(2000):
            taken.append(keys.take())
            if n % 3 == k % 3:  # a call fails
                keys.give_back(taken.pop())
        return taken

    found = [key for taken in at_once(work) for key in taken]
    assert len(set(found)) == len(found)
    assert keys.next not in found, "nor does a copy go on with one"


def copies(lstm):
    return [copy.copy(lstm), copy.deepcopy(lstm), pickle.loads(pickle.dumps(lstm)), lstm.to(np), lstm.freeze()]


def test_copies_go_on_with_the_same_masks_and_not_with_each_others():
    lstm, x = LSTM(3, 8, 2, dropout=0.5, seed=0), np.ones((20, 4, 3), np.float32)
    lstm.forward(x)
    several = [lstm, *copies(lstm)]
    keys = [[one._mask_keys.take() for _ in range(3)] for one in several]
    assert keys == [keys[0]] * 6
