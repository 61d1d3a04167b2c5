"""The GPU benchmarks on the stand-in: what they measure, compare and write."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import cuda_row
import numpy as np
import nvrtc
import pytest
from host_cuda import FakeCupy, compiler

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # the scripts there are no package

import gpu
import gpu_common
import gpu_launch
import gpu_repeat

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
        ours = set() if case.work.kind == "stream" else set(peers.OUR_NARROWER)
        assert {"fastlstm cuda", "torch cuda", "torch cuda TF32", "torch cuda bfloat16"} <= set(case.values), (
            case.refused
        )
        assert set(peers.OUR_NARROWER) & set(case.values) == ours
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
    monkeypatch.setitem(peers._OF_GPU_TABLE, peers.BY_STEPS, wrong)
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


def test_microbenchmarks_measure_barriers_and_launches(xp, out):
    assert gpu_launch.main(["--out", str(out), "--rounds", "3"]) == 0
    cases = {case.name: case for case in gpu_common.load(out).cases}
    for name in ("launch, 20 arguments", "launch, one record", "product of 8 x 8"):
        assert set(cases[name].values) == {"device", "host"}
    for name in ("counter, grid of 2", "counter, grid of 4", "flags, 2 groups of 2", "exchange, 1 groups of 4"):
        assert len(cases[name].values["device"]) == gpu_launch.SAMPLES
    assert cases["kernels of one dtype, compiled"].values["host"]


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        ("put(now + k, t)", "put(now + k, t + (blockIdx.x == 1))", "words of another round"),
        (
            "if (threadIdx.x == 0) {\n        fence();",
            "if (threadIdx.x == 0 && blockIdx.x) {\n        fence();",
            "in vain",
        ),
    ],
    ids=["a stale word", "a block that never arrives"],
)
def test_microbenchmarks_notice_a_wrong_exchange_and_a_block_that_does_not_come(tmp_path, right, wrong, message):
    def change(code):
        if "in vain" in message:
            code = code.replace("1u << 22", "1u << 14")
        return code.replace(right, wrong)

    assert right in gpu_launch.SOURCE.read_text()
    with cuda_row.installed(FakeCupy(change=change)):
        assert gpu_launch.main(["--out", str(tmp_path / "B.json"), "--rounds", "2"]) == 1
    failed = {case.name: case.refused["device"] for case in gpu_common.load(tmp_path / "B.json").cases if case.refused}
    assert message in failed["exchange, 1 groups of 4"] and "counter, grid of 4" not in failed


@pytest.mark.skipif(nvrtc.library() is None, reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize(
    ("architecture", "cluster"), [(80, 1), (90, 1), (100, 1), *((90, c) for c in gpu_launch.CLUSTERS)]
)
def test_the_kernels_of_the_microbenchmarks_compile(architecture, cluster):
    source = gpu_launch.SOURCE.read_text()
    options = ("--std=c++17", f"-DCLUSTER={cluster}", *nvrtc.OPTIONS_OF_CUPY)
    cubin, log = nvrtc.compile_source(source, (*options, f"-arch=sm_{architecture}", "--ptxas-options=-v"))
    assert cubin.startswith(b"\x7fELF") and "warning" not in log
    expected = {"counter", "flags", "exchange", "empty_of_20", "empty_of_record"}
    expected |= {"cluster", "cluster_exchange"} if architecture >= 90 else set()
    found = nvrtc.resources(log)
    assert set(found) == expected
    assert all(taken.spills == 0 for taken in found.values())
    ptx = nvrtc.compile_source(source, (*options, f"-arch=compute_{architecture}"), "PTX")[0].decode()
    assert ("barrier.cluster.wait.acquire" in ptx) == (architecture >= 90)
    assert "ld.acquire.gpu" in ptx and "fence.acq_rel.gpu" in ptx
    (size,) = re.findall(r"empty_of_record_param_0\[(\d+)\]", ptx)
    assert int(size) == gpu_launch.RECORD.itemsize


def test_repetitions_are_compared_bit_by_bit(xp, tmp_path, monkeypatch, capsys):
    out = tmp_path / "A.json"
    monkeypatch.setattr(gpu_repeat, "CASES", ((4, 3, 2, 8, 1, True, True, True), (1, 1, 1, 1, 1, False, False, False)))
    assert gpu_repeat.main(["--times", "2", "--out", str(out), "--no-pool"]) == 0
    assert [case.facts["not bit-identical"] for case in gpu_common.load(out).cases] == [0, 0, 0, 0]
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
    assert [case.facts["not bit-identical"] for case in gpu_common.load(out).cases] == [1, 0, 0, 0]
    # Wrong from the first result on.
    monkeypatch.setattr(gpu_repeat, "results", lambda *arguments: [2 * value for value in original(*arguments)][:1])
    monkeypatch.setattr(gpu_repeat, "BOUNDS", {"float32": 1e-9})
    assert gpu_repeat.main(["--times", "0", "--out", str(out)]) == 1


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
