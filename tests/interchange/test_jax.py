"""Arrays of JAX, and the recipe that makes an LSTM a function of JAX."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from harness import BackendUnderTest

NAMES = ["arrays_are_shared_and_run", "recipe_has_our_gradients", "deep_recipe_has_our_gradients"]


@pytest.mark.parametrize("name", NAMES)
def test_with_jax_in_a_process_of_its_own(name):
    if importlib.util.find_spec("jax") is None:
        pytest.skip("jax is not installed")
    if missing := BackendUnderTest("cpu").missing:
        pytest.skip(str(missing))
    program = Path(__file__).parent / "jax_program.py"
    done = subprocess.run([sys.executable, program, name], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
