"""The program of `.ci/gpu` that repeats passes on a GPU, on the stand-in: it notices every difference."""

from __future__ import annotations

import cuda_row
import gpu_repeat
import numpy as np
import pytest
from host_cuda import FakeCupy, compiler

from fastlstm.bench import results

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def xp():
    with cuda_row.installed(FakeCupy()) as library:
        yield library


def test_repetitions_are_compared_bit_by_bit(xp, tmp_path, monkeypatch, capsys):
    out = tmp_path / "A.json"
    monkeypatch.setattr(gpu_repeat, "CASES", ((4, 3, 2, 8, 1, True, True, True), (1, 1, 1, 1, 1, False, False, False)))
    assert gpu_repeat.main(["--times", "2", "--out", str(out), "--no-pool"]) == 0
    assert [case.facts["not bit-identical"] for case in results.load(out).cases] == [0, 0, 0, 0]
    assert "0 of 2 differ" in capsys.readouterr().out
    # One bit of one result of one repetition.
    calls, original = [], gpu_repeat.results

    def flipped(*arguments):
        found = original(*arguments)
        calls.append(0)
        if len(calls) == 4:  # the reference, the first, a good one, and this
            found[3].view(np.uint32)[0, 0, 0] ^= np.uint32(1)  # the gradient by x
        return found

    monkeypatch.setattr(gpu_repeat, "results", flipped)
    assert gpu_repeat.main(["--times", "3", "--out", str(out)]) == 1
    assert [case.facts["not bit-identical"] for case in results.load(out).cases] == [1, 0, 0, 0]
    # Wrong from the first result on.
    monkeypatch.setattr(gpu_repeat, "results", lambda *arguments: [2 * value for value in original(*arguments)][:1])
    monkeypatch.setattr(gpu_repeat, "BOUNDS", {"float32": 1e-9})
    assert gpu_repeat.main(["--times", "0", "--out", str(out)]) == 1
