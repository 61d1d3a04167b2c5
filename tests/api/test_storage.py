"""Model files: exact round trips, writing that is all or nothing, and files that are not to be trusted."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pickle
import random
import stat
import struct
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_identical

from fastlstm import LSTM, ModelFileError, parameters, storage, use_backend
from fastlstm.cell import Cell

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1.safetensors"
SMALL = Cell(input_size=2, hidden_size=1, dropout=0.25)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="the test is about POSIX file systems")


def draw(cell: Cell, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw parameters with the values in them that careless copies change: -0.0, NaN, infinities, denormals."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype(cell.dtype) for name, shape in parameters.shapes(cell).items()}
    special = [-0.0, np.nan, np.inf, -np.inf, np.finfo(cell.dtype).smallest_subnormal]
    for value, array in zip(special, itertools.cycle(params.values())):
        array.flat[rng.integers(array.size)] = value
    return params


def bits(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays as integers, which compare bit for bit."""
    return {name: value.view(f"i{value.itemsize}") for name, value in params.items()}


def saved(path: Path, cell: Cell = SMALL, seed: int = 0, batch_first: bool = False) -> bytes:
    storage.save(path, cell, draw(cell, seed), batch_first)
    return path.read_bytes()


def assert_is(path: Path, cell: Cell, seed: int, batch_first: bool = False) -> None:
    found = storage.load(path)
    assert (found.cell, found.batch_first, found.dropout_key) == (cell, batch_first, None)
    assert_identical(bits(found.params), bits(draw(cell, seed)))


def left_over(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


# --- Round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_round_trip_is_bit_identical(tmp_path, dtype, layers, bidirectional, bias, batch_first):
    cell = Cell(3, 5, layers, bias, 0.1, bidirectional, dtype)
    saved(tmp_path / "model", cell, batch_first=batch_first)
    assert_is(tmp_path / "model", cell, 0, batch_first)


def test_loaded_arrays_are_the_callers_own(tmp_path, dtype):
    saved(tmp_path / "model", Cell(3, 5, dtype=dtype))
    for value in storage.load(tmp_path / "model").params.values():
        assert type(value) is np.ndarray
        assert value.flags.owndata and value.flags.writeable and value.flags.c_contiguous and value.flags.aligned
        assert value.dtype.isnative


@pytest.mark.parametrize(
    "arrange",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.astype(a.dtype.newbyteorder(">")),
    ],
    ids=["column major", "strided", "reversed", "big-endian"],
)
def test_any_memory_layout_is_saved_right(tmp_path, dtype, arrange):
    cell = Cell(3, 5, dtype=dtype)
    params = {name: arrange(value) for name, value in draw(cell).items()}
    changed = [name for name, a in params.items() if not a.flags.c_contiguous or not a.dtype.isnative]
    assert changed, "the case is what it claims to be"
    for value in params.values():
        value.flags.writeable = False
    storage.save(tmp_path / "model", cell, params, False)
    assert_is(tmp_path / "model", cell, 0)


def test_plain_safetensors_reads_the_weights(tmp_path, dtype):
    cell = Cell(3, 5, 2, bidirectional=True, dtype=dtype)
    saved(tmp_path / "model.safetensors", cell)
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert_identical(bits(found), bits(draw(cell)))


def test_the_same_model_gives_the_same_bytes(tmp_path):
    files = {saved(tmp_path / f"model{k}", Cell(3, 5, 2, bidirectional=True)) for k in range(5)}
    assert len(files) == 1


def test_the_digest_is_the_documented_one(tmp_path):
    header, _ = split(saved(tmp_path / "model"))
    description = json.loads(header["__metadata__"]["fastlstm"])
    sha256 = description.pop("sha256")
    text = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    params = draw(SMALL)
    assert sha256 == hashlib.sha256(text + b"".join(params[name].tobytes() for name in sorted(params))).hexdigest()


def test_a_file_of_format_1_loads_forever():
    """The file was written by release 0.1.0 and is never written again: it stands for the users' files."""
    cell, params, batch_first, dropout_key = storage.load(GOLDEN)
    assert (cell, batch_first, dropout_key) == (Cell(2, 3, 2, True, 0.5, True, np.float64), True, None)
    shapes = parameters.shapes(cell)
    values = iter(np.arange(sum(int(np.prod(shape)) for shape in shapes.values())) / 16)
    expected = {name: np.fromiter(values, np.float64, int(np.prod(s))).reshape(s) for name, s in shapes.items()}
    assert_identical(params, expected)


@pytest.mark.parametrize("kind", [str, Path, os.fsencode], ids=["str", "Path", "bytes"])
def test_kinds_of_path(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "absolute", Path("relative")):
        storage.save(kind(path), SMALL, draw(SMALL), False)
        assert_is(kind(path), SMALL, 0)


# --- LSTM.save and LSTM.load ------------------------------------------------------------------------------------------


def test_a_saved_lstm_is_the_same_lstm(tmp_path, dtype):
    lstm = LSTM(3, 5, 2, batch_first=True, bidirectional=True, dropout=0.25, dtype=dtype, seed=1)
    lstm.save(tmp_path / "model.safetensors")
    found = LSTM.load(tmp_path / "model.safetensors")
    assert repr(found) == repr(lstm)
    assert_identical(found.params, lstm.params)
    x = np.random.default_rng(2).normal(size=(4, 7, 3)).astype(dtype)
    with use_backend("reference"):
        (y, state), (found_y, found_state) = lstm(x), found(x)
    assert_identical({"y": found_y, "h": found_state[0], "c": found_state[1]}, {"y": y, "h": state[0], "c": state[1]})


@pytest.mark.parametrize(
    "change",
    [
        lambda params: params.pop("bias_l0"),
        lambda params: params.update(extra=params["bias_l0"]),
        lambda params: params.update(bias_l0=params["bias_l0"][1:]),
        lambda params: params.update(bias_l0=params["bias_l0"].astype(np.float64)),
        lambda params: params.update(bias_l0=params["bias_l0"].tolist()),
    ],
    ids=["missing", "extra", "shape", "dtype", "list"],
)
def test_broken_parameters_are_never_written(tmp_path, change):
    lstm = LSTM(2, 1)
    change(lstm.params)
    with pytest.raises((ValueError, TypeError)):
        lstm.save(tmp_path / "model")
    assert os.listdir(tmp_path) == []


# --- Writing: all or nothing ------------------------------------------------------------------------------------------


def write_until_full(descriptor, data, write=os.write):
    """Write a few bytes and then find the disk full."""
    if os.fstat(descriptor).st_size > 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return write(descriptor, bytes(data)[:100])


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


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


# --- Damage -----------------------------------------------------------------------------------------------------------


def test_truncation_at_every_byte_is_found(tmp_path):
    data = saved(tmp_path / "model")
    header = len(data) - len(split(data)[1])
    for length in range(len(data)):
        (tmp_path / "model").write_bytes(data[:length])
        with pytest.raises(ModelFileError, match="or ends within it" if length < header else "bytes, and"):
            storage.load(tmp_path / "model")


@pytest.mark.slow
def test_every_flipped_bit_is_found(tmp_path):
    data = saved(tmp_path / "model")
    for position, bit in itertools.product(range(len(data)), range(8)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << bit
        (tmp_path / "model").write_bytes(flipped)
        with pytest.raises(ModelFileError):
            storage.load(tmp_path / "model")
            pytest.fail(f"bit {bit} of byte {position} was flipped and not found")


TOKENS = [b"", b"\x00", b"\xff" * 8, b"-1", b"1e999", b"null", b"true", *(c.encode() for c in '"{}[],:0 \\')]
MUTATION = st.tuples(
    st.integers(0, 10**6),  # where, modulo the length
    st.integers(0, 12),  # how many bytes are replaced
    st.one_of(st.binary(max_size=12), st.sampled_from(TOKENS)),
)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """Bytes of a small file, and a place for mutants."""
    folder = tmp_path_factory.mktemp("mutants")
    return saved(folder / "original"), folder / "mutant"


@pytest.mark.slow
@settings(max_examples=3000)
@given(mutations=st.lists(MUTATION, min_size=1, max_size=4))
def test_a_mutated_file_is_refused_or_harmless(original, mutations):
    data, path = original
    mutant = data
    for position, length, replacement in mutations:
        start = position % (len(mutant) + 1)
        mutant = mutant[:start] + replacement + mutant[start + length :]
    path.write_bytes(mutant)
    with contextlib.suppress(ModelFileError):
        assert_is(path, SMALL, 0)


def split(data: bytes) -> tuple[dict, bytes]:
    """Take a file apart: the header as Python values, and the tensors' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def pack(header: bytes | dict | list, tensors: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + tensors


def raw_change(change):
    """Make a file whose header was changed as bytes."""

    def make(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        return pack(change(data[8:end]), data[end:])

    return make


def header_change(change):
    """Make a file whose header was changed."""

    def make(data: bytes) -> bytes:
        header, tensors = split(data)
        change(header)
        return pack(header, tensors)

    return make


def description_change(change):
    """Make a file whose description of the model was changed; the rest fits the original one."""

    def in_header(header):
        description = json.loads(header["__metadata__"]["fastlstm"])
        description = change(description) or description
        header["__metadata__"]["fastlstm"] = json.dumps(description)

    return header_change(in_header)


def cell_change(**fields):
    return description_change(lambda description: description["cell"].update(fields))


def tensor_change(**fields):
    return header_change(lambda header: header["weight_ih_l0"].update(fields))


def exchange(data: bytes) -> bytes:
    """Exchange the bytes of two tensors of one shape, and leave the rest."""
    header, tensors = split(data)
    pieces = {name: tensors[slice(*entry["data_offsets"])] for name, entry in header.items() if name in draw(SMALL)}
    assert len(pieces["bias_l0"]) == len(pieces["weight_hh_l0"])
    header["bias_l0"]["data_offsets"], header["weight_hh_l0"]["data_offsets"] = (
        header["weight_hh_l0"]["data_offsets"],
        header["bias_l0"]["data_offsets"],
    )
    return pack(header, tensors)


BROKEN = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(64),
    "header of length 0": lambda data: struct.pack("<Q", 0) + data[8:],
    "header longer than the file": lambda data: struct.pack("<Q", len(data)) + data[8:],
    "header of 2^63 bytes": lambda data: struct.pack("<Q", 2**63) + data[8:],
    "header of 2^64 - 1 bytes": lambda data: b"\xff" * 8 + data[8:],
    "header above the limit": raw_change(lambda header: header + b" " * 2**20),
    "bytes after the end": lambda data: data + b"\0",
    "no JSON": lambda data: pack(b"{weights}"),
    "a JSON array": lambda data: pack([]),
    "JSON in UTF-16": raw_change(lambda header: header.decode().encode("utf-16")),
    "JSON after a byte order mark": raw_change(lambda header: b"\xef\xbb\xbf" + header),
    "no UTF-8": lambda data: pack(b'{"\xff": 1}'),
    "nothing but metadata": lambda data: pack({"__metadata__": split(data)[0]["__metadata__"]}),
    "no metadata": header_change(lambda header: header.pop("__metadata__")),
    "metadata of another tool": header_change(lambda header: header.update(__metadata__={"format": "pt"})),
    "metadata is a list": header_change(lambda header: header.update(__metadata__=["fastlstm"])),
    "metadata is a string": header_change(lambda header: header.update(__metadata__="fastlstm")),
    "metadata holds a number": header_change(lambda header: header["__metadata__"].update(more=1)),
    "description is no text": header_change(lambda header: header["__metadata__"].update(fastlstm={"format": 1})),
    "description is no JSON": header_change(lambda header: header["__metadata__"].update(fastlstm="{")),
    "description is a list": header_change(lambda header: header["__metadata__"].update(fastlstm="[1]")),
    "description lacks a field": description_change(lambda d: d.pop("batch_first") and None),
    "description lacks the digest": description_change(lambda d: {k: v for k, v in d.items() if k != "sha256"}),
    "description has another field": description_change(lambda d: d.update(more=1)),
    "format 0": description_change(lambda d: d.update(format=0)),
    "format is a string": description_change(lambda d: d.update(format="1")),
    "format is infinite": description_change(lambda d: d.update(format=float("inf"))),
    "batch_first is a number": description_change(lambda d: d.update(batch_first=0)),
    "batch_first flipped": description_change(lambda d: d.update(batch_first=True)),
    "digest is null": description_change(lambda d: d.update(sha256=None)),
    "digest of something else": description_change(lambda d: d.update(sha256="0" * 64)),
    "cell is null": description_change(lambda d: d.update(cell=None)),
    "cell is a list": description_change(lambda d: d.update(cell=[1, 2])),
    "cell lacks a size": description_change(lambda d: d["cell"].pop("hidden_size") and None),
    "cell has another field": cell_change(more=1),
    "another dropout": cell_change(dropout=0.5),
    "dropout is infinite": cell_change(dropout=float("inf")),
    "dropout is beyond any float": cell_change(dropout=10**4000),
    "dropout is a list": cell_change(dropout=[0.25]),
    "more layers than tensors": cell_change(num_layers=2),
    "a billion layers": cell_change(num_layers=10**9),
    "10^18 layers": cell_change(num_layers=10**18),
    "layers beyond 64 bits": cell_change(num_layers=10**4000),
    "hidden size of 10^18": cell_change(hidden_size=10**18),
    "hidden size is a string": cell_change(hidden_size="1"),
    "hidden size is negative": cell_change(hidden_size=-1),
    "input size is a float": cell_change(input_size=2.0),
    "dtype is object": cell_change(dtype="object"),
    "dtype is float16": cell_change(dtype="float16"),
    "dtype is a list": cell_change(dtype=[["a", "float32"]]),
    "dtype is enormous": cell_change(dtype="(1000000000,)float32"),
    "dtype is missing": description_change(lambda d: d["cell"].pop("dtype") and None),
    "a tensor is missing": header_change(lambda header: header.pop("bias_l0")),
    "a tensor too many": header_change(lambda h: h.update(x={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})),
    "a tensor has another name": header_change(lambda header: header.update(bias_l1=header.pop("bias_l0"))),
    "a tensor is a number": header_change(lambda header: header.update(weight_ih_l0=1)),
    "a tensor is null": header_change(lambda header: header.update(weight_ih_l0=None)),
    "a tensor lacks its place": header_change(lambda header: header["weight_ih_l0"].pop("data_offsets")),
    "a tensor has another field": tensor_change(more=1),
    "tensor dtype F64": tensor_change(dtype="F64"),
    "tensor dtype I32": tensor_change(dtype="I32"),
    "tensor dtype is unhashable": tensor_change(dtype=[]),
    "tensor shape transposed": tensor_change(shape=[2, 4]),
    "tensor shape flat": tensor_change(shape=[8]),
    "tensor shape is huge": tensor_change(shape=[2**62, 2**62]),
    "tensor shape of floats": tensor_change(shape=[4.0, 2.0]),
    "offsets are floats": tensor_change(data_offsets=[0.0, 32.0]),
    "offsets are booleans": tensor_change(data_offsets=[False, True]),
    "offsets are strings": tensor_change(data_offsets=["0", "32"]),
    "offsets are three": tensor_change(data_offsets=[0, 16, 32]),
    "offsets are negative": tensor_change(data_offsets=[-32, 0]),
    "offsets run backwards": tensor_change(data_offsets=[32, 0]),
    "offsets overlap": tensor_change(data_offsets=[0, 32]),
    "two tensors in one place": header_change(
        lambda header: header["bias_l0"].update(data_offsets=header["weight_hh_l0"]["data_offsets"])
    ),
    "offsets of another length": header_change(
        lambda header: (
            header["bias_l0"].update(data_offsets=[0, 12]),
            header["weight_hh_l0"].update(data_offsets=[12, 32]),
        )
    ),
    "offsets leave a gap": tensor_change(data_offsets=[64, 96]),
    "offsets beyond 64 bits": tensor_change(data_offsets=[10**30, 10**30 + 32]),
    "two tensors exchanged": exchange,
    "a name stands twice": raw_change(lambda header: b'{"bias_l0":0,' + header[1:]),
    "a name stands twice in the description": raw_change(
        lambda header: header.replace(rb"{\"", rb"{\"format\":0,\"", 1)
    ),
    "NaN in the header": lambda data: pack(b'{"a": NaN}'),
    "an integer of 100,000 digits": lambda data: pack(b'{"a": ' + b"9" * 100_000 + b"}"),
}


def test_the_makers_of_broken_files_break_nothing_by_themselves(tmp_path):
    data = saved(tmp_path / "model")
    nothing = lambda value: None  # noqa: E731
    for make in (raw_change(bytes), header_change(nothing), description_change(nothing), cell_change()):
        (tmp_path / "model").write_bytes(make(data))
        assert_is(tmp_path / "model", SMALL, 0)


# What cannot be seen before the tensors are there: only the digest shows it, or safetensors itself.
FOUND_LATER = {
    "metadata holds a number",
    "batch_first flipped",
    "digest of something else",
    "another dropout",
    "tensor shape of floats",
    "two tensors exchanged",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_refused_before_its_tensors_are_read(tmp_path, monkeypatch, name):
    path = tmp_path / "model"
    broken = BROKEN[name](saved(path))
    path.write_bytes(broken)
    if name not in FOUND_LATER:
        monkeypatch.setattr(safetensors.numpy, "load", failing(AssertionError("the tensors were read")))
    with pytest.raises(ModelFileError) as caught:
        load_within(path, 200_000 + 2 * len(broken))  # 200 kB for Python's own objects, such as the traceback
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path)), "the message does not repeat what a stranger wrote"


# As large as a header may be, and made for the parser; each needs another part of it. Measured: 28 MB at most.
BOMBS = {
    "deep arrays": b"[" * (2**20 - 16),
    "deep objects": b'{"a":' * (2**20 // 5 - 16),
    "many arrays": b'{"a":[' + b"[]," * (2**20 // 3 - 16) + b"[]]}",
    "many objects": b'{"a":[' + b"{}," * (2**20 // 3 - 16) + b"{}]}",
    "many names": b"{" + b",".join(b'"%x":""' % k for k in range(80_000)) + b"}",
    "many numbers": b'{"a":[' + b"999," * (2**20 // 4 - 16) + b"9]}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_header_made_for_the_parser_is_refused(tmp_path, name):
    (tmp_path / "model").write_bytes(pack(BOMBS[name]))
    with pytest.raises(ModelFileError):
        load_within(tmp_path / "model", 40_000_000)


def test_loading_takes_at_most_twice_the_files_size(tmp_path):
    size = len(saved(tmp_path / "model", Cell(256, 512)))
    assert size > 6_000_000
    load_within(tmp_path / "model", 2 * size + 200_000)


def load_within(path: Path, limit: int) -> None:
    """Load a file and check, also when that fails, how much was allocated at the peak."""
    tracemalloc.start()
    try:
        storage.load(path)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= limit, f"{peak} bytes were allocated at the peak"


def test_a_newer_format_is_called_so(tmp_path):
    data = saved(tmp_path / "model")
    (tmp_path / "model").write_bytes(description_change(lambda d: d.update(format=3))(data))
    with pytest.raises(ModelFileError, match="newer version of fastlstm"):
        storage.load(tmp_path / "model")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path, check = tmp_path / "model", storage._check_header
    data = saved(path, Cell(64, 128))  # larger than a file object's buffer
    changes = {"cut off": data[:-1], "checksum": data[:-1] + bytes([data[-1] ^ 1])}
    for message, changed in changes.items():
        path.write_bytes(data)
        with monkeypatch.context() as patched, pytest.raises(ModelFileError, match=message):
            patched.setattr(storage, "_check_header", lambda *args: (path.write_bytes(changed), check(*args))[1])  # noqa: B023
            storage.load(path)


# --- What is no model file --------------------------------------------------------------------------------------------


class Payload:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_foreign_files_are_refused(tmp_path):
    path, trap = tmp_path / "foreign", tmp_path / "trap"
    archive = io.BytesIO()
    np.savez(archive, **draw(SMALL))
    array = io.BytesIO()
    np.save(array, draw(SMALL)["bias_l0"])
    foreign = [
        *(pickle.dumps(Payload(trap), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
        archive.getvalue(),
        array.getvalue(),
        b"weights: 1, 2, 3\n" * 100,
        random.Random(0).randbytes(1000),
    ]
    for data in foreign:
        path.write_bytes(data)
        with pytest.raises(ModelFileError):
            storage.load(path)
    assert not trap.exists()
    pickle.loads(foreign[0]).close()
    assert trap.exists(), "the payload would have worked"


def test_the_error_for_a_foreign_safetensors_file_says_what_to_do(tmp_path):
    safetensors.numpy.save_file(draw(SMALL), tmp_path / "model", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"LSTM\.load_torch"):
        storage.load(tmp_path / "model")
    LSTM(3, 4, seed=0).save(tmp_path / "ours")
    with pytest.raises(ModelFileError, match=r"written by fastlstm: LSTM\.load"):
        LSTM.load_torch(tmp_path / "ours")


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        storage.load(tmp_path / "missing")


def test_a_folder_is_no_model_file(tmp_path):
    with pytest.raises(ModelFileError, match="not a regular file"):
        storage.load(tmp_path)


@needs_posix
def test_a_pipe_or_device_is_no_model_file(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ModelFileError, match="not a regular file"):
            storage.load(path)
    # One that takes the place of a file after it was looked at does not block either.
    saved(tmp_path / "model")
    status = os.stat(tmp_path / "model")
    refused = threading.Event()

    def load():
        with contextlib.suppress(ModelFileError):
            storage.load(tmp_path / "pipe")
            return
        refused.set()

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", lambda *args, **options: status)
        threading.Thread(target=load, daemon=True).start()
        refused.wait(10)
    assert refused.is_set(), "it waits for someone to write into the pipe"
