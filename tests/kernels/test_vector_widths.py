"""The CPU kernels with vectors narrower than this machine's, as they run on older processors: the same comparison.

Each width and dtype is a process of its own, since the kernels are made for one width, and compiling them for one dtype
takes some twenty seconds; after the first run they are in the kernel cache. So only float64 with vectors of 16 bytes is
tested by default: two numbers to a vector, which no test on a newer processor sees. ``FASTLSTM_TEST_WIDTHS=16,32``
tests these widths with both dtypes.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close

from fastlstm import LSTM

_asked = os.environ.get("FASTLSTM_TEST_WIDTHS")
BUILDS = [(int(width), dtype) for width in (_asked or "").split(",") if width for dtype in ("float32", "float64")]

# H below, at and beyond whole vectors and tiles of either width and dtype; products ahead and not; ragged and not.
CASES = [
    *(Case(4, 7, 5, hidden, 2, hidden % 2 == 1, lengths="zeros") for hidden in (1, 3, 5, 8, 15, 33)),
    *(Case(3, batch, 9, 18) for batch in (1, 2, 6, 13)),
    Case(6, 3, 17, 16, bias=False),
    Case(5, 24, 32, 65, bidirectional=True, lengths="zeros"),
]


def compare(name):
    """Compare every case in a dtype with the reference, streaming steps too; how many results were compared."""
    from fastlstm.kernels.cpu import vector

    assert int(os.environ["FASTLSTM_VECTOR_BYTES"]) == vector.VECTOR_BYTES
    cpu, dtype, compared = BackendUnderTest("cpu"), np.dtype(name), 0
    for case in CASES:
        expected = solve(problem(case), REFERENCE)
        p = problem(case).astype(dtype)
        found = solve(p, cpu)
        assert_close("agreement", found, expected, backend="cpu", dtype=dtype)
        compared += len(found)
        if case.bidirectional or case.lengths:
            continue
        lstm = LSTM(case.inputs, case.hidden, case.layers, case.bias, dtype=dtype)
        lstm.params.update(p.params)
        # A second call may be a prepared call of a small batch.
        for model, x in itertools.product((lstm, lstm.freeze()), (p.x, p.x[:1])):
            with cpu.active():
                first, _ = model.step(x[0], p.state)
                y, _ = model(x, p.state)
            whole = {"first": expected["y"][0], "y": expected["y"][: len(x)]}
            assert_close("agreement", {"first": first, "y": y}, whole, backend="cpu", dtype=dtype)
            compared += 2
    return compared


@pytest.mark.parametrize(("width", "dtype"), BUILDS or [(16, "float64")])
def test_narrower_vectors_give_the_float64_reference(width, dtype):
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    from fastlstm.kernels.cpu import vector

    if width >= vector.VECTOR_BYTES:
        pytest.skip(f"vectors here have {vector.VECTOR_BYTES} bytes: all other tests are about them")
    path = os.pathsep.join(filter(None, [os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, dtype], env=os.environ | {"FASTLSTM_VECTOR_BYTES": str(width), "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


@pytest.mark.parametrize("wrong", ["wide", "24", "0"])
def test_a_width_that_there_is_not_is_refused(wrong):
    if BackendUnderTest("cpu").missing:
        pytest.skip(str(BackendUnderTest("cpu").missing))
    code = "import numpy, fastlstm; fastlstm.LSTM(1, 1)(numpy.zeros((1, 1, 1), 'f'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"FASTLSTM_VECTOR_BYTES": wrong},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert f"BackendError: FASTLSTM_VECTOR_BYTES must be 16, 32 or 64, got '{wrong}'" in done.stderr


if __name__ == "__main__":
    sys.stdout.write(str(compare(sys.argv[1])))
