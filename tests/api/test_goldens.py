"""Values that other projects' LSTM tests carry as literals or golden files, where a checkout has them beside it.

They are in ``../shared/goldens``, seen from the repository, or where ``FASTLSTM_GOLDENS`` says. Each case is run every
way there is: inference, training, frozen, functional, step by step, on the reference backend, in float32 and float64.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import peer_variants
import pytest

FOLDER = Path(os.environ.get("FASTLSTM_GOLDENS") or Path(__file__).parents[3] / "shared" / "goldens")

needs_goldens = pytest.mark.skipif(
    not (FOLDER / "peer_goldens.py").is_file(),
    reason="the golden values of other projects are not here: shared/goldens beside the checkout, or FASTLSTM_GOLDENS",
)

# How many cases there are, so that none is lost. ``peer_variants.py`` lists those that are of variants of the cell.
CASES = {"onnxruntime_cases": 16, "rtneural_cases": 3, "keras_cases": 16}
OTHER_CASES = 44


@pytest.fixture(scope="module")
def goldens():
    """Load the module that makes the cases from the values; it opens its file when it is imported."""
    spec = importlib.util.spec_from_file_location("peer_goldens", FOLDER / "peer_goldens.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is not ours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    with module.DATA:  # or the garbage collector finds an open file, and the test that is running then fails
        yield module


@needs_goldens
@pytest.mark.parametrize("suite", CASES)
def test_the_values_of_other_projects_are_met_every_way(goldens, suite):
    cases = [case for case in getattr(goldens, suite)() if isinstance(case, goldens.Case)]
    assert len(cases) == CASES[suite]
    wrong, ways = [], 0
    for case in cases:
        for way, found in goldens.ways(case):
            error, share = goldens.largest_error(case, found)
            ways += 1
            if not share <= 1:
                wrong.append(f"{case.name}, {way}: off by {error:.3g}, {share:.3g} times what is allowed")
    assert not wrong, "\n".join(wrong)
    assert ways >= 14 * len(cases), "seven ways at least, for two dtypes"


@pytest.fixture(scope="module")
def others():
    """Run the second module, a script that compares and prints; return its lines."""
    path = os.pathsep.join(filter(None, [str(FOLDER), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, FOLDER / "other_peer_goldens.py"], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@needs_goldens
def test_gradients_and_training_of_other_projects_are_met(others):
    assert others[-1] == f"{OTHER_CASES} cases, {OTHER_CASES} passed"
    assert not any(line.startswith("FAIL") for line in others)


@needs_goldens
def test_what_the_goldens_leave_out_is_listed(goldens, others):
    found = {}
    for suite in CASES:
        for case in getattr(goldens, suite)():
            if not isinstance(case, goldens.Case):
                _, name, missing = case
                found[name] = ", ".join(missing)
    assert found == peer_variants.ONNXRUNTIME
    (line,) = (line for line in others if line.startswith("not expressible"))
    assert f"{peer_variants.TENSORFLOW} distinct sets" in line and "hard sigmoid" in line
