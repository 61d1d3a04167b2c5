"""``.ci/gpu`` without a GPU: each stage, its limits and its files, with programs that are quick, broken or hang."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import cuda_row
import pytest
from host_cuda import compiler

from fastlstm.bench import report
from fastlstm.bench.results import load

ROOT = Path(__file__).parents[2]

# On a machine with a GPU it would be the script itself that runs these tests, so they are not for there.
pytestmark = pytest.mark.skipif(os.name != "posix" or cuda_row.on_gpu(), reason="a script for bash; there is a GPU")
STEPS = {
    "A": ["check", "tests", "repeat"],
    "B": ["table"],
    "C": ["memcheck", "racecheck", "suite", "repeat", "table"],
}

# An interpreter that does at once what the programs do, or fails, or hangs whatever it is sent; the report is real.
QUICK = r"""
echo "$*" >>"$NOTES/calls"
case "$*" in
    ${HANG:-no such program}) echo $$ >>"$NOTES/hanging"; trap '' INT TERM; while :; do sleep 1; done ;;
    *"gpu.py step"* | *"gpu.py page"*) exec "$REAL" "$@" ;;
    *find_spec*) echo "${MISSING:-}" ;;
    ${BAD:-no such program}) echo "broken in $PWD"; exit 3 ;;
    ${SLOW:-no such program}) exec sleep 60 ;;
    *"-m pytest"*) env >"$NOTES/environment"; echo "5 passed in 1 s" ;;
    *" info") echo "backend cuda       runs here" ;;
    *" check --backend cuda") echo "All within bounds." ;;
    *gpu_repeat.py*) echo "in $PWD"; echo "every result is the first one, bit for bit" ;;
    *"gpu.py table"*) echo "512,16,512,512 infer float32: fastlstm cuda 12.5 ms" ;;
    *) exit 99 ;;
esac
"""
# The stand-in for CuPy in the real programs; the comparison with the reference alone is left out: it takes ten seconds.
# And so are the eight processes of pytest-xdist.
REAL = r"""
case "$*" in
    *" check --backend"*) echo "All within bounds." ;;
    *find_spec*) echo xdist ;;
    *) PYTHONPATH="$STAND_IN:$PYTHONPATH" exec "$REAL" "$@" ;;
esac
"""
SANITIZER = r"""
[ "$1 $3 $4" = "--tool --error-exitcode 9" ] || exit 99
case "$2" in
    "${BAD_TOOL:-}") echo "========= Invalid __global__ read"; echo "========= ERROR SUMMARY: 1 error"; exit 9 ;;
    "${BLIND_TOOL:-}") echo "========= Target application terminated before first instrumented API call"; exit 0 ;;
    "${UNSUPPORTED:-}") echo "========= Error: Device not supported"; exit 1 ;;
    memcheck) while [ "$1" != "$PYTHON" ]; do shift; done; "$@" || exit ;;
    racecheck) echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"; exit 0 ;;
esac
echo "========= ERROR SUMMARY: 0 errors"
"""


class Script:
    """``.ci/gpu`` with another interpreter and another compute-sanitizer."""

    def __init__(self, folder, interpreter=QUICK):
        self.folder, self.out = folder, folder / "results"
        path = folder / "bin"
        path.mkdir()
        for name, text in (("python", interpreter), ("compute-sanitizer", SANITIZER)):
            (path / name).write_text(f"#!/usr/bin/env bash\n{text}")
            (path / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(path / "python"), "REAL": sys.executable,
            "NOTES": str(folder), "STAND_IN": str(ROOT / "tests" / "host_cuda" / "machine"),
        }  # fmt: skip

    def start(self, *stages, **environment):
        return subprocess.Popen(
            [ROOT / ".ci" / "gpu", self.out, *stages], env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def wait_until_it_hangs(self):
        """Return the process that hangs."""
        file, deadline = self.folder / "hanging", time.monotonic() + 60
        while not (file.exists() and file.read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return int(file.read_text())

    def finish(self, process, timeout=170):
        """Wait for its end; its status and its output."""
        try:
            output, _ = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return process.returncode, output

    def __call__(self, *stages, **environment):
        """Run it; its status, its output, and the result of each step by stage."""
        status, output = self.finish(self.start(*stages, **environment))
        return status, output, self.results()

    def results(self):
        assert len(list(self.out.iterdir())) <= 8
        stages = {path.stem: load(path) for path in self.out.glob("*.json")}
        return {name: {step["name"]: step["result"] for step in stage.steps} for name, stage in stages.items()}

    def logs(self, stages):
        """Every log in the archive, by name."""
        with tarfile.open(self.out / f"logs-{stages}.tar.gz") as archive:
            files = [member for member in archive if member.isfile()]
            return {Path(file.name).name: archive.extractfile(file).read().decode() for file in files}

    def call_of_pytest(self):
        """The only call of pytest."""
        (given,) = [line for line in (self.folder / "calls").read_text().splitlines() if "-m pytest" in line]
        (self.folder / "calls").unlink()
        return given


def passed(*stages):
    """What each step of these stages says when all is well; the first stage looks at the machine, too."""
    found = {stage: dict.fromkeys(STEPS[stage], "passed") for stage in stages}
    found[stages[0]]["machine"] = "passed"
    return found


@pytest.mark.parametrize("stages", [("C",), ("B", "A", "B"), ()], ids=" ".join)
def test_each_stage_runs_and_leaves_what_is_promised(tmp_path, stages):
    script = Script(tmp_path)
    status, output, results = script(*stages)
    assert status == 0, output
    chosen = "".join(sorted(set(stages))) or "ABC"
    assert results == passed(*chosen)
    expected = {*(f"{stage}.json" for stage in chosen), f"summary-{chosen}.md", f"logs-{chosen}.tar.gz"}
    assert {path.name for path in script.out.iterdir()} == expected
    page = (script.out / f"summary-{chosen}.md").read_text()
    logs = script.logs(chosen)
    for stage in chosen:
        *_, table = report.text(load(script.out / f"{stage}.json"))
        assert table in page and table in output
        assert set(logs) >= {f"{stage}-{step}.log" for step in STEPS[stage]}
    assert output.endswith(f"{table}\n")
    for text in (page, *logs.values()):
        assert str(ROOT) not in text


def test_the_tests_run_in_eight_processes_where_xdist_is_there(tmp_path):
    script = Script(tmp_path)
    script("A")
    given = script.call_of_pytest()
    for name in ("cuda_device", "backends_agree", "gradients"):
        assert f"/test_{name}.py" in given
    assert " -n 8 --dist loadgroup " in given and "test_training" not in given
    assert script("C", MISSING="xdist numba")[0] == 0
    given = script.call_of_pytest()
    assert " -n 8 " not in given
    # Every test file that has a row for a device is among those of the whole suite, but none that needs Numba.
    for name in ("backends_agree", "against_torch", "inputs", "cuda_activations", "training", "demo"):
        assert f"/test_{name}.py" in given
    for name in ("cpu_plans", "activations", "packaging", "cuda_compiles", "cuda_mutations", "host_cuda"):
        assert f"/test_{name}.py" not in given


def test_nothing_in_the_environment_falsifies_what_is_measured(tmp_path):
    script = Script(tmp_path)
    set_by_the_caller = dict.fromkeys(
        ("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "CUBLAS_EMULATE_SINGLE_PRECISION", "CUBLASLT_LOG_LEVEL",
         "CUPY_CUDA_PER_THREAD_DEFAULT_STREAM", "CUPY_ACCELERATORS", "CUPY_TF32", "CUPY_GPU_MEMORY_LIMIT",
         "CUDA_LAUNCH_BLOCKING", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NUMBA_DISABLE_JIT", "FASTLSTM_BACKEND",
         "FASTLSTM_TEST_EXAMPLES", "PYTEST_ADDOPTS"), "1",
    )  # fmt: skip
    assert script("A", **set_by_the_caller, KEPT="1", CUPY_CACHE_DIR="here")[0] == 0
    left = dict(line.split("=", 1) for line in (tmp_path / "environment").read_text().splitlines() if "=" in line)
    assert not set_by_the_caller.keys() & left.keys()
    assert left["KEPT"] == "1" and left["CUPY_CACHE_DIR"] == "here" and left["FASTLSTM_TEST_GPU"] == "1"


UNPROVEN = "FAILED (it says nothing of success)"


@pytest.mark.parametrize(
    ("stages", "environment", "expected"),
    [
        ("A", {"BAD": "*-m pytest*", "SLOW": "*check --backend*", "FASTLSTM_GPU_LIMITS": "check=3"},
         {"tests": "FAILED (3)", "check": "out of time"}),
        ("AB", {"HANG": "*-m pytest*", "FASTLSTM_GPU_LIMITS": "tests=2"}, {"tests": "out of time"}),
        ("A", {"SLOW": "*check --backend*", "FASTLSTM_GPU_LIMITS": "A=9 closing=100"},
         {"check": "out of time", "tests": "no time left", "repeat": "no time left"}),
        ("C", {"BAD_TOOL": "memcheck", "BLIND_TOOL": "racecheck", "MISSING": "hypothesis"},
         {"memcheck": "FAILED (9)", "racecheck": UNPROVEN, "suite": "not run"}),
        ("C", {"UNSUPPORTED": "memcheck"}, {"memcheck": "not run"}),
    ],
    ids=["tests fail, check is slow", "tests hang", "no time is left", "sanitizer, no hypothesis", "no sanitizer"],
)  # fmt: skip
def test_a_step_that_fails_or_hangs_does_not_stop_the_others(tmp_path, stages, environment, expected):
    status, output, results = Script(tmp_path)(*stages, **environment)
    wanted = passed(*stages)
    wanted[stages[0]] |= expected
    assert results == wanted and (status == 0) == ("UNSUPPORTED" in environment), output


@pytest.mark.parametrize("hang", ["*", "*gpu.py*"], ids=["everything hangs", "the report hangs"])
def test_the_hard_limit_holds_whatever_hangs(tmp_path, hang):
    script = Script(tmp_path)
    begin = time.monotonic()
    process = script.start("A", "B", HANG=hang, FASTLSTM_GPU_LIMITS="A=2 B=2 closing=4")
    status, _ = script.finish(process, timeout=60)
    assert time.monotonic() - begin < 2 + 2 + 2 * 4 + 2  # and a busy machine
    assert status not in {0, None} and script.logs("AB")


def test_the_limits_of_the_stages_are_those_that_are_promised():
    text = (ROOT / ".ci" / "gpu").read_text()
    limits = dict(pair.strip("[]").split("]=") for pair in text.partition("limits=(")[2].partition(")")[0].split())
    seconds = {name: int(value) for name, value in limits.items()}
    assert seconds["A"] + seconds["B"] + 2 * seconds["closing"] <= 300
    assert seconds["C"] + seconds["closing"] <= 240
    assert {"machine", *(step for steps in STEPS.values() for step in steps)} <= set(seconds)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path, kind):
    script = Script(tmp_path)
    process = script.start("A", HANG="*-m pytest*")
    try:
        hanging = script.wait_until_it_hangs()
        process.send_signal(kind)
    finally:
        status, output = script.finish(process, timeout=30)
    assert status not in {0, None}
    deadline = time.monotonic() + 10  # a killed process stays a zombie until its parent has asked for its status
    while Path(f"/proc/{hanging}").exists():
        assert time.monotonic() < deadline, "what hung was not killed"
        time.sleep(0.05)
    assert script.results() == {"A": {"machine": "passed", "check": "passed", "tests": "stopped"}}
    for text in (output, (script.out / "summary-A.md").read_text()):
        assert re.search(r"\| tests +\| stopped +\|", text)
    assert "All within bounds." in script.logs("A")["A-check.log"] and "A-tests.log" in script.logs("A")


def test_an_earlier_run_is_not_taken_for_one_that_finds_no_gpu_and_other_stages_stay(tmp_path):
    script = Script(tmp_path)
    assert script("B")[0] == 0 and script("A")[0] == 0
    status, output, results = script("A", PYTHON=sys.executable)
    assert status == 1 and "CuPy is missing, or finds no GPU" in output
    assert results == {"A": {"machine": UNPROVEN, "everything else": "not run"}} | passed("B")


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_real_programs_run_to_their_end_on_the_stand_in(tmp_path):
    script = Script(tmp_path, REAL)
    status, output, results = script(
        "A", "B", "C",
        FASTLSTM_GPU_TESTS="tests/api/test_dropout.py -k cuda", FASTLSTM_GPU_TIMES="1", FASTLSTM_TEST_GPU="",
        FASTLSTM_GPU_LIMITS="A=160 repeat=60",  # compiling for the CPU takes longer than for a GPU
        FASTLSTM_GPU_TABLE="--shape 3,2,4,4 --shape 3,3,4,4",
    )  # fmt: skip
    assert status == 0, output
    assert results == passed("A", "B", "C")
    logs = script.logs("ABC")
    assert re.search(r"^[1-9]\d* passed", logs["A-tests.log"], re.M)
    stages = {name: load(script.out / f"{name}.json") for name in "ABC"}
    assert all(stage.machine["GPU"].startswith("no GPU, but a stand-in,") for stage in stages.values())
    repeated = [case.facts for name in "AC" for case in stages[name].cases if case.group == "repetitions"]
    assert len(repeated) == 28 and not any(facts["not bit-identical"] for facts in repeated)
    measured = [case for case in stages["B"].cases if case.work]
    assert len(measured) == 4 and all(case.values["fastlstm cuda"] for case in measured)


@pytest.mark.parametrize("arguments", [(), ("OUT", "D"), ("OUT", "A", "AB")])
def test_wrong_arguments_are_refused(tmp_path, arguments):
    given = [ROOT / ".ci" / "gpu", *(str(tmp_path / "out") if name == "OUT" else name for name in arguments)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 2 and "usage" in done.stderr and not (tmp_path / "out").exists()
