"""The tests of agreement and of gradients in float32, with the persistent kernels forced and with them forbidden.

By default the stand-in has none. Of the sizes of the tests of inference two are run, to save time, and repetitions are
compared in test_cuda_persistent.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from host_cuda import compiler

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("path", ["persistent", "step"])
def test_results_and_gradients_are_right_on_a_path_that_is_forced(path):
    environment = os.environ | {"FASTLSTM_CUDA_RECURRENCE": path, "FASTLSTM_TEST_BACKENDS": "cuda"}
    for name in ("PYTEST_ADDOPTS", "FASTLSTM_EXHAUSTIVE"):  # all that is chosen here runs each time
        environment.pop(name, None)
    files = [str(TESTS / "api" / name) for name in ("test_backends_agree.py", "test_gradients.py")]
    chosen = "cuda and float32 and not bit_identical and (not inference_and_steps or float32-17 or float32-65)"
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *files, "-k", chosen]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    for file in files:
        assert re.search(rf"{Path(file).name}::\S+ PASSED", done.stdout), f"no test of {file} ran"
    for kernel in ("forward", "backward"):
        launches = {name: int(re.search(rf"(\d+) {name}_{kernel}", done.stdout)[1]) for name in ("persistent", "step")}
        assert launches.pop(path) > 50 and not any(launches.values()), (kernel, done.stdout[-3000:])


def test_every_part_of_the_exhaustive_tests_comes_with_those_of_the_persistent_path():
    """What shows that the path is right and that its exchanges are synchronised does not wait for its turn."""
    environment = os.environ | {"FASTLSTM_EXHAUSTIVE": "99999/100000"}  # a part that is empty
    environment.pop("PYTEST_ADDOPTS", None)
    files = [__file__, str(Path(__file__).with_name("test_cuda_persistent_mutations.py"))]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    for name, fewest in (("forced", 2), ("by_flags", 10), ("a_cluster", 4)):
        assert len(re.findall(rf"::\w+_{name}(?:_is_noticed)?\[", done.stdout)) >= fewest, (name, done.stdout)
