"""The kernels on disk: a second process compiles nothing, and a changed source is never run stale."""

from __future__ import annotations

import compileall
import os
import subprocess
import sys
import zipfile

import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

from kernel_process import STEP, copy_package, files, start, variables

RUN = """
import sys
import numpy as np
from numba.core import event
import fastlstm
with event.install_recorder("numba:compile") as recorder:
    model = fastlstm.LSTM(3, 4, dtype=sys.argv[1], seed=0)
    x = np.ones((9, 2, 3), sys.argv[1])
    with fastlstm.use_backend("cpu"):
        y, state, tape = model.forward(x)
        model.backward(tape, y)
        h, state = model.step(x[0])
        model(x)
from fastlstm.kernels.cpu import sequence_backward, sequence_forward, small_batch
kernels = sequence_forward.sequence_forward, sequence_backward.sequence_backward, small_batch.small_forward
print(sum(sum(k.stats.cache_misses.values()) for k in kernels), sum(sum(k.stats.cache_hits.values()) for k in kernels))
print(float(h.sum()))
print("numba.np.arrayobj" in sys.modules)
"""


def run(folder, cache, dtype="float32"):
    """Run every kernel in a new process; misses, hits, a result, and whether what only compiling needs was loaded."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, dtype],
        env=variables(folder, cache), cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts, result, loaded = done.stdout.splitlines()
    misses, hits = map(int, counts.split())
    return misses, hits, float(result), loaded == "True"


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the package, whose sources a test may change, and a fresh cache."""
    folder = tmp_path_factory.mktemp("copy")
    copy_package(folder)
    return folder, folder / "cache"


DOUBLED = "return o, c\n", "return 2.0 * o, c\n"


def replace_in(path, old, new):
    before = path.read_text()
    assert before.count(old) == 1
    path.write_text(before.replace(old, new))


def test_the_second_process_compiles_nothing_and_a_changed_source_is_compiled_again(copied):
    folder, cache = copied
    misses, hits, first, loaded = run(folder, cache)
    assert (misses, hits, loaded) == (3, 0, True)
    misses, hits, second, loaded = run(folder, cache)
    assert (misses, hits, loaded) == (0, 3, False)
    assert second == first
    # One of them is gone: what compiling needs is loaded after the others.
    for file in cache.rglob("*sequence_backward*"):
        file.unlink()
    misses, hits, third, loaded = run(folder, cache)
    assert (misses, hits, loaded) == (1, 2, True)
    assert third == first
    # Not the file of a cached kernel, but one that the kernels call into: Numba alone would not notice.
    replace_in(folder / "fastlstm" / "kernels" / "cpu" / "cell_step.py", *DOUBLED)
    misses, hits, changed, _ = run(folder, cache)
    assert (misses, hits) == (3, 0)
    assert changed == pytest.approx(2 * first)


def test_without_a_folder_to_write_kernels_are_compiled_all_the_same(copied, tmp_path):
    if os.geteuid() == 0:
        unwritable = tmp_path / "a-file"  # root may write anywhere, but not make a folder below a file
        unwritable.touch()
    else:
        unwritable = tmp_path / "locked"
        unwritable.mkdir(mode=0o500)
    found, _ = start(copied[0], unwritable / "cache")
    assert found["hits"] == 0 and found["first"] != 0


def pack_into(archive, folder, pattern):
    """Make a zip file of the package in a folder, of the files that match a pattern."""
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in sorted((folder / "fastlstm").rglob(pattern)):
            if "__pycache__" not in path.parts:
                zipped.write(path, path.relative_to(folder))


@pytest.mark.parametrize("suffix", [".zip", ".pyz"])
def test_a_source_that_is_changed_within_a_zip_is_compiled_again(tmp_path, suffix):
    folder, archive, cache = tmp_path / "source", tmp_path / f"package{suffix}", tmp_path / "cache"
    cpu = copy_package(folder)
    pack_into(archive, folder, "*.py")
    first, _ = start(archive, cache)
    second, _ = start(archive, cache)
    assert str(archive) in first["file"]
    assert (first["misses"], second["misses"], second["hits"]) == (1, 0, 1)
    assert second["bits"] == first["bits"]
    replace_in(cpu / "cell_step.py", *DOUBLED)
    pack_into(archive, folder, "*.py")
    changed, _ = start(archive, cache)
    assert changed["misses"] == 1
    assert changed["first"] == pytest.approx(2 * first["first"], rel=1e-6)


def test_without_sources_nothing_is_cached(tmp_path):
    """A zip of compiled modules: whether a kernel on disk is still theirs, nothing would tell."""
    folder, archive, cache = tmp_path / "source", tmp_path / "package.zip", tmp_path / "cache"
    cpu = copy_package(folder)
    firsts = []
    for turn in range(2):
        if turn:
            replace_in(cpu / "cell_step.py", *DOUBLED)
        assert compileall.compile_dir(folder, legacy=True, quiet=1, force=True)
        pack_into(archive, folder, "*.pyc")
        found, _ = start(archive, cache)
        assert (found["misses"], found["warnings"], files(cache)) == (1, [], [])
        firsts.append(found["first"])
    assert firsts[1] == pytest.approx(2 * firsts[0], rel=1e-6)


def test_one_source_that_cannot_be_read_is_enough_not_to_cache(tmp_path):
    """Such as a module of which only the compiled file was shipped."""
    folder, cache = tmp_path / "source", tmp_path / "cache"
    cpu = copy_package(folder)
    assert compileall.compile_file(cpu / "cell_step.py", legacy=True, quiet=1)
    (cpu / "cell_step.py").unlink()
    found, _ = start(folder, cache)
    assert (found["misses"], files(cache)) == (1, [])


def test_processes_may_fill_the_cache_at_once(tmp_path):
    folder, cache = tmp_path / "source", tmp_path / "cache"
    copy_package(folder)
    processes = [
        subprocess.Popen([sys.executable, "-c", STEP], env=variables(folder, cache), stdout=-1, stderr=-1, text=True)
        for _ in range(4)
    ]
    try:
        found = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * 4, found
    assert {stderr for _, stderr in found} == {""}
    last, _ = start(folder, cache)
    assert last["hits"] == 1
    assert all(last["bits"][0] in stdout for stdout, _ in found)
    assert len(files(cache)) == 1


def test_the_first_process_says_once_that_it_compiles(tmp_path):
    folder, cache = tmp_path / "source", tmp_path / "cache"
    copy_package(folder)
    both = "float32", "float64"
    _, quiet = start(folder, tmp_path / "another", STEP)
    _, cold = start(folder, cache, STEP, *both, FASTLSTM_QUIET="")
    _, warm = start(folder, cache, STEP, *both, FASTLSTM_QUIET="")
    assert quiet == warm == ""
    assert cold.startswith("fastlstm compiles its kernels") and cold.count("\n") == 1
    assert str(cache) in cold and "fastlstm warm" in cold and "FASTLSTM_QUIET=1" in cold
    # Where nothing can be said, nothing is.
    closed = "import sys; sys.stderr = None\n" + STEP
    found, _ = start(folder, tmp_path / "third", closed, FASTLSTM_QUIET="")
    assert found["misses"] == 1
