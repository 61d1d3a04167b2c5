"""Kits and tapes that a caller does not pass as arguments: Numba freezes them to constants, addresses included."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from harness import BackendUnderTest

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)

from kernel_process import variables
from own_process import run_script

CACHED = """
import json
import sys
import numpy as np
from numba import njit
import fastlstm
from fastlstm import compiled

lstm = fastlstm.LSTM(3, 6, 2, seed=0)
KIT = lstm.compiled()
memory = [np.zeros(1 << n, np.int8) for n in range(4, 20)]  # the addresses are others in each process

@njit(cache=True)
def of_global(x, h, c, y, h_next, c_next):
    compiled.step(KIT, x, h, c, y, h_next, c_next)

def closure(kit):
    @njit(cache=True)
    def call(x, h, c, y, h_next, c_next):
        compiled.step(kit, x, h, c, y, h_next, c_next)
    return call

@njit(cache=True)
def argument(kit, x, h, c, y, h_next, c_next):
    compiled.step(kit, x, h, c, y, h_next, c_next)

x, y = np.ones((1, 3), np.float32), np.full((1, 6), 7, np.float32)
states = np.zeros((4, 2, 1, 6), np.float32)
result = {}
for name, function in (("of_global", of_global), ("closure", closure(KIT))):
    try:
        function(x, *states[:2], y, *states[2:])
        result[name] = "not refused"
    except fastlstm.ArgumentError as error:
        result[name] = str(error)
result["untouched"] = bool((y == 7).all())
argument(KIT, x, *states[:2], y, *states[2:])
result["same"] = bool((y == lstm.freeze().step(x)[0]).all())
result["hits"] = [sum(function.stats.cache_hits.values()) for function in (of_global, argument)]
print(json.dumps(result))
"""


def test_a_kit_in_a_cached_caller_is_an_argument(tmp_path):
    script = tmp_path / "caller.py"
    script.write_text(CACHED)
    found = []
    for _ in range(2):  # the second process loads what the first has cached
        done = subprocess.run(
            [sys.executable, str(script)], env=variables(tmp_path, tmp_path / "cache"), cwd=tmp_path,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert [each["hits"] for each in found] == [[0, 0], [1, 1]]
    for each in found:
        assert "pass it as an argument" in each["of_global"]
        assert "has to take it as an argument" in each["closure"]  # Numba pickles it
        assert each["untouched"] and each["same"]


GLOBAL_TAPE = """
import numpy as np
from numba import njit
from fastlstm import LSTM, ArgumentError, compiled

KIT = LSTM(3, 6, 2, seed=0).compiled()
TAPE = KIT.tape(2, 1)

@njit
def step_taped(kit, x, y, dx, gradients):
    compiled.step_taped(kit, TAPE, 0, x, y)

@njit
def step_back(kit, x, y, dx, gradients):
    compiled.step_back(kit, TAPE, 0, y, dx)

@njit
def finish(kit, x, y, dx, gradients):
    compiled.finish(kit, TAPE, gradients)

@njit
def kit_of_training(tape, x, y, dx, gradients):
    compiled.step_taped(KIT, tape, 0, x, y)

x, y = np.ones((1, 3), np.float32), np.full((1, 6), 7, np.float32)
dx, gradients = np.full((1, 3), 7, np.float32), np.full(KIT.parameters, 7, np.float32)

def refused(function, first, what):
    before = TAPE.record.copy()
    try:
        function(first, x, y, dx, gradients)
    except ArgumentError as error:
        assert str(error).startswith("the " + what + " is a global") and "as an argument" in str(error), error
    else:
        raise AssertionError(function.__name__)
    assert (y == 7).all() and (dx == 7).all() and (gradients == 7).all() and (TAPE.record == before).all()

refused(step_taped, KIT, "tape")
refused(kit_of_training, TAPE, "kit")
y[...] = 0
compiled.step_taped(KIT, TAPE, 0, x, y)
y[...] = 7
refused(step_back, KIT, "tape")
compiled.step_back(KIT, TAPE, 0, y, dx)
dx[...] = 7
refused(finish, KIT, "tape")
"""


def test_a_global_tape_is_refused_before_anything_is_written():
    run_script(GLOBAL_TAPE, prelude="", timeout=300)


RETURNED = """
import gc
import numpy as np
from numba import njit
from numba.typed import List
from fastlstm import LSTM, compiled

@njit
def back(kit):
    return kit

@njit
def chosen(kits, n):
    return kits[n]

lstm = LSTM(3, 6, 2, dropout=0.5, seed=0)
kit = back(lstm.compiled())
gc.collect()
tape = kit.tape(2, 1)
kit.draw(back(tape))
compiled.step_taped(kit, tape, 0, np.ones((1, 3), np.float32), np.empty((1, 6), np.float32))
assert set(kit.named(kit.gradients())) == set(lstm.params) and kit.cell == lstm.cell
kits = List([LSTM(3, 6, n, dtype=np.float32, seed=0).compiled() for n in (1, 2)])
gc.collect()
assert [chosen(kits, n).cell.num_layers for n in range(2)] == [1, 2]
from fastlstm.backends.cpu.kit import _models
del kit, tape, kits
gc.collect()
assert not _models, "what is kept for a kit is freed with it"
"""


def test_a_kit_that_compiled_code_returns_has_its_methods():
    run_script(RETURNED, prelude="", timeout=300)
