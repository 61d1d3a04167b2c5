"""LSTM nodes from and to ONNX, with onnxruntime as the oracle: every attribute, or a typed error that names it."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest
from harness import REFERENCE
from onnx_models import B, H, I, T, check, node_model, onnx, run
from tolerances import assert_close, assert_identical

from fastlstm import LSTM, ArgumentError, BackendError, DTypeError, ShapeError

from_array, helper = onnx.numpy_helper.from_array, onnx.helper
reference = pytest.importorskip("onnx.reference", reason="the oracle is missing: onnx is not installed")

NODES = {
    "plain": {},
    "no bias": {"bias": False},
    "constants as nodes": {"as_constants": True},
    "reverse": {"attributes": {"direction": "reverse"}, "state": True, "lengths": True},
    "bidirectional": {"attributes": {"direction": "bidirectional"}, "directions": 2, "state": True, "lengths": True},
    "peepholes": {"peephole": True, "state": True},
    "peepholes, both directions": {"peephole": True, "attributes": {"direction": "bidirectional"}, "directions": 2},
    "coupled": {"attributes": {"input_forget": 1}, "state": True},
    "coupled, peepholes": {"attributes": {"input_forget": 1}, "peephole": True, "state": True},
    "clip": {"attributes": {"clip": 0.3}, "state": True},
    "clip, peepholes": {"attributes": {"clip": 0.3}, "peephole": True, "state": True},
    "hard sigmoid": {"attributes": {"activations": ["HardSigmoid", "Tanh", "Tanh"]}},
    "relu": {"attributes": {"activations": ["Sigmoid", "Relu", "Relu"]}},
    "softsign": {"attributes": {"activations": ["Sigmoid", "Softsign", "Tanh"]}},
    "hard sigmoid, its values given": {
        "attributes": {"activations": ["hardsigmoid", "tanh", "TANH"], "activation_alpha": [0.2],
                       "activation_beta": [0.5]}
    },
    "identity": {
        "attributes": {"activations": ["Sigmoid", "Tanh", "Affine"], "activation_alpha": [1.0],
                       "activation_beta": [0.0]}
    },
    "the squashing functions of 1997": {
        "attributes": {"activations": ["Sigmoid", "ScaledTanh", "ScaledTanh"], "activation_alpha": [2.0, 1.0],
                       "activation_beta": [0.5, 0.5]}
    },
    "all at once": {
        "attributes": {
            "direction": "bidirectional", "clip": 0.8, "activations": ["HardSigmoid", "Softsign", "Relu"] * 2,
            "activation_alpha": [0.2, 0.2], "activation_beta": [0.5, 0.5],
        },
        "directions": 2, "peephole": True, "state": True, "lengths": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", NODES)
def test_nodes_compute_what_onnxruntime_computes_and_go_back(case, tmp_path):
    model, given = node_model(**NODES[case])
    lstm = LSTM.from_onnx(model)
    assert not lstm.batch_first
    with REFERENCE.active():
        check(lstm, model, given)
        path = tmp_path / "model.onnx"
        lstm.to_onnx(path, state="h0" in given, lengths="lengths" in given)
        onnx.checker.check_model(onnx.load(path), full_check=True)
        check(lstm, path.read_bytes(), given)
    again = LSTM.from_onnx(path)
    assert again.cell == lstm.cell
    assert_identical(again.params, lstm.params)


MODELS = {
    "stacked": {"num_layers": 3},
    "stacked, both directions": {"num_layers": 2, "bidirectional": True, "bias": False},
    "stacked, peepholes": {"num_layers": 2, "peephole": True, "batch_first": True},
    "reverse": {"num_layers": 2, "reverse": True},
    "with what acts in training only": {"num_layers": 2, "dropout": 0.5, "recurrent_dropout": 0.5, "truncated": True},
    "one unit": {"hidden_size": 1},
}


@pytest.mark.parametrize("case", MODELS)
def test_models_go_to_onnxruntime_and_come_back(case):
    lstm = LSTM(**({"input_size": I, "hidden_size": H, "seed": 6} | MODELS[case]))
    file = io.BytesIO()
    lstm.to_onnx(file, state=True, lengths=True)
    data = file.getvalue()
    rng = np.random.default_rng(3)
    x = rng.normal(size=(T, B, I)).astype(np.float32)
    rows = lstm.cell.num_layers * lstm.cell.num_directions
    h0, c0 = rng.normal(size=(2, rows, B, lstm.cell.hidden_size)).astype(np.float32)
    given = {
        "x": x.swapaxes(0, 1) if lstm.batch_first else x,
        "lengths": np.array([3, T, 1], np.int32),
        "h0": h0,
        "c0": c0,
    }
    given = {name: np.ascontiguousarray(array) for name, array in given.items()}
    with REFERENCE.active():
        check(lstm, data, given)
    again = LSTM.from_onnx(io.BytesIO(data))
    assert_identical(again.params, lstm.params)
    assert (again.cell.num_layers, again.cell.bidirectional) == (lstm.cell.num_layers, lstm.cell.bidirectional)


@pytest.mark.parametrize("batch_first", [False, True])
def test_onnxruntime_takes_an_input_without_steps(batch_first):
    lstm = LSTM(I, H, 2, bidirectional=True, batch_first=batch_first, seed=6)
    file = io.BytesIO()
    lstm.to_onnx(file, state=True)
    h0, c0 = np.random.default_rng(3).normal(size=(2, 4, B, H)).astype(np.float32)
    x = np.ones((B, 0, I) if batch_first else (0, B, I), np.float32)
    found = run(file.getvalue(), {"x": x, "h0": h0, "c0": c0})
    with REFERENCE.active():
        y, (h_n, c_n) = lstm(x, (h0, c0))
    assert found["y"].shape == y.shape
    # onnxruntime fills the final states with other values.
    assert (found["h_n"].shape, found["c_n"].shape) == (h_n.shape, c_n.shape)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("size", [-1, "given"])
def test_layers_are_joined_behind_both_forms_of_the_reshape(size, bidirectional):
    """Older files have -1, newer ones the size."""
    lstm = LSTM(I, H, 2, bidirectional=bidirectional, seed=6)
    file = io.BytesIO()
    lstm.to_onnx(file)
    model = onnx.load_model_from_string(file.getvalue())
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "joined")
    assert onnx.numpy_helper.to_array(tensor).tolist() == [0, 0, lstm.cell.output_size]
    if size == -1:
        tensor.CopyFrom(from_array(np.array([0, 0, -1]), "joined"))
    assert_identical(LSTM.from_onnx(model).params, lstm.params)


def test_float64_goes_both_ways():
    """Onnxruntime declares float64 and fails; ONNX's own reference has the gates of opset 14 in one direction."""
    lstm = LSTM(I, H, dtype=np.float64, seed=2)
    file = io.BytesIO()
    lstm.to_onnx(file)
    x = np.random.default_rng(3).normal(size=(T, B, I))
    session = reference.ReferenceEvaluator(onnx.load_model_from_string(file.getvalue()))
    y = session.run(["y"], {"x": x})[0]
    with REFERENCE.active():
        assert_close("torch", {"y": lstm(x)[0]}, {"y": y}, backend="reference", dtype=np.float64)
    file.seek(0)
    assert_identical(LSTM.from_onnx(file).params, lstm.params)


# --- What is refused, by name -----------------------------------------------------------------------------------------


def changed(change, **options):
    model, _ = node_model(**options)
    change(model.graph)
    return model


def add_attribute(**attributes):
    def change(graph):
        graph.node[0].attribute.extend([helper.make_attribute(name, value) for name, value in attributes.items()])

    return lambda: changed(change)


def constant_input(number, value):
    def change(graph):
        node = graph.node[0]
        while len(node.input) <= number:
            node.input.append("")
        node.input[number] = "given"
        graph.initializer.append(from_array(value, "given"))

    return lambda: changed(change)


def computed_weights(op_type):
    def change(graph):
        graph.node[0].input[1] = "made"
        graph.node.insert(0, helper.make_node(op_type, ["W"], ["made"]))

    return lambda: changed(change)


REFUSED = {
    "another activation": (add_attribute(activations=["Sigmoid", "Elu", "Tanh"]), "activation elu"),
    "a hard sigmoid of another slope": (
        add_attribute(activations=["HardSigmoid", "Tanh", "Tanh"], activation_alpha=[0.17]), "alpha=0.17"
    ),
    "an affine activation without its values": (
        add_attribute(activations=["Sigmoid", "Tanh", "Affine"]), "affine without alpha without beta"
    ),
    "an affine activation without beta": (
        add_attribute(activations=["Sigmoid", "Tanh", "Affine"], activation_alpha=[1.0]), "alpha=1 without beta"
    ),
    "a scaled tanh without its values": (add_attribute(activations=["Sigmoid", "Tanh", "ScaledTanh"]), "scaledtanh"),
    "activations of another number": (add_attribute(activations=["Sigmoid"]), "1 activations"),
    "other activations in reverse": (
        lambda: node_model({"direction": "bidirectional", "activations": [*["Sigmoid", "Tanh"] * 2, "Sigmoid", "Relu"]},
                           directions=2)[0], "reverse direction"
    ),
    "another direction": (add_attribute(direction="sideways"), "direction=b'sideways'"),
    "an unknown attribute": (add_attribute(cell_clip=1.0), "attribute cell_clip"),
    "no positive clip": (add_attribute(clip=-1.0), "clip must be"),
    "constant lengths": (constant_input(4, np.array([1, 2, 3], np.int32)), "constant sequence_lens"),
    "a constant initial state": (constant_input(5, np.ones((1, B, H), np.float32)), "constant initial_h"),
    "a constant cell state": (constant_input(6, np.ones((1, B, H), np.float32)), "constant initial_c"),
    "quantised weights": (computed_weights("DequantizeLinear"), "DequantizeLinear"),
    "computed weights": (computed_weights("Sin"), "comes from a Sin node"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_by_name(case):
    make, message = REFUSED[case]
    with pytest.raises(ArgumentError, match=message):
        LSTM.from_onnx(make())


def test_weights_that_are_inputs_are_refused():
    model, _ = node_model()
    del model.graph.initializer[0]
    model.graph.input.append(helper.make_tensor_value_info("W", 1, (1, 4 * H, I)))
    with pytest.raises(ArgumentError, match="W of node the_lstm is an input"):
        LSTM.from_onnx(model)


@pytest.mark.parametrize("name", ["W", "R", "B", "P"])
def test_weights_of_another_shape_are_refused(name):
    model, _ = node_model(peephole=True)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    array = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(from_array(np.concatenate([array, array], axis=1), name))
    with pytest.raises(ShapeError, match=f"{'R' if name == 'W' else name} of node|W of node"):
        LSTM.from_onnx(model)


def test_other_hidden_sizes_and_dtypes_are_refused():
    with pytest.raises(ShapeError, match="hidden_size=7"):
        LSTM.from_onnx(node_model({"hidden_size": 7})[0])
    with pytest.raises(DTypeError, match="float16"):
        LSTM.from_onnx(node_model(dtype=np.float16)[0])


def test_initial_states_that_are_zero_or_inputs_are_taken():
    """As exporters write them: a constant of zeros, or zeros of the shape of x."""
    for make in (constant_input(5, np.zeros((1, B, H), np.float32)), lambda: node_model(state=True)[0]):
        assert LSTM.from_onnx(make()).cell.hidden_size == H

    def change(graph):
        graph.node[0].input[5] = graph.node[0].input[6] = "zeros"
        graph.initializer.append(from_array(np.array([1, B, H]), "shape"))
        graph.node.insert(0, helper.make_node("ConstantOfShape", ["shape"], ["zeros"]))

    assert LSTM.from_onnx(changed(change, state=True)).cell.hidden_size == H


def test_weights_behind_operators_that_exporters_leave_are_read():
    model, given = node_model()
    lstm = LSTM.from_onnx(model)
    graph = model.graph
    array = onnx.numpy_helper.to_array(graph.initializer[0])
    graph.initializer[0].CopyFrom(from_array(np.ascontiguousarray(array[0].T), "flat"))
    graph.initializer.append(from_array(np.array([0]), "axes"))
    graph.node[0].input[1] = "made"
    graph.node.insert(0, helper.make_node("Transpose", ["flat"], ["turned"], perm=[1, 0]))
    graph.node.insert(1, helper.make_node("Unsqueeze", ["turned", "axes"], ["made"]))
    assert_identical(LSTM.from_onnx(model).params, lstm.params)
    with REFERENCE.active():
        check(lstm, model, given)


def test_layout_1_is_batch_first():
    model, given = node_model({"layout": 1})
    lstm = LSTM.from_onnx(model)
    assert lstm.batch_first
    plain = LSTM.from_onnx(node_model()[0])
    x = given["x"]
    with REFERENCE.active():
        np.testing.assert_array_equal(lstm(np.ascontiguousarray(x.swapaxes(0, 1)))[0].swapaxes(0, 1), plain(x)[0])


def test_nodes_are_chosen_by_their_names():
    lstm = LSTM(I, H, 2, seed=0)
    file = io.BytesIO()
    lstm.to_onnx(file)
    model = onnx.load_model_from_string(file.getvalue())
    for layer, output in ((0, "Y0"), (1, "c_n_1")):
        for name in (f"lstm_{layer}", output):
            one = LSTM.from_onnx(model, node=name)
            assert one.cell.num_layers == 1
            np.testing.assert_array_equal(one.params["weight_hh_l0"], lstm.params[f"weight_hh_l{layer}"])
    assert_identical(LSTM.from_onnx(model, node=["lstm_0", "lstm_1"]).params, lstm.params)
    with pytest.raises(ArgumentError, match="no LSTM node called 'nobody'; there are 'lstm_0', 'lstm_1'"):
        LSTM.from_onnx(model, node="nobody")
    for bad in (3, [], [1]):
        with pytest.raises(ArgumentError, match="node must be"):
            LSTM.from_onnx(model, node=bad)


@pytest.mark.parametrize("change", ["a relu between", "another order of axes", "another size"])
def test_nodes_that_are_not_the_layers_of_one_model_are_not_joined(change):
    file = io.BytesIO()
    LSTM(I, H, 2, seed=0).to_onnx(file)
    model = onnx.load_model_from_string(file.getvalue())
    graph = model.graph
    nodes = {node.op_type + (node.name or node.output[0]): node for node in graph.node}
    if change == "a relu between":
        nodes["LSTMlstm_1"].input[0] = "rectified"
        graph.node.insert(3, helper.make_node("Relu", ["y0"], ["rectified"]))
    elif change == "another order of axes":
        nodes["TransposeZ0"].attribute[0].ints[:] = [2, 0, 1, 3]
    else:
        for tensor in graph.initializer:
            if tensor.name in ("W1", "R1", "B1"):
                shape = {"W1": (1, 8, H), "R1": (1, 8, 2), "B1": (1, 16)}[tensor.name]
                tensor.CopyFrom(from_array(np.ones(shape, np.float32), tensor.name))
        nodes["LSTMlstm_1"].attribute[0].i = 2
    with pytest.raises(ArgumentError, match="not the layers of one LSTM"):
        LSTM.from_onnx(model)
    assert LSTM.from_onnx(model, node="lstm_0").cell.hidden_size == H


def test_nodes_inside_a_branch_are_found_with_the_constants_around_them():
    inner, _ = node_model()
    expected = LSTM.from_onnx(inner)
    tensors = list(inner.graph.initializer)
    branch = helper.make_graph(inner.graph.node, "branch", [], list(inner.graph.output)[:1])
    other = helper.make_graph([helper.make_node("Identity", ["x"], ["Z"])], "other", [],
                              [helper.make_tensor_value_info("Z", 1, None)])  # fmt: skip
    node = helper.make_node("If", ["on"], ["out"], then_branch=branch, else_branch=other)
    inputs = [*inner.graph.input, helper.make_tensor_value_info("on", 9, ())]
    graph = helper.make_graph([node], "g", inputs, [helper.make_tensor_value_info("out", 1, None)], tensors)
    assert_identical(LSTM.from_onnx(helper.make_model(graph)).params, expected.params)


def test_attributes_that_the_caller_of_a_function_gives_are_refused():
    model, _ = node_model()
    del model.graph.node[0].attribute[:]
    model.graph.node[0].attribute.append(onnx.AttributeProto(name="clip", ref_attr_name="bound", type=1))
    with pytest.raises(ArgumentError, match="the caller of its function"):
        LSTM.from_onnx(model)


def test_a_model_without_an_lstm_says_what_it_has():
    graph = helper.make_graph([helper.make_node("GRU", ["x", "w", "r"], ["y"], hidden_size=3)], "g", [], [])
    with pytest.raises(ArgumentError, match="no LSTM node; it has GRU"):
        LSTM.from_onnx(helper.make_model(graph))


@pytest.mark.parametrize(
    "fields",
    [{"proj_size": 2}, {"forget_gate": False}, {"block_size": 5}, {"cell_clip": 1.0}, {"layer_norm": True},
     {"zoneout": (0.1, 0.1)}, {"merge": "sum", "bidirectional": True}],
    ids=str,
)  # fmt: skip
def test_variants_that_onnx_lacks_are_refused_by_name(fields, tmp_path):
    with pytest.raises(ArgumentError, match=rf"ONNX's LSTM has no counterpart of {next(iter(fields))}="):
        LSTM(I, H, **fields, seed=0).to_onnx(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    for call in (lambda: LSTM.from_onnx(io.BytesIO()), lambda: LSTM(I, H, seed=0).to_onnx(io.BytesIO())):
        with pytest.raises(BackendError, match=r"pip install \"fastlstm\[onnx\]\""):
            call()
