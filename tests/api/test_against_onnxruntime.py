"""Forward and final states against onnxruntime's LSTM operator: one node per layer, gates in the order i, o, f, c.

Peepholes are in the order i, o, f.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import Arrays, Case, Problem, problem, solve
from tolerances import assert_close

from fastlstm.parameters import direction_names

onnx = pytest.importorskip("onnx", reason="the oracle is missing: onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the oracle is missing: onnxruntime is not installed")

SIZES = (1, 3, 5, 16, 17)  # of T, B, I and H, drawn per case
FLAGS = tuple(itertools.product((1, 2, 3), (False, True), (False, True), (False, True), (None, "positive", "zeros"),
                               (False, True)))  # fmt: skip


def make_cases() -> list[Case]:
    """Make the product over the flags, with sizes drawn per case."""
    rng = np.random.default_rng(30)
    return [
        Case(*map(int, rng.choice(SIZES, 4)), layers, bidirectional, bias, state=state, lengths=lengths, seed=k,
             peephole=peephole)
        for k, (layers, bidirectional, bias, state, lengths, peephole) in enumerate(FLAGS)
    ]  # fmt: skip


def onnx_model(p: Problem) -> onnx.ModelProto:
    """Build the chain: LSTM gives (T, D, B, H), which is transposed and reshaped to the next layer's (T, B, D*H)."""
    cell, helper, from_array = p.cell, onnx.helper, onnx.numpy_helper.from_array
    directions = range(cell.num_directions)

    def iofc(value: np.ndarray) -> np.ndarray:
        i, f, g, o = np.split(value, 4)
        return np.concatenate([i, o, f, g])

    constants, nodes, source = [from_array(np.array([0, 0, -1]), "joined")], [], "x"
    for layer in range(cell.num_layers):
        names = [direction_names(cell, layer, d) for d in directions]
        weights = {f"W{layer}": [n["weight_ih"] for n in names], f"R{layer}": [n["weight_hh"] for n in names]}
        for name, parts in weights.items():
            constants.append(from_array(np.stack([iofc(p.params[part]) for part in parts]), name))
        if cell.bias:
            rows = [np.concatenate([iofc(b), np.zeros_like(b)]) for b in (p.params[n["bias"]] for n in names)]
            constants.append(from_array(np.stack(rows), f"B{layer}"))
        inputs = [source, *weights, f"B{layer}" if cell.bias else "", "" if p.lengths is None else "lengths"]
        inputs += [""] * 2
        if p.state is not None:
            rows = slice(layer * len(directions), (layer + 1) * len(directions))
            inputs[5:] = f"h{layer}", f"c{layer}"
            constants += [from_array(value[rows], name) for name, value in zip(inputs[5:], p.state, strict=True)]
        if cell.peephole:
            own = [p.params[n["weight_peephole"]][[0, 2, 1]].reshape(-1) for n in names]
            constants.append(from_array(np.stack(own), f"P{layer}"))
            inputs.append(f"P{layer}")
        direction = "bidirectional" if cell.bidirectional else "forward"
        nodes.append(
            helper.make_node("LSTM", inputs, [f"Y{layer}", f"hn{layer}", f"cn{layer}"], hidden_size=cell.hidden_size,
                             direction=direction),
        )  # fmt: skip
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
        nodes.append(helper.make_node("Reshape", [f"Z{layer}", "joined"], [f"y{layer}"]))
        source = f"y{layer}"
    for name in ("h", "c"):
        parts = [f"{name}n{layer}" for layer in range(cell.num_layers)]
        nodes.append(helper.make_node("Concat", parts, [f"{name}_n"], axis=0))
    info, real = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph_inputs = [info("x", real, p.x.shape)]
    if p.lengths is not None:
        graph_inputs.append(info("lengths", onnx.TensorProto.INT32, p.lengths.shape))
    outputs = [info(name, real, None) for name in (source, "h_n", "c_n")]
    graph = helper.make_graph(nodes, "lstm", graph_inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def onnx_solve(p: Problem) -> Arrays:
    """Run the forward pass in onnxruntime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = onnx_model(p).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = {"x": p.x} | ({} if p.lengths is None else {"lengths": p.lengths.astype(np.int32)})
    return dict(zip(("y", "h_n", "c_n"), session.run(None, inputs), strict=True))


def test_cases_have_empty_sequences_in_stacked_bidirectional_models():
    ragged = [case for case in make_cases() if case.lengths == "zeros" and (problem(case).lengths == 0).any()]
    assert len(ragged) > 8
    assert any(case.bidirectional and case.layers > 1 and case.state for case in ragged)


@pytest.mark.parametrize("case", make_cases(), ids=str)
@pytest.mark.sampled
def test_forward_equals_onnxruntime(backend, case):
    p = problem(case).astype(np.float32)
    ours, theirs = solve(p, backend), onnx_solve(p)
    ours = {name: ours[name] for name in theirs}
    empty = np.zeros(case.batch, bool) if p.lengths is None else p.lengths == 0
    for k, name in enumerate(("h_n", "c_n")):
        # onnxruntime returns zero as the state of a sequence of length 0; here it is the initial state, to the bit.
        initial = 0 if p.state is None else p.state[k][:, empty]
        np.testing.assert_array_equal(ours[name][:, empty], np.broadcast_to(initial, ours[name][:, empty].shape))
        ours[name], theirs[name] = ours[name][:, ~empty], theirs[name][:, ~empty]
    assert_close("onnxruntime", ours, theirs, backend=backend.name, dtype=np.float32)
