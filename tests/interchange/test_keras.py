"""Layers from and to Keras: by files of every kind, and by get_weights(); live Keras where it is installed."""

from __future__ import annotations

import io
import itertools
import json
import sys
import zipfile

import numpy as np
import pytest
from keras_files import h5py, import_keras, legacy_file, weights
from own_process import run_script
from tolerances import BOUNDS, assert_close, assert_identical, normalised_error

from fastlstm import LSTM, ArgumentError, ArrayTypeError, BackendError, DTypeError, FastLSTMError, ModelFileError


@pytest.fixture
def keras():
    module = import_keras()
    module.utils.set_random_seed(3)
    return module


# The layers of the model whose files are read: its names, and whether ours may read them.
NAMES = ("plain", "both", "summed", "nobias", "soft")


def model_of(keras):
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((None, 3)),
            layers.Dense(4, name="first"),
            layers.LSTM(6, return_sequences=True, name="plain"),
            layers.Bidirectional(layers.LSTM(5, return_sequences=True), name="both"),
            layers.GRU(4, return_sequences=True, name="other"),
            layers.Bidirectional(layers.LSTM(4, return_sequences=True), merge_mode="sum", name="summed"),
            layers.LSTM(7, return_sequences=True, use_bias=False, name="nobias"),
            layers.LSTM(
                5, return_sequences=True, activation="softsign", recurrent_activation="relu", name="soft", dropout=0.2
            ),
        ]
    )


def randomise(model, scale=0.4):
    rng = np.random.default_rng(8)
    model.set_weights([rng.normal(size=w.shape, scale=scale).astype(np.float32) for w in model.get_weights()])
    return model


def saved(model, folder, kind):
    path = folder / f"model{kind}"
    model.save_weights(path) if "weights" in kind else model.save(path)
    return path


@pytest.mark.filterwarnings("ignore")  # Keras warns of its legacy format
@pytest.mark.parametrize("kind", [".keras", ".h5", ".weights.h5"])
def test_layers_of_files_compute_what_keras_computes(keras, tmp_path, kind):
    model = randomise(model_of(keras))
    path = saved(model, tmp_path, kind)
    x = np.random.default_rng(1).normal(size=(3, 7, 3)).astype(np.float32)
    outputs = keras.Model(model.inputs, [layer.output for layer in model.layers])(x)
    before = x
    for layer, output in zip(model.layers, outputs, strict=True):
        y = output.detach().numpy()
        if layer.name in NAMES and not (kind == ".weights.h5" and layer.name in ("summed", "soft")):
            lstm = LSTM.from_keras(path, layer=layer.name)
            assert lstm.batch_first and lstm.cell.dtype == np.float32
            assert_close("agreement", {"y": lstm(before)[0]}, {"y": y}, backend="reference", dtype=np.float32)
            arrays = LSTM.from_keras(layer.get_weights())
            assert_identical(arrays.params, lstm.params)
        before = y
    with pytest.raises(ArgumentError, match=r"no layer called 'nobody'.*'both'"):
        LSTM.from_keras(path, layer="nobody")
    with pytest.raises(ArgumentError, match=r"LSTM layers: choose by layer=.*'plain'"):
        LSTM.from_keras(path)
    with pytest.raises(ArgumentError, match=r"class 'GRU'|\(H, 4H\)"):
        LSTM.from_keras(path, layer="other")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [".keras", ".h5"])
def test_a_layer_inside_a_model_inside_a_model_is_found_by_its_name(keras, tmp_path, kind):
    layers = keras.layers
    inner = keras.Sequential([keras.Input((None, 3)), layers.LSTM(4, return_sequences=True, name="deep")], name="inner")
    model = randomise(
        keras.Sequential([keras.Input((None, 3)), layers.LSTM(3, return_sequences=True, name="top"), inner])
    )
    path = saved(model, tmp_path, kind)
    for name, layer in (("deep", inner.layers[-1]), ("top", model.layers[0])):
        assert_identical(LSTM.from_keras(path, layer=name).params, LSTM.from_keras(layer.get_weights()).params)


@pytest.mark.filterwarnings("ignore")
def test_stacked_layers_become_one_model(keras, tmp_path):
    layers = keras.layers
    model = keras.Sequential([keras.Input((None, 3)), *(layers.LSTM(4, return_sequences=True, name=n) for n in "abc")])
    path = saved(randomise(model), tmp_path, ".keras")
    x = np.random.default_rng(1).normal(size=(3, 7, 3)).astype(np.float32)
    lstm = LSTM.from_keras(path, layer=["a", "b", "c"])
    assert lstm.cell.num_layers == 3
    assert_close(
        "agreement", {"y": lstm(x)[0]}, {"y": model(x).detach().numpy()}, backend="reference", dtype=np.float32
    )
    assert_identical(LSTM.from_keras([layer.get_weights() for layer in model.layers]).params, lstm.params)


@pytest.mark.filterwarnings("ignore")
def test_unsupported_layers_are_refused_by_name(keras, tmp_path):
    layers = keras.layers
    given = {
        "go_backwards": layers.LSTM(4, return_sequences=True, go_backwards=True, name="a"),
        "recurrent_activation='hard_sigmoid'": layers.LSTM(
            4, return_sequences=True, recurrent_activation="hard_sigmoid", name="b"
        ),
        "activation='gelu'": layers.LSTM(4, return_sequences=True, activation="gelu", name="c"),
        "'SimpleRNN'": layers.Bidirectional(layers.SimpleRNN(4, return_sequences=True), name="d"),
        "'RNN'": layers.RNN(layers.LSTMCell(4), return_sequences=True, name="f"),
    }
    model = keras.Sequential([keras.Input((None, 3)), *given.values()])
    path = saved(model, tmp_path, ".keras")
    for message, layer in given.items():
        with pytest.raises(ArgumentError, match=message):
            LSTM.from_keras(path, layer=layer.name)


# --- Without Keras ----------------------------------------------------------------------------------------------------


def test_files_of_keras_2_have_its_hard_sigmoid():
    """Slope 1/5 in Keras 2, as here; Keras 3 has another function of this name."""
    lstm = LSTM.from_keras(io.BytesIO(legacy_file()))
    assert lstm.cell.activations == ("hard_sigmoid", "tanh", "tanh")
    plain = LSTM.from_keras(weights())
    assert_identical(lstm.params, plain.params)
    with pytest.raises(ArgumentError, match="slope 1/6"):
        LSTM.from_keras(io.BytesIO(legacy_file("3.1.0")))


REFUSED = {
    "go_backwards": ({"go_backwards": True}, "go_backwards=True"),
    "time_major": ({"time_major": True}, "time_major=True"),
    "an unknown activation": ({"activation": "selu"}, "activation='selu'"),
    "a function of the user": ({"activation": {"class_name": "function", "config": "mine"}}, "'mine'"),
    "no activation": ({"activation": None}, "activation=None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_configurations_that_are_not_supported_are_refused_by_name(case):
    config, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        LSTM.from_keras(io.BytesIO(legacy_file(config=config)))


@pytest.mark.parametrize(
    "link", [h5py.SoftLink("/model_weights"), h5py.ExternalLink("other.h5", "/a")], ids=["soft", "external"]
)
def test_links_out_of_a_file_are_not_followed(link):
    with pytest.raises(ModelFileError, match="not followed"):
        LSTM.from_keras(io.BytesIO(legacy_file(links=link)))


def test_datasets_in_other_files_are_not_read(tmp_path):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(4 * 3 * 16))
    path = tmp_path / "model.h5"
    path.write_bytes(legacy_file())
    with h5py.File(path, "r+") as h5:
        own = h5["model_weights/rnn/rnn/lstm_cell"]
        del own["kernel:0"]
        own.create_dataset("kernel:0", (3, 16), "f4", external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
    with pytest.raises(ModelFileError, match="other files"):
        LSTM.from_keras(path)


def test_a_dataset_that_claims_more_than_the_file_has_is_refused():
    file = io.BytesIO(legacy_file())
    with h5py.File(file, "r+") as h5:
        own = h5["model_weights/rnn/rnn/lstm_cell"]
        del own["kernel:0"]
        own.create_dataset("kernel:0", (2**40, 16), "f4", chunks=(64, 16), compression="gzip")
    file.seek(0)
    with pytest.raises(ModelFileError, match="compressed or incomplete"):
        LSTM.from_keras(file)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89HDF\r\n\x1a\n" + bytes(99), b"PK\x03\x04" + bytes(99)], ids=str)
def test_other_files_are_refused(data):
    with pytest.raises(ModelFileError):
        LSTM.from_keras(io.BytesIO(data))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], ArrayTypeError, "0 objects"),
        (weights()[:1], ArrayTypeError, "1 objects"),
        ([1, 2, 3], ArrayTypeError, "must be arrays"),
        ([a.astype(np.float16) for a in weights()], DTypeError, "float16"),
        ([weights()[0].astype(np.float64), *weights()[1:]], DTypeError, "one dtype"),
        ([weights()[0], weights()[1][:, :12], weights()[2]], ArgumentError, r"\(H, 4H\)"),
        ([weights()[0].T, *weights()[1:]], ArgumentError, "shape"),
        ([weights(), weights()], ArgumentError, "shape"),  # the second layer reads 4 features
        ([weights(), weights(4, bias=False)], ArgumentError, "bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(given, error, message):
    with pytest.raises(error, match=message):
        LSTM.from_keras(given)


def test_what_is_given_must_agree_with_the_configuration(tmp_path):
    path = tmp_path / "model.keras"
    LSTM(3, 4, seed=0).to_keras(path)
    assert LSTM.from_keras(path, activations=("sigmoid", "tanh", "tanh"), merge="concat").cell.is_plain
    for fields in ({"activations": ("relu", "tanh", "tanh")}, {"merge": "sum"}):
        with pytest.raises(ArgumentError, match="is given"):
            LSTM.from_keras(path, **fields)


def test_layer_and_path_are_checked(tmp_path):
    with pytest.raises(ArgumentError, match="layer chooses"):
        LSTM.from_keras(weights(), layer="a")
    with pytest.raises(ArgumentError, match="a name or a list"):
        LSTM.from_keras(io.BytesIO(legacy_file()), layer=3)
    with pytest.raises(ArgumentError, match="must end with"):
        LSTM(3, 4, seed=0).to_keras(tmp_path / "model.h5")
    with pytest.raises(FileNotFoundError):
        LSTM.from_keras(tmp_path / "none.keras")


def test_without_h5py_the_error_says_how_to_install_it(monkeypatch):
    file = io.BytesIO(legacy_file())
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(BackendError, match=r"pip install \"fastlstm\[keras\]\""):
        LSTM.from_keras(file)
    LSTM.from_keras(weights())  # which needs none


DAMAGE = """
import collections, io, sys
import numpy as np
from fastlstm import LSTM, FastLSTMError
data, outcomes = open(sys.argv[1], "rb").read(), collections.Counter()
for number in range(int(sys.argv[2])):
    rng = np.random.default_rng([number, 5])
    found = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(len(found)))
        found[at : at + 4] = rng.bytes(int(rng.integers(0, 5)))
    try:
        LSTM.from_keras(io.BytesIO(found))
    except FastLSTMError as error:
        outcomes[type(error).__name__] += 1
    else:
        outcomes["read"] += 1
print(outcomes["ModelFileError"])
"""


@pytest.mark.parametrize("kind", [".keras", ".h5"])
def test_damaged_files_raise_typed_errors_only(tmp_path, kind):
    """In a process of their own: HDF5 is a C library."""
    path = tmp_path / f"model{kind}"
    if kind == ".keras":
        LSTM(3, 4, seed=0).to_keras(path)
    else:
        path.write_bytes(legacy_file())
    assert int(run_script(DAMAGE, path, 2500, prelude="")) > 600


# --- Out --------------------------------------------------------------------------------------------------------------

MODELS = {
    "plain": {},
    "no bias": {"bias": False},
    "stacked": {"num_layers": 3, "dropout": 0.25},
    "bidirectional": {"bidirectional": True},
    "stacked and summed": {"num_layers": 2, "bidirectional": True, "merge": "sum"},
    "averaged": {"bidirectional": True, "merge": "mean"},
    "other activations": {"activations": ("relu", "softsign", "softsign")},
    "float64": {"dtype": np.float64},
    "recurrent dropout": {"num_layers": 2, "recurrent_dropout": 0.1, "dropout": 0.2, "bidirectional": True},
    "truncated": {"truncated": True},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", MODELS)
def test_keras_loads_what_is_written_and_computes_the_same(keras, tmp_path, case):
    lstm = LSTM(3, 4, **MODELS[case], batch_first=True, seed=4)
    path = tmp_path / "model.keras"
    lstm.to_keras(path)
    model = keras.saving.load_model(path)
    x = np.random.default_rng(1).normal(size=(3, 7, 3)).astype(lstm.cell.dtype)
    y = model(x).detach().numpy()
    claim = "torch" if lstm.cell.dtype == np.float64 else "agreement"
    assert_close(claim, {"y": lstm(x)[0]}, {"y": y}, backend="reference", dtype=lstm.cell.dtype)
    gaps = [lstm.cell.dropout] * (lstm.cell.num_layers - 1) * (lstm.cell.dropout > 0)
    assert [layer.rate for layer in model.layers if "dropout" in layer.name] == gaps
    for layer, arrays in zip([la for la in model.layers if "lstm" in la.name], lstm.to_keras(), strict=True):
        inner = layer.forward_layer if lstm.cell.bidirectional else layer
        assert inner.recurrent_dropout == lstm.cell.recurrent_dropout
        for ours, theirs in zip(arrays, layer.get_weights(), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    fresh = keras.saving.load_model(path)
    randomise(fresh)
    weights_path = tmp_path / "model.weights.h5"
    lstm.to_keras(weights_path)
    fresh.load_weights(weights_path)
    for ours, theirs in zip(model.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("kind", [".keras", ".weights.h5", None])
@pytest.mark.parametrize("case", MODELS)
def test_what_is_written_is_read_again_to_the_bit(tmp_path, case, kind):
    lstm = LSTM(3, 4, **MODELS[case], seed=4)
    names = [f"lstm_{n}" for n in range(lstm.cell.num_layers)]
    fields = {name: getattr(lstm.cell, name) for name in ("activations", "merge", "dropout", "recurrent_dropout")}
    if kind is None:
        again = LSTM.from_keras(lstm.to_keras(), **fields)
    else:
        path = tmp_path / f"model{kind}"
        lstm.to_keras(path)
        again = LSTM.from_keras(path, layer=names, **({} if kind == ".keras" else fields))
    assert_identical(again.params, lstm.params)
    assert {name: getattr(again.cell, name) for name in fields} == fields
    if kind == ".keras":  # what is given wins: it affects training only
        assert LSTM.from_keras(path, layer=names, dropout=0.5, recurrent_dropout=0).cell.dropout == 0.5


@pytest.mark.parametrize(
    "fields",
    [
        {"peephole": True}, {"proj_size": 2}, {"coupled": True}, {"forget_gate": False}, {"clip": 1.0},
        {"layer_norm": True}, {"zoneout": (0.1, 0.1)}, {"reverse": True}, {"block_size": 2},
        {"activations": ("hard_sigmoid", "tanh", "tanh")}, {"activations": ("sigmoid", "tanh", "relu")},
    ],
    ids=str,
)  # fmt: skip
def test_what_keras_lacks_is_refused_by_name(fields, tmp_path):
    lstm = LSTM(3, 4, **fields, seed=0)
    with pytest.raises(ArgumentError, match="Keras"):
        lstm.to_keras(tmp_path / "model.keras")
    assert not list(tmp_path.iterdir())


# --- The test of the test ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("pair", list(itertools.combinations(range(4), 2)), ids=str)
def test_swapping_any_two_gates_would_be_seen(keras, tmp_path, pair):
    layer = keras.layers.LSTM(4, return_sequences=True)
    x = np.random.default_rng(1).normal(size=(3, 7, 3)).astype(np.float32)
    layer(x)
    given = weights()
    layer.set_weights(given)
    y = layer(x).detach().numpy()
    assert normalised_error(LSTM.from_keras(given)(x)[0], y) < BOUNDS["agreement"].float32
    order = np.arange(4)
    order[list(pair)] = order[list(pair[::-1])]
    for k in range(3):
        swapped = list(given)
        swapped[k] = given[k].reshape(*given[k].shape[:-1], 4, 4)[..., order, :].reshape(given[k].shape)
        assert normalised_error(LSTM.from_keras(swapped)(x)[0], y) > 1000 * BOUNDS["agreement"].float32


def test_a_zip_with_another_order_of_layers_than_its_names_is_refused(tmp_path):
    """The weights of .keras are stored by class and counter: a configuration in another order must not be believed."""
    lstm = LSTM(3, 3, 2, seed=0)
    lstm.to_keras(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(contents["config.json"])
    config["config"]["layers"] = [config["config"]["layers"][k] for k in (0, 2, 1)]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in (contents | {"config.json": json.dumps(config)}).items():
            archive.writestr(name, content)
    file.seek(0)
    with pytest.raises(ModelFileError, match="lstm_1 is expected"):
        LSTM.from_keras(file, layer="lstm_1")
    assert issubclass(ModelFileError, FastLSTMError)
