"""The shapes of ``benchmarks/cpu.py`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

For comparisons with an earlier state: ``--benchmark-save`` and ``--benchmark-compare``. For comparisons with
peers, ``python benchmarks/cpu.py`` takes the sides in turn, which this does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark", reason='the benchmarks need pip install "fastlstm[bench]"')
sys.path.insert(0, str(Path(__file__).parent))  # the scripts beside this are no package

import cpu
import peers

import fastlstm

SIZES = {",".join(map(str, shape)): shape for shape in cpu.SHAPES}


@pytest.mark.parametrize("dtype", cpu.TOLERANCE)
@pytest.mark.parametrize("kind", ["infer", "train"])
@pytest.mark.parametrize("shape", SIZES)
def test_sequence(benchmark, shape, kind, dtype):
    """A whole sequence, or a training pass over it."""
    work = peers.Work(*SIZES[shape], dtype, kind == "train")
    run = peers.ours(work, fastlstm.get_num_threads())
    y = benchmark.pedantic(run, rounds=5, warmup_rounds=1)[0]
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", cpu.TOLERANCE)
def test_step(benchmark, dtype):
    """One streaming step, the whole Python call."""
    work = peers.Work(1, 1, 32, 64, dtype)
    model, (x, _) = work.model(), work.data()
    state = model.step(x[0])[1]
    h, _ = benchmark(model.step, x[0], state)
    assert np.isfinite(h).all()
