"""Whole models: one mapping of parameters, gradients through all parts, predictions in the targets' units."""

from __future__ import annotations

import re
import subprocess
import sys

import cuda_row
import numpy as np
import pytest
from whole_models import OUTPUTS, build, data, named, saved, scaled

from fastlstm import LSTM, ArgumentError, ArrayTypeError, DTypeError, ShapeError
from fastlstm.training import Linear, Model, clip_by_value, mean_squared_error

# Central differences with a step of 1e-6 on values of order one, in float64.
STEP, ATOL = 1e-6, 1e-8


@pytest.fixture
def rng():
    return np.random.default_rng(31)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_gradients_are_slopes(rng, output, batch_first, several, ragged):
    model = scaled(build(output, several, batch_first), rng)
    x, lengths = data(rng, model), np.array([3, 0, 6, 1]) if ragged else None
    prediction, tape = model.forward(x, lengths)
    weights = {name: rng.normal(size=p.shape) for name, p in named(model, prediction).items()}
    if output == "sequence" and ragged:  # the heads read zeros there; their biases would get gradients
        inside = np.arange(6)[:, None] < lengths
        weights = {name: w * (inside.T if batch_first else inside)[..., None] for name, w in weights.items()}
    given = weights["head"] if model.single_head else weights
    grads = model.backward(tape, given)
    assert list(grads) == list(model.params)

    def loss():
        found = named(model, model(x, lengths))
        return sum((weights[name] * found[name]).sum() for name in weights)

    for name, value in model.params.items():
        assert grads[name].shape == value.shape
        for index in map(tuple, rng.permutation(list(np.ndindex(value.shape)))[:6]):
            kept = value[index]
            value[index] = kept + STEP
            upper = loss()
            value[index] = kept - STEP
            lower = loss()
            value[index] = kept
            assert grads[name][index] == pytest.approx((upper - lower) / (2 * STEP), abs=ATOL), (name, index)


@pytest.mark.parametrize("merge", ["sum", "mean", "product"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_heads_read_two_directions_as_they_are_merged(rng, tmp_path, output, merge):
    lstm = LSTM(3, 4, num_layers=2, bidirectional=True, merge=merge, dtype=np.float64, seed=0)
    model = Model(lstm, Linear(4, 2, dtype=np.float64, seed=1), output=output)
    x, lengths = rng.normal(size=(6, 4, 3)), np.array([3, 0, 6, 1])
    y, (h_n, _) = lstm(x, None, lengths)
    merged = {"sum": np.add, "mean": lambda a, b: (a + b) / 2, "product": np.multiply}[merge](h_n[-2], h_n[-1])
    mean = y.sum(axis=0) / np.maximum(lengths, 1)[:, None]
    expected = model.heads["head"]({"last": merged, "mean": mean, "sequence": y}[output])
    prediction, tape = model.forward(x, lengths)
    model.save(tmp_path / "model.safetensors")
    for found in (prediction, model(x, lengths), model.freeze()(x, lengths),
                  Model.load(tmp_path / "model.safetensors")(x, lengths)):  # fmt: skip
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-14)  # sums in other orders
    inside = (np.arange(6)[:, None] < lengths)[..., None] if output == "sequence" else 1
    weights, along = rng.normal(size=prediction.shape) * inside, {}
    grads = model.backward(tape, weights)
    for name, value in model.params.items():
        along[name] = rng.normal(size=value.shape)
        value[...] = value + STEP * along[name]
    upper = (weights * model(x, lengths)).sum()
    for name, value in model.params.items():
        value[...] = value - 2 * STEP * along[name]
    slope = (upper - (weights * model(x, lengths)).sum()) / (2 * STEP)
    assert sum((grads[name] * along[name]).sum() for name in along) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_the_two_layouts_agree(rng, output, several):
    one, other = build(output, several), build(output, several, batch_first=True)
    x, lengths = data(rng, one), [2, 6, 0, 5]
    found, expected = other.predict(x.swapaxes(0, 1), lengths), one.predict(x, lengths)
    for name, value in named(one, expected).items():
        swapped = value.swapaxes(0, 1) if output == "sequence" else value
        # The features are the same bits; BLAS may sum them in another order.
        np.testing.assert_allclose(named(other, found)[name], swapped, rtol=0, atol=1e-13)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
def test_predictions_are_in_the_units_of_the_targets(rng, output, several, batch_first):
    model = scaled(build(output, several, batch_first), rng)
    x, lengths = data(rng, model), np.array([3, 1, 6, 2])
    found = named(model, model.predict(x, lengths))
    listed = [row[:length] for row, length in zip(x if batch_first else x.swapaxes(0, 1), lengths, strict=True)]
    of_list = named(model, model.predict(listed))
    scaled_ones = named(model, model(x, lengths))
    inside = np.arange(6)[:, None] < lengths
    inside = (inside.T if batch_first else inside)[..., None]
    for name, value in found.items():
        mean, deviation = (model.scaler.arrays[f"{name}.{kind}"] for kind in ("mean", "deviation"))
        expected = scaled_ones[name] * deviation + mean
        if output != "sequence":
            np.testing.assert_array_equal(value, expected)
            np.testing.assert_allclose(of_list[name], value, rtol=0, atol=1e-13)
            continue
        np.testing.assert_array_equal(value, np.where(inside, expected, 0))
        for b, (row, length) in enumerate(zip(of_list[name], lengths, strict=True)):
            whole = value[b] if batch_first else value[:, b]
            np.testing.assert_allclose(row, whole[:length], rtol=0, atol=1e-13)


@pytest.mark.parametrize("output", OUTPUTS)
def test_padding_has_no_influence(rng, output):
    model = scaled(build(output), rng)
    x, lengths = data(rng, model), [2, 6, 0, 5]
    expected = model.predict(x, lengths)
    for b, length in enumerate(lengths):
        x[length:, b] = np.nan
    np.testing.assert_array_equal(model.predict(x, lengths), expected)
    assert np.isfinite(expected).all()


VARIANTS = [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 3}, {"layer_norm": True},
            {"peephole": True, "block_size": 2, "bidirectional": True}]  # fmt: skip


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("steps", "batch"), [(5, 0), (0, 3), (0, 0)])
def test_no_sequences_and_no_steps_give_empty_or_initial_predictions(steps, batch, output, batch_first, options):
    lstm = LSTM(3, 4, batch_first=batch_first, seed=0, **options)
    model = Model(lstm, Linear(lstm.cell.output_size, 2, seed=1), output=output)
    x = np.zeros((batch, steps, 3) if batch_first else (steps, batch, 3), np.float32)
    shape = (*x.shape[:2], 2) if output == "sequence" else (batch, 2)
    frozen = model.freeze()
    found, tape = model.forward(x)
    for value in (found, model(x), model.predict(x), model.predict(x, [0] * batch), frozen(x), frozen.predict(x)):
        assert value.shape == shape
        np.testing.assert_array_equal(value, np.broadcast_to(model.params["head.bias"], shape))
    grads = model.backward(tape, np.ones(shape, np.float32))
    assert {name: grads[name].shape for name in grads} == {name: value.shape for name, value in model.params.items()}
    np.testing.assert_array_equal(grads["head.bias"], np.full(2, np.prod(shape[:-1]), np.float32))


def test_parameters_of_parts_with_equal_names_do_not_clash():
    model = build(several=True)
    names = list(model.params)
    assert len(names) == len(set(names)) == 6 + 12 + 3
    assert sum(value.size for value in model.params.values()) == model.num_parameters
    assert {"lstm0.weight_ih_l0", "lstm1.weight_ih_l0", "flow.weight", "flow.bias", "level.weight"} <= set(names)
    assert model.params["lstm1.bias_l0"] is model.lstms["lstm1"].params["bias_l0"]
    clip_by_value(model, 1.0)  # functions that take a model's parameters take this one's


def test_a_part_that_is_replaced_is_found(rng):
    model = build()
    x = data(rng, model)
    model.heads["head"].params = {"weight": np.zeros((2, 5))}
    assert list(model.params)[-1] == "head.weight"
    assert not model.predict(x).any()


# Bad input

LSTM_, HEAD = LSTM(3, 5, seed=0), Linear(5, 2, seed=0)
ERRORS = {
    "no lstm": (lambda: Model(None, HEAD), ArgumentError),
    "empty list": (lambda: Model([], HEAD), ArgumentError),
    "a linear layer for an lstm": (lambda: Model(HEAD, HEAD), ArgumentError),
    "one lstm twice": (lambda: Model([LSTM(5, 5)] * 2, HEAD), ArgumentError),
    "one head under two names": (lambda: Model(LSTM_, {"a": HEAD, "b": HEAD}), ArgumentError),
    "no head": (lambda: Model(LSTM_, None), ArgumentError),
    "no heads": (lambda: Model(LSTM_, {}), ArgumentError),
    "head of another size": (lambda: Model(LSTM_, Linear(4, 1)), ShapeError),
    "head of another dtype": (lambda: Model(LSTM_, Linear(5, 1, dtype="float64")), DTypeError),
    "lstms of other sizes": (lambda: Model([LSTM_, LSTM(4, 5)], HEAD), ShapeError),
    "lstms of other dtypes": (lambda: Model([LSTM_, LSTM(5, 5, dtype="float64")], HEAD), DTypeError),
    "lstms of other layouts": (lambda: Model([LSTM_, LSTM(5, 5, batch_first=True)], HEAD), ArgumentError),
    "head's name has a dot": (lambda: Model(LSTM_, {"a.b": HEAD}), ArgumentError),
    "head's name is an LSTM's": (lambda: Model(LSTM_, {"lstm": HEAD}), ArgumentError),
    "head's name is the scaler's": (lambda: Model(LSTM_, {"scaler": HEAD}), ArgumentError),
    "head's name is a number": (lambda: Model(LSTM_, {1: HEAD}), ArgumentError),
    "unknown output": (lambda: Model(LSTM_, HEAD, output="first"), ArgumentError),
    "scale is a number": (lambda: Model(LSTM_, HEAD, scale=1), ArgumentError),
    "x of another size": (lambda: Model(LSTM_, HEAD).predict(np.zeros((4, 2, 4), "f4")), ShapeError),
    "x of another dtype": (lambda: Model(LSTM_, HEAD).predict(np.zeros((4, 2, 3))), DTypeError),
    "x unbatched": (lambda: Model(LSTM_, HEAD).predict(np.zeros((4, 3), "f4")), ShapeError),
    "x an empty list": (lambda: Model(LSTM_, HEAD).predict([]), ArgumentError),
    "x a list of numbers": (lambda: Model(LSTM_, HEAD).predict([1, 2]), ArrayTypeError),
    "lengths of a list": (lambda: Model(LSTM_, HEAD).predict([np.zeros((4, 3), "f4")], [4]), ArgumentError),
    "too long": (lambda: Model(LSTM_, HEAD).predict(np.zeros((4, 2, 3), "f4"), [5, 1]), ArgumentError),
    "not its tape": (lambda: Model(LSTM_, HEAD).backward(None, np.zeros((2, 2), "f4")), ArgumentError),
    "gradient without heads": (
        lambda: Model(LSTM_, {"a": HEAD}).backward(Model(LSTM_, HEAD).forward(np.zeros((4, 2, 3), "f4"))[1], HEAD),
        ArgumentError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input_raises_a_typed_error(case):
    call, error = ERRORS[case]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error and re.search(r"\w{3}", str(caught.value))


@pytest.mark.parametrize(
    ("head", "message"),
    [(Linear(4, 1), "head must have 5 in_features"), ({"flow": Linear(4, 1)}, "head flow must have 5 in_features"),
     (Linear(5, 1, dtype="float64"), "head is float64"), ({"b": Linear(5, 1, dtype="f8")}, "head b is float64")],
)  # fmt: skip
def test_messages_name_a_head_once(head, message):
    with pytest.raises((ShapeError, DTypeError), match=f"^{message}"):
        Model(LSTM_, head)


@pytest.mark.skipif(bool(cuda_row.missing()), reason=str(cuda_row.missing()))
@pytest.mark.parametrize("output", OUTPUTS)
def test_cupy_gives_what_numpy_gives(rng, output):
    model, lengths = scaled(build(output, several=True), rng), [3, 0, 6, 1]
    x = data(rng, model)
    target = named(model, model(x, lengths))

    def run(model, xp):
        prediction, tape = model.forward(xp.asarray(x), lengths)
        gradients = {}
        for name, value in prediction.items():
            gradients[name] = mean_squared_error(value, xp.asarray(target[name] + 1))[1]
        found = {**model.backward(tape, gradients)}
        return found | {f"predicted {name}": value for name, value in model.predict(xp.asarray(x), lengths).items()}

    expected = run(model, np)
    with cuda_row.installed() as cupy:
        moved = model.to(cupy)
        for name, value in run(moved, cupy).items():
            assert isinstance(value, cupy.ndarray), name
            # Sums of some ten terms of order one, in another order, through six steps of three layers.
            np.testing.assert_allclose(cupy.asnumpy(value), expected[name], rtol=0, atol=1e-12, err_msg=name)
        file = saved(moved)
    assert file == saved(model)


def test_importing_fastlstm_does_not_load_whole_models():
    code = """if True:
        import sys, fastlstm
        assert not {"fastlstm.training.model", "fastlstm.training.fitting"} & sys.modules.keys()
        assert {"Model", "fit", "History", "allreduce"} <= set(dir(fastlstm.training))
        from fastlstm.training import *
        assert Model.__module__ == "fastlstm.training.model" and fit.__module__ == "fastlstm.training.fitting"
        try:
            fastlstm.training.nothing
        except AttributeError as error:
            assert "nothing" in str(error)
        else:
            raise AssertionError
        assert not {"numba", "sklearn", "dask", "mpi4py", "tqdm"} & sys.modules.keys()"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
