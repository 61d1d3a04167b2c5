"""A service of many streams: each has the bits that it would have alone, in this process and in the next."""

from __future__ import annotations

import numpy as np
import pytest
from harness import BackendUnderTest
from own_process import run_script

from fastlstm import LSTM, DTypeError, ModelFileError, ShapeError
from fastlstm.demo.streams import Streams

if BackendUnderTest("cpu").missing:
    pytest.skip(str(BackendUnderTest("cpu").missing), allow_module_level=True)


def news(rng, names, inputs, dtype):
    return {name: rng.normal(size=inputs).astype(dtype) for name in names}


class Alone:
    """Every stream by a call of its own."""

    def __init__(self, lstm):
        self.lstm, self.states = lstm.freeze(), {}

    def step(self, inputs):
        found = {}
        for name, x in inputs.items():
            y, self.states[name] = self.lstm.step(x[None], self.states.get(name))
            found[name] = y[0]
        return found


@pytest.mark.parametrize("layers", [1, 2])
def test_a_thousand_streams_that_come_and_go_have_the_bits_that_each_has_alone(dtype, layers):
    rng, lstm = np.random.default_rng(0), LSTM(5, 24, layers, dtype=dtype, seed=0)
    streams, alone, there, number = Streams(lstm), Alone(lstm), [f"stream {n}" for n in range(1000)], 1000
    for turn in range(6):
        # All of them, some, one, or none have news.
        chosen = [there, there[::3], there[5:6], [], there[::-1], there][turn]
        inputs = news(rng, chosen, 5, dtype)
        found, expected = streams.step(inputs), alone.step(inputs)
        assert list(found) == list(expected) == chosen
        for name in chosen:
            np.testing.assert_array_equal(found[name], expected[name])
        for name in there[::7]:  # these go, and as many come
            if name in set(streams):
                streams.close(name)
                del alone.states[name]
        there = [name for n, name in enumerate(there) if n % 7]
        there += [f"stream {number + n}" for n in range(1000 - len(there))]
        number += 1000
    assert set(streams) == set(alone.states) and len(streams) == len(alone.states)
    assert streams._h.shape[1] < 2100, "columns are used again"


def test_a_step_that_is_refused_changes_nothing(dtype):
    streams = Streams(LSTM(3, 4, dtype=dtype, seed=0))
    streams.step({"a": np.ones(3, dtype)})
    before = streams._h.copy(), streams._c.copy()
    with pytest.raises(ShapeError):
        streams.step({"a": np.ones(4, dtype), "b": np.ones(4, dtype)})
    assert list(streams) == ["a"]
    np.testing.assert_array_equal(streams._h, before[0])
    np.testing.assert_array_equal(streams._c, before[1])


CONTINUE = """
import sys
import numpy as np
from fastlstm import LSTM
from fastlstm.demo.streams import Streams

folder = sys.argv[1]
streams = Streams.load(LSTM.load(folder + "/model.safetensors"), folder + "/states.npz")
with np.load(folder + "/news.npz") as news:
    for turn in range(3):
        found = streams.step({name: news[name][turn] for name in news})
streams.save(folder + "/later.npz")
np.savez(folder + "/outputs.npz", **found)
"""


def test_saved_states_are_continued_bit_identically_in_another_process(dtype, tmp_path):
    rng, lstm = np.random.default_rng(0), LSTM(3, 20, 2, dtype=dtype, seed=0)
    streams, names = Streams(lstm), [f"s{n}" for n in range(70)]
    for _ in range(3):
        streams.step(news(rng, names, 3, dtype))
    streams.close("s3")  # columns are not in the order of the names any more
    streams.step(news(rng, ["late", *names[4:]], 3, dtype))
    lstm.save(tmp_path / "model.safetensors")
    streams.save(tmp_path / "states.npz")
    inputs = {name: rng.normal(size=(3, 3)).astype(dtype) for name in [*streams, "later"]}
    np.savez(tmp_path / "news.npz", **inputs)
    run_script(CONTINUE, tmp_path, prelude="")
    for turn in range(3):
        expected = streams.step({name: x[turn] for name, x in inputs.items()})
    with np.load(tmp_path / "outputs.npz") as found:
        assert set(found) == set(expected)
        for name, y in expected.items():
            np.testing.assert_array_equal(found[name], y)
    with np.load(tmp_path / "later.npz") as later:
        assert set(later["names"]) == set(streams)
        for column, name in enumerate(later["names"]):
            np.testing.assert_array_equal(later["h"][:, column], streams._h[:, streams._columns[name]])
            np.testing.assert_array_equal(later["c"][:, column], streams._c[:, streams._columns[name]])
    assert [file.name for file in tmp_path.iterdir() if file.name.endswith(".new")] == []


@pytest.mark.parametrize(
    ("other", "error"),
    [((3, 7, 2), ShapeError), ((3, 6, 1), ShapeError), ((3, 6, 2, np.float64), DTypeError)],
    ids=["units", "layers", "dtype"],
)
def test_states_of_another_model_are_refused(tmp_path, other, error):
    streams = Streams(LSTM(3, 6, 2, seed=0))
    streams.step({name: np.ones(3, np.float32) for name in "abc"})
    streams.save(tmp_path / "states.npz")
    sizes, dtype = other[:3], other[3] if other[3:] else np.float32
    with pytest.raises(error, match="in the file"):
        Streams.load(LSTM(*sizes, dtype=dtype, seed=0), tmp_path / "states.npz")


BROKEN = {
    "empty": b"",
    "text": b"no file of NumPy's",
    "half": None,
    "one array": np.zeros(3),
    "no states": {"names": np.array(["a"])},
    "one number": {"names": np.array("a"), "h": np.zeros((1, 1, 6)), "c": np.zeros((1, 1, 6))},
    "a name twice": {"names": np.array(["a", "a"]), "h": np.zeros((1, 2, 6)), "c": np.zeros((1, 2, 6))},
    "objects": {"names": np.array(["a", None]), "h": np.zeros((1, 2, 6)), "c": np.zeros((1, 2, 6))},
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_no_file_of_streams_is_refused(tmp_path, what):
    lstm, path, content = LSTM(3, 6, seed=0), tmp_path / "states.npz", BROKEN[what]
    if what == "half":
        streams = Streams(lstm)
        streams.step({"a": np.ones(3, np.float32)})
        streams.save(path)
        path.write_bytes(path.read_bytes()[:300])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        with open(path, "wb") as file:
            np.savez(file, **content) if isinstance(content, dict) else np.save(file, content)
    with pytest.raises(ModelFileError, match="is no file of streams"):
        Streams.load(lstm, path)


def test_a_file_that_is_not_there_is_not_found(tmp_path):
    with pytest.raises(FileNotFoundError):
        Streams.load(LSTM(3, 6, seed=0), tmp_path / "states.npz")


@pytest.mark.parametrize("options", [{"proj_size": 2}, {"layer_norm": True}], ids=str)
def test_streams_of_a_variant_have_the_bits_that_each_has_alone(tmp_path, options):
    rng, lstm = np.random.default_rng(0), LSTM(3, 6, 2, seed=0, **options)
    streams, alone = Streams(lstm), Alone(lstm)
    for names in (["a", "b"], ["b", "c", "a"]):
        inputs = news(rng, names, 3, np.float32)
        found, expected = streams.step(inputs), alone.step(inputs)
        for name in names:
            np.testing.assert_array_equal(found[name], expected[name])
        streams.save(tmp_path / "states.npz")
        streams = Streams.load(lstm, tmp_path / "states.npz")
