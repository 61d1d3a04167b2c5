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

import pytest

FOLDER = Path(os.environ.get("FASTLSTM_GOLDENS") or Path(__file__).parents[3] / "shared" / "goldens")

needs_goldens = pytest.mark.skipif(
    not (FOLDER / "peer_goldens.py").is_file(),
    reason="the golden values of other projects are not here: shared/goldens beside the checkout, or FASTLSTM_GOLDENS",
)

# How many cases there are, so that none is lost, and what the model does not have yet. A case that becomes possible is
# to be taken out of this list; test_the_list_of_what_is_not_supported_is_the_goldens_own fails until then.
CASES = {"onnxruntime_cases": 16, "rtneural_cases": 3, "keras_cases": 16}
OTHER_CASES = 44
PREFIX = "ONNXRuntime_TestLSTM"
UNSUPPORTED = {
    "LargeBatchWithClip#1": "clip",
    f"{PREFIX}ForwardPeepHole#1": "peephole",
    f"{PREFIX}BidirectionalBasic#1": "peephole",
    f"{PREFIX}ForwardNoBiasUsePeepholes#1": "peephole",
    f"{PREFIX}ForwardInputForget#1": "peephole, input_forget",
    f"{PREFIX}ForwardClip#1": "peephole, clip",
    f"{PREFIX}Backward#1": "peephole",
    f"{PREFIX}Activation#1": "activations",
    f"{PREFIX}BatchReallocation#1": "activations",
    f"{PREFIX}BatchReallocation#2": "activations",
    f"{PREFIX}OutputWrite#1": "activations",
    f"{PREFIX}OutputWrite#2": "activations",
    f"{PREFIX}SequenceLengthPartialZeros#1": "activations",
    f"{PREFIX}SequenceLengthShorterThanInputSequenceLength#1": "peephole",
    f"{PREFIX}SequenceLengthShorterThanInputSequenceLengthNoP#1": "peephole",
    "BackwardCompute#1": "gradient from given gates (the tape is opaque)",
}
OTHER_UNSUPPORTED = {f"TensorFlow.js LSTM layer, values {n} of 10": "hard sigmoid gates" for n in range(1, 11)}


@pytest.fixture(scope="module")
def goldens():
    """Load the module that makes the cases from the values."""
    spec = importlib.util.spec_from_file_location("peer_goldens", FOLDER / "peer_goldens.py")
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # the folder is not ours
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


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
def test_the_list_of_what_is_not_supported_is_the_goldens_own(goldens, others):
    found = {}
    for suite in CASES:
        for case in getattr(goldens, suite)():
            if not isinstance(case, goldens.Case):
                _, name, missing = case
                found[name] = ", ".join(missing)
    assert found == UNSUPPORTED
    (line,) = (line for line in others if line.startswith("not expressible"))
    assert f"{len(OTHER_UNSUPPORTED)} distinct sets" in line and "hard sigmoid" in line


@needs_goldens
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.xfail(run=False, reason=f"not supported: {missing}"))
        for name, missing in (UNSUPPORTED | OTHER_UNSUPPORTED).items()
    ],
)
def test_case_that_is_not_supported_yet(case):
    raise AssertionError(f"{case} is counted, not run")
