"""``fastlstm warm --loops``: a later process compiles no kernel for a closed loop."""

from __future__ import annotations

import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

from kernel_process import copy_package, start

WARM = """
import json, sys
from fastlstm.cli import main
sys.argv = ["fastlstm", "warm", "--loops", "--step", "--dtype", "float32"]
assert main() == 0
print(json.dumps({}))
"""
USE = """
import json
import numpy as np
import fastlstm
from fastlstm import compiled
from fastlstm.kernels.cpu import jit
for threads in (1, 2):
    fastlstm.set_num_threads(threads)
    lstm = fastlstm.LSTM(5, 40, 2, seed=0)
    x = np.ones((20, 32, 5), np.float32)
    run = lstm.unroll(steps=20, batch=32)
    ys = [run.step(x_t) for x_t in x]
    back = run.backward()
    for y in ys:
        back.step(y)
    back.finish()
kit = lstm.compiled()
kit.tape(2, 1)
h, c, h_next, c_next = np.zeros((4, 2, 32, 40), np.float32)
compiled.step(kit, x[0], h, c, y, h_next, c_next)
print(json.dumps({
    "misses": [kernel.__name__ for kernel in jit.KERNELS if sum(kernel.stats.cache_misses.values())],
    "hits": [kernel.__name__ for kernel in jit.KERNELS if sum(kernel.stats.cache_hits.values())],
}))
"""


def test_a_later_process_compiles_no_kernel_for_a_closed_loop(tmp_path):
    copy_package(tmp_path / "package")
    start(tmp_path / "package", tmp_path / "cache", WARM)
    found, _ = start(tmp_path / "package", tmp_path / "cache", USE)
    assert not found["misses"]
    assert {"unrolled_step", "unrolled_step_taped", "unrolled_back", "unrolled_finish"} <= set(found["hits"])
