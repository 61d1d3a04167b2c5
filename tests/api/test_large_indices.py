"""Arrays of more than 2^31 elements, on the CPU: hardly any of their memory is ever touched.

A batch of half a million sequences, all empty but the last one: input, output and their gradients then lie in pages
that the system never has to provide, and the one sequence lies at their very end. On a GPU, where all memory is real,
``cuda/test_cuda_device.py`` has large arrays.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from harness import BackendUnderTest

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

RUN = """
from pathlib import Path

import numpy as np
from fastlstm import LSTM, use_backend

steps, hidden, inputs = 2**11 + 1, 1, 2
batch = 2**19
lengths = np.zeros(batch, np.int64)
lengths[-1] = steps
model = LSTM(inputs, hidden, bidirectional=True, seed=0)
rng = np.random.default_rng(0)
x, dy = (np.zeros((steps, batch, n), np.float32) for n in (inputs, 2 * hidden))
assert x.size > 2**31 and dy.size > 2**31
x[:, -1], dy[:, -1] = (rng.uniform(-1, 1, (steps, 2)) for _ in range(2))

def run(x, dy, lengths=None):
    with use_backend("cpu"):
        y, (h_n, c_n), tape = model.forward(x, lengths=lengths)
        grads = model.backward(tape, dy)
        inference = model(x, lengths=lengths)[0]
    ends = [y[:, -1], inference[:, -1], grads.x[:, -1], h_n[:, -1], c_n[:, -1], grads.state[0][:, -1]]
    return ends + list(grads.params.values())

for found, alone in zip(run(x, dy, lengths), run(x[:, -1:].copy(), dy[:, -1:].copy()), strict=True):
    assert np.abs(alone).max() > 0
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-6 * np.abs(alone).max())
# Not getrusage's maximum, which a process takes over from the one that started it.
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(int(peak.split()[1]) // 1024)
"""


def test_indices_beyond_32_bits():
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    if not HUGE_PAGES.exists() or "[always]" in HUGE_PAGES.read_text():
        pytest.skip("untouched memory is not free here: its pages are two megabytes each")
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN], env=os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    if "MemoryError" in done.stderr:
        pytest.skip("the system does not lend as much memory, not even untouched")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2000, "megabytes: not the memory that was meant to be touched"
