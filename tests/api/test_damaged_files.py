"""Damaged, forged and hostile model files are refused, before their tensors are read where that can be."""

from __future__ import annotations

import contextlib
import itertools
import json
import struct
import tracemalloc
from pathlib import Path

import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from model_files import SMALL, assert_is, draw, failing, saved, split

from fastlstm import ModelFileError, storage
from fastlstm.cell import Cell


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
