"""Real models of other software, read by the calls of the library, against what that software computes from them.

README.md beside this file says where each file is from. An error is the largest difference over the largest expected
value; the software itself computes in float32, so 1e-5 is asked for, or what stands beside a comparison.
"""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from tolerances import normalised_error

import fastlstm
from fastlstm import LSTM
from fastlstm.demo import ealstm
from fastlstm.interchange.torch_file import load_arrays

HERE = Path(__file__).parent


def numbers(path):
    with np.load(HERE / path) as file:
        return dict(file)


def close(what, got, expected, bound=1e-5):
    error = normalised_error(np.asarray(got), np.asarray(expected))
    assert error <= bound, f"{what}: {error:.1e} is above {bound:.0e}"


def sigmoid(a):
    return 0.5 + 0.5 * np.tanh(0.5 * a)


def time_first(a):
    return np.ascontiguousarray(a.swapaxes(0, 1))


@pytest.fixture(params=["as read", "frozen"])
def prepared(request):
    return (lambda lstm: lstm) if request.param == "as read" else LSTM.freeze


def test_noaa_rainfall_runoff(prepared):
    """720 hours of one catchment, as one call and hour by hour, against torch and the runoff that the BMI reports."""
    path, n = HERE / "noaa_aorc" / "model_epoch009.pt", numbers("noaa_aorc/cat67_720h.npz")
    head = load_arrays(path, "head.net.0.")
    model = prepared(LSTM.load_torch(path, prefix="lstm."))
    h, (_, c_n) = model(n["x"][:, None])
    close("head", (h[:, 0] @ head["weight"].T + head["bias"])[:, 0], n["head"])
    # Its cells reach 671 and its gates are steep: torch's own h is 3e-6 away from float64 here.
    close("h", h[n["at"], 0], n["h"], 2e-5)
    close("c at the end", c_n[0, 0], n["c"][-1])
    state, heads, cells = None, [], []
    for x_t in n["x"]:
        h_t, state = model.step(x_t[None], state)
        heads.append((h_t @ head["weight"].T + head["bias"]).item())
        cells.append(state[1][0, 0])
    close("head, hour by hour", heads, n["head"])
    close("head, hour by hour, against float64", heads, n["head_float64"])
    close("c, hour by hour", np.array(cells)[n["at"]], n["c"])
    depth = np.maximum(np.array(heads) * n["target_std"] + n["target_mean"], 0) / 1000
    close("runoff depth", depth, n["runoff_depth_m"])


def test_neuralhydrology_ea_lstm():
    """As a masked LSTM: forward, and the gradients by inputs and by every weight."""
    n = numbers("nh_ealstm/ealstm.npz")
    weights = {name: value for name, value in n.items() if name.startswith(("input_gate.", "dynamic_gates."))}
    lstm, _ = ealstm.from_neuralhydrology(weights)
    size, dynamic = lstm.cell.hidden_size, n["x_d"].shape[2]
    h, (_, c_n), tape = lstm.forward(ealstm.joined(time_first(n["x_d"]), n["x_s"]))
    close("h", time_first(h), n["expected_h"], 2e-5)  # torch in float32 is 4e-6 away from it
    close("c at the end", c_n[0], n["expected_c"][:, -1])
    head = n["head.net.0.weight"]
    close("prediction", time_first(h @ head.T + n["head.net.0.bias"]), n["expected_y_hat"])
    dy = n["dy"].swapaxes(0, 1)
    grads = lstm.backward(tape, time_first(n["dh"]) + dy @ head)
    by, back = grads.params, np.r_[size : 2 * size, 3 * size : 4 * size, 2 * size : 3 * size]  # f o g
    found = {
        "x_d": time_first(grads.x[..., :dynamic]),
        "x_s": grads.x[..., dynamic:].sum(0),
        "input_gate.weight": by["weight_ih_l0"][:size, dynamic:],
        "input_gate.bias": by["bias_l0"][:size],
        "dynamic_gates.weight_ih": by["weight_ih_l0"][back, :dynamic].T,
        "dynamic_gates.weight_hh": by["weight_hh_l0"][back].T,
        "dynamic_gates.bias": by["bias_l0"][back],
        "head.net.0.weight": np.einsum("tbo,tbh->oh", dy, h),
    }
    for name, value in found.items():
        close(f"gradient by {name}", value, n[f"expected_grad_{name}"])


def by_gates(params, layer, suffix=""):
    """Return the arrays of one layer of a model under our own names, for ``from_gates``."""
    names = ("weight_ih", "weight_hh", "bias", "weight_peephole")
    return tuple(params[f"{name}_l{layer}{suffix}"] for name in names)


@pytest.mark.parametrize("file", ["beats_lstm", "beats_blstm"])
def test_madmom_beat_tracking(file, prepared):
    """Three layers with peepholes, in one direction and in two: 1,000 frames, and frame by frame."""
    n = numbers(f"madmom_peephole/{file}.npz")
    x = n["x_times_32"].astype(np.float32) / np.float32(32)
    both = "weight_ih_l0_reverse" in n
    backward = [by_gates(n, layer, "_reverse") for layer in range(3)] if both else None
    model = prepared(LSTM.from_gates([by_gates(n, layer) for layer in range(3)], "ifgo", backward=backward))

    def head(h):
        return sigmoid(np.float64(h) @ n["head_weight"] + n["head_bias"])[:, 0]

    h, _ = model(x)
    close("h", h[n["at"]], n["expected_h"])
    close("output", head(h), n["expected_y"])
    if not both:
        state, frames = None, []
        for x_t in x[:200]:
            h_t, state = model.step(x_t, state)
            frames.append(h_t)
        close("output, frame by frame", head(np.array(frames)), n["expected_y"][:200])


def test_rtneural_in_torchs_order():
    n = numbers("rtneural/lstm_torch.npz")
    first, second = (LSTM.from_torch_state_dict(n, prefix=prefix) for prefix in ("lstm.", "lstm2."))
    h = second(first(n["x"].astype(np.float32)[:, None])[0])[0]
    close("output", (h @ n["dense.weight"].T + n["dense.bias"])[:, 0], n["y"])


@pytest.mark.parametrize("file", ["keras_lstm_1d", "keras_lstm"])
def test_rtneural_in_kerass_order(file):
    n = numbers(f"rtneural/{file}.npz")
    x = n["x"].astype(np.float32).reshape(1, len(n["x"]), -1)
    for name in (key.removesuffix("_kernel") for key in n if key.endswith("_kernel") and "recurrent" not in key):
        if "_lstm_" in name:
            x = LSTM.from_keras([n[f"{name}_{part}"] for part in ("kernel", "recurrent_kernel", "bias")])(x)[0]
        else:
            x = x @ n[f"{name}_kernel"] + n[f"{name}_bias"]
            x = np.tanh(x) if "_tanh" in name else x
    close("output", x[0].reshape(n["y"].shape), n["y"])


def test_feedback_loop(prepared):
    """Naumann et al. (eLife 76096): an LSTM sets the weights of the layer whose output it reads, for 1,000 steps."""
    n = numbers("feedback_loop/one_context.npz")
    weights = {name: value for name, value in n.items() if name.startswith("rec_net.")}
    model = prepared(LSTM.from_torch_state_dict(weights, prefix="rec_net."))
    readout, state, ys, readouts = np.zeros((2, 2), np.float32), None, [], []
    for x in n["x"]:
        y = readout @ x
        h, state = model.step(np.concatenate([x, y])[None], state)
        readout = n["w0"] * (h[0] @ n["hidden2out.weight"].T + n["hidden2out.bias"]).reshape(2, 2)
        ys.append(y)
        readouts.append(readout.ravel())
    close("y", ys, n["expected_y"])
    close("W", readouts, n["expected_W"])
    close("W, against float64", readouts, n["expected_W_float64"])
    close("h at the end", state[0][0, 0], n["h_end"])
    close("c at the end", state[1][0, 0], n["c_end"])


# --- ONNX -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def onnx():
    return pytest.importorskip("onnx", reason="the oracle is missing: onnx is not installed")


def side_by_side(y):
    """(T, D, B, H) -> (T, B, D*H)."""
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


def node_agrees(n, node, lstm, x=None):
    """Compare one node with what onnxruntime gave for it, at the steps `at` if it has them; return the output."""
    state = (n[f"{node}|h0"], n[f"{node}|c0"]) if f"{node}|h0" in n else None
    y, ends = lstm(np.ascontiguousarray(n[f"{node}|x"] if x is None else x), state)
    close(f"{node}: y", y[n["at"]] if "at" in n else y, side_by_side(n[f"{node}|y"]))
    for name, end in zip(("h_n", "c_n"), ends, strict=True):
        if f"{node}|{name}" in n:
            close(f"{node}: {name}", end, n[f"{node}|{name}"])
    return y


def test_silero_voice_activity(onnx, tmp_path):
    """The graph as published, with its LSTM's weights; those of its convolutions are zeros, for a small packed file."""
    path, n = tmp_path / "vad.onnx", numbers("onnx/silero_vad_16k_sequence.npz")
    path.write_bytes(gzip.decompress((HERE / "onnx" / "silero_vad_16k_sequence.onnx.gz").read_bytes()))
    node = "/recurrent/LSTM"
    lstm = LSTM.from_onnx(path)
    h = node_agrees(n, node, lstm)[:, 0]
    close("speech", sigmoid(np.maximum(h, 0) @ n["decoder_weight"] + n["decoder_bias"]), n["whole|speech_probs"])
    node_agrees(n, node, LSTM.from_onnx(onnx.load(path)))


def test_tract_byte_model(onnx):
    """Two bidirectional LSTMs of other sizes, exported by PyTorch 1.5: refused without the name of one.

    A quarter of the published model's units: 32 and 16, with their weights.
    """
    path, n = HERE / "onnx" / "byte_sb_bidi_lstm.onnx", numbers("onnx/byte_sb_bidi_lstm.npz")
    first, second = (LSTM.from_onnx(path, node=node) for node in ("LSTM_9", "LSTM_20"))
    y = node_agrees(n, "LSTM_20", second, node_agrees(n, "LSTM_9", first))
    close("output", time_first(y @ n["out_weight"] + n["out_bias"]), n["whole|output"])
    with pytest.raises(fastlstm.ArgumentError, match="LSTM_9"):
        LSTM.from_onnx(path)


def test_cntk_bidirectional(onnx):
    """Opset 7, weights listed as inputs of the graph, defaults spelled out, a node in each direction."""
    path, n = HERE / "onnx" / "cntk_bidirectional.onnx", numbers("onnx/cntk_bidirectional.npz")
    for node in ("Block1326", "Block1237"):
        lstm = LSTM.from_onnx(path, node=node)
        assert lstm.cell.reverse is (node == "Block1237")
        node_agrees(n, node, lstm)


@pytest.mark.parametrize(
    ("file", "nodes"),
    [("torch_legacy", ("/rnn/LSTM", "/rnn/LSTM_1")), ("torch_dynamo", ("node_LSTM_100", "node_LSTM_208"))],
)
def test_torch_exports(onnx, file, nodes):
    """Two bidirectional layers with initial states, by both exporters: as a whole, and node by node."""
    path, n = HERE / "onnx" / f"{file}.onnx", numbers(f"onnx/{file}.npz")
    h0, c0 = (np.concatenate([n[f"{node}|{part}"] for node in nodes]) for part in ("h0", "c0"))
    whole = LSTM.from_onnx(path)
    assert whole.cell.num_layers == 2
    y, (h_n, c_n) = whole(np.ascontiguousarray(n[f"{nodes[0]}|x"]), (h0, c0))
    close("output", time_first(y @ n["out_weight"].T + n["out_bias"]), n["whole|out"])
    close("h_n", h_n, n["whole|hn"])
    close("c_n", c_n, n["whole|cn"])
    y = n[f"{nodes[0]}|x"]
    for node in nodes:
        y = node_agrees(n, node, LSTM.from_onnx(path, node=node), y)


@pytest.mark.parametrize("file", ["peephole", "peephole_bidirectional", "input_forget", "hard_sigmoid"])
def test_onnx_variants(onnx, file):
    lstm = LSTM.from_onnx(HERE / "onnx" / f"{file}.onnx")
    node_agrees(numbers(f"onnx/{file}.npz"), "the_lstm", lstm)
    assert not lstm.cell.is_plain


# --- Keras ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["model.keras", "model.h5"])
def test_keras_files(file):
    """An LSTM, a bidirectional one, two stacked, the first without bias; Keras 3's hard sigmoid is refused."""
    pytest.importorskip("h5py", reason="h5py is not installed: the extra keras")
    n, path = numbers("keras/expected.npz"), HERE / "keras" / file
    x = n["x"]
    for name in ("plain", "both", "stack_a", "stack_b"):
        x, _ = LSTM.from_keras(path, layer=name)(x)
        close(name, x, n[f"expected/{name}"])
    for name in ("hard", "nobody"):
        with pytest.raises(fastlstm.ArgumentError, match=name):
            LSTM.from_keras(path, layer=name)
