"""Threads that share the steps of a loop: the same bits, in processes of their own, since a wait could be for ever."""

from __future__ import annotations

import pytest
from own_process import run_script

SCRIPT = """
import copy, sys
import numpy as np
import fastlstm
from fastlstm import LSTM
from fastlstm.backends.cpu.autotune import Trials

Trials.pick = lambda self, kind, ways: 0  # the team, whatever proves faster
layers, batch, hidden = map(int, sys.argv[1:4])
lstm = LSTM(20, hidden, layers, peephole=True, dropout=0.3 if layers > 1 else 0.0, seed=0)
rng = np.random.default_rng(0)
x = rng.normal(size=(9, batch, 20)).astype(np.float32)
dy = rng.normal(size=(9, batch, hidden)).astype(np.float32)

def served():
    from fastlstm.backends.cpu.thread_pool import _workers
    from fastlstm.kernels.cpu.worker import SERVED
    return sum(worker.words[SERVED] for worker in _workers)

def loop(threads):
    fastlstm.set_num_threads(threads)
    run = copy.copy(lstm).unroll(steps=9, batch=batch)
    found = [run.step(x_t) for x_t in x] + list(run.state)
    steps = served()
    back = run.backward()
    found += [back.step(d) for d in dy]
    steps_back = served() - steps
    grads = back.finish()
    return found + list(grads.state) + list(grads.params.values()), steps, steps_back

alone, *none = loop(1)
together, steps, steps_back = loop(2)
assert none == [0, 0], none
assert steps == steps_back == 9, (steps, steps_back)
assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
# A run goes on when the limit is lowered, and in a forked child, where the workers are not.
fastlstm.set_num_threads(2)
run = copy.copy(lstm).unroll(steps=9, batch=batch)
ys = [run.step(x[0])]
import os, warnings
warnings.simplefilter("ignore")
child = os.fork()
ys += [run.step(x_t) for x_t in x[1:]]
same = all(np.array_equal(a, b) for a, b in zip(ys, alone))
if child == 0:
    os._exit(0 if same else 1)
assert same and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

COMPILED = """
import sys
import numpy as np
import fastlstm
from numba import njit
from fastlstm import LSTM, compiled

@njit
def loop(kit, tape, x, dy, y, dx, gradients):
    for t in range(len(x)):
        compiled.step_taped(kit, tape, t, x[t], y[t])
    for t in range(len(x) - 1, -1, -1):
        compiled.step_back(kit, tape, t, dy[t], dx[t])
    compiled.finish(kit, tape, gradients)

fastlstm.set_num_threads(2)
hidden = int(sys.argv[1])
lstm, rng = LSTM(20, hidden, 2, seed=0), np.random.default_rng(0)
x, dy = (rng.normal(size=(9, 16, size)).astype(np.float32) for size in (20, hidden))
kit, found = lstm.compiled(), []
from fastlstm.backends.cpu.thread_pool import _workers
from fastlstm.kernels.cpu.worker import SERVED
for threads in (1, 2, 2):
    tape, gradients = kit.tape(9, 16, threads=threads), kit.gradients()
    y, dx = np.empty_like(dy), np.empty_like(x)
    loop(kit, tape, x, dy, y, dx, gradients)
    found.append((y, dx, gradients))
    assert sum(worker.words[SERVED] for worker in _workers) == 19 * (len(found) - 1)  # 9 steps, 9 back, and the end
for other in found[1:]:
    assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))
"""


# With 70 units, blocks of 16 or of 8 are an odd number: one is divided by its rows.
@pytest.mark.parametrize(("layers", "batch", "hidden"), [(1, 16, 150), (2, 100, 150), (3, 16, 150), (2, 133, 70)])
def test_threads_that_share_steps_give_the_same_bits(layers, batch, hidden):
    run_script(SCRIPT, layers, batch, hidden, prelude="")


@pytest.mark.parametrize("hidden", [150, 70, 6])  # of the last, one thread has all units in `finish`
def test_threads_share_the_steps_of_compiled_code(hidden):
    run_script(COMPILED, hidden, prelude="")
