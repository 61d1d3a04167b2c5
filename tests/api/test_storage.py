"""Model files: exact round trips, and files of other kinds, which are refused."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from model_files import SMALL, assert_is, bits, draw, needs_posix, saved, split
from tolerances import assert_identical

from fastlstm import LSTM, ModelFileError, parameters, storage, use_backend
from fastlstm.cell import Cell

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1.safetensors"


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
