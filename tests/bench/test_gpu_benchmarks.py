"""The GPU benchmarks on the stand-in: what they measure, compare and write."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import cuda_row
import pytest
from host_cuda import FakeCupy, compiler

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the scripts there are no package

import gpu
import gpu_common

from fastlstm.backends.cuda import plans
from fastlstm.bench import clock, peers, run

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
CELLS = [[2, 8, "sequence", 1, False, 6], [3, 8, "ragged", 2, True, 6], [2, 8, "one step"]]


@pytest.fixture
def xp():
    with cuda_row.installed(FakeCupy()) as library:
        yield library


@pytest.fixture
def out(tmp_path, monkeypatch):
    for name, value in {"PAUSE": 0.0, "LONGEST_PAUSE": 0.0, "WARM": 0.0, "SAMPLE": 0.0, "MOST_ROUNDS": 3}.items():
        monkeypatch.setattr(clock, name, value)
    monkeypatch.setattr(peers, "TORCH_GPU", "cuda")  # which an option changes
    return tmp_path / "B.json"


def given(out, cells, *more):
    return ["--out", str(out), "--cells", json.dumps(cells), *more]


def test_the_table_has_its_cells_the_most_valuable_first():
    for batch in (1, 16, 64):
        for hidden in (128, 256, 512, 1024):
            assert gpu.Cell(batch, hidden, steps=512) in gpu.CELLS
    first = gpu.CELLS[:15]
    assert {cell.kind for cell in first} == {"sequence", "ragged", "one step"}
    assert any(cell.layers == 2 and cell.bidirectional for cell in first)
    assert {cell.batch for cell in gpu.CELLS[:4]} == {16}
    titles = [work.title for cell in gpu.CELLS for work in cell.works()]
    assert len(set(titles)) == len(titles)


def test_the_file_is_written_after_each_case_and_lists_what_is_not_reached(xp, out, monkeypatch):
    written, update = [], gpu_common.update

    def seen(path, *parts, **more):
        update(path, *parts, **more)
        written.append(len(gpu_common.load(path).cases))

    monkeypatch.setattr(gpu_common, "update", seen)
    assert gpu.main(given(out, CELLS, "--no-torch")) == 0
    assert written == [0, 1, 2, 3, 4, 5, 5]
    found = gpu_common.load(out)
    assert found.machine["GPU"] == "no GPU, but a stand-in" and len(found.cases) == 5
    for case in found.cases:
        assert set(case.values) == {"fastlstm cuda"} and case.facts["host, fastlstm cuda"] > 0
    ticks = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(ticks, 100.0))
    out.unlink()
    assert gpu.main(given(out, CELLS, "--no-torch", "--seconds", "50")) == 0
    late = [case for case in gpu_common.load(out).cases if case.refused]
    assert [case.refused for case in late] == 3 * [{run.EVERYBODY: gpu.UNREACHED}]


def test_torch_does_the_same_work_in_every_kind_of_cell(xp, out, monkeypatch, capsys):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert gpu.main(given(out, CELLS, "--torch-device", "cpu")) == 0
    for case in gpu_common.load(out).cases:
        assert {"fastlstm cuda", "torch cuda", "torch cuda TF32"} <= set(case.values), case.refused
    # A difference that float32 does not explain is a failure.
    monkeypatch.setitem(peers.CONTENDERS, "torch cuda", peers.CONTENDERS["torch cuda"]._replace(tolerance=1e-12))
    assert gpu.main(given(out, CELLS[:1], "--torch-device", "cpu")) == 1
    assert "computes something else" in capsys.readouterr().err
    torch.set_num_threads(threads)


def test_where_a_persistent_kernel_is_planned_the_step_path_is_timed_too(out, monkeypatch, capsys):
    cells = [[2, 8, "sequence", 1, True, 4], [2, 8, "one step"], [2, 8, "sequence", 1, False, 2]]
    with cuda_row.installed(FakeCupy(architecture="80", multiprocessors=132)) as xp:
        assert gpu.main(given(out, cells, "--no-torch", "--seconds", "1000")) == 0
        launched = [name for name in xp.pool.launched if name.startswith(("persistent", "step"))]
    assert set(launched) == {"persistent_forward", "persistent_backward", "step_forward", "step_backward"}
    assert plans.FORCED is None
    sides = {case.name: set(case.values) for case in gpu_common.load(out).cases}
    assert sides == {
        "4,2,8,8, both directions infer float32": {peers.CUDA, peers.BY_STEPS},
        "4,2,8,8, both directions train float32": {peers.CUDA, peers.BY_STEPS},
        "1,2,8,8 stream float32": {peers.CUDA},
        "2,2,8,8 infer float32": {peers.CUDA},  # too few steps for a persistent kernel
        "2,2,8,8 train float32": {peers.CUDA},
    }
    assert gpu_common.main(["page", str(out)]) == 0
    assert peers.BY_STEPS in capsys.readouterr().out
    # Its results are compared with those of the plan, and a difference is a failure.
    wrong = peers.contender(peers.BY_STEPS)._replace(tolerance=1e-12)
    monkeypatch.setitem(peers.OF_GPU_TABLE, peers.BY_STEPS, wrong)
    with cuda_row.installed(FakeCupy(architecture="80", multiprocessors=132)):
        assert gpu.main(given(out, cells[:1], "--no-torch")) == 1


def test_a_cell_that_fails_does_not_stop_the_next(xp, out, monkeypatch, capsys):
    original = run.Problem.of

    def of(work):
        if work.lengths:
            raise MemoryError("Out of memory")
        return original(work)

    monkeypatch.setattr(run.Problem, "of", of)
    assert gpu.main(given(out, [CELLS[1], CELLS[0]], "--no-torch")) == 1
    *failed, _, last = gpu_common.load(out).cases
    assert all("not enough memory" in case.refused[run.EVERYBODY] for case in failed) and last.values
    assert "ragged train float32: not enough memory" in capsys.readouterr().err


def test_the_cells_left_are_those_that_another_stage_has_not_measured(tmp_path):
    def chosen(*more):
        return gpu.chosen(gpu.parser().parse_args(["--out", "C.json", *more]))

    done = tmp_path / "B.json"
    given = ("--last-first", "--done", str(done))
    assert chosen() == list(gpu.CELLS) and chosen(*given) == list(gpu.CELLS)[::-1]
    first = [gpu.Case(work.title, {peers.CUDA: (1.0,)}) for work in gpu.CELLS[0].works()]
    failed = [gpu.Case(work.title, {}, refused={peers.CUDA: "no room"}) for work in gpu.CELLS[1].works()]
    gpu_common.update(done, [*first, *failed])
    assert chosen(*given) == list(gpu.CELLS[1:])


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_step_is_noted_even_if_the_file_is_none(tmp_path, content, capsys):
    path = tmp_path / "B.json"
    if content is not None:
        path.write_text(content)
    assert gpu_common.load(path) is None
    assert gpu_common.main(["step", str(path), "check", "passed", "3", "fine"]) == 0
    assert gpu_common.main(["page", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("### Stage B") and re.search(r"\| check +\| passed +\| 3 ", printed)
