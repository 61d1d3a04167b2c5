"""Values of variants that other projects' tests carry as literals: ONNX Runtime's and TensorFlow.js's.

Those of ONNX Runtime are in the folder that ``FASTLSTM_GOLDENS`` names (see ``tests/api/test_goldens.py``). Those of
TensorFlow.js, whose gates are hard sigmoids, stand here; it obtained them from Keras.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import peer_variants
import pytest
from harness import REFERENCE, BackendUnderTest

from fastlstm import LSTM, RNN
from fastlstm.backends.reference.cell import Gates

FOLDER = Path(os.environ.get("FASTLSTM_GOLDENS") or Path(__file__).parents[3] / "shared" / "goldens")
needs_goldens = pytest.mark.skipif(
    not (FOLDER / "peer_goldens.npz").is_file(),
    reason="the golden values of other projects are not here: shared/goldens beside the checkout, or FASTLSTM_GOLDENS",
)
ALLOWED = 1e-6  # absolute, and relative: the literals have seven digits
SIX_DIGITS = 6e-6
CPU = BackendUnderTest("cpu")

GRADIENT = "BackwardCompute#1"
FIVE_DECIMALS = ("ONNXRuntime_TestLSTMBatchReallocation#2",)  # of its literals
FORWARD = [name for name in peer_variants.ONNXRUNTIME if name != GRADIENT]


@pytest.fixture(params=[REFERENCE, CPU], ids=lambda backend: backend.name)
def host_backend(request):
    """Each backend of NumPy arrays."""
    if request.param.missing:
        pytest.skip(request.param.missing)
    with request.param.active():
        yield request.param


def assert_met(found, expected, tolerance=ALLOWED):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def onnxruntime_case(case):
    """Read a case, called by its test and its number there: its attributes, inputs and outputs."""
    with np.load(FOLDER / "peer_goldens.npz") as file:
        data = dict(file)
    metas = json.loads(str(data["ort/meta"]))
    test, number = case.split("#")
    number = [n for n, meta in enumerate(metas) if meta["test"] == test][int(number) - 1]
    meta = metas[number]
    inputs, outputs = (
        {key: data[f"ort/{number}/{side}/{key}"] for key in meta[side]} for side in ("inputs", "outputs")
    )
    return meta["attributes"], inputs, outputs


def onnxruntime_model(attributes, inputs, dtype):
    """Make the model of a case: gates in the order i, o, f, c there, peepholes i, o, f."""
    directions, rows, features = inputs["W"].shape
    size = rows // 4
    names = attributes.get("activations", ["sigmoid", "tanh", "tanh"])[:3]
    coupled, peephole = bool(attributes.get("input_forget")), bool(np.any(inputs.get("P", 0)))
    lstm = LSTM(
        features, size, bias="B" in inputs, bidirectional=directions == 2, peephole=peephole, coupled=coupled,
        reverse=attributes["direction"] == "reverse", activations=tuple(names), clip=attributes.get("clip"),
        dtype=dtype, seed=0,
    )  # fmt: skip
    gates = [0, 3, 1] if coupled else [0, 2, 3, 1]
    for d in range(directions):
        suffix = "l0" + ("_reverse" if d else "")

        def ours(value):
            return np.concatenate([np.split(value, 4)[gate] for gate in gates]).astype(dtype)

        lstm.params[f"weight_ih_{suffix}"] = ours(inputs["W"][d])
        lstm.params[f"weight_hh_{suffix}"] = ours(inputs["R"][d])
        if "B" in inputs:
            of_input, of_hidden = np.split(inputs["B"][d].astype(np.float64), 2)
            lstm.params[f"bias_{suffix}"] = ours(of_input + of_hidden)
        if peephole:
            i, o, f = np.split(inputs["P"][d], 3)
            lstm.params[f"weight_peephole_{suffix}"] = np.stack([i, o] if coupled else [i, f, o]).astype(dtype)
    return lstm


@needs_goldens
@pytest.mark.parametrize("case", FORWARD)
def test_onnxruntime_s_values_of_variants_are_met(host_backend, dtype, case):
    attributes, inputs, outputs = onnxruntime_case(case)
    lstm = onnxruntime_model(attributes, inputs, dtype)
    x, lengths, state = inputs["X"].astype(dtype), inputs.get("sequence_lens"), None
    if "initial_h" in inputs:
        state = tuple(inputs[name].astype(dtype) for name in ("initial_h", "initial_c"))
    for model in (lstm, lstm.freeze()):
        for y, (h, c) in (model(x, state, lengths), model.forward(x, state, lengths)[:2]):
            found = {"Y": np.stack(np.split(y, len(h), axis=2), axis=1), "Y_h": h, "Y_c": c}
            for name, expected in outputs.items():
                assert_met(found[name], expected, SIX_DIGITS if case in FIVE_DECIMALS else ALLOWED)


@needs_goldens
def test_onnxruntime_s_gradients_from_given_gates_are_met(host_backend, dtype):
    """Its gates are random numbers, which no forward pass gives: they are written to the tape."""
    _, inputs, outputs = onnxruntime_case(GRADIENT)
    case = {name: value.astype(dtype) for name, value in inputs.items()}
    (steps, batch, features), size = case["input_tensor"].shape, case["HAll"].shape[-1]
    lstm = LSTM(features, size, dtype=dtype, seed=0)
    iofc = [0, 2, 3, 1]

    def reordered(value):
        return np.concatenate([np.split(value, 4)[gate] for gate in iofc])

    lstm.params["weight_ih_l0"] = reordered(case["weights"][0])
    lstm.params["weight_hh_l0"] = reordered(case["recurrence_weights"][0])
    _, _, tape = lstm.forward(case["input_tensor"])
    h, c, gates = case["HAll"][:, 0], case["CAll"][:, 0], np.split(case["iofc"][:, 0], 4, axis=2)
    i, f, g, o = (gates[gate] for gate in iofc)
    before = [np.concatenate([np.zeros_like(value[:1]), value[:-1]]) for value in (h, c)]
    (layer,) = tape.record.layers
    if host_backend is REFERENCE:
        (given,) = layer.steps
        for t, step in enumerate(given):
            given[t] = dataclasses.replace(
                step, gates=Gates(i[t], f[t], g[t], o[t]), h_prev=before[0][t], c_prev=before[1][t], c_raw=c[t],
                c=c[t], squashed=np.tanh(c[t]),
            )  # fmt: skip
    else:
        (given,) = layer.directions
        for number, value in enumerate((i, f, g, o, c)):
            given.gates[:, 0, number, :size] = value.reshape(steps * batch, size)
        given.h_rows[:, :size] = before[0].reshape(steps * batch, size)
    grads = lstm.backward(tape, case["grad_HAll"][:, 0])
    assert_met(grads.x, outputs["dX"], SIX_DIGITS)
    for name, value in (("weight_ih_l0", outputs["dW"][0]), ("weight_hh_l0", outputs["dR"][0])):
        assert_met(grads.params[name], reordered(value), SIX_DIGITS)
    assert_met(grads.params["bias_l0"], reordered(outputs["dB"][0][: 4 * size]), SIX_DIGITS)


# --- TensorFlow.js ----------------------------------------------------------------------------------------------------


def tensorflow_model(features, size, *, bias, kernel=1.0, dtype, **fields):
    """Make a model of constant parameters, whose forget gate has a bias of one where there is one."""
    lstm = LSTM(features, size, bias=bias is not None, activations=("hard_sigmoid", "tanh", "tanh"), dtype=dtype,
                seed=0, **fields)  # fmt: skip
    for name in ("weight_ih_l0", "weight_hh_l0"):
        lstm.params[name][:] = kernel
    if bias is not None:
        lstm.params["bias_l0"][:] = bias
        lstm.params["bias_l0"][size : 2 * size] = 1
    return lstm


def test_tensorflow_s_outputs_and_states(host_backend, dtype):
    lstm = tensorflow_model(2, 5, bias=1, dtype=dtype)
    y, (_, c) = lstm(np.ones((2, 4, 2), dtype))
    assert_met(y[0], 0.7595095)
    assert_met(y[1], 0.96367633)
    assert_met(c, 1.99505234)


def test_tensorflow_s_stateful_layer(host_backend, dtype):
    lstm, x = tensorflow_model(2, 5, bias=1, dtype=dtype), np.ones((3, 4, 2), dtype)
    y, state = lstm(x)
    assert_met(y[-1], 0.995, 1e-5)  # three digits there
    again, _ = lstm(x, state)
    assert_met(again[-1], 0.99998766)


def test_tensorflow_s_loss_of_a_stateful_layer(host_backend, dtype):
    """Two batches, the second from the state of the first, after one step of SGD (0.01) on the mean squared error."""
    lstm, state, losses = tensorflow_model(2, 5, bias=1, dtype=dtype), None, []
    dense, x = np.ones(5, dtype), np.ones((3, 4, 2), dtype)
    for labels in (np.arange(1, 5), np.arange(5, 9)):
        y, new_state, tape = lstm.forward(x, state)
        error = y[-1] @ dense - labels
        losses.append((error**2).mean())
        dy = np.zeros_like(y)
        dy[-1] = (error / 2)[:, None] * dense
        grads = lstm.backward(tape, dy).params
        dense = dense - dtype.type(0.01) * (error / 2 @ y[-1]).astype(dtype)
        for name, value in grads.items():
            lstm.params[name] -= dtype.type(0.01) * value
        state = new_state
    assert abs(np.mean(losses) - 5.8377) < 1e-4  # four decimals there


def test_tensorflow_s_weights_after_two_steps(host_backend, dtype):
    lstm = tensorflow_model(4, 1, bias=None, kernel=0.0, dtype=dtype)
    dense, x = dtype.type(1), np.ones((3, 5, 4), dtype)
    for _ in range(2):
        y, _, tape = lstm.forward(x)
        derror = 2 * (y[-1] * dense - 1) / 5
        dy = np.zeros_like(y)
        dy[-1] = derror * dense
        grads = lstm.backward(tape, dy).params
        dense -= (derror * y[-1]).sum()
        for name, value in grads.items():
            lstm.params[name] -= value
    kernel = np.array([0.11455188, 0.06545822, 0.8760446, 0.18237013])
    assert_met(lstm.params["weight_ih_l0"], np.repeat(kernel[:, None], 4, axis=1))
    assert_met(lstm.params["weight_hh_l0"], np.array([0.02831176, 0.01934617, 0.00025817, 0.05784169])[:, None])
    assert_met(dense, 1.4559253)


LENGTHS = [0, 1, 2, 3]


def test_tensorflow_s_masked_layers(host_backend, dtype):
    """Words are ones, and zeros of the mask come last: lengths. Past them, Keras goes on with the last output."""
    lstm = tensorflow_model(4, 3, bias=0, dtype=dtype)
    y, (h, c) = lstm(np.ones((6, 4, 4), dtype), lengths=LENGTHS)
    assert not y[3:].any()
    assert_met(h[0].sum(axis=1), [0, 2.283937, 2.891939, 2.9851441])
    assert_met(h[0], np.array([0, 0.76131237, 0.9639796, 0.99504817])[:, None].repeat(3, axis=1))
    assert_met(c[0], np.array([0, 0.9993292, 1.9993222, 2.9993203])[:, None].repeat(3, axis=1))
    assert_met(y[:3, 3].sum(axis=1), [2.283937, 2.8919387, 2.9851446])


def test_tensorflow_s_masked_layer_backwards(host_backend, dtype):
    lstm = tensorflow_model(2, 2, bias=0, dtype=dtype, reverse=True)
    row = np.arange(1, 9, dtype=dtype)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        lstm.params[name][:] = np.stack([row, -row], axis=1)
    lstm.params["bias_l0"][:] = row
    words = np.array([[0.1, 0.2], [0.3, 0.4], [-0.1, -0.2], [-0.3, -0.4]], dtype)
    x = words[np.array([[0, 0, 0], [1, 0, 0], [1, 2, 0], [1, 2, 3]])].swapaxes(0, 1)
    _, (h, _) = lstm(x, lengths=LENGTHS)
    assert_met(h[0].sum(axis=1), [0, 1.2876499, 1.8165315, 1.9599037])


def test_tensorflow_s_losses_of_a_masked_layer(host_backend, dtype):
    """Four steps of SGD (0.01) on words, layer and head; the losses of the last two."""
    lstm, words = tensorflow_model(4, 3, bias=0, dtype=dtype), np.ones((4, 4), dtype)
    dense, offset = np.ones(3, dtype), dtype.type(0)
    ids, rate, losses = np.array([[1, 2, 3]] * 4).T, dtype.type(0.01), []
    for _ in range(4):
        _, (h, _), tape = lstm.forward(words[ids], lengths=LENGTHS)
        error = h[0] @ dense + offset - np.arange(1, 5)
        losses.append((error**2).mean())
        derror = (error / 2).astype(dtype)
        grads = lstm.backward(tape, None, ((derror[:, None] * dense)[None], None))
        dense, offset = dense - rate * (derror @ h[0]), offset - rate * derror.sum()
        np.subtract.at(words, ids, rate * grads.x)
        for name, value in grads.params.items():
            lstm.params[name] -= rate * value
    np.testing.assert_allclose(losses[2:], [0.503677, 0.492173], atol=2e-6)  # six digits there


def test_tensorflow_s_stacked_layers(host_backend, dtype):
    rnn, lstm = RNN(4, 3, dtype=dtype, seed=0), tensorflow_model(3, 3, bias=0, dtype=dtype)
    for name, value in rnn.params.items():
        value[:] = 0 if name.startswith("bias") else 1
    between, _ = rnn(np.ones((3, 4, 4), dtype), lengths=LENGTHS)
    _, (h, _) = lstm(between, lengths=LENGTHS)
    assert_met(h[0], np.array([0, 0.75950104, 0.96367145, 0.9950049])[:, None].repeat(3, axis=1))
