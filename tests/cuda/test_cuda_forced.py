"""The tests of agreement and of gradients, with the persistent kernels forced: by default the stand-in has none."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host_cuda import compiler

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("path", ["persistent", "step"])
def test_results_and_gradients_are_right_on_a_path_that_is_forced(path):
    environment = os.environ | {"FASTLSTM_CUDA_RECURRENCE": path, "FASTLSTM_TEST_BACKENDS": "cuda"}
    environment.pop("PYTEST_ADDOPTS", None)
    files = [str(TESTS / "api" / name) for name in ("test_backends_agree.py", "test_gradients.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "cuda and float32"]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0 and re.search(r"\d+ passed", done.stdout), done.stdout[-3000:] + done.stderr[-1000:]
