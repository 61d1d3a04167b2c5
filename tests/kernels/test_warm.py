"""``fastlstm warm``: a later process compiles nothing, and kernels that cannot be kept are reported."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys

import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

from kernel_process import STEP, copy_package, start, variables

# Calls of all kinds, on one thread and on two.
USE = """
import json, sys
import numpy as np
import fastlstm
dtype, what = sys.argv[1], sys.argv[2:]
rng = np.random.default_rng(0)

def draw(*shape):
    return rng.standard_normal(shape).astype(dtype)

def models(**options):
    made = fastlstm.LSTM(5, 20, dtype=dtype, seed=0, **options)
    return made, made.freeze()

def train(model, *arguments, **options):
    y, state, tape = model.forward(*arguments, **options)
    model.backward(tape, y, state)
    model.backward(tape, y)

lengths, several = np.array([3, 30, 0]), dict(num_layers=2, bidirectional=True)
for threads in (1, 2):
    fastlstm.set_num_threads(threads)
    for model in (*models(), *models(bias=False), *models(**several), *models(peephole=True)):
        for x in (draw(30, 3, 5), draw(30, 1, 5), draw(200, 64, 5), draw(1, 1, 5), draw(6, 5), draw(3, 2, 5)):
            model(x)
            if "train" in what:
                for recompute in (False, True):
                    train(model, x, recompute=recompute)
        model(draw(30, 3, 5), lengths=lengths)
        if "train" in what:
            train(model, draw(30, 3, 5), lengths=lengths)
        if "step" in what and not model.cell.bidirectional:
            for batch in (1, 3, 40, 200):
                model.step(draw(batch, 5))
    for fields in ({"layer_norm": True}, {"peephole": True, "block_size": 2}, {"proj_size": 3, "zoneout": (0.1, 0.1)}):
        for model in models(**fields):
            model(draw(30, 3, 5))
            if "train" in what:
                train(model, draw(30, 3, 5), lengths=lengths)
    fastlstm.RNN(5, 20, dtype=dtype, seed=0)(draw(30, 3, 5))
    fastlstm.LSTM(32, 64, bidirectional=True, dtype=dtype, seed=0)(draw(200, 8, 32))  # both directions at once
    big = fastlstm.LSTM(64, 256, dtype=dtype, seed=0)
    for model in (big, big.freeze()):
        model(draw(20, 32, 64))
        model.step(draw(1, 64))
        if "train" in what:
            train(model, draw(20, 32, 64))
jit = sys.modules["fastlstm.kernels.cpu.jit"]
print(json.dumps({
    "misses": {kernel.__name__: sum(kernel.stats.cache_misses.values()) for kernel in jit.KERNELS},
    "hits": {kernel.__name__: sum(kernel.stats.cache_hits.values()) for kernel in jit.KERNELS},
}))
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    copy_package(folder)
    return folder


def warm(package, cache, *options, **more):
    environment = variables(package, cache) | {"FASTLSTM_QUIET": ""} | more
    return subprocess.run(
        [sys.executable, "-m", "fastlstm", "warm", *options], env=environment,
        cwd=package, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def warmed(package, tmp_path_factory):
    """Return what makes a folder warm for a dtype and options, once: the folder, and the process that did it."""

    @functools.cache
    def make(dtype, *what):
        cache = tmp_path_factory.mktemp("cache")
        return cache, warm(package, cache, "--dtype", dtype, *(f"--{option}" for option in what))

    return make


@pytest.mark.parametrize(("dtype", "what"), [("float32", ["train", "step"]), ("float64", [])], ids=str)
def test_after_it_a_process_compiles_nothing(package, warmed, dtype, what):
    cache, done = warmed(dtype, *what)
    assert done.returncode == 0 and done.stderr == ""
    assert "0 loaded" in done.stdout and str(cache) in done.stdout
    used, stderr = start(package, cache, USE, dtype, *what, FASTLSTM_QUIET="")
    assert set(used["misses"].values()) == {0} and stderr == ""
    assert used["hits"]["sequence_forward"] == used["hits"]["small_forward_packed"] == 1
    for name in ("serve", "run_records", "measure", "fill_index", "variant_update"):
        assert used["hits"][name] == 1, name
    assert used["hits"]["sequence_backward"] == (2 if "train" in what else 0)
    assert used["hits"]["phased_forward"] == 1
    assert used["hits"].get("phased_backward", 0) == (1 if "train" in what else 0)
    again = warm(package, cache, "--dtype", dtype, *(f"--{option}" for option in what))
    assert again.returncode == 0 and "\n0 compiled" in again.stdout


def test_another_dtype_is_not_ready(package, warmed, tmp_path):
    """So that the test above can fail."""
    shutil.copytree(warmed("float64")[0], tmp_path / "cache")
    used, stderr = start(package, tmp_path / "cache", STEP, "float32", FASTLSTM_QUIET="")
    assert used["misses"] == 1 and stderr.startswith("fastlstm compiles")


def test_a_warmed_folder_serves_where_nothing_can_be_written(package, warmed, tmp_path):
    """As in an image that runs with a read-only file system."""
    shutil.copytree(warmed("float64")[0], tmp_path / "cache")
    if os.geteuid() == 0:
        # Root may write anywhere: so let all calls that could write fail.
        shut = "import os, pathlib, tempfile\n"
        shut += "def refuse(*_, **__): raise OSError(30, 'Read-only file system')\n"
        shut += "pathlib.Path.mkdir = os.replace = tempfile.TemporaryFile = refuse\n"
    else:
        shut = ""
        for path in (tmp_path / "cache", *(tmp_path / "cache").iterdir()):
            path.chmod(0o500)
    used, stderr = start(package, tmp_path / "cache", shut + USE, "float64")
    assert set(used["misses"].values()) == {0} and stderr == ""


def test_the_folder_is_complete_where_kernels_were_found_in_another(package, warmed, tmp_path):
    home = tmp_path / "home" / "fastlstm"
    home.mkdir(parents=True)
    (folder,) = warmed("float64")[0].iterdir()
    shutil.copytree(folder, home / folder.name)
    done = warm(package, tmp_path / "cache", "--dtype", "float64", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert done.returncode == 0 and "\n0 compiled" in done.stdout, done.stdout + done.stderr
    (found,) = (tmp_path / "cache").iterdir()
    assert {path.name for path in found.iterdir()} == {path.name for path in folder.iterdir()}


def test_it_fails_if_the_folder_that_was_asked_for_cannot_be_written(package, warmed, tmp_path):
    home = tmp_path / "home" / "fastlstm"
    home.mkdir(parents=True)
    (folder,) = warmed("float64")[0].iterdir()
    shutil.copytree(folder, home / folder.name)
    (tmp_path / "file").touch()
    done = warm(package, tmp_path / "file" / "x", "--dtype", "float64", XDG_CACHE_HOME=str(tmp_path / "home"))
    assert done.returncode == 1
    assert "cannot be written; they are in" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("why", ["full", "plain"])
def test_it_fails_if_nothing_can_be_kept(package, tmp_path, why):
    if why == "plain":
        done = warm(package, tmp_path / "cache", "--dtype", "float32", FASTLSTM_PLAIN_NJIT="1")
        assert "FASTLSTM_PLAIN_NJIT" in done.stderr
    else:
        pytest.importorskip("resource", reason="limits the size of files")
        code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))\n"
        code += "from fastlstm.cli import main; sys.exit(main(['warm', '--dtype', 'float32']))"
        done = subprocess.run(
            [sys.executable, "-B", "-c", code], env=variables(package, tmp_path / "cache"), cwd=package,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert str(tmp_path / "cache") in done.stderr and "sequence_forward" in done.stdout
    assert done.returncode == 1
    assert done.stderr.startswith("fastlstm warm: ") and done.stderr.count("\n") == 1
