"""The GPU benchmarks on the stand-in: what they measure, compare and write, and the documents made of it."""

from __future__ import annotations

import copy
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

import figures
import gpu
import gpu_common
import gpu_launch
import gpu_repeat
from readme import gpu as shown

from fastlstm.backends.cuda import plans

pytestmark = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
CELLS = [[2, 8, "sequence", 1, False, 6], [3, 8, "ragged", 2, True, 6], [2, 8, "one step"]]


@pytest.fixture
def xp():
    with cuda_row.installed(FakeCupy()) as library:
        yield library


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ROUNDS", (3, 4))
    return tmp_path / "B.json"


@pytest.fixture
def torch():
    library = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    flags = library.backends.cudnn.allow_tf32, library.backends.cuda.matmul.allow_tf32
    threads = library.get_num_threads()
    library.set_num_threads(1)
    yield library
    library.set_num_threads(threads)
    library.backends.cudnn.allow_tf32, library.backends.cuda.matmul.allow_tf32 = flags


def given(out, cells, *more):
    return ["--out", str(out), "--cells", json.dumps(cells), *more]


def read(out):
    content = json.loads(out.read_text())
    assert content["format"] == shown.FORMAT and content["stage"] == out.stem
    return content


def test_the_table_has_its_cells_the_most_valuable_first():
    cells = set(gpu.CELLS)
    for batch in (1, 16, 64):
        for hidden in (128, 256, 512, 1024):
            assert gpu.Cell(batch, hidden, steps=512) in cells
    first = gpu.CELLS[:15]
    assert {cell.kind for cell in first} == {"sequence", "ragged", "one step"}
    assert any(cell.layers == 2 and cell.bidirectional for cell in first)
    assert {cell.batch for cell in gpu.CELLS[:4]} == {16}
    assert len({str(cell) for cell in gpu.CELLS}) == len(gpu.CELLS)
    assert set(gpu.TOLERANCE) == set(gpu.SIDES)
    assert set(gpu.SIDES.values()) == {("float32", False), ("float32", True), ("float16", False), ("bfloat16", False)}


def test_the_file_is_written_after_each_cell_and_names_what_is_skipped(xp, out, monkeypatch):
    written, update = [], gpu_common.update

    def seen(path, **parts):
        update(path, **parts)
        written.append(len(read(path).get("table", [])))
        assert [found.name for found in path.parent.iterdir()] == [path.name]

    monkeypatch.setattr(gpu_common, "update", seen)
    assert gpu.main(given(out, CELLS, "--no-torch")) == 0
    assert written == [0, 1, 2, 3]
    found = read(out)
    assert found["skipped"] == [] and found["machine"]["GPU"] == "no GPU, but a stand-in"
    for cell in found["table"]:
        side = cell["sides"][gpu.OURS]
        assert set(side) == {"agrees", "error", "plan", *shown.MODES[: 1 if cell["kind"] == "one step" else 2]}
        for mode in set(side) & set(shown.MODES):
            for clock in ("device", "host"):
                low, middle, high = side[mode][clock]
                assert 0 < low <= middle <= high
            assert 3 <= side[mode]["rounds"] <= 4
    ticks = iter([0.0, 1.0, 100.0])
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(ticks, 100.0))
    assert gpu.main(given(out, CELLS, "--no-torch", "--seconds", "50")) == 0
    found = read(out)
    assert [cell["name"] for cell in found["table"]] == ["B=2 H=8"]
    assert found["skipped"] == ["B=3 H=8, 2 layers, both directions, ragged", "B=2 H=8, one step"]


def test_the_host_time_ends_before_the_device_is_waited_for(xp, monkeypatch):
    events, clock = [], iter([1.0, 1.5])
    monkeypatch.setattr(gpu_common.time, "perf_counter", lambda: events.append("clock") or next(clock))
    event = type(xp.cuda.Event())
    monkeypatch.setattr(event, "record", lambda self: events.append("record"))
    for waits in (event, type(xp.cuda.get_current_stream())):
        monkeypatch.setattr(waits, "synchronize", lambda self: events.append("wait"))
    monkeypatch.setattr(xp.cuda, "get_elapsed_time", lambda start, end: 2.0)
    assert gpu_common.elapsed(xp, lambda: events.append("call")) == (2000.0, 500_000.0)
    assert events == ["wait", "record", "clock", "call", "clock", "record", "wait"]


def test_torch_does_the_same_work_in_every_kind_of_cell_and_its_kernels_are_named(xp, out, torch, monkeypatch):
    original, tf32 = gpu.torch_side, []

    def torch_side(*arguments):
        if arguments[-2] == "float16":  # as when there is no room for one of them
            raise torch.OutOfMemoryError("CUDA out of memory")
        made = original(*arguments)

        def forward():
            tf32.append((arguments[-1], torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return made.forward()

        return made._replace(forward=forward)

    monkeypatch.setattr(gpu, "torch_side", torch_side)
    monkeypatch.setattr(gpu, "SECONDS_OF_A_CELL", 0.0)
    assert gpu.main(given(out, CELLS, "--torch-device", "cpu", "--seconds", "1000")) == 0
    for cell in read(out)["table"]:
        sides = cell["sides"]
        assert set(sides) == {gpu.OURS, *gpu.SIDES}
        assert sides["torch float16"] == {"failed": "OutOfMemoryError: CUDA out of memory"}
        assert sides["torch float32"]["agrees"] and sides["torch float32"]["error"] < 1e-5
        assert 1e-5 < sides["torch bfloat16"]["error"] < 0.2
        for name in ("torch float32", "torch float32 TF32", "torch bfloat16"):
            assert any(re.search("mm|rnn|lstm|linear", kernel) for kernel, _ in sides[name]["kernels"])
            assert all(count > 0 for _, count in sides[name]["kernels"])
    assert {wanted for wanted, *_ in tf32} == {True, False}
    assert all(wanted == cudnn == products for wanted, cudnn, products in tf32)
    # A time whose results are not ours is a failure, where nothing but float32 explains a difference.
    monkeypatch.setattr(gpu, "TOLERANCE", gpu.TOLERANCE | {"torch float32": 1e-12})
    assert gpu.main(given(out, CELLS[:1], "--torch-device", "cpu")) == 1
    assert not read(out)["table"][0]["sides"]["torch float32"]["agrees"]


def test_where_the_plan_is_persistent_the_step_path_is_timed_too(out, torch, monkeypatch):
    monkeypatch.setattr(gpu, "SECONDS_OF_A_CELL", 0.0)
    with cuda_row.installed(FakeCupy(architecture="80")) as xp:
        cells = [[2, 8, "sequence", 1, False, 4], [2, 8, "one step"]]
        assert gpu.main(given(out, cells, "--torch-device", "cpu", "--seconds", "1000")) == 0
        kernels = [name for name in xp.pool.launched if name.startswith(("persistent", "step"))]
    sequence, step = (cell["sides"] for cell in read(out)["table"])
    assert "one launch a sequence" in sequence[gpu.OURS]["plan"] and sequence[gpu.STEPS]["agrees"]
    assert set(sequence) == {gpu.OURS, *gpu.SIDES, gpu.STEPS} and set(step) == {gpu.OURS, *gpu.SIDES}
    assert {"persistent_forward", "persistent_backward", "step_forward", "step_backward"} <= set(kernels)
    assert plans.FORCED is None
    assert gpu.STEPS in "\n".join(shown.comparison(read(out)["table"]))


def test_without_torch_the_table_has_our_side_and_says_so(xp, out, monkeypatch):
    def version(name):
        raise gpu_common.PackageNotFoundError(name)

    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(gpu_common, "version", version)
    assert gpu.main(given(out, CELLS[:1])) == 0
    found = read(out)
    assert set(found["table"][0]["sides"]) == {gpu.OURS}
    assert "no torch" in shown.machine_line(found)


def test_a_cell_that_fails_does_not_stop_the_next(xp, out, monkeypatch, capsys):
    original = gpu.measure

    def measure(*arguments):
        if arguments[-1].kind == "ragged":
            raise MemoryError("Out of memory")
        return original(*arguments)

    monkeypatch.setattr(gpu, "measure", measure)
    assert gpu.main(given(out, [CELLS[1], CELLS[0]], "--no-torch")) == 1
    first, second = read(out)["table"]
    assert first["failed"] == "MemoryError: Out of memory" and gpu.OURS in second["sides"]
    assert "ragged: MemoryError: Out of memory" in capsys.readouterr().err


def test_the_cells_left_are_those_that_another_stage_has_not_measured(tmp_path):
    def chosen(*more):
        return gpu.chosen(gpu.parser().parse_args(["--out", "C.json", *more]))

    assert chosen() == list(gpu.CELLS) and chosen("--last-first") == list(gpu.CELLS)[::-1]
    done = tmp_path / "B.json"
    assert chosen("--last-first", "--done", str(done)) == list(gpu.CELLS)[::-1]
    table = [{"name": str(gpu.CELLS[0])}, {"name": str(gpu.CELLS[1]), "failed": "no room"}]
    gpu_common.update(done, table=table)
    assert chosen("--last-first", "--done", str(done)) == list(gpu.CELLS[1:])


def test_microbenchmarks_measure_barriers_and_launches(xp, out):
    assert gpu_launch.main(["--out", str(out), "--rounds", "3"]) == 0
    cells = {cell["name"]: cell for cell in read(out)["launch"]}
    for name in ("launch, 20 arguments", "launch, one record", "product of 8 x 8"):
        assert cells[name]["host"][0] > 0 and cells[name]["device"][0] > 0
    for name in ("counter, grid of 2", "counter, grid of 4", "flags, 2 groups of 2", "exchange, 1 groups of 4"):
        assert cells[name]["device"][0] > 0
    assert cells["barrier.cluster"] == {"name": "barrier.cluster", "not run": "this device has no clusters"}
    assert cells["kernels of one dtype, compiled"]["host"][0] > 0


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
    failed = {cell["name"]: cell["failed"] for cell in read(tmp_path / "B.json")["launch"] if "failed" in cell}
    assert message in failed["exchange, 1 groups of 4"] and "counter, grid of 4" not in failed


@pytest.mark.skipif(nvrtc.library() is None, reason="the wheel nvidia-cuda-nvrtc is not installed")
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("cluster", [1, *gpu_launch.CLUSTERS])
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
    assert [case["different"] for case in read(out)["repeat"]] == [0, 0, 0, 0]
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
    assert [case["different"] for case in read(out)["repeat"]] == [1, 0, 0, 0]
    assert "1 of 12 repetitions differ" in shown.repetitions(read(out)["repeat"])
    # Wrong from the first result on.
    monkeypatch.setattr(gpu_repeat, "results", lambda *arguments: [2 * value for value in original(*arguments)][:1])
    monkeypatch.setattr(gpu_repeat, "BOUNDS", {"float32": 1e-9})
    assert gpu_repeat.main(["--times", "0", "--out", str(out)]) == 1


def side(factor, hidden, **more):
    clocks = {
        "device": [0.9 * factor * hidden / 100, factor * hidden / 100, 2.5 * hidden],
        "host": [1.0, 4321.0, 5000.0],
    }
    return {"agrees": True, "error": 1e-6} | dict.fromkeys(shown.MODES, clocks | {"rounds": 5}) | more


def made_up():
    """A stage B as a GPU would leave it."""
    table = [
        {"name": str(gpu.Cell(16, hidden)), **gpu.Cell(16, hidden)._asdict(), "sides": {
            gpu.OURS: side(2.0, hidden), "torch float32": side(3.0, hidden, kernels=[["persist|kernel", 512]]),
            "torch float32 TF32": side(1.0, hidden), "torch float16": side(1.0, hidden, agrees=False, error=0.5)}}
        for hidden in (128, 512)
    ]  # fmt: skip
    table[1]["sides"]["torch float16"] = {"failed": "no room"}
    table.append({"name": "B=64 H=1024", **gpu.Cell(64, 1024)._asdict(), "failed": "Out of memory"})
    machine = {"GPU": "a GPU that nobody has", "driver": "580.1", "CUDA": "13.0", "CuPy": "14.2", "torch": "2.11",
               "cuDNN": "91900", "TF32": "as each column says"}  # fmt: skip
    steps = [{"name": "table", "result": "passed", "seconds": 150, "remark": "3 of 5 cells measured"}]
    launch = [{"name": "counter, grid of 132", "device": [1.0, 1.25, 1.5]}, {"name": "flags", "failed": "in vain"}]
    return {"format": shown.FORMAT, "stage": "B", "made": "2000-01-02T03:04:05", "machine": machine, "launch": launch,
            "table": table, "skipped": ["B=1 H=128"], "steps": steps}  # fmt: skip


def test_results_of_a_gpu_make_its_tables_and_the_sentence_of_the_readme(tmp_path):
    reasons = tmp_path / "reasons.toml"
    reasons.write_text("")
    results = tmp_path / "results"
    (results / "made-up").mkdir(parents=True)
    before = figures.tables(results, reasons)
    assert figures.gpu_sentence(results) == shown.NOT_MEASURED
    (results / "made-up" / "B.json").write_text(json.dumps(made_up()))
    for name in ("summary-AB.md", "logs-AB.tar.gz"):  # committed as it came back
        (results / "made-up" / name).write_bytes(b"")
    text = figures.tables(results, reasons)
    assert text.startswith(before.rstrip()) and "## made-up\n\n### Stage B\n" in text
    for expected in (
        "*a GPU that nobody has; driver 580.1, CUDA 13.0, CuPy 14.2, torch 2.11, cuDNN 91900; TF32 as each column says;"
        " 2000-01-02*",
        "| counter, grid of 132 | 1.25 [1.00, 1.50] | - |", "| flags | failed: in vain | - |",
        "| B=16 H=128 | 2.56 [2.30, 320.00] | 3.84 (1.50) | 1.28 (**0.50**) | 1.28 (**0.50**, disagrees) | 4321 |",
        "| B=16 H=512 | 10.24 [9.22, 1280] | 15.36 (1.50) | 5.12 (**0.50**) | failed | 4321 | 4321 |",
        "- forward, torch float32: geometric mean of its time / ours 1.50 over 2 cells",
        "- B=64 H=1024: Out of memory", "- B=16 H=512, torch float16: no room",
        "- B=16 H=128, torch float16: results differ from ours by 5.0e-01",
        "| B=16 H=128 | `persist/kernel` x 512 | - |",
        "Not measured, because the time ran out: B=1 H=128.", "| table | passed | 150 s | 3 of 5 cells measured |",
    ):  # fmt: skip
        assert expected in text
    assert "torch float16: geometric mean" not in text  # of cells that agree, there is none
    sentence = figures.gpu_sentence(results)
    assert "not been measured" not in sentence and "`benchmarks/RESULTS.md`" in sentence
    for expected in ("a GPU that nobody has", "driver 580.1", "CUDA 13.0", "CuPy 14.2", "torch 2.11", "cuDNN 91900",
                     "1.50 forward (TF32 off, 2 cells)", "0.50 forward and backward (TF32 on, 2 cells)"):  # fmt: skip
        assert expected in sentence
    readme = figures.readme(figures.README.read_text(encoding="utf-8"), "the figures", sentence)
    assert shown.NOT_MEASURED not in readme and f"{figures.BEGIN_GPU}\n{sentence}\n{figures.END_GPU}" in readme
    assert "made-up" not in figures.section(results, tmp_path, reasons)  # which is of CPUs


@pytest.mark.parametrize("missing", ["machine", "launch", "table", "skipped", "steps"])
def test_a_stage_that_was_cut_off_is_shown_as_far_as_it_came(tmp_path, missing):
    content = copy.deepcopy(made_up())
    del content[missing]
    path = tmp_path / "B.json"
    path.write_text(json.dumps(content))
    assert "### Stage B" in "\n".join(shown.stage(shown.load(path)))
    assert ("Measured on" in shown.sentence([{"B": content}])) == (missing not in {"machine", "table"})


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_file_that_is_no_stage_is_none(tmp_path, content):
    path = tmp_path / "B.json"
    if content is not None:
        path.write_text(content)
    assert shown.load(path) is None
    gpu_common.step(path, "check", "passed", "3", "fine")
    assert read(path)["steps"] == [{"name": "check", "result": "passed", "seconds": 3, "remark": "fine"}]
