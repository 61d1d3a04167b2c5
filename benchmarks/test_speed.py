"""The shapes of ``benchmarks/cpu.py`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

For comparisons with an earlier state: ``--benchmark-save`` and ``--benchmark-compare``. For comparisons with
peers, ``python benchmarks/cpu.py`` and ``fastlstm bench`` take the sides in turn, which this does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark", reason='the benchmarks need pip install "fastlstm[bench]"')
sys.path.insert(0, str(Path(__file__).parent))  # the scripts beside this are no package

import cpu

import fastlstm
from fastlstm.bench import sides
from fastlstm.bench.work import DTYPES, Problem, Work

SIZES = {",".join(map(str, shape)): shape for shape in cpu.SHAPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["infer", "train"])
@pytest.mark.parametrize("shape", SIZES)
def test_sequence(benchmark, shape, kind, dtype):
    """A whole sequence, or a training pass over it."""
    problem = Problem.of(Work(*SIZES[shape], dtype, kind))
    with sides.cpu(problem, fastlstm.get_num_threads()) as side:
        y = benchmark.pedantic(side.call, rounds=5, warmup_rounds=1)[0]
    assert np.isfinite(y).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_step(benchmark, dtype):
    """One streaming step, the whole Python call."""
    problem = Problem.of(Work(1, 1, 32, 64, dtype, "stream"))
    with sides.cpu(problem, fastlstm.get_num_threads()) as side:
        assert np.isfinite(benchmark(side.call)).all()
