"""The files of Keras: their LSTM layers, the configuration of each, and the place of its weights.

There are four kinds. ``.keras`` is a zip archive of ``config.json`` and ``model.weights.h5``; the latter stores layers
by class and counter (``layers/lstm_1/cell/vars/0``), and only the order in ``config.json`` says which layer that is.
``.weights.h5`` is the same without the configuration. The HDF5 files of Keras 1 and 2, ``.h5``, store by name
(``model_weights/lstm_1/...``), with the configuration in an attribute, or, written by ``save_weights``, without.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlstm.errors import ModelFileError
from fastlstm.interchange.source import HostArray, Source, broken_if, need

__all__ = ["Layer", "layers_of"]

MOST_ENTRIES = 100_000  # of a file, that are looked at
_MODELS = ("Functional", "Sequential", "Model")
_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # the latter in Keras 2.12 to 2.15


class Layer(NamedTuple):
    """A layer that may be an LSTM, or a wrapper of one.

    `config` is None in a file that has weights alone. `weights` reads the arrays, in the order of ``get_weights()``.
    `inputs` names the layers that feed it, as far as the configuration says so.
    """

    name: str
    class_name: str
    config: dict[str, Any] | None
    version: str | None  # of Keras
    weights: Callable[[], list[HostArray]]
    inputs: tuple[str, ...] = ()


def layers_of(source: Source) -> list[Layer]:
    """List the layers of a file that may be LSTMs; their weights can be read as long as the file is open.

    Raises
    ------
    BackendError
        If h5py is not installed.
    ModelFileError
        If the file is damaged or none of Keras's.
    """
    head = source.head(8)
    if head[:4] == b"PK\x03\x04":
        return _of_archive(source)
    if head != b"\x89HDF\r\n\x1a\n":
        raise ModelFileError("it is neither a .keras file nor an HDF5 file")
    file = _opened(source.file)
    if "layer_names" in file.attrs or "layer_names0" in file.attrs:
        return _of_names(file, file, None, None)
    if "model_weights" in file:
        return _of_legacy_model(file)
    return _of_weights(file)


def _opened(file: Any) -> Any:
    h5py = need("h5py", "keras")
    try:
        return h5py.File(file, "r")
    except (OSError, RuntimeError, ValueError) as error:
        raise ModelFileError(f"its HDF5 content is damaged ({error})") from error


# --- HDF5, of which nothing is trusted --------------------------------------------------------------------------------


def _child(group: Any, path: str) -> Any:
    """Return a group or dataset inside `group`, or None; links are refused, so that no other file is read."""
    with broken_if("its HDF5 content"):
        for part in path.split("/"):
            link = group.get(part, getlink=True)
            if link is None:
                return None
            if type(link).__name__ != "HardLink":
                raise ModelFileError(f"{path} is a link out of its place, which is not followed")
            group = group[part]
        return group


def _array(group: Any, path: str) -> HostArray:
    """Read a dataset that lies in this file as it is, so that it is never larger than the file."""
    dataset = _child(group, path)
    if dataset is None or not hasattr(dataset, "dtype"):
        raise ModelFileError(f"the weights {path} are missing")
    with broken_if(f"the dataset {path}"):
        if dataset.external or dataset.is_virtual:
            raise ModelFileError(f"the dataset {path} refers to other files, which are not read")
        if dataset.dtype.kind != "f" or dataset.ndim > 2:
            raise ModelFileError(f"the dataset {path} is no matrix or vector of real numbers, but {dataset.dtype}")
        if dataset.id.get_storage_size() != dataset.nbytes:
            raise ModelFileError(f"the dataset {path} is compressed or incomplete, which Keras never writes")
        array: HostArray = np.asarray(dataset[()])
        return array


def _strings(attributes: Any, name: str) -> list[str]:
    """Read a list of strings; Keras divides those that are too long for an attribute."""
    with broken_if(f"the attribute {name}"):
        if name in attributes:
            return [_text(item) for item in attributes[name]]
        found: list[str] = []
        while f"{name}{len(found)}" in attributes and len(found) < MOST_ENTRIES:
            found.append(f"{name}{len(found)}")
        return [_text(item) for part in found for item in attributes[part]]


def _text(value: Any) -> str:
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _json(text: Any, what: str) -> dict[str, Any]:
    with broken_if(what):
        value = json.loads(text)
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} is no JSON object")
    return value


# --- .keras and .weights.h5 -------------------------------------------------------------------------------------------


def _of_archive(source: Source) -> list[Layer]:
    with broken_if("its zip archive"):
        archive = zipfile.ZipFile(source.file)
        sizes = {info.filename: info.file_size for info in archive.infolist()}

    def record(name: str) -> bytes:
        if name not in sizes:
            raise ModelFileError(f"it is a zip archive without {name}, so no .keras file")
        if sizes[name] > 64 * source.size + 2**20:
            raise ModelFileError(f"its {name} is far larger than the file")
        with broken_if(f"its {name}"):
            return archive.read(name)

    config = _json(record("config.json"), "its config.json")
    version = _json(record("metadata.json"), "its metadata.json").get("keras_version")
    file = _opened(io.BytesIO(record("model.weights.h5")))
    with broken_if("its config.json"):
        found = list(_configured(config))
    return [
        Layer(
            layer["config"]["name"],
            layer["class_name"],
            layer["config"],
            version,
            _by_path(file, paths, layer),
            inputs,
        )
        for layer, paths, inputs in found
    ]


def _configured(
    model: Mapping[str, Any], paths: tuple[str, ...] = ("",)
) -> Iterator[tuple[dict[str, Any], tuple[str, ...], tuple[str, ...]]]:
    """Walk the layers of a configuration, with the places where each one's weights may be stored, and its inputs."""
    used: dict[str, int] = {}
    before: tuple[str, ...] = ()
    for layer in _layers_in(model):
        inputs = before if model["class_name"] == "Sequential" else _feeding(layer.get("inbound_nodes"))
        before = (layer["config"]["name"],) if isinstance(layer["config"], dict) else ()
        name = _snake_case(layer["class_name"])
        number = used[name] = used.get(name, -1) + 1
        own = f"{name}_{number}" if number else name
        inner = tuple(f"{path}{container}/{own}" for path in paths for container in _CONTAINERS)
        if layer["class_name"] in _MODELS:
            yield from _configured(layer, tuple(f"{path}/" for path in inner))
        else:
            yield layer, inner, inputs


def _feeding(nodes: Any) -> tuple[str, ...]:
    """Name the layers whose outputs a layer of a functional model reads, from its ``inbound_nodes``."""
    found: list[str] = []
    waiting = [nodes]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
        elif isinstance(node, list) and [type(item) for item in node[:3]] == [str, int, int]:
            found.append(node[0])  # the name, the number of the call and that of the output: a "keras_history"
        elif isinstance(node, list):
            waiting += node
    return tuple(dict.fromkeys(found))


def _layers_in(model: Mapping[str, Any]) -> list[Any]:
    layers = model["config"].get("layers") if isinstance(model["config"], dict) else model["config"]
    if model["class_name"] not in _MODELS or not isinstance(layers, list):
        raise ModelFileError(
            f"it is a {model['class_name']}, whose configuration does not list its layers; pass layer.get_weights()"
        )
    return layers


def _snake_case(name: str) -> str:
    """Return the name under which Keras stores the layers of a class."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


def _by_path(file: Any, paths: Sequence[str], layer: Mapping[str, Any]) -> Callable[[], list[HostArray]]:
    """Return a function that reads the weights of a layer from the first existing one of `paths`."""

    def read() -> list[HostArray]:
        for path in paths:
            group = _child(file, path)
            if group is not None:
                stored = _stored_name(group)
                if stored not in (None, layer["config"]["name"]):
                    raise ModelFileError(f"layer {layer['config']['name']} is expected at {path}, where {stored} is")
                return _variables(group)
        raise ModelFileError(f"the weights of layer {layer['config']['name']} are missing")

    return read


def _stored_name(group: Any) -> str | None:
    """Return a layer's own name, which newer versions of Keras 3 store."""
    variables = _child(group, "vars")
    with broken_if("its HDF5 content"):
        return _text(variables.attrs["name"]) if variables is not None and "name" in variables.attrs else None


def _variables(group: Any) -> list[HostArray]:
    """Read the arrays of an LSTM, or of both directions."""
    cells = [path for path in ("cell", "forward_layer/cell", "backward_layer/cell") if _child(group, path) is not None]
    arrays = []
    for cell in cells:
        variables = _child(group, f"{cell}/vars")
        count = 0 if variables is None else len(variables)
        if count not in (2, 3):  # more would be taken for the weights of a second direction
            raise ModelFileError(f"{cell} has {count} weights: an LSTM of Keras has 2, or 3 with a bias")
        arrays += [_array(variables, str(number)) for number in range(count)]
    return arrays


def _of_weights(file: Any) -> list[Layer]:
    """List the layers of a file without configuration: by their own names, or else as the file calls them.

    A model of the user's own class stores its layers under the names of its attributes, so every group is visited.
    """
    found: list[Layer] = []
    waiting = [("", file)]
    visited = 0
    while waiting:
        path, group = waiting.pop(0)
        with broken_if("its HDF5 content"):
            names = list(group)
        visited += len(names) + 1
        if visited > MOST_ENTRIES:
            raise ModelFileError("its HDF5 groups hold each other, or are too many")
        for name in names:
            child = _child(group, name) if name != "vars" else None
            if child is None or not hasattr(child, "keys"):
                continue
            own, kind = f"{path}{name}", _kind_of(child)
            if kind is None:
                waiting.append((f"{own}/", child))
            else:
                read = _reader(_variables, child)
                found.append(Layer(_stored_name(child) or own.removeprefix("layers/"), kind, None, None, read))
    return found


def _kind_of(group: Any) -> str | None:
    """Return the class of a recurrent layer, by the shape of its recurrent kernel, or None for another group."""
    for kind, path in (("Bidirectional", "forward_layer/cell/vars/1"), ("LSTM", "cell/vars/1")):
        kernel = _child(group, path)
        if kernel is not None and hasattr(kernel, "dtype"):
            return kind if _is_of_lstm(kernel) else "RNN"
    return None


def _is_of_lstm(kernel: Any) -> bool:
    """Whether a recurrent kernel is that of an LSTM, (H, 4H), and not of a GRU or a plain RNN."""
    with broken_if("its HDF5 content"):
        return bool(kernel.ndim == 2 and kernel.shape[1] == 4 * kernel.shape[0])


def _reader(read: Callable[..., list[HostArray]], *arguments: Any) -> Callable[[], list[HostArray]]:
    return lambda: read(*arguments)


# --- .h5 of Keras 1 and 2 ---------------------------------------------------------------------------------------------


def _of_legacy_model(file: Any) -> list[Layer]:
    with broken_if("its HDF5 content"):
        config = _json(file.attrs["model_config"], "its model_config")
        version = _text(file.attrs.get("keras_version", ""))
        layers = {layer["config"]["name"]: (layer, inputs) for layer, _, inputs in _configured(config)}
    return _of_names(file, _child(file, "model_weights"), layers, version)


def _of_names(file: Any, weights: Any, layers: Mapping[str, Any] | None, version: str | None) -> list[Layer]:
    """List the layers of a file that stores them by name."""
    stored_layers = {name: _child(weights, name) for name in _strings(weights.attrs, "layer_names")}
    groups = {name: _strings(g.attrs, "weight_names") for name, g in stored_layers.items() if g is not None}
    found = []
    if layers is None:
        for name, stored in groups.items():
            parts = [path.split("/")[-1].partition(":")[0] for path in stored]
            if "recurrent_kernel" in parts:
                kernel = _child(weights, f"{name}/{stored[parts.index('recurrent_kernel')]}")
                kind = "Bidirectional" if parts.count("recurrent_kernel") == 2 else "LSTM"
                kind = kind if hasattr(kernel, "dtype") and _is_of_lstm(kernel) else "RNN"
                found.append(Layer(name, kind, None, version, _reader(_named_arrays, weights, name, stored)))
        return found
    for name, (layer, inputs) in layers.items():
        # A layer inside a model inside the model is stored with the outer one, its own name in the path.
        outer = (
            name if name in groups else next((g for g, s in groups.items() if any(name in p.split("/") for p in s)), "")
        )
        stored = [path for path in groups.get(outer, ()) if outer == name or name in path.split("/")]
        read = _reader(_named_arrays, weights, outer, stored)
        found.append(Layer(name, layer["class_name"], layer["config"], version, read, inputs))
    return found


def _named_arrays(weights: Any, group: str, stored: Sequence[str]) -> list[HostArray]:
    return [_array(weights, f"{group}/{path}") for path in stored]
