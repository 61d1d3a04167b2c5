"""Variants against onnxruntime's LSTM operator, live: peepholes, coupled gates, clip, activations, backwards alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from harness import REFERENCE, BackendUnderTest, Case, problem, solve
from tolerances import assert_close

from fastlstm.parameters import gate_rows, peepholes

onnx = pytest.importorskip("onnx", reason="the oracle is missing: onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="the oracle is missing: onnxruntime is not installed")

# What onnxruntime calls an activation, and its alpha and beta, without which it has other defaults.
NAMES = {"sigmoid": ("Sigmoid", 0.0, 0.0), "tanh": ("Tanh", 0.0, 0.0), "relu": ("Relu", 0.0, 0.0),
         "hard_sigmoid": ("HardSigmoid", 0.2, 0.5), "softsign": ("Softsign", 0.0, 0.0),
         "identity": ("Affine", 1.0, 0.0)}  # fmt: skip


def make_cases():
    """Draw combinations: each activation at each place, the other fields with half a chance."""
    rng, cases = np.random.default_rng(31), []
    for number, (place, name) in enumerate(itertools.product(range(3), NAMES)):
        for more in range(3):
            # With gates that have no bound, the state grows from step to step: they get few steps.
            activations = [str(rng.choice(["sigmoid", "hard_sigmoid", "tanh"])), *map(str, rng.choice([*NAMES], 2))]
            activations[place] = name
            fields = {"activations": tuple(activations)}
            fields |= {field: value for field, value in (("peephole", True), ("coupled", True), ("clip", 0.6))
                       if rng.random() < 0.5}  # fmt: skip
            bidirectional = bool(rng.random() < 0.4)
            if not bidirectional and rng.random() < 0.3:
                fields["reverse"] = True
            steps, batch = ((5, 3), (3 if name in ("relu", "identity") else 9, 21), (1, 1))[more]
            cases.append(
                Case(
                    steps, batch, 3, 5, 1, bidirectional, bool(rng.random() < 0.7), fields=tuple(fields.items()),
                    lengths=[None, "positive"][int(rng.integers(2))], state=bool(rng.random() < 0.7), seed=number,
                )
            )  # fmt: skip
    return cases


def rows_of(cell, value):
    """Reorder the rows of a parameter to i, o, f, g; coupled gates have no use for those of f."""
    parts = {gate: value[gate_rows(cell, gate)] for gate in cell.gates}
    parts.setdefault("f", np.full_like(parts["i"], np.pi))
    return np.concatenate([parts[gate] for gate in "iofg"])


def onnxruntime_solve(p):
    """Run the forward pass of one layer in onnxruntime."""
    cell, helper, from_array = p.cell, onnx.helper, onnx.numpy_helper.from_array
    suffixes = ["l0", "l0_reverse"][: cell.num_directions]
    constants = {
        letter: np.stack([rows_of(cell, p.params[f"{name}_{suffix}"]) for suffix in suffixes])
        for letter, name in (("W", "weight_ih"), ("R", "weight_hh"))
    }
    if cell.bias:
        biases = [rows_of(cell, p.params[f"bias_{suffix}"]) for suffix in suffixes]
        constants["B"] = np.stack([np.concatenate([bias, np.zeros_like(bias)]) for bias in biases])
    if p.state is not None:
        constants |= {"h": p.state[0], "c": p.state[1]}
    if cell.peephole:
        rows = [dict(zip(peepholes(cell), p.params[f"weight_peephole_{suffix}"], strict=True)) for suffix in suffixes]
        constants["P"] = np.stack([np.concatenate([row["i"], row["o"], row.get("f", row["i"])]) for row in rows])
    lengths = "" if p.lengths is None else "lengths"
    inputs = ["x", "W", "R", *(name if name in constants else "" for name in ("B",)), lengths]
    inputs += [name if name in constants else "" for name in ("h", "c", "P")]
    functions = [NAMES[name] for name in cell.activations] * cell.num_directions
    attributes = {"clip": cell.clip} if cell.clip else {}
    # Alphas and betas are taken in turn by the functions that have some.
    having = [(alpha, beta) for _, alpha, beta in functions if alpha]
    if having:
        alphas, betas = zip(*having, strict=True)
        attributes |= {"activation_alpha": list(alphas), "activation_beta": list(betas)}
    node = helper.make_node(
        "LSTM", inputs, ["Y", "h_n", "c_n"], hidden_size=cell.hidden_size, input_forget=int(cell.coupled),
        direction="bidirectional" if cell.bidirectional else "reverse" if cell.reverse else "forward",
        activations=[name for name, _, _ in functions], **attributes,
    )  # fmt: skip
    info, real = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    given = [info("x", real, p.x.shape)] + ([info("lengths", onnx.TensorProto.INT32, [p.x.shape[1]])] * bool(lengths))
    graph = helper.make_graph(
        [node], "lstm", given, [info(name, real, None) for name in ("Y", "h_n", "c_n")],
        [from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": p.x} | ({} if p.lengths is None else {"lengths": p.lengths.astype(np.int32)})
    y, h_n, c_n = session.run(None, feeds)
    return {"y": np.concatenate(list(y.swapaxes(0, 1)), axis=-1), "h_n": h_n, "c_n": c_n}


@pytest.mark.parametrize("backend", [REFERENCE, BackendUnderTest("cpu")], ids=lambda backend: backend.name)
@pytest.mark.parametrize("case", make_cases(), ids=str)
@pytest.mark.sampled
def test_forward_equals_onnxruntime(backend, case):
    if backend.missing:
        pytest.skip(backend.missing)
    p = problem(case).astype(np.float32)
    theirs = onnxruntime_solve(p)
    ours = {name: value for name, value in solve(p, backend).items() if name in theirs}
    assert_close("onnxruntime", ours, theirs, backend=backend.name, dtype=np.float32)
