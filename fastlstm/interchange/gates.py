"""Weights in any order of the gates: from papers, from hand-made layouts, and from the other formats.

Every format stacks the same numbers in another way: Keras has the gates i, f, c, o and transposed matrices, ONNX i, o,
f, c, haste i, g, f, o, Chainer a, i, f, o, unit by unit. One function brings them into the order of
:mod:`fastlstm.parameters`, another takes them out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastlstm import checks, parameters
from fastlstm.cell import VARIANTS, Cell
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError, shown

__all__ = ["Part", "assemble", "blocks", "from_gates", "refuse_variants"]

HostArray = np.ndarray[Any, Any]

# Fields of the cell that `from_gates` accepts: those that the weights do not show and that keep their shapes.
FIELDS = (
    "activations", "cell_clip", "clip", "coupled", "dropout", "forget_gate", "merge", "recurrent_dropout", "reverse",
    "truncated", "zoneout",
)  # fmt: skip
ALIASES = {"c": "g", "a": "g"}  # other names of the candidate


class Part(NamedTuple):
    """The weights of one layer in one direction, gates stacked in the rows."""

    weight_ih: HostArray  # (R, I)
    weight_hh: HostArray  # (R, H)
    bias: HostArray | None = None  # (R,)
    weight_peephole: HostArray | None = None  # (3, H) or (2, H)


def blocks(stacked: HostArray, order: Sequence[str], wanted: Sequence[str]) -> HostArray:
    """Bring the blocks of rows of `stacked` from one order to another, which may leave some of them out."""
    size = len(stacked) // len(order)
    return np.concatenate([stacked[order.index(gate) * size :][:size] for gate in wanted])


def refuse_variants(cell: Cell, known: Sequence[str], where: str) -> None:
    """Raise if a cell has a variant that another library does not have.

    Raises
    ------
    ArgumentError
        With the name of the variant.
    """
    for name, plain in VARIANTS.items():
        value = getattr(cell, name)
        if value != plain and name not in known:
            raise ArgumentError(f"{where} has no counterpart of {name}={shown(value)}")


def assemble(
    layers: Sequence[Sequence[Part]], order: Sequence[str], peepholes: Sequence[str], name: str, **fields: Any
) -> tuple[Cell, dict[str, HostArray]]:
    """Make a model of the weights of each layer and direction.

    Parameters
    ----------
    layers : sequence of sequence of Part
        The directions of each layer.
    order, peepholes : sequence of str
        The gates of the blocks of rows, and of the rows of peephole weights.
    name : str
        Name of the weights in messages.
    **fields
        Other fields of the :class:`fastlstm.cell.Cell`.

    Returns
    -------
    cell : Cell
        The model's description.
    params : dict of str to numpy.ndarray
        New arrays in native byte order.

    Raises
    ------
    ArgumentError, ArrayTypeError, DTypeError, ShapeError
        If the weights are no arrays of one dtype, or their shapes do not fit each other.
    """
    first = layers[0][0]
    dtype = _check_arrays(layers, name)
    if first.weight_ih.ndim != 2 or first.weight_hh.ndim != 2:
        raise ShapeError(
            f"weight_ih and weight_hh of {name} must be matrices, got {first.weight_ih.shape}, {first.weight_hh.shape}"
        )
    cell = Cell(
        input_size=first.weight_ih.shape[1],
        hidden_size=first.weight_hh.shape[1],
        num_layers=len(layers),
        bias=first.bias is not None,
        bidirectional=len(layers[0]) == 2,
        dtype=dtype,
        peephole=first.weight_peephole is not None,
        **fields,
    )
    shapes, params = parameters.shapes(cell), {}
    for layer, direction in parameters.directions(cell):
        names = parameters.direction_names(cell, layer, direction)
        if direction >= len(layers[layer]):
            raise ArgumentError(f"layer {layer} of {name} has another number of directions than the first")
        for role, value in layers[layer][direction]._asdict().items():
            if (value is not None) != (role in names):
                raise ArgumentError(f"layer {layer} of {name} differs from the first: {role} is given for one of them")
            if value is None:
                continue
            given, wanted = (
                (peepholes, parameters.peepholes(cell)) if role == "weight_peephole" else (order, cell.gates)
            )
            _check_shape(cell, value, shapes[names[role]], len(given), f"{role} of layer {layer} of {name}")
            params[names[role]] = np.ascontiguousarray(blocks(value, given, wanted), cell.dtype)
    return cell, {name: params[name] for name in shapes}


def _check_shape(cell: Cell, value: HostArray, shape: tuple[int, ...], count: int, what: str) -> None:
    """Check the shape of an array that still has the rows of all `count` gates."""
    rows = count if what.startswith("weight_peephole") else count * cell.hidden_size
    if value.shape != (rows, *shape[1:]):
        raise ShapeError(f"{what} must have shape {(rows, *shape[1:])}, gates in the rows, got {value.shape}")


def _check_arrays(layers: Sequence[Sequence[Part]], name: str) -> np.dtype[Any]:
    dtypes = set()
    for directions in layers:
        for part in directions:
            for role, value in part._asdict().items():
                if value is None:
                    continue
                library = kind_of(f"{role} of {name}", value).library
                if library != "numpy":
                    raise ArrayTypeError(f"{role} of {name} is an array of {library}: convert it with .get()")
                dtypes.add(value.dtype.newbyteorder("="))
    if len(dtypes) > 1:
        raise DTypeError(f"all arrays of {name} must have one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    dtype: np.dtype[Any] = dtypes.pop()
    return dtype


def from_gates(
    gates: Any,
    order: Sequence[str] | None = None,
    *,
    backward: Any = None,
    transposed: bool = False,
    interleaved: bool = False,
    **fields: Any,
) -> tuple[Cell, dict[str, HostArray]]:
    """Make a model of weights that are given gate by gate, or stacked in any order: see ``LSTM.from_gates``."""
    unknown = sorted(set(fields) - set(FIELDS))
    if unknown:
        raise ArgumentError(f"{', '.join(unknown)} cannot be given with gates; valid are {', '.join(FIELDS)}")
    layers, backwards = _listed(gates), None if backward is None else _listed(backward)
    if backwards is not None and len(backwards) != len(layers):
        raise ArgumentError(f"gates has {len(layers)} layers, backward has {len(backwards)}")
    if order is not None and not isinstance(order, str | list | tuple):
        raise ArgumentError(f"order must be a string or a list of gates, such as 'ifgo', got {shown(order)}")
    transposed, interleaved = checks.flag("transposed", transposed), checks.flag("interleaved", interleaved)
    wanted = ("i", "g", "o") if fields.get("coupled") or fields.get("forget_gate") is False else parameters.GATES
    read = _Reader(order, transposed, interleaved, wanted)
    parts = [[read.part(layer), *([read.part(backwards[k])] if backwards else [])] for k, layer in enumerate(layers)]
    peepholes = [gate for gate in parameters.PEEPHOLES if gate in wanted]
    return assemble(parts, wanted, peepholes, "gates", **fields)


def _listed(gates: Any) -> list[Any]:
    layers = gates if isinstance(gates, list) else [gates]
    if not layers:
        raise ArgumentError("gates must have at least one layer")
    return layers


class _Reader(NamedTuple):
    """How the caller lays out weights."""

    order: Sequence[str] | None
    transposed: bool
    interleaved: bool
    wanted: Sequence[str]

    def part(self, given: Any) -> Part:
        """Return one layer's weights, gates stacked in our order."""
        if isinstance(given, Mapping):
            return self._of_mapping(given)
        if not isinstance(given, tuple) or len(given) not in (2, 3, 4):
            raise ArgumentError(
                "gates must be a mapping {'i': (W, U, b), ...}, or a tuple (W, U), (W, U, b) or (W, U, b, p) of arrays"
                f" with the gates stacked in the order of `order`, or a list of these; got {shown(type(given))}"
            )
        if self.order is None:
            raise ArgumentError("order is missing: the gates of the stacked blocks, such as order='ifgo'")
        order = self._names(list(self.order))
        stacked = [
            self._rows(value, len(order)) if k < 3 and value is not None else value for k, value in enumerate(given)
        ]
        found = [None if value is None else blocks(value, order, self.wanted) for value in stacked[:3]]
        own = [gate for gate in order if gate != "g"]
        peephole = stacked[3] if len(stacked) > 3 else None
        if peephole is not None:
            peephole = _array("peephole", peephole, 2)
            if len(peephole) != len(own):  # `blocks` would leave out the rows that are too many
                raise ShapeError(
                    f"the peephole weights must have one row for each of {', '.join(own)}, got shape {peephole.shape}"
                )
            found.append(blocks(peephole, own, [g for g in self.wanted if g != "g"]))
        return Part(*found)  # type: ignore[arg-type]

    def _rows(self, value: Any, count: int) -> HostArray:
        """Return a stacked array with one block of rows for each gate."""
        array = _array("gates", value, None)
        array = array.T if self.transposed else array
        if not array.ndim or len(array) % count:
            raise ShapeError(f"{count} gates are stacked in order, but an array has shape {array.shape}")
        if self.interleaved:
            array = array.reshape(len(array) // count, count, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)
        return array

    def _names(self, given: list[Any]) -> list[str]:
        """Return our names of gates that are called differently elsewhere, all of them there."""
        names = [ALIASES.get(name, name) if isinstance(name, str) else name for name in given]
        if sorted(map(str, names)) != sorted(self.wanted):
            raise ArgumentError(
                f"the gates must be {', '.join(self.wanted)} (g may be called c or a), each once, got {shown(given)}"
            )
        return names

    def _of_mapping(self, given: Mapping[Any, Any]) -> Part:
        names = self._names(list(given))
        if self.interleaved:
            raise ArgumentError("interleaved=True is for stacked gates, but a mapping gives the arrays of each gate")
        if self.order is not None and self._names(list(self.order)) != names:
            raise ArgumentError(f"order is {shown(self.order)}, but the mapping has its gates in the order {names}")
        values = dict(zip(names, given.values(), strict=True))
        for name, value in values.items():
            if not isinstance(value, tuple | list) or not 2 <= len(value) <= 4:
                raise ArgumentError(f"gate {name} must be (W, U), (W, U, b) or (W, U, b, p), got {shown(type(value))}")
        if len(values["g"]) > 3 and values["g"][3] is not None:
            raise ArgumentError("gate g has a fourth array, but g has no peephole; if these are two biases, add them")
        columns = []
        for k, (role, axes) in enumerate((("W", 2), ("U", 2), ("b", 1), ("p", 1))):
            gates = [name for name in self.wanted if not (role == "p" and name == "g")]
            found = [values[name][k] if len(values[name]) > k else None for name in gates]
            there = [array is not None for array in found]
            if any(there) and not all(there):
                having = ", ".join(name for name, is_there in zip(gates, there, strict=True) if is_there)
                raise ArgumentError(f"{role} is given for some gates only: {having}")
            arrays = [
                _array(f"{role} of gate {n}", a, axes) for n, a in zip(gates, found, strict=True) if a is not None
            ]
            columns.append(self._stacked(role, arrays))
        return Part(*columns)  # type: ignore[arg-type]

    def _stacked(self, role: str, arrays: list[HostArray]) -> HostArray | None:
        if not arrays:
            return None
        arrays = [array.T for array in arrays] if self.transposed else arrays
        if len({array.shape for array in arrays}) != 1:
            raise ShapeError(f"{role} must have one shape for all gates, got {[array.shape for array in arrays]}")
        if len({array.dtype for array in arrays}) != 1:
            raise DTypeError(f"{role} must have one dtype for all gates, got {[str(array.dtype) for array in arrays]}")
        return np.stack(arrays) if role == "p" else np.concatenate(arrays)


def _array(name: str, value: Any, axes: int | None) -> HostArray:
    if kind_of(name, value).library != "numpy":
        raise ArrayTypeError(f"{name} must be a NumPy array: convert it with .get()")
    if axes is not None and value.ndim != axes:
        raise ShapeError(f"{name} must have {axes} axes, got shape {value.shape}")
    array: HostArray = value
    return array
