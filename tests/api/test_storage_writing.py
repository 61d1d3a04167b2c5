"""Writing model files is all or nothing: failures, kills, concurrent processes, kinds of files."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from model_files import SMALL, assert_is, draw, failing, left_over, needs_posix, saved

from fastlstm import ModelFileError, parameters, storage
from fastlstm.cell import Cell


def write_until_full(descriptor, data, write=os.write):
    """Write a few bytes and then find the disk full."""
    if os.fstat(descriptor).st_size > 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, bytes(data)[:100])


def io_error() -> OSError:
    return OSError(errno.EIO, os.strerror(errno.EIO))


FAILURES = {
    "creating": (os, "open", failing(PermissionError(errno.EACCES, "no")), PermissionError),
    "disk full": (os, "write", write_until_full, OSError),
    "syncing": (os, "fsync", failing(io_error()), OSError),
    "chmod": (os, "chmod", failing(io_error()), OSError),
    "renaming": (os, "replace", failing(io_error()), OSError),
    "interrupt": (os, "fsync", failing(KeyboardInterrupt()), KeyboardInterrupt),
}


@pytest.mark.parametrize("step", FAILURES)
@pytest.mark.parametrize("before", ["old file", "no file"])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, step, before):
    path = tmp_path / "model"
    if before == "old file":
        saved(path, SMALL, seed=1)
    elif step == "chmod":
        return  # a new file needs none
    module, name, replacement, error = FAILURES[step]
    with monkeypatch.context() as patched, pytest.raises(error):
        patched.setattr(module, name, replacement)
        storage.save(path, SMALL, draw(SMALL, seed=2), False)
    if before == "old file":
        assert_is(path, SMALL, 1)
    else:
        assert not path.exists()
    assert left_over(tmp_path) == []
    saved(path, SMALL, seed=2)
    assert_is(path, SMALL, 2)


@needs_posix
def test_the_file_is_synced_before_the_renaming_and_the_folder_after_it(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append(("fsync folder", os.path.samestat(status, os.stat(tmp_path))) if stat.S_ISDIR(status.st_mode)
                     else ("fsync file", status.st_size))  # fmt: skip
        fsync(descriptor)

    def record_replace(source, target):
        calls.append(("replace", os.path.dirname(source) == os.path.dirname(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    size = len(saved(tmp_path / "model"))
    assert calls == [("fsync file", size), ("replace", True), ("fsync folder", True)]


@needs_posix
@pytest.mark.parametrize(("number", "reported"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_a_folder_that_cannot_be_synced(tmp_path, monkeypatch, number, reported):
    """A file system without it is no error; one that fails is, though the new file is in place by then."""
    fsync = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", only_files)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)) if reported else contextlib.nullcontext():
        saved(tmp_path / "model")
    assert_is(tmp_path / "model", SMALL, 0)


# Run in a process of its own, which has one thread and may fork. The children save two models in turn and are
# killed at random points. It prints how often each model was found, and how often a temporary file was left behind.
KILLER = """
    import os, random, signal, sys, time
    import numpy as np
    from fastlstm import parameters, storage
    from fastlstm.cell import Cell

    folder, rounds = sys.argv[1], int(sys.argv[2])
    path = os.path.join(folder, "model")
    cell = Cell(64, 128)
    models = [{name: np.full(s, k, np.float32) for name, s in parameters.shapes(cell).items()} for k in (1, 2)]
    storage.save(path, cell, models[0], False)
    rng, found, left = random.Random(0), {1: 0, 2: 0}, 0
    for _ in range(rounds):
        models.reverse()  # so that each is found in turn, also where a child has time to save but one
        child = os.fork()
        if child == 0:
            try:
                while True:
                    for model in models:
                        storage.save(path, cell, model, False)
            finally:
                os._exit(1)  # an error in the child must not run on as a second parent
        time.sleep(rng.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        params = storage.load(path).params
        values = {float(v) for array in params.values() for v in np.unique(array)}
        assert len(values) == 1, values
        found[values.pop()] += 1
        for name in os.listdir(folder):
            if name.endswith(".tmp"):
                left += 1
                os.unlink(os.path.join(folder, name))
    print(found[1], found[2], left)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks")
def test_a_killed_process_leaves_the_old_file_or_the_new_one(tmp_path):
    rounds = 100
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(KILLER), str(tmp_path), str(rounds)]
    # Not from the checkout's root, where python -c would find the checkout and not what is installed.
    result = subprocess.run(
        command, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    first, second, left = map(int, result.stdout.split())
    assert first + second == rounds
    assert min(first, second, left) > 0, "the kills never came at a point where they could have done harm"


def clean_environment() -> dict[str, str]:
    """Return the environment with BLAS held to one thread, so that a child may fork."""
    return os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_concurrent_readers_and_writers_see_whole_files(tmp_path):
    cell = Cell(8, 16)
    path, stop, errors, loads = tmp_path / "model", threading.Event(), [], itertools.count()
    storage.save(path, cell, {name: np.zeros(s, np.float32) for name, s in parameters.shapes(cell).items()}, False)

    def work(action):
        try:
            while not stop.is_set():
                action()
        except BaseException as error:
            errors.append(error)

    def write(value):
        storage.save(path, cell, {n: np.full(s, value, np.float32) for n, s in parameters.shapes(cell).items()}, False)

    def read():
        params = storage.load(path).params
        assert len({float(v) for array in params.values() for v in np.unique(array)}) == 1
        next(loads)

    actions = [lambda: write(1), lambda: write(2), read, read]
    threads = [threading.Thread(target=work, args=[action]) for action in actions]
    for thread in threads:
        thread.start()
    stop.wait(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    assert next(loads) > 10
    assert left_over(tmp_path) == []


def test_training_on_while_saving_does_not_break_the_file(tmp_path, monkeypatch):
    params, digest = draw(SMALL), storage._digest

    def digest_then_train(description, tensors):
        result = digest(description, tensors)
        for value in params.values():
            np.add(value, 1, out=value)
        return result

    with monkeypatch.context() as patched:
        patched.setattr(storage, "_digest", digest_then_train)
        storage.save(tmp_path / "model", SMALL, params, False)
    assert not np.array_equal(params["bias_l0"], draw(SMALL)["bias_l0"]), "the training came in between"
    assert_is(tmp_path / "model", SMALL, 0)


@needs_posix
def test_permissions_are_those_of_any_new_file_or_of_the_old_one(tmp_path):
    path = tmp_path / "model"
    mask = os.umask(0o027)
    try:
        saved(path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    saved(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o604


@needs_posix
def test_a_symbolic_link_stays_one_and_its_target_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "model", tmp_path / "link"
    link.symlink_to(Path("real") / "model")
    for seed in (1, 2):  # at first the link dangles
        saved(link, SMALL, seed)
        assert link.is_symlink() and not target.is_symlink()
        assert_is(target, SMALL, seed)
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    with pytest.raises(OSError, match="loop"):
        saved(loop)
    assert loop.is_symlink()


def test_the_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    path = tmp_path / ("m" * 255)
    saved(path)
    assert_is(path, SMALL, 0)


def test_saving_over_a_folder(tmp_path):
    with pytest.raises(IsADirectoryError):
        storage.save(tmp_path, SMALL, draw(SMALL), False)
    with pytest.raises(FileNotFoundError) as caught:
        storage.save(tmp_path / "missing" / "model", SMALL, draw(SMALL), False)
    assert caught.value.filename == str(tmp_path / "missing" / "model")
    assert os.listdir(tmp_path) == []


@needs_posix
def test_saving_over_a_pipe_does_not_replace_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        storage.save(tmp_path / "pipe", SMALL, draw(SMALL), False)
    assert os.listdir(tmp_path) == ["pipe"]
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_file_that_load_would_refuse_is_not_written(tmp_path):
    params = draw(SMALL)
    with pytest.raises(ModelFileError, match="not those of the model"):
        storage.save(tmp_path / "model", SMALL, params | {"bias_l0": params["bias_l0"][1:]}, False)
    cell = Cell(1, 1, num_layers=5_000)
    params = {name: np.zeros(shape, np.float32) for name, shape in parameters.shapes(cell).items()}
    with pytest.raises(ModelFileError, match="header is longer"):
        storage.save(tmp_path / "model", cell, params, False)
    assert os.listdir(tmp_path) == []
