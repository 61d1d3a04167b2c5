"""The key of the next dropout masks goes with the model: into files, pickles, copies and other array libraries."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import cuda_row
import numpy as np
import pytest
import safetensors.numpy
from tolerances import assert_identical

from fastlstm import LSTM, ModelFileError, parameters, storage
from fastlstm.cell import Cell

GOLDEN = Path(__file__).parents[1] / "golden" / "format-2.safetensors"


def through_a_file(lstm):
    file = io.BytesIO()
    lstm.save(file)
    file.seek(0)
    return LSTM.load(file)


WAYS = {
    "file": through_a_file,
    "pickle": lambda lstm: pickle.loads(pickle.dumps(lstm)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "to": lambda lstm: lstm.to(np),
    "freeze": LSTM.freeze,
    "frozen file": lambda lstm: through_a_file(lstm.freeze()),
    "frozen pickle": lambda lstm: pickle.loads(pickle.dumps(lstm.freeze())),
    "thawed": lambda lstm: lstm.freeze().to(np),
}


def model(seed=0, **options):
    return LSTM(3, 8, 2, dropout=0.5, seed=seed, **options)


def passes(lstm, count=2):
    x = np.ones((4, 5, 3), lstm.cell.dtype)
    return {str(k): lstm.forward(x)[0] for k in range(count)}


@pytest.mark.parametrize("done", [0, 3])
@pytest.mark.parametrize("way", WAYS)
def test_the_next_masks_are_those_that_the_original_would_draw(way, done):
    lstm = model()
    passes(lstm, done)
    other = WAYS[way](lstm)
    found, expected = passes(other), passes(lstm)
    for name, y in found.items():
        # A frozen model sums in another order; a mask of another pass zeroes other units: differences of order 0.1.
        np.testing.assert_allclose(y, expected[name], rtol=0, atol=1e-5)
    assert np.abs(expected["0"] - expected["1"]).max() > 1e-2, "each pass draws its own masks"


@pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))
def test_a_model_of_cupy_arrays_goes_through_a_file_with_its_masks():
    lstm = model()
    expected = passes(lstm, 3)["2"]
    moved = model()
    with cuda_row.installed() as cupy:
        moved = moved.to(cupy)
        for _ in range(2):
            moved.forward(cupy.asarray(np.ones((4, 5, 3), np.float32)))
        back = through_a_file(moved)
    np.testing.assert_allclose(passes(back, 1)["0"], expected, rtol=0, atol=1e-5)


def test_a_model_without_masks_is_written_in_format_1():
    """Older releases read it, and the bytes do not depend on a key that decides nothing."""
    for options in ({}, {"num_layers": 2}, {"dropout": 0.5}):
        lstm, file = LSTM(3, 4, seed=0, **options), io.BytesIO()
        lstm.save(file)
        assert description_of(file.getvalue())["format"] == 1
        assert b"dropout_key" not in file.getvalue()


def test_a_file_of_format_2_loads_forever():
    """Written by the release that introduced the format, and never again: it stands for the users' files."""
    cell, params, batch_first, dropout_key = storage.load(GOLDEN)
    assert (cell, batch_first, dropout_key) == (Cell(2, 3, 2, True, 0.5, False, np.float32), False, 2**63 + 11)
    values = iter(np.arange(sum(int(np.prod(shape)) for shape in parameters.shapes(cell).values())) / 16)
    expected = {
        name: np.fromiter(values, np.float32, int(np.prod(shape))).reshape(shape)
        for name, shape in parameters.shapes(cell).items()
    }
    assert_identical(params, expected)
    assert LSTM.load(GOLDEN)._dropout_key == 2**63 + 11


def test_models_of_format_1_start_at_the_first_masks():
    golden = GOLDEN.with_name("format-1.safetensors")
    first, second = LSTM.load(golden), LSTM.load(golden)
    assert first._dropout_key == 0
    x = np.ones((2, 4, 2))
    assert_identical({"y": first.forward(x)[0]}, {"y": second.forward(x)[0]})


def description_of(data: bytes) -> dict:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return json.loads(header["__metadata__"]["fastlstm"])


def changed(data: bytes, **fields) -> bytes:
    """Return a file with other fields in its description, and None for no such field; its digest fits."""
    description = {name: value for name, value in (description_of(data) | fields).items() if value is not None}
    tensors = safetensors.numpy.load(data)
    description.pop("sha256")
    description["sha256"] = storage._digest(description, tensors)
    return safetensors.numpy.save(tensors, metadata={"fastlstm": json.dumps(description)})


WRONG = {
    "format 2 without a key": {"dropout_key": None},
    "format 1 with a key": {"format": 1},
    "a negative key": {"dropout_key": -1},
    "a key beyond 64 bits": {"dropout_key": 10**19},
    "a key of 4,000 digits": {"dropout_key": 10**4000},
    "a fractional key": {"dropout_key": 1.0},
    "a key of text": {"dropout_key": "1"},
    "a key that is true": {"dropout_key": True},
    "a key that is a list": {"dropout_key": [1]},
    "format 1.0": {"format": 1.0, "dropout_key": None},
    "format true": {"format": True, "dropout_key": None},
    "a format that is a list": {"format": [2]},
}


@pytest.mark.parametrize("name", WRONG)
def test_a_key_that_cannot_be_is_refused(name):
    file = io.BytesIO()
    model().save(file)
    assert LSTM.load(io.BytesIO(changed(file.getvalue(), dropout_key=5)))._dropout_key == 5, "the maker breaks nothing"
    with pytest.raises(ModelFileError):
        LSTM.load(io.BytesIO(changed(file.getvalue(), **WRONG[name])))


def test_a_flipped_bit_of_the_key_is_found():
    file = io.BytesIO()
    model().save(file)
    data = file.getvalue()
    key = str(description_of(data)["dropout_key"]).encode()
    position = data.index(key)
    for offset in range(len(key)):
        broken = bytearray(data)
        broken[position + offset] ^= 1
        with pytest.raises(ModelFileError):
            LSTM.load(io.BytesIO(broken))


def state_dict():
    return model(seed=1).to_torch_state_dict()


def test_models_from_pytorch_draw_masks_of_their_own():
    one, other = (LSTM.from_torch_state_dict(state_dict(), dropout=0.5) for _ in range(2))
    assert not np.array_equal(passes(one)["0"], passes(other)["0"])


@pytest.mark.parametrize("seed", [3, np.random.SeedSequence(3), [3, 4]], ids=["int", "SeedSequence", "list"])
def test_a_seed_determines_the_masks_of_a_model_from_pytorch(seed):
    one, same = (LSTM.from_torch_state_dict(state_dict(), dropout=0.5, seed=seed) for _ in range(2))
    other = LSTM.from_torch_state_dict(state_dict(), dropout=0.5, seed=5)
    expected = passes(one)
    assert_identical(passes(same), expected)
    assert not np.array_equal(passes(other)["0"], expected["0"])


def test_a_generator_gives_each_model_from_pytorch_the_next_key():
    rng = np.random.default_rng(3)
    one, other = (LSTM.from_torch_state_dict(state_dict(), dropout=0.5, seed=rng) for _ in range(2))
    assert one._dropout_key != other._dropout_key


@pytest.mark.parametrize("seed", [-1, 1.5, "seed", object()], ids=["negative", "fraction", "text", "object"])
def test_bad_seeds_of_a_model_from_pytorch_are_refused(seed):
    with pytest.raises(ValueError, match="seed must suit"):
        LSTM.from_torch_state_dict(state_dict(), dropout=0.5, seed=seed)
