"""The LSTM nodes of an ONNX model: where they are, which of their inputs are constant, and which feeds which."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError, ModelFileError
from fastlstm.interchange.source import HostArray, broken_if, need

__all__ = ["Node", "Scope", "lstm_nodes"]

# Operators by which exporters prepare weights; their results are never larger than their inputs.
_FOLDED = ("Identity", "Transpose", "Slice", "Concat", "Unsqueeze", "Squeeze", "Reshape", "Cast", "Gather", "Split")
_PASSED = ("Identity", "Dropout")  # the identity in inference
_SHAPED = ("Expand", "Tile", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Identity", "Slice", "Cast", "Concat")
DEEPEST = 64  # operators before a constant, and graphs inside each other


@dataclass(frozen=True)
class Scope:
    """One graph, inside others or not: its constants, and which node makes which value."""

    model: Any
    folder: str | None  # where external data are
    outer: Scope | None
    tensors: dict[str, Any]
    makers: dict[str, Any]
    infos: dict[str, Any]  # declared types and shapes, by name
    depth: int = 0
    found: dict[str, HostArray | None] = field(default_factory=dict)

    def maker(self, name: str) -> Any:
        """Return the node that makes a value, or None."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.makers:
                return scope.makers[name]
            scope = scope.outer
        return None

    def sizes(self, name: str) -> list[int] | None:
        """Return the four sizes of a value, None if they are not known."""
        if name not in self.infos:
            return None
        found = [size.dim_value for size in self.infos[name].type.tensor_type.shape.dim]
        return found if len(found) == 4 and min(found) > 0 else None

    def constant(self, name: str, depth: int = 0) -> HostArray | None:
        """Return a value that does not depend on the model's inputs; None if it does."""
        if name not in self.found:
            self.found[name] = self._constant(name, depth)
        return self.found[name]

    def _constant(self, name: str, depth: int) -> HostArray | None:
        if name in self.tensors:
            return _array(self.tensors[name], self.folder)
        node = self.makers.get(name)
        if node is None:
            return self.outer.constant(name, depth) if self.outer is not None else None
        if node.op_type == "Constant":
            return _array_of_constant(node, self.folder)
        if node.op_type not in _FOLDED or depth > DEEPEST:
            return None
        inputs = {given: self.constant(given, depth + 1) for given in node.input if given}
        if any(value is None for value in inputs.values()):
            return None
        return _evaluated(self.model, node, inputs, name)

    def is_zero(self, name: str, depth: int = 0) -> bool:
        """Whether a value is zero whatever its shape, such as initial states that were not given."""
        value = self.constant(name)
        if value is not None:
            return not np.any(value)
        node = self.maker(name)
        if node is None or depth > DEEPEST:
            return False
        if node.op_type == "ConstantOfShape":
            return not any(np.any(_array(attribute.t, self.folder)) for attribute in node.attribute)
        if node.op_type == "Concat":
            return all(self.is_zero(given, depth + 1) for given in node.input)
        return node.op_type in _SHAPED and self.is_zero(node.input[0], depth + 1)

    def depends_on_input(self, name: str, depth: int = 0) -> bool:
        """Whether a value comes from the model's inputs, and not from its weights alone."""
        if self.constant(name) is not None or depth > DEEPEST:
            return False
        node = self.maker(name)
        if node is None:
            return True
        # A shape may depend on the inputs without the values doing so.
        values = (
            node.input[:1] if node.op_type in (*_SHAPED, "ConstantOfShape") and node.op_type != "Concat" else node.input
        )
        if node.op_type == "ConstantOfShape":
            return False
        return any(self.depends_on_input(given, depth + 1) for given in values if given)


@dataclass(frozen=True)
class Node:
    """One LSTM node, and the graph that it stands in."""

    proto: Any
    scope: Scope

    @property
    def name(self) -> str:
        """Its name, or that of its first output; protobuf gives a damaged name as bytes."""
        name = self.proto.name or next((name for name in self.proto.output if name), "")
        return name if isinstance(name, str) else repr(name)

    def input(self, number: int) -> str:
        """Return the name of an input, "" if it is not given."""
        return self.proto.input[number] if number < len(self.proto.input) else ""

    def answers_to(self, name: str) -> bool:
        """Whether it is called so, or one of its outputs is."""
        return name in (self.proto.name, *self.proto.output) and name != ""

    def source(self) -> tuple[Any, list[Any]]:
        """Return the LSTM node whose output is this one's input, or None, and the nodes between them."""
        between: list[Any] = []
        name = self.input(0)
        for _ in range(DEEPEST):
            node = self.scope.makers.get(name)
            if node is None:
                break
            if node.op_type == "LSTM":
                return (node, between) if node.output[0] == name else (None, between)
            if node.op_type not in (*_PASSED, "Transpose", "Reshape", "Squeeze"):
                break
            if node.op_type not in _PASSED:
                between.insert(0, node)
            name = node.input[0]
        return None, between

    def joins_directions(self, between: list[Any], directions: int, layout: int) -> bool:
        """Whether the nodes between two LSTMs only put the directions of Y side by side, as a stacked model does."""
        axis = 2 if layout else 1  # of the directions in Y: (T, D, B, H), or (B, T, D, H)
        kinds = [node.op_type for node in between]
        if kinds == ["Squeeze"] and directions == 1:
            return self._numbers(between[0], "axes", 1) == [axis]
        if kinds == ["Transpose", "Reshape"] and not layout:
            if self._numbers(between[0], "perm", None) != [0, 2, 1, 3]:
                return False
        elif not (kinds == ["Reshape"] and layout):
            return False
        reshape = between[-1]
        target, known = self._numbers(reshape, "shape", 1), self.scope.sizes(reshape.input[0])
        if target is None or len(target) != 3:
            return False
        # Zeros copy the sizes of the first two axes, so the third can only be that of the others, as a number or as -1.
        copied = target[:2] == [0, 0] and target[2] != 0
        return copied or (known is not None and target == [*known[:2], known[2] * known[3]])

    def _numbers(self, node: Any, attribute: str, input_number: int | None) -> list[int] | None:
        """Return integers that are given by an attribute or, in newer versions, by an input."""
        for given in node.attribute:
            if given.name == attribute:
                return list(given.ints)
        if input_number is None or len(node.input) <= input_number:
            return None
        value = self.scope.constant(node.input[input_number])
        return None if value is None else [int(number) for number in value.reshape(-1)]


def lstm_nodes(model: Any, folder: str | None) -> list[Node]:
    """List the LSTM nodes of a model, those of its subgraphs and functions too.

    Raises
    ------
    ArgumentError
        If there is none; the message names the other recurrent nodes.
    ModelFileError
        If the model is damaged.
    """
    with broken_if("its graph"):
        scopes = list(_scopes(model, model.graph, folder, None))
        for function in model.functions:
            scopes += _scopes(model, function, folder, None)
        every = [(node, scope) for scope, nodes in scopes for node in nodes if node.domain in ("", "ai.onnx")]
    found = [Node(node, scope) for node, scope in every if node.op_type == "LSTM"]
    if not found:
        others = sorted({node.op_type for scope, nodes in scopes for node in nodes
                         if node.op_type in ("GRU", "RNN", "Scan", "Loop") or "LSTM" in node.op_type})  # fmt: skip
        hint = f"; it has {', '.join(others)}, which cannot be read" if others else ""
        raise ArgumentError(f"the model has no LSTM node{hint}")
    return found


def _scopes(model: Any, graph: Any, folder: str | None, outer: Scope | None) -> Iterator[tuple[Scope, Any]]:
    depth = 0 if outer is None else outer.depth + 1
    if depth > DEEPEST:
        raise ModelFileError("its graphs are nested too deeply")
    tensors = {tensor.name: tensor for tensor in getattr(graph, "initializer", ())}
    makers = {name: node for node in graph.node for name in node.output if name}
    infos = {info.name: info for info in getattr(graph, "value_info", ())}
    scope = Scope(model, folder, outer, tensors, makers, infos, depth)
    yield scope, graph.node
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _scopes(model, inner, folder, scope)


def _array(tensor: Any, folder: str | None) -> HostArray:
    onnx = need("onnx", "onnx")
    with broken_if(f"the tensor {tensor.name[:200]}"):
        if onnx.external_data_helper.uses_external_data(tensor):
            if folder is None:
                raise ModelFileError(f"{tensor.name[:200]} lies in another file: read the model from its path")
            copy = onnx.TensorProto()
            copy.CopyFrom(tensor)
            try:
                # This refuses names that lead out of the folder.
                onnx.external_data_helper.load_external_data_for_tensor(copy, folder)
            except (OSError, onnx.checker.ValidationError) as error:
                raise ModelFileError(
                    f"{tensor.name[:200]} lies in another file, which cannot be read: {error}"
                ) from error
            tensor = copy
        array: HostArray = onnx.numpy_helper.to_array(tensor)
        return array


def _array_of_constant(node: Any, folder: str | None) -> HostArray | None:
    for attribute in node.attribute:
        if attribute.name == "value":
            return _array(attribute.t, folder)
        if attribute.name in ("value_int", "value_ints"):
            return np.array(attribute.ints or attribute.i, np.int64)
        if attribute.name in ("value_float", "value_floats"):
            return np.array(attribute.floats or attribute.f, np.float32)
    return None


def _evaluated(model: Any, node: Any, inputs: dict[str, Any], name: str) -> HostArray:
    """Compute one of a node's outputs by ONNX's own reference."""
    onnx = need("onnx", "onnx")
    helper = onnx.helper
    with broken_if(f"the {node.op_type} node before a weight"):
        values = [helper.make_tensor_value_info(given, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                  for given, array in inputs.items()]  # fmt: skip
        outputs = [helper.make_value_info(name, onnx.TypeProto())]
        graph = helper.make_graph([node], "constant", values, outputs)
        alone = helper.make_model(graph, opset_imports=list(model.opset_import))
        array: HostArray = need("onnx.reference", "onnx").ReferenceEvaluator(alone).run([name], inputs)[0]
        return array


def folder_of(path: Any) -> str | None:
    """Return the folder of a model's external data, None for a file object."""
    return os.path.dirname(os.path.abspath(os.fsdecode(path))) if isinstance(path, str | bytes | os.PathLike) else None
