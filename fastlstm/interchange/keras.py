"""LSTM layers from and to Keras: by file or by ``get_weights()``, without Keras.

Keras orders the gates i, f, c, o, as fastlstm does (c is our g), has one bias, and the transposes of our matrices:
``kernel`` (I, 4H), ``recurrent_kernel`` (H, 4H), ``bias`` (4H,).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastlstm import files, parameters
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, ArrayTypeError, ModelFileError, shown
from fastlstm.interchange.gates import Part, assemble, refuse_variants
from fastlstm.interchange.keras_file import Layer, layers_of
from fastlstm.interchange.source import HostArray, Source, broken_if, check_readable, need, with_source

__all__ = ["from_keras", "to_keras", "write_keras"]

ACTIVATIONS = {"sigmoid": "sigmoid", "tanh": "tanh", "relu": "relu", "softsign": "softsign", "linear": "identity"}
MERGES = {"concat": "concat", "sum": "sum", "ave": "mean", "mul": "product"}
# The variants that Keras has too, and one that affects training only.
KNOWN = ("activations", "merge", "recurrent_dropout", "truncated")
VERSION = "3.0.0"  # of Keras, whose format is written


def from_keras(
    source: Any,
    layer: str | Sequence[str] | None = None,
    *,
    dropout: float | None = None,
    recurrent_dropout: float | None = None,
    **given: Any,
) -> tuple[Cell, dict[str, HostArray]]:
    """Turn a Keras layer, or stacked ones, into a model: see ``LSTM.from_keras``.

    `given` are the fields of the cell that weights alone do not show, and that a configuration must agree with.
    """
    rates = {"dropout": dropout, "recurrent_dropout": recurrent_dropout}
    if isinstance(source, list | tuple):
        if layer is not None:
            raise ArgumentError("layer chooses a layer of a file; weights are those of one layer, or a list of layers")
        layers = list(source) if source and isinstance(source[0], list | tuple) else [source]
        known = {name: rate for name, rate in rates.items() if rate is not None}
        return _of_arrays([list(weights) for weights in layers], "the given weights", **given, **known)
    if hasattr(source, "get_weights"):
        raise ArgumentError(
            f"source is an object of Keras, {type(source).__qualname__}: pass layer.get_weights() of an LSTM layer, or"
            " a list of these for stacked layers, or the path of a file"
        )
    check_readable("source", source, "a list of arrays such as layer.get_weights()")
    names = [layer] if isinstance(layer, str) else layer
    if names is not None and not (isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names)):
        raise ArgumentError(f"layer must be a name or a list of names, got {shown(layer)}")

    def read(opened: Source) -> tuple[Cell, dict[str, HostArray]]:
        with broken_if("its content"):  # HDF5 raises several kinds of errors, at any access
            return read_undamaged(opened)

    def read_undamaged(opened: Source) -> tuple[Cell, dict[str, HostArray]]:
        layers = layers_of(opened)
        chosen = _chosen(layers, names, opened.name)
        fields = [_fields(entry, given) for entry in chosen]
        both = [entry.name for entry in chosen if entry.class_name == "Bidirectional"]
        if 0 < len(both) < len(chosen):
            raise ArgumentError(
                f"the layers differ in their directions: of {', '.join(entry.name for entry in chosen)}, only"
                f" {', '.join(both)} is Bidirectional; read them one by one"
            )
        if any(other != fields[0] for other in fields):
            raise ArgumentError("the layers differ in their activations or merge modes: read them one by one")
        what = "layer " + " and ".join(entry.name for entry in chosen)
        read_rates = {
            "dropout": lambda: [_dropout_between(layers, *pair) for pair in pairwise(chosen)],
            "recurrent_dropout": lambda: [_recurrent_dropout(entry) for entry in chosen],
        }
        used = {name: _one_rate(name, read_rates[name]()) if r is None else r for name, r in rates.items()}
        return _of_arrays([entry.weights() for entry in chosen], what, **fields[0], **used)

    return with_source(source, read)


def _chosen(layers: Sequence[Layer], names: Sequence[str] | None, where: str) -> list[Layer]:
    recurrent = [layer for layer in layers if _is_lstm(layer)]
    listed = ", ".join(repr(layer.name) for layer in recurrent[:50]) or "none"
    if names is None:
        if len(recurrent) != 1:
            raise ArgumentError(f"{where} has {len(recurrent)} LSTM layers: choose by layer=..., out of {listed}")
        return recurrent
    found = []
    for name in names:
        matches = [layer for layer in layers if layer.name == name]
        if len(matches) != 1:
            raise ArgumentError(
                f"{where} has {len(matches) or 'no'} layer called {name!r}; its LSTM layers are {listed}"
            )
        found += matches
    return found


def _dropout_between(layers: Sequence[Layer], first: Layer, second: Layer) -> float:
    """Return the probability that Dropout layers between two layers drop a number; 0 if the file does not join them."""
    by_name, dropped, found = {layer.name: layer for layer in layers}, 0.0, second
    for _ in layers:  # which ends where a damaged configuration has a cycle
        if len(found.inputs) != 1 or found.inputs[0] not in by_name:
            return 0.0
        if found.inputs[0] == first.name:
            return dropped
        found = by_name[found.inputs[0]]
        # With a noise_shape, one number of the mask is used for several steps or units, which fastlstm does not have.
        if found.class_name == "Dropout" and found.config and not found.config.get("noise_shape"):
            rate = float(found.config.get("rate", 0.0))
            dropped += rate - dropped * rate
    return 0.0


def _recurrent_dropout(layer: Layer) -> float:
    """Return the recurrent dropout of a layer's configuration."""
    inner = layer.config or {}
    if layer.class_name == "Bidirectional":
        inner = (inner.get("layer") or {}).get("config", {})
    return float(inner.get("recurrent_dropout") or 0.0)


def _one_rate(name: str, found: Sequence[float]) -> float:
    if len(set(found)) > 1:
        rates = ", ".join(f"{rate:g}" for rate in found)
        raise ArgumentError(f"the layers differ in their {name} ({rates}), but a model has one: pass {name}=")
    return found[0] if found else 0.0


def _is_lstm(layer: Layer) -> bool:
    inner = layer.config.get("layer") if layer.config and layer.class_name == "Bidirectional" else None
    return (inner.get("class_name") if isinstance(inner, dict) else layer.class_name) in ("LSTM", "Bidirectional")


def _fields(layer: Layer, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of the cell that a layer's configuration asks for, or raise if one is unsupported."""
    if layer.config is None:  # weights alone: they cannot say
        return dict(given)
    found = _configured(layer, layer.config)
    for name, value in given.items():
        if found.get(name, "concat") != (tuple(value) if isinstance(value, list) else value):
            raise ArgumentError(f"layer {layer.name} has {name}={found.get(name)}, but {shown(value)} is given")
    return found


def _configured(layer: Layer, config: dict[str, Any]) -> dict[str, Any]:
    if layer.class_name == "Bidirectional":
        merge = config.get("merge_mode", "concat")
        if merge not in MERGES:
            raise ArgumentError(f"layer {layer.name} has merge_mode={shown(merge)}, which is not supported")
        backward, inner = config.get("backward_layer"), config.get("layer")
        own = _activations(layer, inner, False)
        if backward is not None and _activations(layer, backward, True) != own:
            raise ArgumentError(f"layer {layer.name} has a backward_layer with other activations")
        return {"activations": own, "merge": MERGES[merge]}
    return {"activations": _activations(layer, {"class_name": layer.class_name, "config": config}, False)}


def _activations(layer: Layer, described: Any, backwards: bool) -> tuple[str, str, str]:
    if not isinstance(described, dict) or not isinstance(described.get("config"), dict):
        raise ModelFileError(f"the configuration of layer {layer.name} is damaged")
    config, kind = described["config"], described.get("class_name")
    if kind != "LSTM":
        raise ArgumentError(f"layer {layer.name} is of class {shown(kind)}, not LSTM or Bidirectional")
    if bool(config.get("go_backwards", False)) != backwards:
        raise ArgumentError(f"layer {layer.name} has go_backwards={not backwards}, which is not supported")
    if config.get("time_major"):
        raise ArgumentError(f"layer {layer.name} has time_major=True, which is not supported")
    gates = _activation(layer, "recurrent_activation", config.get("recurrent_activation"))
    candidate = _activation(layer, "activation", config.get("activation"))
    return gates, candidate, candidate


def _activation(layer: Layer, field: str, given: Any) -> str:
    name = given.get("config") if isinstance(given, dict) and given.get("class_name") == "function" else given
    if name == "hard_sigmoid" and str(layer.version).startswith("2."):
        return "hard_sigmoid"  # of slope 1/5, as ours; that of Keras 3 has slope 1/6
    if not isinstance(name, str) or name not in ACTIVATIONS:
        hint = " (in Keras 3 it has slope 1/6, ours 1/5)" if name == "hard_sigmoid" else ""
        raise ArgumentError(f"layer {layer.name} has {field}={shown(name)}, which is not supported{hint}")
    return ACTIVATIONS[name]


def _of_arrays(layers: Sequence[Sequence[Any]], what: str, **fields: Any) -> tuple[Cell, dict[str, HostArray]]:
    """Make a model of the results of ``get_weights()`` of each layer."""
    parts = []
    for arrays in layers:
        if len(arrays) not in (2, 3, 4, 6) or any(not hasattr(array, "ndim") for array in arrays):
            raise ArrayTypeError(
                f"{what} must be arrays: kernel, recurrent_kernel and, if there is one, bias; for a Bidirectional layer"
                f" those of both directions; got {len(arrays)} objects"
            )
        each = 3 if len(arrays) in (3, 6) else 2
        parts.append([_part(arrays[k : k + each], what) for k in range(0, len(arrays), each)])
    return assemble(parts, parameters.GATES, parameters.PEEPHOLES, what, **fields)


def _part(arrays: Sequence[Any], what: str) -> Part:
    kernel, recurrent, *bias = arrays
    if recurrent.ndim == 2 and recurrent.shape[1] != 4 * recurrent.shape[0]:
        raise ArgumentError(
            f"{what}: the recurrent kernel of an LSTM has shape (H, 4H), got {recurrent.shape}; is this another layer?"
        )
    return Part(kernel.T, recurrent.T, bias[0] if bias else None)


def to_keras(cell: Cell, params: Mapping[str, HostArray]) -> list[list[HostArray]]:
    """Return the weights of each layer as its ``set_weights()`` takes them: see ``LSTM.to_keras``."""
    refuse_variants(cell, KNOWN, "Keras's LSTM")
    if cell.activations[1] != cell.activations[2]:
        raise ArgumentError("Keras's LSTM has one activation for candidate and output, these differ")
    unknown = set(cell.activations) - set(ACTIVATIONS.values())
    if unknown:
        raise ArgumentError(f"Keras 3 has no counterpart of the activation {', '.join(sorted(unknown))}")
    layers: list[list[HostArray]] = [[] for _ in range(cell.num_layers)]
    for layer, direction in parameters.directions(cell):
        names = parameters.direction_names(cell, layer, direction)
        layers[layer] += [
            np.array(params[names[role]].T, cell.dtype, order="C") for role in ("weight_ih", "weight_hh", "bias")
            if role in names
        ]  # fmt: skip
    return layers


def write_keras(path: Any, cell: Cell, params: Mapping[str, HostArray]) -> None:
    """Write a ``.keras`` file of a Sequential model of these layers: see ``LSTM.to_keras``."""
    layers = to_keras(cell, params)
    target = files.path_name(path)
    if not target.endswith((".keras", ".weights.h5")):
        raise ArgumentError(f"path must end with .keras or .weights.h5, got {shown(target)}")
    weights = _weights_file(cell, layers)
    if target.endswith(".keras"):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as entries:
            entries.writestr(
                "metadata.json", json.dumps({"keras_version": VERSION, "date_saved": "2000-01-01@00:00:00"})
            )
            entries.writestr("config.json", json.dumps(_config(cell)))
            entries.writestr("model.weights.h5", weights)
        weights = archive.getvalue()
    files.replace(target, weights)


def _weights_file(cell: Cell, layers: Sequence[Sequence[HostArray]]) -> bytes:
    h5py = need("h5py", "keras")
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        file.create_group("vars")
        for number, arrays in enumerate(layers):
            kind = "bidirectional" if cell.bidirectional else "lstm"
            group = file.create_group(f"layers/{kind}" + (f"_{number}" if number else ""))
            group.create_group("vars").attrs["name"] = _layer_name(number)
            inner = (
                [group.create_group(f"{d}_layer") for d in ("forward", "backward")] if cell.bidirectional else [group]
            )
            each = len(arrays) // len(inner)
            for k, place in enumerate(inner):
                if cell.bidirectional:
                    place.create_group("vars")
                variables = place.create_group("cell/vars")
                for index, array in enumerate(arrays[k * each : (k + 1) * each]):
                    variables.create_dataset(str(index), data=array)
    return content.getvalue()


def _layer_name(number: int) -> str:
    return f"lstm_{number}"


def _config(cell: Cell) -> dict[str, Any]:
    """Describe the Sequential model as Keras's own ``config.json`` does."""
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    gates, candidate, _ = cell.activations
    layers = [
        _described("InputLayer", {"name": "x", "batch_shape": [None, None, cell.input_size], "dtype": cell.dtype.name})
    ]
    for number in range(cell.num_layers):
        own = {
            "name": _layer_name(number), "units": cell.hidden_size, "activation": names[candidate],
            "recurrent_activation": names[gates], "use_bias": cell.bias, "return_sequences": True,
            "recurrent_dropout": cell.recurrent_dropout, "dtype": cell.dtype.name,
        }  # fmt: skip
        if number and cell.dropout:
            layers.append(_described("Dropout", {"name": f"dropout_{number}", "rate": cell.dropout}))
        if not cell.bidirectional:
            layers.append(_described("LSTM", own))
            continue
        merge = next(theirs for theirs, ours in MERGES.items() if ours == cell.merge)
        inner = _described("LSTM", own | {"name": f"forward_{own['name']}"})
        layers.append(_described("Bidirectional", {"name": own["name"], "layer": inner, "merge_mode": merge,
                                                   "dtype": cell.dtype.name}))  # fmt: skip
    shape = [None, None, cell.input_size]
    model = {"name": "sequential", "layers": layers, "build_input_shape": shape}
    return {"module": "keras", "class_name": "Sequential", "config": model, "registered_name": None,
            "build_config": {"input_shape": shape}}  # fmt: skip


def _described(class_name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"module": "keras.layers", "class_name": class_name, "config": config, "registered_name": None}
