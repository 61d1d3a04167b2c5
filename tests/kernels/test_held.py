"""Records that routines take by their address: kernels of several dtypes, each compiled in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness import BackendUnderTest

pytestmark = pytest.mark.slow

RUN = """
import sys
import numpy as np
from fastlstm import LSTM, use_backend

for dtype in sys.argv[1:]:
    x = np.random.default_rng(0).standard_normal((4, 3, 5)).astype(dtype)
    lstm, found = LSTM(5, 12, layer_norm=True, zoneout=(0.1, 0.1), dtype=np.dtype(dtype), seed=0), []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            found.append(lstm(x)[0])
    assert np.abs(found[0] - found[1]).max() < 1e-6, dtype  # outputs are below 1, with float32's epsilon of 1.2e-7
"""


def test_kernels_that_several_processes_compiled_run_in_one(tmp_path):
    """Their functions have names of their own: of two with one name, a process would run one for both."""
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "FASTLSTM_QUIET": "1"}
    for dtypes in (["float32"], ["float64"], ["float64", "float32"], ["float32", "float64"]):
        done = subprocess.run(
            [sys.executable, "-c", RUN, *dtypes], env=environment, capture_output=True, text=True, timeout=180,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{dtypes}: status {done.returncode}: {done.stderr}"
