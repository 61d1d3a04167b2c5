"""LSTM nodes from and to ONNX, with every attribute that a cell has; the rest is refused by name.

ONNX orders the gates i, o, f, c and the peepholes i, o, f. W is (D, 4H, I), R (D, 4H, H), B (D, 8H), the biases of both
products one after the other, P (D, 3H); Y is (T, D, B, H).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlstm import files, parameters
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, ModelFileError, ShapeError, shown
from fastlstm.interchange.gates import Part, assemble, blocks, refuse_variants
from fastlstm.interchange.onnx_graph import Node, folder_of, lstm_nodes
from fastlstm.interchange.source import HostArray, Source, broken_if, check_readable, need, with_source
from fastlstm.interchange.torch import add

__all__ = ["from_onnx", "node_attributes", "node_inputs", "write_onnx"]

ORDER, PEEPHOLES = "iofg", "iof"
# ONNX's name, alpha and beta of each activation; of the 1997 cell, those of the candidate and of the output differ.
ACTIVATIONS: dict[str, tuple[str, float | None, float | None]] = {
    "sigmoid": ("Sigmoid", None, None), "tanh": ("Tanh", None, None), "relu": ("Relu", None, None),
    "softsign": ("Softsign", None, None), "hard_sigmoid": ("HardSigmoid", 0.2, 0.5), "identity": ("Affine", 1.0, 0.0),
}  # fmt: skip
CANDIDATE_1997, OUTPUT_1997 = ("ScaledTanh", 2.0, 0.5), ("ScaledTanh", 1.0, 0.5)
# The activations with parameters, and the values that are meant where none are given. Affine has no such values: the
# standard gives none, and onnxruntime takes 0 for both.
DEFAULTS: dict[str, tuple[float | None, float | None]] = {
    "affine": (math.nan, math.nan), "leakyrelu": (0.01, None), "thresholdedrelu": (1.0, None), "scaledtanh": (1.0, 1.0),
    "hardsigmoid": (0.2, 0.5), "elu": (1.0, None),
}  # fmt: skip
ATTRIBUTES = {"activations", "activation_alpha", "activation_beta", "clip", "direction", "hidden_size", "input_forget",
              "layout", "output_sequence"}  # fmt: skip
KNOWN = ("peephole", "coupled", "activations", "clip", "reverse", "truncated", "recurrent_dropout")
OPSET, IR_VERSION = 14, 8  # every runtime of the last years reads these


def from_onnx(source: Any, node: str | Sequence[str] | None = None) -> tuple[Cell, dict[str, HostArray], bool]:
    """Turn LSTM nodes into a model; also says whether it has the batch first: see ``LSTM.from_onnx``."""
    names = [node] if isinstance(node, str) else node
    if names is not None and not (isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names)):
        raise ArgumentError(f"node must be a name or a list of names, got {shown(node)}")
    onnx = need("onnx", "onnx")
    if isinstance(source, onnx.ModelProto):
        return _of_model(source, None, names)
    check_readable("source", source, "an onnx.ModelProto")

    def read(opened: Source) -> tuple[Cell, dict[str, HostArray], bool]:
        opened.file.seek(0)
        if not opened.size:  # which would be read as a model without nodes
            raise ModelFileError("it is empty")
        return _of_model(_parsed(onnx, opened.file.read()), folder_of(source), names)

    return with_source(source, read)


def _parsed(onnx: Any, data: bytes) -> Any:
    protobuf = need("google.protobuf.message", "onnx")  # which comes with onnx
    try:
        return onnx.load_model_from_string(data)
    except protobuf.DecodeError as error:
        raise ModelFileError(f"it is no ONNX model, or damaged ({error})") from error


def _of_model(model: Any, folder: str | None, names: Sequence[str] | None) -> tuple[Cell, dict[str, HostArray], bool]:
    with broken_if(
        "its graph"
    ):  # every field of a damaged model may have any value and, from protobuf, some other types
        return _of_nodes(lstm_nodes(model, folder), names)


def _of_nodes(nodes: Sequence[Node], names: Sequence[str] | None) -> tuple[Cell, dict[str, HostArray], bool]:
    chosen = _chosen(nodes, names) if names is not None else _stacked(nodes)
    fields = [_fields(node) for node in chosen]
    if any(other != fields[0] for other in fields):
        raise ArgumentError("the nodes differ in their attributes: read them one by one")
    directions = 2 if _attributes(chosen[0]).get("direction") == b"bidirectional" else 1
    parts = [_parts(node, directions) for node in chosen]
    layout = fields[0].pop("layout")
    what = "node " + " and ".join(node.name for node in chosen)
    cell, params = assemble(parts, ORDER, PEEPHOLES, what, **fields[0])
    for node in chosen:
        given = _attributes(node).get("hidden_size", cell.hidden_size)
        if given != cell.hidden_size:
            raise ShapeError(f"node {node.name} has hidden_size={given}, but R is for {cell.hidden_size}")
    return cell, params, bool(layout)


def _chosen(nodes: Sequence[Node], names: Sequence[str]) -> list[Node]:
    found = []
    for name in names:
        matches = [node for node in nodes if node.answers_to(name)]
        if len(matches) != 1:
            count = len(matches) or "no"
            raise ArgumentError(f"the model has {count} LSTM node called {name!r}; there are {_listed(nodes)}")
        found += matches
    return found


def _listed(nodes: Sequence[Node]) -> str:
    return ", ".join(repr(node.name) for node in nodes[:50])


def _stacked(nodes: Sequence[Node]) -> list[Node]:
    """Return all nodes, in order, if they are the layers of one model."""
    if len(nodes) == 1:
        return list(nodes)
    after, rest = {}, list(nodes)
    for node in nodes:
        source, between = node.source()
        attributes = _attributes(node)
        directions = 2 if attributes.get("direction") == b"bidirectional" else 1
        if source is not None and node.joins_directions(between, directions, attributes.get("layout", 0)):
            after[id(source)] = node
            rest.remove(node)
    chain = rest[:1]
    while len(rest) == 1 and id(chain[-1].proto) in after:
        chain.append(after.pop(id(chain[-1].proto)))
    sizes = {_hidden_size(node) for node in nodes}
    if len(chain) != len(nodes) or len(sizes) != 1 or any(_fields(node) != _fields(nodes[0]) for node in nodes):
        raise ArgumentError(
            f"the model has {len(nodes)} LSTM nodes that are not the layers of one LSTM: choose by node=..., out of"
            f" {_listed(nodes)}"
        )
    return chain


def _hidden_size(node: Node) -> int | None:
    weights = node.scope.constant(node.input(2))
    return weights.shape[-1] if weights is not None and weights.ndim == 3 else None


def _attributes(node: Node) -> dict[str, Any]:
    onnx = need("onnx", "onnx")
    if any(given.ref_attr_name for given in node.proto.attribute):
        raise ArgumentError(f"node {node.name} takes attributes from the caller of its function: they are not known")
    with broken_if(f"node {node.name}"):
        return {given.name: onnx.helper.get_attribute_value(given) for given in node.proto.attribute}


def _fields(node: Node) -> dict[str, Any]:
    """Return the fields of the cell that a node asks for, and its layout, or raise if one is unsupported."""
    attributes = _attributes(node)
    unknown = sorted(set(attributes) - ATTRIBUTES)
    if unknown:
        raise ArgumentError(f"node {node.name} has the attribute {unknown[0]}, which is not supported")
    direction = attributes.get("direction", b"forward")
    if direction not in (b"forward", b"reverse", b"bidirectional"):
        raise ArgumentError(f"node {node.name} has direction={shown(direction)}, which is not supported")
    with broken_if(f"node {node.name}"):
        activations = _activations(node, attributes, 2 if direction == b"bidirectional" else 1)
        clip = attributes.get("clip")
        found = {
            "activations": activations, "coupled": bool(int(attributes.get("input_forget", 0))),
            "reverse": direction == b"reverse", "clip": None if clip is None else float(np.float32(clip)),
            "layout": int(attributes.get("layout", 0)),
        }  # fmt: skip
    if node.input(4) and not node.scope.depends_on_input(node.input(4)):
        raise ArgumentError(f"node {node.name} has constant sequence_lens, which a model does not hold")
    for number, name in ((5, "initial_h"), (6, "initial_c")):
        given = node.input(number)
        if given and not node.scope.is_zero(given) and not node.scope.depends_on_input(given):
            raise ArgumentError(f"node {node.name} has a constant {name} that is not zero, which a model does not hold")
    return found


def _activations(node: Node, attributes: Mapping[str, Any], directions: int) -> tuple[str, ...]:
    given = attributes.get("activations") or [b"Sigmoid", b"Tanh", b"Tanh"] * directions
    alphas, betas = list(attributes.get("activation_alpha", ())), list(attributes.get("activation_beta", ()))
    if len(given) != 3 * directions:
        raise ArgumentError(f"node {node.name} has {len(given)} activations for {directions} directions")
    found = []
    for number, function in enumerate(given):
        name = function.decode("utf-8").lower()
        # Each takes the next value, if it has such a parameter.
        alpha, beta = DEFAULTS.get(name, (None, None))
        alpha = alphas.pop(0) if alpha is not None and alphas else alpha
        beta = betas.pop(0) if beta is not None and betas else beta
        found.append(_activation(node, name, (alpha, beta), number % 3))
    if found[:3] * directions != found:
        raise ArgumentError(f"node {node.name} has other activations in its reverse direction, which is not supported")
    return tuple(found[:3])


def _activation(node: Node, name: str, values: tuple[float | None, float | None], role: int) -> str:
    known = {ours: theirs for ours, theirs in ACTIVATIONS.items()}
    if role:
        known["1997"] = CANDIDATE_1997 if role == 1 else OUTPUT_1997
    for ours, (theirs, *expected) in known.items():
        if theirs.lower() == name and all(
            wanted is None or (value is not None and np.float32(wanted) == np.float32(value))
            for wanted, value in zip(expected, values, strict=True)
        ):
            return ours
    parameters_of = "".join(
        f", {what}={v:g}" if not math.isnan(v) else f" without {what}"
        for what, v in zip(("alpha", "beta"), values, strict=True)
        if v is not None
    )
    raise ArgumentError(f"node {node.name} has the activation {name}{parameters_of}, which is not supported")


def _parts(node: Node, directions: int) -> list[Part]:
    """Read the weights of each direction."""
    w, r = (_weight(node, number, name) for number, name in ((1, "W"), (2, "R")))
    b, p = (_weight(node, number, name) if node.input(number) else None for number, name in ((3, "B"), (7, "P")))
    size = r.shape[2] if r.ndim == 3 else 0
    shapes = {"W": (w, (directions, 4 * size, w.shape[-1])), "R": (r, (directions, 4 * size, size)),
              "B": (b, (directions, 8 * size)), "P": (p, (directions, 3 * size))}  # fmt: skip
    for name, (array, shape) in shapes.items():
        if array is not None and array.shape != shape:
            raise ShapeError(f"{name} of node {node.name} must have shape {shape}, got {array.shape}")
    return [
        Part(
            w[d],
            r[d],
            None if b is None else add(b[d, : 4 * size], b[d, 4 * size :]),
            None if p is None else p[d].reshape(3, size),
        )
        for d in range(directions)
    ]


def _weight(node: Node, number: int, name: str) -> HostArray:
    array = node.scope.constant(node.input(number))
    if array is None:
        maker = node.scope.maker(node.input(number))
        origin = f"comes from a {maker.op_type} node" if maker is not None else "is an input of the model"
        raise ArgumentError(f"{name} of node {node.name} {origin}, so it is not constant and cannot be read")
    return array


# --- Out --------------------------------------------------------------------------------------------------------------


def write_onnx(
    path: Any, cell: Cell, params: Mapping[str, HostArray], batch_first: bool, state: bool, lengths: bool
) -> None:
    """Write an ONNX model of one LSTM: see ``LSTM.to_onnx``."""
    refuse_variants(cell, KNOWN, "ONNX's LSTM")
    onnx = need("onnx", "onnx")
    data = _model(onnx, cell, params, batch_first, state, lengths).SerializeToString()
    file = files.file_object(path, "write")
    if file is None:
        files.replace(files.path_name(path), data)
    else:
        files.write(file, data)


def _model(
    onnx: Any, cell: Cell, params: Mapping[str, HostArray], batch_first: bool, state: bool, lengths: bool
) -> Any:
    """Build the graph: one node for each layer, then its directions side by side."""
    helper, from_array = onnx.helper, onnx.numpy_helper.from_array
    # With -1 in place of the size, onnxruntime cannot reshape an input without steps.
    joined = from_array(np.array([0, 0, cell.num_directions * cell.hidden_size]), "joined")
    constants, nodes, source = [joined], [], "x"
    if batch_first:
        nodes.append(helper.make_node("Transpose", ["x"], ["x_t"], perm=[1, 0, 2]))
        source = "x_t"
    for layer in range(cell.num_layers):
        made = node_inputs(cell, params, layer)
        constants += [from_array(array, name) for name, array in made.items()]
        w, r, b, p = (name if name in made else "" for name in (f"{x}{layer}" for x in "WRBP"))
        h0, c0 = (f"h0_{layer}", f"c0_{layer}") if state else ("", "")
        if state:
            bounds = [from_array(np.array([k * cell.num_directions]), f"at_{k}") for k in (layer, layer + 1)]
            constants += bounds if layer == 0 else bounds[1:]
            nodes += [helper.make_node("Slice", [given, f"at_{layer}", f"at_{layer + 1}"], [name])
                      for given, name in (("h0", h0), ("c0", c0))]  # fmt: skip
        inputs = [source, w, r, b, "lengths" if lengths else "", h0, c0, p]
        while not inputs[-1]:
            inputs.pop()
        outputs = [f"Y{layer}", f"h_n_{layer}", f"c_n_{layer}"]
        nodes.append(helper.make_node("LSTM", inputs, outputs, name=f"lstm_{layer}", **node_attributes(cell)))
        nodes.append(helper.make_node("Transpose", [f"Y{layer}"], [f"Z{layer}"], perm=[0, 2, 1, 3]))
        last = layer == cell.num_layers - 1
        source = "y" if last and not batch_first else f"y{layer}"
        nodes.append(helper.make_node("Reshape", [f"Z{layer}", "joined"], [source]))
    if batch_first:
        nodes.append(helper.make_node("Transpose", [source], ["y"], perm=[1, 0, 2]))
    for name in ("h_n", "c_n"):
        nodes.append(helper.make_node("Concat", [f"{name}_{k}" for k in range(cell.num_layers)], [name], axis=0))
    inputs, outputs = _values(onnx, cell, batch_first, state, lengths)
    graph = helper.make_graph(nodes, "lstm", inputs, outputs, constants)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_model(graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="fastlstm")


def _values(onnx: Any, cell: Cell, batch_first: bool, state: bool, lengths: bool) -> tuple[list[Any], list[Any]]:
    """Describe the inputs and outputs of the model."""
    info = onnx.helper.make_tensor_value_info
    real = onnx.helper.np_dtype_to_tensor_dtype(cell.dtype)
    first = ["B", "T"] if batch_first else ["T", "B"]
    rows = [cell.num_layers * cell.num_directions, "B", cell.hidden_size]
    inputs = [info("x", real, [*first, cell.input_size])]
    inputs += [info("lengths", onnx.TensorProto.INT32, ["B"])] * lengths
    inputs += [info(name, real, rows) for name in ("h0", "c0")] * state
    outputs = [info("y", real, [*first, cell.output_size]), *(info(name, real, rows) for name in ("h_n", "c_n"))]
    return inputs, outputs


def node_inputs(cell: Cell, params: Mapping[str, HostArray], layer: int) -> dict[str, HostArray]:
    """Return W, R, B and P of a layer, by name."""
    found: dict[str, list[HostArray]] = {}
    for direction in range(cell.num_directions):
        names = parameters.direction_names(cell, layer, direction)
        for role, letter in (("weight_ih", "W"), ("weight_hh", "R"), ("bias", "B"), ("weight_peephole", "P")):
            if role not in names:
                continue
            own = parameters.peepholes(cell) if letter == "P" else cell.gates
            array = np.asarray(params[names[role]], cell.dtype)
            size, wanted = len(array) // len(own), PEEPHOLES if letter == "P" else ORDER
            # Coupled gates have no rows for f; the operator wants some, and does not read them.
            empty = np.zeros((size, *array.shape[1:]), cell.dtype)
            array = np.concatenate([blocks(array, own, [gate]) if gate in own else empty for gate in wanted])
            if letter == "B":
                array = np.concatenate([array, np.zeros_like(array)])
            found.setdefault(f"{letter}{layer}", []).append(array.reshape(-1) if letter == "P" else array)
    return {name: np.stack(arrays) for name, arrays in found.items()}


def node_attributes(cell: Cell) -> dict[str, Any]:
    """Return the attributes of every layer's node."""
    direction = "bidirectional" if cell.bidirectional else "reverse" if cell.reverse else "forward"
    found: dict[str, Any] = {"hidden_size": cell.hidden_size, "direction": direction}
    if cell.activations != ("sigmoid", "tanh", "tanh"):
        of_role = [ACTIVATIONS, ACTIVATIONS | {"1997": CANDIDATE_1997}, ACTIVATIONS | {"1997": OUTPUT_1997}]
        functions = [known[name] for known, name in zip(of_role, cell.activations, strict=True)] * cell.num_directions
        found["activations"] = [name for name, _, _ in functions]
        alphas, betas = ([f[k] for f in functions if f[k] is not None] for k in (1, 2))
        found |= {"activation_alpha": alphas, "activation_beta": betas} if alphas else {}
    if cell.clip is not None:
        found["clip"] = cell.clip
    if cell.coupled:
        found["input_forget"] = 1
    return found
