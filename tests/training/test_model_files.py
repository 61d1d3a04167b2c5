"""Files of whole models: exact round trips; damaged, forged and hostile files are refused."""

from __future__ import annotations

import copy
import io
import itertools
import json
import pickle
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from whole_models import OUTPUTS, assert_same, build, data, named, saved, scaled

from fastlstm import LSTM, ArgumentError, ModelFileError, storage
from fastlstm.training import Linear, Model
from fastlstm.training.scaler import Scaler

GOLDEN = Path(__file__).parents[1] / "golden" / "model-1.safetensors"


@pytest.fixture
def rng():
    return np.random.default_rng(31)


def loaded(data):
    return Model.load(io.BytesIO(data))


@pytest.mark.parametrize("with_scaler", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_a_saved_model_is_the_same_model(rng, tmp_path, dtype, output, several, batch_first, with_scaler):
    model = build(output, several, batch_first, dtype)
    model = scaled(model, rng) if with_scaler else model
    model.save(tmp_path / "model.safetensors")
    again = Model.load(tmp_path / "model.safetensors")
    assert_same(model, again)
    x = data(rng, model)
    for name, value in named(model, model.predict(x)).items():
        np.testing.assert_array_equal(named(again, again.predict(x))[name], value)
    assert saved(again) == (tmp_path / "model.safetensors").read_bytes(), "the same model gives the same bytes"


def test_dropout_masks_go_on_where_they_were(rng):
    model = Model(LSTM(3, 8, 2, dropout=0.5, seed=0), Linear(8, 1, seed=1))
    x = rng.normal(size=(4, 5, 3)).astype(np.float32)
    model.forward(x)
    again = loaded(saved(model))
    np.testing.assert_array_equal(model.forward(x)[0], again.forward(x)[0])


def test_copies_and_pickles_share_nothing(rng):
    model = scaled(build(several=True), rng)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.to(np)):
        assert_same(model, again)
        for name, value in model.params.items():
            assert not np.shares_memory(value, again.params[name])
        assert not np.shares_memory(model.scaler.arrays["x.mean"], again.scaler.arrays["x.mean"])


def test_plain_safetensors_reads_all_parts(rng):
    import safetensors.numpy

    model = scaled(build(several=True), rng)
    found = safetensors.numpy.load(saved(model))
    assert found.keys() == {*model.params, *(f"scaler.{name}" for name in model.scaler.arrays)}


def test_a_file_of_format_1_loads_forever():
    """The file was written by release 0.1.0 and is never written again: it stands for the users' files."""
    lstms = [LSTM(3, 2, 2, dropout=0.5, batch_first=True), LSTM(2, 2, bidirectional=True, batch_first=True)]
    expected = Model(lstms, {"flow": Linear(4, 2), "level": Linear(4, 1, bias=False)}, output="mean", scale=True)
    count = iter(range(1, 1000))
    expected.scaler = Scaler(
        {f"{name}.{kind}": np.arange(size, dtype=np.float32) + next(count)
         for name, size in (("x", 3), ("flow", 2)) for kind in ("mean", "deviation")}
    )  # fmt: skip
    for value in expected.params.values():
        value[...] = np.arange(value.size).reshape(value.shape) / 16 + next(count)
    found = Model.load(GOLDEN)
    assert_same(expected, found)
    assert found.lstms["lstm0"]._dropout_key == 29 and found.batch_first


def test_files_of_one_kind_are_not_taken_for_the_other(rng):
    model, lstm = build(), io.BytesIO()
    model.lstms["lstm"].save(lstm)
    with pytest.raises(ModelFileError, match=re.escape("use LSTM.load")):
        loaded(lstm.getvalue())
    with pytest.raises(ModelFileError, match=r"fastlstm\.training\.Model"):
        LSTM.load(io.BytesIO(saved(model)))


SMALL = scaled(
    Model([LSTM(3, 1, seed=1), LSTM(1, 1, 2, dropout=0.25, seed=2)], {"a": Linear(1, 2, seed=3)}),
    np.random.default_rng(0),
)
SAVED = saved(SMALL)
TOKENS = [b"", b"\x00", b"\xff" * 8, b"-1", b"1e999", b"null", b"true", b"[]", b"{}", b'\\"a\\"', b"lstm", b"last",
          *(c.encode() for c in '"{}[],:0 \\')]  # fmt: skip


def mutate(rng, data):
    """Replace up to 12 bytes at one to four places, mostly in the header, by random bytes or by a token of JSON."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(data) + 1)
        new = rng.choice(TOKENS) if rng.random() < 0.5 else rng.randbytes(rng.randint(0, 12))
        data = data[:start] + new + data[start + rng.randint(0, 12) :]
    return data


def test_a_mutated_file_is_refused_or_harmless():
    rng, refused = random.Random(29), 0
    for _ in range(10_000):
        mutant = mutate(rng, SAVED)
        try:
            assert_same(SMALL, loaded(mutant))
        except ModelFileError:
            refused += 1
    assert refused > 9_000, "most mutations change something"


def test_truncation_at_every_byte_and_every_flipped_bit_is_found():
    for length in range(len(SAVED)):
        with pytest.raises(ModelFileError):
            loaded(SAVED[:length])
    for position, bit in itertools.product(range(len(SAVED)), range(0, 8, 3)):
        flipped = bytearray(SAVED)
        flipped[position] ^= 1 << bit
        with pytest.raises(ModelFileError):
            loaded(bytes(flipped))
            pytest.fail(f"bit {bit} of byte {position} was flipped and not found")


def changed(change, data=SAVED):
    """Change the description of the model, or the header; the rest fits the original one."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:end])
    said = json.loads(header["__metadata__"]["fastlstm.training.Model"])
    change(said, header)
    header["__metadata__"]["fastlstm.training.Model"] = json.dumps(said)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def put(*path, value):
    def change(said, header):
        for key in path[:-1]:
            said = said[key]
        said[path[-1]] = value

    return change


LIES = {
    "format 2": put("format", value=2),
    "format text": put("format", value="1"),
    "more fields": put("more", value=1),
    "no lstms": put("lstms", value=[]),
    "lstms null": put("lstms", value=None),
    "lstms numbers": put("lstms", value=[1, 2]),
    "a billion layers": put("lstms", 0, "cell", "num_layers", value=10**9),
    "a million layers": put("lstms", 0, "cell", "num_layers", value=2**20),
    "huge hidden size": put("lstms", 1, "cell", "hidden_size", value=2**28),
    "cell of another dtype": put("lstms", 1, "cell", "dtype", value="float64"),
    "cell of object dtype": put("lstms", 1, "cell", "dtype", value="O"),
    "cell with more": put("lstms", 1, "cell", "more", value=1),
    "cell list": put("lstms", 1, "cell", value=[]),
    "lstms that do not fit": put("lstms", 1, "cell", "input_size", value=2),
    "negative key": put("lstms", 1, "dropout_key", value=-1),
    "key true": put("lstms", 1, "dropout_key", value=True),
    "not listed": put("listed", value=False),
    "listed 1": put("listed", value=1),
    "heads null": put("heads", value=None),
    "no heads": put("heads", value=[]),
    "many heads": put("heads", value=[{"name": f"h{k}", "in": 1, "out": 1, "bias": True} for k in range(1000)]),
    "head of a huge size": put("heads", 0, "out", value=2**31),
    "head of no size": put("heads", 0, "out", value=0),
    "head of a negative size": put("heads", 0, "out", value=-2),
    "head of size true": put("heads", 0, "out", value=True),
    "head with another input": put("heads", 0, "in", value=2),
    "head bias 1": put("heads", 0, "bias", value=1),
    "head without bias": put("heads", 0, "bias", value=False),
    "head with a dot": put("heads", 0, "name", value="a.b"),
    "head named as an LSTM": put("heads", 0, "name", value="lstm0"),
    "head with a list for a name": put("heads", 0, "name", value=["a"]),
    "output list": put("output", value=["last"]),
    "output unknown": put("output", value="first"),
    "scaled unknown": put("scaled", value=["b"]),
    "scaled twice": put("scaled", value=["a", "a"]),
    "scaled lists": put("scaled", value=[["a"]]),
    "scaled null": put("scaled", value=None),
    "scaled nothing": put("scaled", value=[]),
    "not scaling": put("scale", value=False),
    "digest null": put("sha256", value=None),
    "digest of others": put("sha256", value="0" * 64),
    "layout": put("batch_first", value=True),
    "single": put("single_head", value=True),
    "tensor of another shape": lambda said, header: header["a.weight"].update(shape=[1, 2]),
    "tensor of another dtype": lambda said, header: header["a.weight"].update(dtype="I64"),
    "tensor without a place": lambda said, header: header["a.weight"].pop("data_offsets"),
    "tensor missing": lambda said, header: header.pop("a.weight"),
    "tensor renamed": lambda said, header: header.update(b=header.pop("a.weight")),
    "tensors overlap": lambda said, header: header["a.weight"].update(data_offsets=[0, 8]),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused(lie):
    assert_same(SMALL, loaded(changed(lambda said, header: None)))
    with pytest.raises(ModelFileError):
        loaded(changed(LIES[lie]))


def forged(monkeypatch, change):
    """Write a file with a right digest, of tensors and a description that were changed to fit each other."""
    written = []
    with monkeypatch.context() as patched:
        patched.setattr(storage, "write", lambda path, tensors, key, said, check: written.append((tensors, key, said)))
        SMALL.save(io.BytesIO())
    tensors, key, said = written[0]
    tensors, said = dict(tensors), copy.deepcopy(said)
    change(tensors, said)
    file = io.BytesIO()
    storage.write(file, tensors, key, said, lambda *_: None)
    return file.getvalue()


def wider_head(tensors, said):
    said["heads"][0]["in"] = 3
    tensors["a.weight"] = np.zeros((2, 3), np.float32)


def other_dtype(tensors, said):
    said["lstms"][1]["cell"]["dtype"] = "float64"
    for name in [name for name in tensors if name.startswith("lstm1")]:
        tensors[name] = tensors[name].astype(np.float64)
    for name in [name for name in tensors if name.startswith(("a.", "scaler.a."))]:
        tensors[name] = tensors[name].astype(np.float64)


def wider_lstm(tensors, said):
    said["lstms"][1]["cell"]["input_size"] = 2
    tensors["lstm1.weight_ih_l0"] = np.zeros((4, 2), np.float32)


def one_more(tensors, said):
    tensors["more"] = np.zeros(0, np.float32)


@pytest.mark.parametrize("change", [wider_head, other_dtype, wider_lstm, one_more])
def test_parts_that_do_not_fit_each_other_are_refused(monkeypatch, change):
    assert_same(SMALL, loaded(forged(monkeypatch, lambda tensors, said: None)))
    with pytest.raises(ModelFileError, match=r"description of the model|tensors are not those"):
        loaded(forged(monkeypatch, change))


def test_a_scaler_that_cannot_scale_is_refused(rng):
    for name, value in (("x.mean", np.nan), ("x.deviation", 0.0), ("a.deviation", -1.0), ("a.mean", np.inf)):
        model = copy.deepcopy(SMALL)
        model.scaler.arrays[name][0] = value
        with pytest.raises(ModelFileError, match="scaler"):
            loaded(saved(model))


def test_what_load_would_refuse_is_not_written(tmp_path):
    model = build()
    model.heads["head"].params["weight"] = np.zeros((2, 4))
    with pytest.raises(ModelFileError):
        model.save(tmp_path / "model")
    model = build()
    model.lstms["lstm"].params.pop("bias_l0")
    with pytest.raises(ArgumentError, match="bias_l0"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())
