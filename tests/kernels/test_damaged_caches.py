"""A kernel cache that is damaged, full or missing costs time, but causes no error and no wrong result."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import shutil
import sys
import warnings

import pytest

pytest.importorskip("numba", reason="the CPU kernels need Numba")

from kernel_process import STEP, copy_package, files, start

from fastlstm.errors import KernelCacheWarning


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A copy of the package, a cache that one process has filled, and what this process found."""
    folder = tmp_path_factory.mktemp("installed")
    copy_package(folder)
    found, _ = start(folder, folder / "cache")
    assert (found["misses"], found["hits"], found["warnings"]) == (1, 0, [])
    return folder, folder / "cache", found


def flip_bits(path):
    """Flip bits of the machine code alone, which follows an object file's head."""
    content = bytearray(path.read_bytes())
    start = content.find(b"\x7fELF") + 100  # as Linux calls it; elsewhere it begins near the file's start, too
    for n in range(start, start + 6000, 10):
        content[n] ^= 1
    path.write_bytes(content)


def make_a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "something").touch()


def make_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def make_a_link(path, target):
    path.unlink()
    path.symlink_to(target)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "random bytes": lambda path: path.write_bytes(hashlib.shake_256(b"").digest(5000)),
    "flipped bits": flip_bits,
    "a pickle of something else": lambda path: path.write_bytes(pickle.dumps(("0.0", {"a": 1}))),
    "a folder with files": make_a_folder,
    "a pipe": make_a_pipe,
    "a link to nothing": lambda path: make_a_link(path, "nowhere"),
    "unreadable": lambda path: path.chmod(0),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_replaced(installed, kind, tmp_path):
    folder, filled, right = installed
    if kind == "unreadable" and os.geteuid() == 0:
        pytest.skip("root may read any file")
    cache = tmp_path / "cache"
    shutil.copytree(filled, cache)
    for path in files(cache):
        DAMAGE[kind](path)
    first, _ = start(folder, cache, timeout=120)
    assert (first["misses"], first["hits"], first["bits"], first["warnings"]) == (1, 0, right["bits"], [])
    second, _ = start(folder, cache, timeout=120)
    assert (second["misses"], second["hits"], second["bits"], second["warnings"]) == (0, 1, right["bits"], [])
    assert [path.name for path in files(cache)] == [path.name for path in files(filled)]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The module that keeps kernels, with two empty folders."""
    from fastlstm.kernels.cpu import kernel_cache

    monkeypatch.setattr(kernel_cache, "folders", (tmp_path / "a", tmp_path / "b"))
    monkeypatch.setattr(kernel_cache, "problem", None)
    monkeypatch.setattr(kernel_cache, "used", {})
    return kernel_cache


def test_a_kernel_file_with_any_flipped_bit_is_not_used(store, tmp_path):
    key = b"k" * 32
    store.write("it", key, b"payload" * 9)
    path = tmp_path / "a" / "it"
    whole = path.read_bytes()
    assert store.read("it", key) == b"payload" * 9
    assert store.read("it", b"l" * 32) is None
    for bit in range(8 * len(whole)):
        path.write_bytes(bytes(value ^ (1 << bit % 8 if n == bit // 8 else 0) for n, value in enumerate(whole)))
        assert store.read("it", key) is None


def test_a_file_that_may_not_be_read_counts_as_missing(store, monkeypatch):
    key = b"k" * 32
    store.write("it", key, b"payload")

    def refuse(path):
        raise PermissionError(errno.EACCES, "not for you", path)

    monkeypatch.setattr(store.Path, "read_bytes", refuse)
    assert store.read("it", key) is None


def test_kernels_missing_in_one_folder_are_read_from_the_next(store, tmp_path):
    """As in an image whose kernels were compiled by a user with write access."""
    key = b"k" * 32
    store.write("it", key, b"payload")
    (tmp_path / "a").rename(tmp_path / "b")
    assert store.read("it", key) == b"payload"
    (tmp_path / "a").touch()  # a file where a folder is to be
    store.write("it", key, b"another")
    assert store.read("it", key) == b"another" and store.problem is None
    assert store.folder() == tmp_path / "b"


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EFBIG", "EROFS"])
@pytest.mark.parametrize("where", ["open", "write", "replace", "mkdir"])
def test_a_failed_save_warns_once_and_leaves_nothing_behind(store, tmp_path, monkeypatch, code, where):
    tried = []

    def fail(*_, **__):
        tried.append(where)
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    if where == "open":
        monkeypatch.setattr(store, "open", fail, raising=False)
    elif where == "write":
        monkeypatch.setattr(store, "open", lambda path, mode: _Full(path, mode, fail), raising=False)
    elif where == "replace":
        monkeypatch.setattr(store.os, "replace", fail)
    else:
        monkeypatch.setattr(store.Path, "mkdir", fail)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("one", "another"):
            store.write(name, b"k" * 32, b"payload")
    assert [warning.category for warning in caught] == [KernelCacheWarning]
    assert str(tmp_path / "a") in str(caught[0].message) and os.strerror(getattr(errno, code)) in str(caught[0].message)
    assert len(tried) == 2, "each folder once"
    assert files(tmp_path) == []
    assert store.folder() is None and os.strerror(getattr(errno, code)) in store.describe()


class _Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, path, mode, fail):
        self.file, self.fail = path.open(mode), fail

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[:5])
        self.fail()


def test_an_interrupted_save_leaves_nothing_behind(store, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        store.write("it", b"k" * 32, b"payload")
    assert files(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_limit_on_the_size_of_files_costs_no_more_than_the_cache(installed, tmp_path):
    import resource

    folder, _, right = installed

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    both = "float32", "float64"
    found, _ = start(folder, tmp_path / "cache", STEP, *both, timeout=120, preexec_fn=limit)
    assert (found["misses"], found["bits"][:1]) == (2, right["bits"])
    (warning,) = found["warnings"]
    assert warning.startswith("KernelCacheWarning: ") and str(tmp_path / "cache") in warning
    assert files(tmp_path / "cache") == [] and files(folder / "fastlstm" / "kernels" / "cpu" / "__pycache__") == []


@pytest.mark.parametrize("level", ["cache", "its folder"])
def test_a_file_in_place_of_the_cache_folder_is_no_error(installed, tmp_path, level):
    folder, filled, right = installed
    cache = tmp_path / "cache"
    if level == "cache":
        cache.touch()
    else:
        cache.mkdir()
        (cache / next(filled.iterdir()).name).touch()
    beside = folder / "fastlstm" / "kernels" / "cpu" / "__pycache__"
    try:
        first, _ = start(folder, cache, timeout=120)
        second, _ = start(folder, cache, timeout=120)
    finally:
        for path in beside.glob("*.nb*"):
            path.unlink()
    assert (first["misses"], first["bits"], first["warnings"]) == (1, right["bits"], [])
    assert (second["hits"], second["bits"], second["warnings"]) == (1, right["bits"], []), "it lies beside the kernels"


REMOVED_WHILE_RUNNING = """
import json, pathlib, shutil, sys
import numpy as np
import fastlstm
cache = pathlib.Path(sys.argv[1])
bits = []
for name in ("float32", "float64"):
    bits.append(fastlstm.LSTM(3, 4, dtype=name, seed=0).step(np.ones((1, 3), name))[0].tobytes().hex())
    if name == "float32":
        shutil.rmtree(cache)
        if sys.argv[2] == "file":
            cache.touch()
print(json.dumps({"bits": bits}))
"""


@pytest.mark.parametrize("then", ["nothing", "file"])
def test_a_cache_may_be_removed_while_a_process_runs(installed, tmp_path, then):
    folder, _, right = installed
    cache = tmp_path / "cache"
    beside = folder / "fastlstm" / "kernels" / "cpu" / "__pycache__"
    try:
        found, stderr = start(folder, cache, REMOVED_WHILE_RUNNING, str(cache), then, timeout=120)
        assert len(list(beside.glob("*.nb*"))) == (then == "file")
    finally:
        for path in beside.glob("*.nb*"):
            path.unlink()
    assert found["bits"][0] == right["bits"][0] and "Warning" not in stderr
    if then == "nothing":
        assert len(files(cache)) == 1
        again, _ = start(folder, cache, timeout=120)
        assert (again["misses"], again["bits"]) == (1, right["bits"])
