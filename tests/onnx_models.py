"""ONNX models of one LSTM node, made by hand, and what onnxruntime gives for a model."""

from __future__ import annotations

import numpy as np
import pytest
from tolerances import assert_close

onnx = pytest.importorskip("onnx", reason="the oracle is missing: onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the oracle is missing: onnxruntime is not installed")

T, B, I, H = 6, 3, 4, 5  # noqa: E741
from_array, helper = onnx.numpy_helper.from_array, onnx.helper


def node_model(attributes=None, *, directions=1, bias=True, peephole=False, state=False, lengths=False, seed=0,
               as_constants=False, dtype=np.float32):  # fmt: skip
    """Make a model of one node, by hand, with random weights in every place."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape, scale=0.6).astype(dtype)  # noqa: E731
    weights = {"W": draw(directions, 4 * H, I), "R": draw(directions, 4 * H, H)}
    weights |= {"B": draw(directions, 8 * H)} if bias else {}
    weights |= {"P": draw(directions, 3 * H)} if peephole else {}
    inputs = ["x", "W", "R", "B" if bias else "", "lengths" if lengths else ""]
    inputs += ["h0", "c0"] if state else ["", ""]
    inputs += ["P"] if peephole else []
    nodes = [helper.make_node("LSTM", inputs, ["Y", "h_n", "c_n"], name="the_lstm",
                              **({"hidden_size": H} | (attributes or {})))]  # fmt: skip
    given, real = {"x": draw(T, B, I)}, helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    if lengths:
        given["lengths"] = np.array([T, 2, 4], np.int32)
    if state:
        given |= {"h0": draw(directions, B, H), "c0": draw(directions, B, H)}
    if as_constants:
        made = [helper.make_node("Constant", [], [name], value=from_array(a, name)) for name, a in weights.items()]
        nodes, weights = made + nodes, {}
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()
    ]
    outputs = [helper.make_tensor_value_info(name, real, None) for name in ("Y", "h_n", "c_n")]
    graph = helper.make_graph(nodes, "g", infos, outputs, [from_array(a, name) for name, a in weights.items()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8), given


def run(model, given):
    data = model if isinstance(model, bytes) else model.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, given), strict=True))


def ours(lstm, given):
    state = (given["h0"], given["c0"]) if "h0" in given else None
    lengths = given["lengths"].astype(np.int64) if "lengths" in given else None
    y, (h_n, c_n) = lstm(given["x"], state, lengths)
    return {"y": y, "h_n": h_n, "c_n": c_n}


def joined(y):
    """(T, D, B, H) -> (T, B, D*H)."""
    return y.transpose(0, 2, 1, 3).reshape(y.shape[0], y.shape[2], -1)


def check(lstm, model, given):
    theirs = run(model, given)
    expected = {"y": joined(theirs["Y"]) if "Y" in theirs else theirs["y"], "h_n": theirs["h_n"], "c_n": theirs["c_n"]}
    assert_close("onnxruntime", ours(lstm, given), expected, backend="reference", dtype=np.float32)
