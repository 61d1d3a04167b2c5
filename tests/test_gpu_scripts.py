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

from fastlstm import LSTM

ROOT = Path(__file__).parent.parent
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


def script(name):
    """Load a file of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def xp(monkeypatch):
    library = FakeCupy()
    # What describes a machine asks for more than the stand-in has.
    library.cuda.runtime.getDeviceProperties = lambda number: {"name": b"none"}
    library.cuda.runtime.driverGetVersion = library.cuda.runtime.runtimeGetVersion = lambda: 0
    monkeypatch.setattr(library.cuda.Device, "compute_capability", "00", raising=False)
    with cuda_row.installed(library):
        yield library


@needs_compiler
def test_the_benchmark_measures_and_writes_after_each_shape(xp, tmp_path):
    gpu, out = script("gpu"), tmp_path / "benchmark.json"
    gpu.ROUNDS, gpu.SECONDS_OF_A_SHAPE = (3, 4), 0.1
    given = ["--out", str(out), "--hidden", "4", "5", "--batch", "2", "--steps", "3", "--no-torch"]
    assert gpu.main(given) == 0
    found = json.loads(out.read_text())
    assert [(shape["hidden"], shape["batch"]) for shape in found["shapes"]] == [(4, 2), (5, 2)]
    for shape in found["shapes"]:
        for mode in ("forward", "forward and backward"):
            assert shape["contenders"]["fastlstm float32"][mode]["us per step"] > 0
    assert set(found["launch"]) == {"RawKernel, host", "RawKernel, device", "product, host", "product, device"}
    assert gpu.main([*given, "--seconds", "-1"]) == 0
    assert json.loads(out.read_text())["skipped"] == [[4, 2], [5, 2]]


def test_the_benchmark_knows_its_shapes():
    gpu = script("gpu")
    options = gpu.parser().parse_args(["--out", "x.json"])
    assert set(gpu.shapes(options)) == {(h, b) for h in (64, 128, 168, 256, 512, 768, 1024) for b in (1, 16, 64, 256)}
    assert options.steps == 512


def test_torch_gets_the_same_weights_and_is_compared(monkeypatch):
    torch = pytest.importorskip("torch", reason="the oracle is missing: torch is not installed")
    gpu = script("gpu")
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    rng = np.random.default_rng(0)
    x, dy = (rng.uniform(-1, 1, (6, 3, 8)).astype(np.float32) for _ in range(2))
    model = LSTM(8, 8, seed=0)
    y, _, tape = model.forward(x)
    grads = model.backward(tape, dy)
    truth = [y, grads.x, grads.params["weight_hh_l0"], grads.params["weight_ih_l0"]]
    forward, train = gpu.torch_calls(torch, model, truth, x, dy, np.float32, False)
    assert gpu.worst_error([value.numpy() for value in train()], truth) < 1e-5
    assert gpu.worst_error([forward().numpy()], truth[:1]) < 1e-5
    assert gpu.worst_error([value.numpy() for value in train()], truth) < 1e-5  # gradients are not summed up
    assert gpu.worst_error([2 * y], [y]) > 0.5
    assert set(gpu.TOLERANCE) == set(gpu.CONTENDERS)


@needs_compiler
def test_repetitions_are_compared_bit_by_bit(xp, tmp_path, monkeypatch, capsys):
    repeat, out = script("gpu_repeat"), tmp_path / "repeat.json"
    repeat.CASES = ((4, 3, 2, 8, 1, True, True), (1, 1, 1, 1, 1, False, False))
    assert repeat.main(["--times", "2", "--out", str(out), "--no-pool"]) == 0
    assert json.loads(out.read_text())["passed"]
    assert "0 of 2 differ" in capsys.readouterr().out
    # One bit of one result of one repetition.
    calls, original = [], repeat.results

    def flipped(*arguments):
        found = original(*arguments)
        calls.append(0)
        if len(calls) == 4:  # the reference, the first, a good one, and this
            found[3].view(np.uint32)[0, 0, 0] ^= np.uint32(1)
        return found

    monkeypatch.setattr(repeat, "results", flipped)
    assert repeat.main(["--times", "3", "--out", str(out)]) == 1
    found = json.loads(out.read_text())
    assert [case["different"] for case in found["cases"]] == [1, 0, 0, 0] and not found["passed"]


MADE_UP = {
    "machine": {"GPU": "one that nobody has", "CuPy": "0"},
    "steps": 512,
    "launch": {"RawKernel, host": 4.5},
    "skipped": [[168, 256]],
    "shapes": [
        {"hidden": hidden, "batch": batch, "contenders": {
            name: {"agrees": name != "torch float16", "error": 0.0} | {
                mode: {"us per step": factor * hidden / 100, "quartiles": [0.9, 1.1], "rounds": 5}
                for mode in ("forward", "forward and backward")}
            for name, factor in (("fastlstm float32", 2.0), ("torch float32", 3.0), ("torch float16", 1.0))}}
        for hidden in (64, 128) for batch in (1, 16)
    ] + [{"hidden": 1024, "batch": 256, "error": "Out of memory"}],
}  # fmt: skip


def test_the_summary_says_what_was_measured_and_what_was_not(tmp_path, capsys):
    report = script("gpu_report")
    (tmp_path / "benchmark.json").write_text(json.dumps(MADE_UP))
    (tmp_path / "stages.tsv").write_text("suite\tpassed\t100\t900 passed\nsanitizer\tnot run\t0\tnot installed\n")
    cases = [{"dtype": dtype, "repetitions": 1000, "different": 0, "error": 1e-7} for dtype in ("float32", "float64")]
    (tmp_path / "repeat.json").write_text(json.dumps({"passed": True, "cases": cases}))
    assert report.main([str(tmp_path)]) == 0
    page = (tmp_path / "summary.md").read_text()
    assert page.strip() in capsys.readouterr().out
    for expected in (
        "| suite | passed | 100 s | 900 passed |", "0 of 2000 differ", "one that nobody has", "4.50 us a launch",
        "| 64 | 16 | 1.28 | 1.92 (1.50x) | 0.64 (0.50x) **disagrees** |", "H=1024 B=256: Out of memory",
        "No time was left for H, B = (168, 256).",
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


@pytest.mark.skipif(os.name != "posix", reason="a script for bash")
@pytest.mark.skipif(cuda_row.on_gpu(), reason="there is a GPU: it would run everything")
def test_without_a_gpu_the_run_says_so_and_fails(tmp_path):
    out = tmp_path / "results"
    done = subprocess.run(
        [ROOT / ".ci" / "gpu", out], env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "| machine | FAILED | 0 s | CuPy is missing, or finds no GPU |" in (out / "summary.md").read_text()
    assert subprocess.run([ROOT / ".ci" / "gpu"], capture_output=True, check=False).returncode == 2
