"""Model files in binary file objects, and errors for values that are neither a path nor a file object."""
# ruff: noqa: SIM115  (the tables hold functions that open files; those who call them close them)

from __future__ import annotations

import codecs
import gzip
import io
import os
import tempfile
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tolerances import assert_identical

from fastlstm import LSTM, ArgumentError, ModelFileError, storage


def model(dtype=np.float32):
    return LSTM(3, 5, 2, dropout=0.25, batch_first=True, dtype=dtype, seed=1)


def data_of(lstm) -> bytes:
    file = io.BytesIO()
    lstm.save(file)
    return file.getvalue()


def assert_is_model(lstm, dtype=np.float32):
    assert repr(lstm) == repr(model(dtype))
    assert_identical(lstm.params, model(dtype).params)


class Stingy(io.RawIOBase):
    """A raw file object that takes and gives seven bytes at a time, and cannot seek."""

    def __init__(self, data: bytes = b"") -> None:
        super().__init__()
        self.data = bytearray(data)

    def readable(self):
        return True

    def writable(self):
        return True

    def write(self, data):
        self.data += bytes(data)[:7]
        return min(7, len(data))

    def read(self, size=-1):
        piece = bytes(self.data[: min(7, size)])
        del self.data[: len(piece)]
        return piece


@pytest.mark.parametrize("kind", ["BytesIO", "file", "unbuffered file", "gzip", "temporary file", "spooled"])
def test_a_file_object_holds_what_a_file_at_a_path_would(tmp_path, dtype, kind):
    model(dtype).save(tmp_path / "path")
    expected, path = (tmp_path / "path").read_bytes(), tmp_path / "object"
    opened = {
        "BytesIO": io.BytesIO,
        "file": lambda: open(path, "w+b"),
        "unbuffered file": lambda: open(path, "w+b", buffering=0),
        "gzip": lambda: gzip.open(path, "wb"),
        "temporary file": lambda: tempfile.NamedTemporaryFile(dir=tmp_path),
        "spooled": lambda: tempfile.SpooledTemporaryFile(dir=tmp_path),
    }[kind]
    with opened() as file:
        model(dtype).save(file)
        assert not file.closed
        if kind != "gzip":
            assert file.tell() == len(expected)
            file.seek(0)
            assert file.read() == expected
            file.seek(0)
            assert_is_model(LSTM.load(file), dtype)
            assert not file.closed
    if kind == "gzip":
        with gzip.open(path) as file:
            assert_is_model(LSTM.load(file), dtype)


def test_the_position_is_respected():
    file = io.BytesIO(b"0123456789")
    file.seek(4)
    model().save(file)
    assert file.getvalue()[:4] == b"0123"
    file.seek(0)
    with pytest.raises(ModelFileError):
        LSTM.load(file)
    file.seek(4)
    assert_is_model(LSTM.load(file))
    assert file.read() == b""


def test_a_raw_file_that_takes_a_part_at_a_time_gets_all():
    file = Stingy()
    model().save(file)
    assert bytes(file.data) == data_of(model())
    assert_is_model(LSTM.load(file))


def test_the_system_may_write_a_part_at_a_time(tmp_path, monkeypatch):
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:100]))
        model().save(tmp_path / "model")
    assert_is_model(LSTM.load(tmp_path / "model"))


@pytest.mark.skipif(os.name != "posix", reason="the test reads from a pipe")
def test_a_pipe_is_read_to_its_end():
    reading, writing = os.pipe()

    def send():
        with open(writing, "wb") as file:
            model().save(file)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    with open(reading, "rb") as file:
        assert_is_model(LSTM.load(file))
    sender.join(10)


class OnlyWrite:
    """Not much of a file object: it does not even count."""

    def __init__(self):
        self.data = b""

    def write(self, data):
        self.data += data


def test_an_object_with_nothing_but_the_method_is_enough():
    file = OnlyWrite()
    model().save(file)
    assert file.data == data_of(model())


class Failing(io.BytesIO):
    def write(self, data):
        raise OSError(28, "no room")


class Full(io.RawIOBase):
    """A raw file object that takes nothing more."""

    def __init__(self, result):
        super().__init__()
        self.result = result

    def writable(self):
        return True

    def readable(self):
        return True

    def write(self, data):
        return self.result

    def read(self, size=-1):
        return self.result


def test_errors_of_a_file_object_come_through():
    with pytest.raises(OSError, match="no room"):
        model().save(Failing())
    for result, error in ((0, OSError), (None, BlockingIOError)):
        with pytest.raises(error):
            model().save(Full(result))
    with pytest.raises(BlockingIOError):
        LSTM.load(Full(None))


# Validation is that of files


def test_truncation_at_every_byte_and_surplus_are_found():
    lstm = LSTM(2, 1, seed=0)
    data = data_of(lstm)
    for broken in (*(data[:length] for length in range(len(data))), data + b"\0"):
        with pytest.raises(ModelFileError, match="content of the file object"):
            LSTM.load(io.BytesIO(broken))


def test_every_flipped_bit_is_found():
    data = data_of(LSTM(2, 1, seed=0))
    for position in range(len(data)):
        broken = bytearray(data)
        broken[position] ^= 1 << position % 8
        with pytest.raises(ModelFileError):
            LSTM.load(io.BytesIO(broken))


@pytest.mark.parametrize("kind", ["BytesIO", "buffered", "raw"])
def test_a_header_that_claims_a_large_model_allocates_nothing_large(tmp_path, kind):
    """The size of a stream is not known before its end: what is allocated follows what is there."""
    lstm = LSTM(2, 1, seed=0)
    claim = LSTM(256, 1024, seed=0)
    small, large = data_of(lstm), data_of(claim)
    header = large[: 8 + int.from_bytes(large[:8], "little")]
    assert len(large) > 20_000_000
    for data in (header, header + small):
        (tmp_path / "file").write_bytes(data)
        with io.BytesIO(data) if kind == "BytesIO" else open(tmp_path / "file", "rb", -(kind != "raw")) as file:
            tracemalloc.start()
            try:
                with pytest.raises(ModelFileError):
                    storage.load(file)
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert peak < 3_000_000  # a piece of 1 MiB and its copy, and Python's own objects


def test_loading_takes_at_most_twice_the_size():
    data = data_of(LSTM(256, 512, seed=0))
    file = io.BytesIO(data)
    tracemalloc.start()
    try:
        storage.load(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= 2 * len(data) + 200_000


# What is no file


class Wicked:
    """Its repr is an error of its own."""

    def __repr__(self):
        raise RuntimeError


class NoPath:
    def __fspath__(self):
        return 3


NEITHER = {
    "None": None,
    "a descriptor": 1,
    "a float": 1.5,
    "a list": ["model"],
    "a bytearray": bytearray(b"model"),
    "an array": np.zeros(3),
    "a wicked object": Wicked(),
    "a huge integer": 10**5000,
    "no path": NoPath(),
    "a class": Path,
    "NUL": "a\0b",
    "NUL in bytes": b"a\0b",
    "NUL in a Path": Path("a\0b"),
    "a lone surrogate": "\ud800",
}


@pytest.mark.parametrize("name", NEITHER)
def test_values_that_are_not_files_are_refused_before_any_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError, match=r"path|file"):
        model().save(NEITHER[name])
    with pytest.raises(ArgumentError, match=r"path|file"):
        LSTM.load(NEITHER[name])
    assert os.listdir(tmp_path) == []


def test_file_objects_in_text_mode_are_refused_with_a_hint(tmp_path):
    path = tmp_path / "text"
    for opened in (
        lambda: open(path, "w", encoding="utf-8"),
        io.StringIO,
        lambda: codecs.getwriter("utf-8")(io.BytesIO()),
        lambda: tempfile.NamedTemporaryFile("w", dir=tmp_path),
    ):
        with opened() as file, pytest.raises(ArgumentError, match="'wb'"):
            model().save(file)
    path.write_text("text " * 100)
    for opened in (
        lambda: open(path, encoding="utf-8"),
        lambda: io.StringIO("text"),
        lambda: codecs.getreader("utf-8")(io.BytesIO(b"text")),
    ):
        with opened() as file, pytest.raises(ArgumentError, match="'rb'"):
            LSTM.load(file)


def test_file_objects_that_cannot_be_used_are_refused(tmp_path):
    path = tmp_path / "model"
    model().save(path)
    before = path.read_bytes()
    with open(path, "rb") as file, pytest.raises(ArgumentError, match="not writable"):
        model().save(file)
    with pytest.raises(ArgumentError, match="closed"):
        model().save(file)
    with pytest.raises(ArgumentError, match="closed"):
        LSTM.load(file)
    with open(tmp_path / "other", "wb") as file, pytest.raises(ArgumentError, match="not readable"):
        LSTM.load(file)
    assert path.read_bytes() == before


def test_broken_parameters_write_nothing_into_a_file_object():
    lstm, file = model(), io.BytesIO()
    lstm.params.pop("bias_l0")
    with pytest.raises(ArgumentError):
        lstm.save(file)
    assert file.getvalue() == b""
