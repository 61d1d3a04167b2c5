"""The GPU benchmarks on the stand-in: what they measure, compare and write."""

from __future__ import annotations

import bench_data
import cuda_row
import gpu
import pytest
from host_cuda import FakeCupy, compiler

from fastlstm.backends.cuda import plans
from fastlstm.bench import peers, results, run
from fastlstm.bench.work import Work

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
STREAM, PLAIN = Work(1, 2, 8, 8, kind="stream"), Work(2, 2, 8, 8, kind="train")
WORKS = (PLAIN, Work.ragged(6, 3, 8, 8), STREAM)


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Run the program on some works; its status, and the cases."""
    bench_data.without_pauses(monkeypatch)

    def run_on(works, *more, sides=gpu.OURS, **device):
        monkeypatch.setattr(gpu, "WORKS", works)
        monkeypatch.setattr(gpu, "SIDES", sides)
        out = tmp_path / "B.json"
        out.unlink(missing_ok=True)
        with cuda_row.installed(FakeCupy(**device)):
            status = gpu.table("--out", str(out), *more)
        return status, results.load(out).cases

    return run_on


def test_the_table_begins_with_one_batch_at_all_sizes_and_one_of_each_other_kind():
    assert len(set(gpu.WORKS)) == len(gpu.WORKS)
    assert {work.shape for work in gpu.WORKS} >= {(512, b, h, h) for b in (1, 16, 64) for h in (128, 256, 512, 1024)}
    first = gpu.WORKS[:13]
    assert {work.batch for work in first[:8]} == {16} and {work.kind for work in first} == {"infer", "train", "stream"}
    assert any(work.layers == 2 and work.bidirectional for work in first) and any(work.lengths for work in first)


def test_what_the_time_does_not_reach_is_listed_and_left_to_another_stage(measured, monkeypatch, tmp_path):
    done, ticks = tmp_path / "B.json", iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(ticks, 100.0))
    status, (first, *left) = measured(WORKS, "--seconds", "50")
    assert status == 0 and set(first.values) == {peers.CUDA}
    assert [case.refused for case in left] == 2 * [{run.EVERYBODY: gpu.UNREACHED}]
    done = done.rename(tmp_path / "done.json")
    for works, message in ((WORKS[1:], "measured the rest"), (WORKS[::-1], "began with the last")):
        _, cases = measured(WORKS, "--done", str(done))
        assert [case.work for case in cases if case.values] == list(works), message
        done.unlink(missing_ok=True)  # a stage that has measured nothing


def test_torch_does_the_same_work_and_a_difference_is_a_failure(measured, monkeypatch, capsys):
    pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    monkeypatch.setattr(peers, "TORCH_GPU", "cpu")
    sides = gpu.SIDES
    status, cases = measured(WORKS, sides=sides)
    for case in cases:  # none has a persistent kernel, and a step of a stream is computed in float32
        unable = {peers.BY_STEPS, *(sides[-2:] if case.work.kind == "stream" else ())}
        assert status == 0 and set(case.values) == {*sides} - unable, case.refused
    monkeypatch.setitem(peers.CONTENDERS, "torch cuda", peers.CONTENDERS["torch cuda"]._replace(tolerance=1e-12))
    assert measured([PLAIN], sides=sides)[0] == 1 and "computes something else" in capsys.readouterr().out


def test_where_a_persistent_kernel_is_planned_the_step_path_is_timed_and_compared_too(measured, monkeypatch):
    device = {"architecture": "80", "multiprocessors": 132}
    long = Work(4, 2, 8, 8, kind="train", bidirectional=True)
    status, cases = measured([long, STREAM, PLAIN], **device)  # PLAIN has too few steps
    sides = [set(case.values) for case in cases]
    assert status == 0 and sides == [{peers.CUDA, peers.BY_STEPS}, {peers.CUDA}, {peers.CUDA}] and plans.FORCED is None
    wrong = peers.CONTENDERS[peers.BY_STEPS]._replace(tolerance=1e-12)  # both paths sum in another order
    monkeypatch.setitem(peers.CONTENDERS, peers.BY_STEPS, wrong)
    assert measured([long], **device)[0] == 1


def test_a_case_that_fails_does_not_stop_the_next(measured, monkeypatch, capsys):
    def of(work, original=run.Problem.of):
        if work.lengths:
            raise MemoryError("of course")
        return original(work)

    monkeypatch.setattr(run.Problem, "of", of)
    status, (failed, last) = measured([WORKS[1], PLAIN])
    assert status == 1 and failed.refused == {run.EVERYBODY: "not enough memory: of course"} and last.values
    assert f"ragged train float32: {run.EVERYBODY}: not enough memory" in capsys.readouterr().out
