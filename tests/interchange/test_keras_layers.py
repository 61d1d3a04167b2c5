"""The layers in files of Keras: dropout between them, layers of the user's models, other recurrent layers."""

from __future__ import annotations

import io
import re

import h5py
import numpy as np
import pytest
from keras_files import import_keras, legacy_file
from tolerances import assert_identical

from fastlstm import LSTM, ArgumentError, ModelFileError

pytestmark = pytest.mark.filterwarnings("ignore")  # Keras warns of its legacy format
FILES = [".keras", ".h5"]


@pytest.fixture
def keras():
    module = import_keras()
    module.utils.set_random_seed(3)
    return module


def sequential(keras, layers):
    return keras.Sequential([keras.Input((None, 3)), *layers])


def functional(keras, layers):
    x = found = keras.Input((None, 3))
    for layer in layers:
        found = layer(found)
    return keras.Model(x, found)


def saved(model, folder, kind):
    path = folder / f"model{kind}"
    model.save_weights(path) if kind.endswith(".weights.h5") else model.save(path)
    return path


def lstm_layer(keras, name, **options):
    return keras.layers.LSTM(4, return_sequences=True, name=name, **options)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("make", [sequential, functional])
def test_dropout_is_read_from_the_configuration(keras, tmp_path, make, kind):
    layers = keras.layers
    model = make(keras, [
        layers.Dropout(0.9), lstm_layer(keras, "a", recurrent_dropout=0.3), layers.Dropout(0.1),
        lstm_layer(keras, "b", recurrent_dropout=0.3, dropout=0.7), layers.Dropout(0.5), layers.Dropout(0.5),
        lstm_layer(keras, "c", recurrent_dropout=0.1), layers.SpatialDropout1D(0.4), lstm_layer(keras, "d"),
    ])  # fmt: skip
    path = saved(model, tmp_path, kind)
    cell = LSTM.from_keras(path, ["a", "b"]).cell
    assert (cell.dropout, cell.recurrent_dropout) == (0.1, 0.3)
    assert LSTM.from_keras(path, ["b", "c"], recurrent_dropout=0.0).cell.dropout == 0.75  # of two layers
    assert LSTM.from_keras(path, ["c", "d"], recurrent_dropout=0.0).cell.dropout == 0.0
    assert LSTM.from_keras(path, "c").cell.recurrent_dropout == 0.1
    with pytest.raises(ArgumentError, match=r"recurrent_dropout \(0.3, 0.1\), but a model has one"):
        LSTM.from_keras(path, ["b", "c"])
    with pytest.raises(ArgumentError, match=r"their dropout \(0.1, 0.75\), but a model has one: pass dropout="):
        LSTM.from_keras(path, ["a", "b", "c"], recurrent_dropout=0.3)
    assert LSTM.from_keras(path, ["a", "b", "c"], recurrent_dropout=0.3, dropout=0.2).cell.dropout == 0.2


def test_dropout_on_another_branch_is_not_that_between_two_layers(keras, tmp_path):
    x = keras.Input((None, 3))
    first = lstm_layer(keras, "a")(x)
    branch = keras.layers.Dropout(0.5)(first)
    joined = keras.layers.Add()([first, branch])
    path = saved(keras.Model(x, [lstm_layer(keras, "b")(first), lstm_layer(keras, "c")(joined)]), tmp_path, ".keras")
    assert LSTM.from_keras(path, ["a", "b"]).cell.dropout == 0.0
    assert LSTM.from_keras(path, ["a", "c"]).cell.dropout == 0.0


@pytest.mark.parametrize("kind", FILES)
def test_recurrent_dropout_of_a_bidirectional_layer(keras, tmp_path, kind):
    layer = keras.layers.Bidirectional(lstm_layer(keras, "x", recurrent_dropout=0.2), name="both")
    assert LSTM.from_keras(saved(sequential(keras, [layer]), tmp_path, kind)).cell.recurrent_dropout == 0.2


def test_layers_of_a_model_of_the_users_own_class_are_found_in_its_weights(keras, tmp_path):
    layers = keras.layers

    class Encoder(keras.Model):
        def __init__(self):
            super().__init__()
            self.enc = lstm_layer(keras, "first")
            self.cell = layers.Bidirectional(lstm_layer(keras, "x"), name="both")
            self.gated = layers.GRU(4, return_sequences=True, name="gated")
            self.stack = [lstm_layer(keras, "second")]
            self.inner = keras.Sequential([lstm_layer(keras, "nested")])

        def call(self, x):
            for layer in (self.enc, self.cell, self.gated, *self.stack, self.inner):
                x = layer(x)
            return x

    model = Encoder()
    model.compile(loss="mse", optimizer="adam")
    model(np.ones((1, 2, 3), np.float32))
    path = saved(model, tmp_path, ".weights.h5")
    expected = {"first": model.enc, "both": model.cell, "second": model.stack[0], "nested": model.inner.layers[0]}
    for name, layer in expected.items():
        assert_identical(LSTM.from_keras(path, name).params, LSTM.from_keras(layer.get_weights()).params)
    with pytest.raises(ArgumentError, match="has 4 LSTM layers") as caught:
        LSTM.from_keras(path)
    assert sorted(re.findall(r"'([a-z]+)'", str(caught.value).partition("out of")[2])) == sorted(expected)
    with pytest.raises(ArgumentError, match=r"\(H, 4H\)"):
        LSTM.from_keras(path, "gated")


@pytest.mark.parametrize("kind", [".keras", ".h5", ".weights.h5", "old.h5"])
def test_other_recurrent_layers_do_not_count(keras, tmp_path, kind):
    layers = keras.layers
    others = [
        layers.GRU(3, return_sequences=True, name="g"),
        layers.SimpleRNN(3, return_sequences=True, name="r"),
        layers.Bidirectional(layers.GRU(3, return_sequences=True), name="bg"),
        layers.RNN([layers.LSTMCell(3), layers.LSTMCell(3)], return_sequences=True, name="cells"),
    ]
    wanted = lstm_layer(keras, "wanted")
    model = sequential(keras, [*others, wanted])
    if kind == "old.h5":  # what save_weights of Keras 2 writes: names, and no configuration
        path = tmp_path / "old.h5"
        model = sequential(keras, [others[0], others[1], others[2], wanted])
        model.save(tmp_path / "whole.h5")
        with h5py.File(tmp_path / "whole.h5") as whole, h5py.File(path, "w") as file:
            for name in whole["model_weights"]:
                whole.copy(f"model_weights/{name}", file)
            file.attrs["layer_names"] = whole["model_weights"].attrs["layer_names"]
    else:
        path = saved(model, tmp_path, kind)
    assert_identical(LSTM.from_keras(path).params, LSTM.from_keras(wanted.get_weights()).params)
    with pytest.raises(ArgumentError, match=r"'GRU'|\(H, 4H\)"):
        LSTM.from_keras(path, "bg")


@pytest.mark.parametrize("kind", [".keras", ".h5", ".weights.h5"])
def test_layers_of_one_and_of_two_directions_are_told_apart(keras, tmp_path, kind):
    both = keras.layers.Bidirectional(lstm_layer(keras, "x"), name="both")
    path = saved(sequential(keras, [both, lstm_layer(keras, "one")]), tmp_path, kind)
    for names in (["both", "one"], ["one", "both"]):
        with pytest.raises(ArgumentError, match=r"differ in their directions: of .*, only both is Bidirectional"):
            LSTM.from_keras(path, names)


def test_objects_of_keras_are_refused_with_the_call_that_reads_them(keras):
    layer = lstm_layer(keras, "a")
    for given in (layer, sequential(keras, [layer])):
        with pytest.raises(ArgumentError, match=rf"source .* {type(given).__name__}: pass layer.get_weights\(\)"):
            LSTM.from_keras(given)
    LSTM.from_keras(layer.get_weights())


@pytest.mark.parametrize("given", [3, None, {"a": 1}, np.ones(3)], ids=str)
def test_the_message_about_a_wrong_source_names_it_and_lists(given):
    with pytest.raises(ArgumentError, match=r"source must be a path, a binary file object or .*get_weights\(\), got"):
        LSTM.from_keras(given)
    with pytest.raises(ArgumentError, match=r"source must be a path, a binary file object or an onnx\.ModelProto, got"):
        LSTM.from_onnx(given)


def test_a_cell_with_weights_of_its_own_is_not_taken_for_two_directions(tmp_path):
    """Of the user's own cell with a second pair of kernels, the arrays have the shapes of a bidirectional layer."""
    path = tmp_path / "model.weights.h5"
    LSTM(3, 4, bidirectional=False, seed=0).to_keras(path)
    with h5py.File(path, "r+") as file:
        variables = file["layers/lstm/cell/vars"]
        bias = variables["2"][()]
        del variables["2"]
        for name, array in (("2", variables["0"][()]), ("3", variables["1"][()]), ("4", bias)):
            variables[name] = array
    with pytest.raises(ModelFileError, match="cell has 5 weights"):
        LSTM.from_keras(path)


def test_a_rate_that_is_no_probability_is_refused():
    with pytest.raises(ArgumentError, match="recurrent_dropout must be a number"):
        LSTM.from_keras(io.BytesIO(legacy_file(config={"recurrent_dropout": 1.0})))
