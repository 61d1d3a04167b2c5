"""The kernels on disk: a second process compiles nothing, and a changed source is never run stale."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

import fastlstm

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
kernels = sequence_forward.layer_forward, sequence_backward.layer_backward, small_batch.small_forward
print(sum(sum(k.stats.cache_misses.values()) for k in kernels), sum(sum(k.stats.cache_hits.values()) for k in kernels))
print(float(h.sum()))
print("numba.np.arraymath" in sys.modules)
"""


def run(folder, cache, dtype="float32"):
    """Run every kernel in a new process; misses, hits, a result, and whether what only compiling needs was loaded."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "FASTLSTM_"))}
    environment |= {"PYTHONPATH": str(folder), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", RUN, dtype],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    counts, result, loaded = done.stdout.splitlines()
    misses, hits = map(int, counts.split())
    return misses, hits, float(result), loaded == "True"


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the package, whose sources a test may change, and a fresh cache."""
    folder = tmp_path_factory.mktemp("copy")
    package, kernels = Path(fastlstm.__file__).parent, Path(fastlstm.kernels.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "fastlstm", ignore=ignore)
    shutil.copytree(kernels, folder / "fastlstm" / "kernels", ignore=ignore, dirs_exist_ok=True)
    return folder, folder / "cache"


def test_the_second_process_compiles_nothing_and_a_changed_source_is_compiled_again(copied):
    folder, cache = copied
    misses, hits, first, loaded = run(folder, cache)
    assert (misses, hits, loaded) == (3, 0, True)
    misses, hits, second, loaded = run(folder, cache)
    assert (misses, hits, loaded) == (0, 3, False)
    assert second == first
    # One of them is gone: what compiling needs is loaded after the others.
    for file in cache.rglob("*layer_backward*"):
        file.unlink()
    misses, hits, third, loaded = run(folder, cache)
    assert (misses, hits, loaded) == (1, 2, True)
    assert third == first
    # Not the file of a cached kernel, but one that the kernels call into: Numba alone would not notice.
    gates = folder / "fastlstm" / "kernels" / "cpu" / "gates.py"
    before = gates.read_text()
    gates.write_text(before.replace("return i, f, g, o, ", "return i, f, g, 2.0 * o, "))
    assert gates.read_text() != before
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
    _, hits, result, _ = run(copied[0], unwritable / "cache")
    assert hits == 0 and result != 0
