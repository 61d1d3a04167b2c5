"""The works of ``benchmarks/study.py`` under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

For comparisons with an earlier state: ``--benchmark-autosave`` before, ``--benchmark-compare`` after. Only our own side
runs here; ``benchmarks/study.py`` takes it and its peers in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pytest_benchmark", reason='the benchmarks need pip install "fastlstm[bench]"')
sys.path.insert(0, str(Path(__file__).parent))  # the scripts beside this are no package

from studies import growth, hydrology, loop, ragged, threads

import fastlstm
from fastlstm.bench import sides
from fastlstm.bench.work import Problem, Work

TRAINING = [shape for axis in growth.SIZES for shape in growth.shapes(axis)]


def run(benchmark, work, count=None):
    """Time a work on our side."""
    with sides.cpu(Problem.of(work), count or fastlstm.get_num_threads()) as side:
        benchmark.pedantic(side.call, rounds=5, warmup_rounds=1)


def named(works):
    return [pytest.param(work, id=f"{work.name} {work.kind}") for work in works]


@pytest.mark.parametrize("work", named(Work(*hydrology.SHAPE, kind=kind) for kind in hydrology.KINDS))
def test_hydrology(benchmark, work):
    run(benchmark, work)


RAGGED = [Work.ragged(*shape, kind=kind) for shape in ragged.SHAPES for kind in ragged.KINDS]


@pytest.mark.parametrize("work", named(RAGGED))
def test_ragged(benchmark, work):
    run(benchmark, work)


@pytest.mark.parametrize("work", named(Work(*shape, kind="train") for shape in TRAINING))
def test_growth(benchmark, work):
    run(benchmark, work)


@pytest.mark.parametrize("count", range(1, fastlstm.get_num_threads() + 1))
@pytest.mark.parametrize("work", named(Work(*shape, kind=kind) for shape in threads.SHAPES for kind in threads.KINDS))
def test_threads(benchmark, work, count):
    run(benchmark, work, count)


def test_loop(benchmark):
    """The closed loop, one call of step for each time step."""
    problem = Problem.of(loop.WORK)
    with sides.cpu(problem, fastlstm.get_num_threads()):
        h = benchmark.pedantic(loop.ours(problem, fastlstm.get_num_threads()), rounds=5, warmup_rounds=1)
    assert np.isfinite(h).all()


def test_vowels(benchmark):
    """An epoch of training on JapaneseVowels, from the same weights each time."""
    pytest.importorskip("sktime", reason='the data come in a package: pip install "fastlstm[demo]"')
    from studies import vowels

    learned, _ = vowels.load_utterances()

    def begin():
        rng = np.random.default_rng(0)
        return (vowels.Ours(rng, learned.frames.shape[-1]), 0, rng, learned), {}

    benchmark.pedantic(vowels.epoch_of, setup=begin, rounds=5, warmup_rounds=1)
