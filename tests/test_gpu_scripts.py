"""The scripts for a machine with a GPU, as far as a machine without one goes: on the stand-in, on made-up results."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cuda_row
import numpy as np
import pytest
from host_cuda import FakeCupy, compiler

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def script(name):
    """Load a file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def xp():
    with cuda_row.installed(FakeCupy()) as library:
        yield library


@needs_compiler
def test_the_benchmark_measures_and_writes_after_each_shape(xp, tmp_path, monkeypatch):
    gpu, out = script("gpu"), tmp_path / "benchmark.json"
    monkeypatch.setattr(gpu, "ROUNDS", (3, 4))
    monkeypatch.setattr(gpu, "compilation", lambda cupy: {})  # a second or more; the dry run below has it
    given = ["--out", str(out), "--hidden", "4", "5", "--batch", "2", "--steps", "3", "--no-torch"]
    assert gpu.main(given) == 0
    found = json.loads(out.read_text())
    assert [(shape["hidden"], shape["batch"]) for shape in found["shapes"]] == [(4, 2), (5, 2)]
    for shape in found["shapes"]:
        for mode in ("forward", "forward and backward"):
            assert shape["contenders"]["fastlstm float32"][mode]["us per step"] > 0
    calls = ("RawKernel of 5 arguments", "RawKernel of 12 arguments", "product")
    assert set(found["launch"]) == {f"{name}, {where}" for name in calls for where in ("host", "device")}
    assert gpu.main([*given, "--seconds", "-1"]) == 0
    assert json.loads(out.read_text())["skipped"] == [[4, 2], [5, 2]]


def test_the_benchmark_knows_its_shapes():
    gpu = script("gpu")
    options = gpu.parser().parse_args(["--out", "x.json"])
    order = list(gpu.shapes(options))
    assert len(order) == 28
    assert set(order) == {(h, b) for h in (64, 128, 168, 256, 512, 768, 1024) for b in (1, 16, 64, 256)}
    assert {batch for _, batch in order[:7]} == {16} and order[:2] == [(512, 16), (1024, 16)]
    assert options.steps == 512
    assert set(gpu.TOLERANCE) == set(gpu.CONTENDERS)


@needs_compiler
def test_torch_gets_the_same_work_and_is_compared(xp, tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    gpu, out = script("gpu"), tmp_path / "benchmark.json"
    monkeypatch.setattr(gpu, "ROUNDS", (3, 3))
    monkeypatch.setattr(gpu, "compilation", lambda cupy: {})
    monkeypatch.setattr(gpu, "launch_cost", lambda cupy: {})
    given = ["--out", str(out), "--hidden", "8", "--batch", "3", "--steps", "6", "--torch-device", "cpu"]
    tf32 = []
    original = gpu.torch_contender

    def contender(*arguments):
        made = original(*arguments)
        if arguments[-2] == "float16":  # as when there is no room for one of them
            raise torch.OutOfMemoryError("CUDA out of memory")

        def forward():
            tf32.append((arguments[-2:], torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
            return made.forward()

        return made._replace(forward=forward)

    monkeypatch.setattr(gpu, "torch_contender", contender)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)  # restored afterwards
    assert gpu.main(given) == 0
    found = json.loads(out.read_text())["shapes"][0]["contenders"]
    assert set(found) == {gpu.OURS, *gpu.CONTENDERS}
    assert found["torch float32"]["agrees"] and found["torch float32"]["error"] < 1e-5
    assert 1e-5 < found["torch bfloat16"]["error"] < 0.2
    assert all(found[name]["forward and backward"]["rounds"] == 3 for name in found if name != "torch float16")
    assert found["torch float16"] == {"failed": "OutOfMemoryError: CUDA out of memory"}
    assert all(on == products == wanted for (_, wanted), on, products in tf32) and len(tf32) >= 12
    # A time whose results are not ours is a failure, where nothing but float32 explains a difference.
    monkeypatch.setattr(gpu, "TOLERANCE", gpu.TOLERANCE | {"torch float32": 1e-12, "torch bfloat16": 1e-12})
    assert gpu.main(given) == 1
    found = json.loads(out.read_text())["shapes"][0]["contenders"]
    assert not found["torch float32"]["agrees"] and not found["torch bfloat16"]["agrees"]


@needs_compiler
def test_a_shape_that_fails_does_not_stop_the_next(xp, tmp_path, monkeypatch, capsys):
    gpu, out = script("gpu"), tmp_path / "benchmark.json"
    monkeypatch.setattr(gpu, "compilation", lambda cupy: {})
    monkeypatch.setattr(gpu, "launch_cost", lambda cupy: {})
    original = gpu.measure

    def measure(*arguments):
        if arguments[4] == 5:
            raise MemoryError("Out of memory")
        return original(*arguments)

    monkeypatch.setattr(gpu, "measure", measure)
    given = ["--out", str(out), "--hidden", "5", "4", "--batch", "2", "--steps", "3", "--no-torch"]
    assert gpu.main(given) == 1
    first, second = json.loads(out.read_text())["shapes"]
    assert first["error"] == "MemoryError: Out of memory" and gpu.OURS in second["contenders"]
    assert "H=5 B=2: MemoryError: Out of memory" in capsys.readouterr().err


@needs_compiler
def test_repetitions_are_compared_bit_by_bit(xp, tmp_path, monkeypatch, capsys):
    repeat, out = script("gpu_repeat"), tmp_path / "repeat.json"
    repeat.CASES = ((4, 3, 2, 8, 1, True, True, True), (1, 1, 1, 1, 1, False, False, False))
    assert repeat.main(["--times", "2", "--out", str(out), "--no-pool"]) == 0
    assert json.loads(out.read_text())["passed"]
    assert "0 of 2 differ" in capsys.readouterr().out
    # One bit of one result of one repetition.
    calls, original = [], repeat.results

    def flipped(*arguments):
        found = original(*arguments)
        calls.append(0)
        if len(calls) == 4:  # the reference, the first, a good one, and this
            found[3].view(np.uint32)[0, 0, 0] ^= np.uint32(1)  # the gradient by x
        return found

    monkeypatch.setattr(repeat, "results", flipped)
    assert repeat.main(["--times", "3", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [case["different"] for case in found["cases"]] == [1, 0, 0, 0] and not found["passed"]
    # Wrong from the first result on.
    monkeypatch.setattr(repeat, "results", lambda *arguments: [2 * value for value in original(*arguments)][:1])
    monkeypatch.setattr(repeat, "BOUNDS", {"float32": 1e-9})
    assert repeat.main(["--times", "0", "--out", str(out)]) == 1


MADE_UP = {
    "machine": {"GPU": "one that nobody has", "CuPy": "0"},
    "steps": 512,
    "launch": {"RawKernel, host": 4.5},
    "compilation": {"NVRTC": 1.25},
    "skipped": [[168, 256]],
    "shapes": [
        {"hidden": hidden, "batch": batch, "contenders": {
            name: {"agrees": name != "torch float16", "error": 0.0} | {
                mode: {"us per step": factor * hidden / 100, "quartiles": [0.9, 1.1], "rounds": 5}
                for mode in ("forward", "forward and backward")}
            for name, factor in (("fastlstm float32", 2.0), ("torch float32", 3.0), ("torch float16", 1.0))}}
        for hidden in (64, 128) for batch in (1, 16)
    ] + [{"hidden": 1024, "batch": 256, "error": "Out of memory"}, {"hidden": 768, "batch": 1, "contenders": {
        "fastlstm float32": {"agrees": True, "error": 0.0} | {
            mode: {"us per step": 7.0, "quartiles": [7.0, 7.0], "rounds": 3}
            for mode in ("forward", "forward and backward")},
        "torch float32": {"failed": "OutOfMemoryError: no room"}, "torch float16": {"failed": "no room"}}}],
}  # fmt: skip


def test_the_summary_says_what_was_measured_and_what_was_not(tmp_path, capsys):
    report = script("gpu_report")
    (tmp_path / "benchmark.json").write_text(json.dumps(MADE_UP))
    (tmp_path / "stages.tsv").write_text("suite\tpassed\t100\t900 passed\nsanitizer\tnot run\t0\tnot installed\n")
    cases = [{"dtype": dtype, "repetitions": 1000, "different": 0, "error": 1e-7} for dtype in ("float32", "float64")]
    (tmp_path / "repeat.json").write_text(json.dumps({"passed": True, "missing": 6, "cases": cases}))
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert page.strip() in capsys.readouterr().out
    for expected in (
        "| suite | passed | 100 s | 900 passed |", "0 of 2000 differ", "6 cases are missing",
        "one that nobody has", "4.50 us a launch",
        "| 64 | 16 | 1.28 | 1.92 (1.50x) | 0.64 (0.50x) **disagrees** |", "H=1024 B=256: Out of memory",
        "No time was left for H, B = (168, 256).", "| 768 | 1 | 7.00 | failed | failed |",
        "H=768 B=1, torch float32: OutOfMemoryError: no room", "NVRTC: 1.25 s",
        "torch float32: results at most 0.0e+00 from ours",
    ):  # fmt: skip
        assert expected in page
    if importlib.util.find_spec("matplotlib"):
        assert "![Microseconds per step](benchmark.png)" in page
        assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("content", [None, "", "{", json.dumps(MADE_UP | {"shapes": [], "launch": {}})])
def test_the_summary_of_a_run_that_was_cut_short(tmp_path, content):
    if content is not None:
        (tmp_path / "benchmark.json").write_text(content)
    assert script("gpu_report").main([str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert "Repetitions: not run." in page and "No picture" in page


# The whole script. On a machine with a GPU it would be itself that runs these tests, so they are not for there.
whole_script = pytest.mark.skipif(os.name != "posix" or cuda_row.on_gpu(), reason="a script for bash; there is a GPU")
STAGES = ("machine", "suite", "check", "repeat", "sanitizer-memcheck", "sanitizer-racecheck", "sanitizer-initcheck",
          "sanitizer-synccheck", "benchmark")  # fmt: skip

# An interpreter that does at once what the stages' programs do, or fails, or takes too long; but the report is real.
QUICK = r"""
case "$*" in
    *gpu_report.py*) exec "$REAL" "$@" ;;
    *is_available*) exit "${NO_CUPY:-0}" ;;
    "-c import numba") exit 1 ;;
    *${BAD:-no such program}*) echo broken; exit 3 ;;
    *${SLOW:-no such program}*) exec sleep 60 ;;
    *"-m pytest"*) for last; do :; done; echo "$*" >"${last#--junitxml=}"; echo "5 passed in 1 s" ;;
    *" info") echo "backend cuda   runs here" ;;
    *" check "*) echo "All within bounds." ;;
    *gpu_repeat.py*--out*) cp "$MADE_UP/repeat.json" "${@: -1}"; echo "every result is the first one, bit for bit" ;;
    *gpu_repeat.py*) echo "every result is the first one, bit for bit" ;;
    *gpu.py*) cp "$MADE_UP/benchmark.json" "$3"; echo "H=64 B=1: as made up" ;;
    "-c import "*) exit 0 ;;
    *) exit 99 ;;
esac
"""
# The stand-in for CuPy in the real programs; the comparison with the reference alone is left out: it takes ten seconds.
REAL = r"""
case "$*" in
    *" check "*) echo "All within bounds." ;;
    *) PYTHONPATH="$STAND_IN:$PYTHONPATH" exec "$REAL" "$@" ;;
esac
"""
SANITIZER = r"""
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 99
case "$2" in
    "${BAD_TOOL:-}") echo "========= Invalid __global__ read"; echo "========= ERROR SUMMARY: 1 error"; exit 9 ;;
    "${BLIND_TOOL:-}") echo "========= Target application terminated before first instrumented API call"; exit 0 ;;
    memcheck) while [ "$1" != "$PYTHON" ]; do shift; done; "$@" || exit ;;
    racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"; exit 0 ;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


class Script:
    """``.ci/gpu`` with another interpreter and another compute-sanitizer."""

    def __init__(self, folder, interpreter):
        self.out = folder / "results"
        path = folder / "bin"
        path.mkdir()
        for name, text in (("python", interpreter), ("compute-sanitizer", SANITIZER)):
            (path / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (path / name).chmod(0o755)
        (folder / "benchmark.json").write_text(json.dumps(MADE_UP))
        cases = [{"dtype": "float32", "repetitions": 1000, "different": 0, "error": 1e-7}]
        (folder / "repeat.json").write_text(json.dumps({"passed": True, "missing": 0, "cases": cases}))
        self.environment = os.environ | {
            "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(path / "python"), "REAL": sys.executable,
            "MADE_UP": str(folder), "STAND_IN": str(ROOT / "tests" / "host_cuda" / "machine"),
        }  # fmt: skip

    def __call__(self, **environment):
        done = subprocess.run(
            [ROOT / ".ci" / "gpu", self.out], env=self.environment | environment, capture_output=True, text=True,
            timeout=170, check=False,
        )  # fmt: skip
        rows = [line.split("\t") for line in (self.out / "stages.tsv").read_text().splitlines()]
        page = (self.out / "summary.md").read_text()
        for name, result, *_ in rows:
            assert f"| {name} | {result} |" in page
        return done, {name: result for name, result, *_ in rows}


@whole_script
def test_all_stages_run_and_leave_what_is_promised(tmp_path):
    script = Script(tmp_path, QUICK)
    done, results = script()
    assert done.returncode == 0, done.stdout + done.stderr
    assert results == dict.fromkeys(STAGES, "passed")
    left = {path.name for path in script.out.iterdir()}
    assert left >= {"repeat.json", "benchmark.json", "junit.xml", "summary.md", *(f"{name}.log" for name in STAGES)}
    page = (script.out / "summary.md").read_text()
    if importlib.util.find_spec("matplotlib"):
        assert (script.out / "benchmark.png").read_bytes().startswith(b"\x89PNG") and "(benchmark.png)" in page
    assert "0 of 1000 differ" in page and "one that nobody has" in page
    # Every test file that has a row for a device is among those given to pytest, but none that needs what is missing.
    given = (script.out / "junit.xml").read_text()
    for name in ("backends_agree", "against_torch", "inputs", "cuda_activations", "training", "demo"):
        assert f"/test_{name}.py" in given
    for name in ("cpu_plans", "activations", "packaging", "cuda_compiles", "cuda_mutations", "host_cuda"):
        assert f"/test_{name}.py" not in given


@whole_script
@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"BAD": "gpu_repeat.py --times 1000"}, {"repeat": "FAILED (3)"}),
        ({"BAD": "-m pytest", "SLOW": " check ", "FASTLSTM_GPU_LIMITS": "check=3"},
         {"suite": "FAILED (3)", "check": "out of time"}),
        ({"BAD_TOOL": "initcheck", "BLIND_TOOL": "synccheck"},
         {"sanitizer-initcheck": "FAILED (9)", "sanitizer-synccheck": "FAILED (it says nothing of success)"}),
        ({"SLOW": " info", "FASTLSTM_GPU_SECONDS": "4"},
         dict.fromkeys(STAGES, "no time left") | {"machine": "out of time"}),
    ],
    ids=["repeat fails", "suite fails, check is slow", "sanitizer", "no time"],
)  # fmt: skip
def test_a_stage_that_fails_does_not_stop_the_others(tmp_path, environment, expected):
    script = Script(tmp_path, QUICK)
    (tmp_path / "benchmark.json").write_text(json.dumps(MADE_UP | {"shapes": []}))  # no picture, which takes a second
    done, results = script(**environment)
    assert done.returncode == 1
    assert results == dict.fromkeys(STAGES, "passed") | expected


@whole_script
def test_an_earlier_run_is_not_taken_for_this_one(tmp_path):
    script = Script(tmp_path, QUICK)
    assert script()[0].returncode == 0
    done, results = script(BAD="gpu")
    assert done.returncode == 1 and results["benchmark"] == results["repeat"] == "FAILED (3)"
    assert not (script.out / "benchmark.json").exists()
    page = (script.out / "summary.md").read_text()
    assert "Benchmarks: not run." in page and "Repetitions: not run." in page


@whole_script
@needs_compiler
def test_the_real_programs_run_to_their_end_on_the_stand_in(tmp_path):
    script = Script(tmp_path, REAL)
    done, results = script(
        FASTLSTM_GPU_TESTS="tests/test_dropout.py -k cuda", FASTLSTM_GPU_TIMES="1", FASTLSTM_TEST_GPU="",
        FASTLSTM_GPU_BENCHMARK="--hidden 4 --batch 2 --steps 3 --no-torch",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert results == dict.fromkeys(STAGES, "passed")
    assert "no GPU, but a stand-in" in (script.out / "summary.md").read_text()
    assert "2 passed" in (script.out / "suite.log").read_text()
    assert json.loads((script.out / "repeat.json").read_text())["passed"]
    found = json.loads((script.out / "benchmark.json").read_text())
    assert found["shapes"][0]["contenders"]["fastlstm float32"]["forward"]["us per step"] > 0
    assert found["compilation"]["NVRTC"] > 0


@whole_script
def test_without_a_gpu_the_run_says_so_and_fails(tmp_path):
    out = tmp_path / "results"
    done = subprocess.run(
        [ROOT / ".ci" / "gpu", out], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "| machine | FAILED | 0 s | CuPy is missing, or finds no GPU |" in (out / "summary.md").read_text()
    assert subprocess.run([ROOT / ".ci" / "gpu"], capture_output=True, check=False).returncode == 2
