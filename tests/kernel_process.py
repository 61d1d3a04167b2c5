"""Processes that run kernels from a copy of the package, with a kernel cache of their own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastlstm

# The code of each process. It runs small_forward alone, which is compiled in a second.
STEP = """
import json, sys, warnings
import numpy as np
import fastlstm
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    found = [fastlstm.LSTM(3, 4, dtype=name, seed=0).step(np.ones((1, 3), name))[0] for name in sys.argv[1:] or ["float32"]]
from fastlstm.kernels.cpu import small_batch
stats = small_batch.small_forward.stats
print(json.dumps({
    "misses": sum(stats.cache_misses.values()), "hits": sum(stats.cache_hits.values()),
    "bits": [h.tobytes().hex() for h in found], "first": float(found[0][0, 0]), "file": fastlstm.__file__,
    "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
}))
"""  # noqa: E501


def copy_package(folder):
    """Copy the package, whose sources a test may change, below a folder; return the folder of the CPU kernels."""
    package, kernels = Path(fastlstm.__file__).parent, Path(fastlstm.kernels.__path__[0])
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(package, folder / "fastlstm", ignore=ignore)
    shutil.copytree(kernels, folder / "fastlstm" / "kernels", ignore=ignore, dirs_exist_ok=True)
    return folder / "fastlstm" / "kernels" / "cpu"


def variables(where, cache, **more):
    """Return the environment of a process that finds the package at `where`, a folder or a zip file."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "FASTLSTM_"))}
    return kept | {"PYTHONPATH": str(where), "NUMBA_CACHE_DIR": str(cache), "FASTLSTM_QUIET": "1"} | more


def start(where, cache, code=STEP, *arguments, timeout=300, preexec_fn=None, **more):
    """Run code in a process that has to succeed; return what it printed last, from JSON, and its stderr."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=variables(where, cache, **more), cwd=Path(where).parent,
        capture_output=True, text=True, timeout=timeout, check=False, preexec_fn=preexec_fn,
    )  # fmt: skip
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def files(folder):
    """Return all files below a folder."""
    return sorted(path for path in folder.rglob("*") if not path.is_dir())
