"""Names, shapes, gate order and initialisation of the parameters: the one place that knows the layout.

The parameters are named and laid out as in ``torch.nn.LSTM``, except that there is one bias where
PyTorch keeps two that are only ever added:

=================  ===================  =====================================================
name               shape                meaning
=================  ===================  =====================================================
``weight_ih_l0``   (4H, I)              input weights; (4H, D*H) in the layers above
``weight_hh_l0``   (4H, H)              recurrent weights
``bias_l0``        (4H,)                bias of the pre-activations
=================  ===================  =====================================================

The rows come in four blocks of H, one per gate, in the order of :data:`GATES`: input gate i, forget
gate f, candidate g, output gate o. The number in the name is the layer; the reverse direction of a
bidirectional layer carries the suffix ``_reverse``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, ShapeError

__all__ = ["GATES", "DirectionNames", "cell_of", "direction_names", "initialise", "shapes"]

GATES = ("i", "f", "g", "o")


class DirectionNames(NamedTuple):
    """The parameter names of one direction of one layer; `bias` is None in a model without bias."""

    weight_ih: str
    weight_hh: str
    bias: str | None


def direction_names(cell: Cell, layer: int, direction: int) -> DirectionNames:
    """Names of the parameters of one layer and direction (0 forward, 1 reverse)."""
    return _direction_names(layer, direction, cell.bias)


@functools.lru_cache(maxsize=64)
def _direction_names(layer: int, direction: int, bias: bool) -> DirectionNames:
    suffix = f"l{layer}" + ("_reverse" if direction else "")
    return DirectionNames(f"weight_ih_{suffix}", f"weight_hh_{suffix}", f"bias_{suffix}" if bias else None)


def directions(cell: Cell) -> Iterator[tuple[int, int]]:
    """Every (layer, direction) of the model, in the order of the first axis of ``h_n`` and ``c_n``."""
    for layer in range(cell.num_layers):
        for direction in range(cell.num_directions):
            yield layer, direction


def shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the model, in a fixed order.

    Examples
    --------
    >>> shapes(Cell(input_size=3, hidden_size=2))
    {'weight_ih_l0': (8, 3), 'weight_hh_l0': (8, 2), 'bias_l0': (8,)}
    """
    return dict(_shapes(cell))


@functools.lru_cache(maxsize=64)
def _shapes(cell: Cell) -> dict[str, tuple[int, ...]]:
    rows = len(GATES) * cell.hidden_size
    result: dict[str, tuple[int, ...]] = {}
    for layer, direction in directions(cell):
        names = direction_names(cell, layer, direction)
        result[names.weight_ih] = (rows, cell.layer_input_size(layer))
        result[names.weight_hh] = (rows, cell.hidden_size)
        if names.bias is not None:
            result[names.bias] = (rows,)
    return result


def gate_rows(cell: Cell, gate: str) -> slice:
    """Rows of a weight or bias that belong to `gate`, one of :data:`GATES`."""
    start = GATES.index(gate) * cell.hidden_size
    return slice(start, start + cell.hidden_size)


def initialise(cell: Cell, seed: Any = None) -> dict[str, np.ndarray[Any, Any]]:
    """Draw new parameters as NumPy arrays.

    Weights are uniform in ±1/sqrt(H); biases are zero, except the forget gate's, which are one, so that
    a fresh cell remembers (Gers, Schmidhuber and Cummins 2000; Jozefowicz, Zaremba and Sutskever 2015).

    Parameters
    ----------
    cell : Cell
        The model's description.
    seed : None, int, SeedSequence, BitGenerator or Generator
        As for :func:`numpy.random.default_rng`. The draws do not depend on the dtype.
    """
    rng = np.random.default_rng(seed)
    bound = 1.0 / np.sqrt(cell.hidden_size)
    params = {}
    for name, shape in shapes(cell).items():
        if name.startswith("bias"):
            values = np.zeros(shape)
            values[gate_rows(cell, "f")] = 1.0
        else:
            values = rng.uniform(-bound, bound, shape)
        params[name] = values.astype(cell.dtype)
    return params


_NAME = re.compile(r"(?:weight_ih|weight_hh|bias)_l([0-9]{1,9})(_reverse)?")
_TORCH_NAME = re.compile(r"weight_[ih]h|bias_[ih]h(_l[0-9]{1,9}(_reverse)?)?")  # of an LSTMCell, and biases of an LSTM


def cell_of(params: Mapping[str, Any], dropout: float = 0.0) -> Cell:
    """Work out the description of the model whose parameters these are.

    Parameters
    ----------
    params : mapping of str to array
        Parameters as :func:`shapes` names them.
    dropout : float
        The dropout between layers, which the parameters do not show.

    Raises
    ------
    ArgumentError
        If a name is unknown or a parameter is missing.
    ShapeError
        If the first layer's weights are not matrices of 4H rows.
    """
    if not isinstance(params, Mapping):
        raise ArgumentError(f"params must be a mapping of names to arrays, got {type(params).__qualname__}")
    matches = {name: _NAME.fullmatch(name) if isinstance(name, str) else None for name in params}
    unknown = sorted(str(name) for name, match in matches.items() if match is None)
    if unknown:
        of_torch = any(_TORCH_NAME.fullmatch(name) for name in unknown)
        hint = "; from_torch_state_dict converts PyTorch's names and biases" if of_torch else ""
        raise ArgumentError(f"unknown parameter {', '.join(unknown)}; expected names such as weight_ih_l0{hint}")
    num_layers = 1 + max((int(match[1]) for match in matches.values() if match), default=0)
    if num_layers > len(params):  # caught here, because all names of a model so deep may not fit into memory
        raise ArgumentError(f"parameter names go to layer {num_layers - 1}, but only {len(params)} names are given")
    for name in ("weight_ih_l0", "weight_hh_l0"):
        if name not in params:
            raise ArgumentError(f"parameter {name} is missing")
        if getattr(params[name], "ndim", None) != 2 or not hasattr(params[name], "dtype"):
            raise ShapeError(f"parameter {name} must be an array of two dimensions")
    rows, hidden_size = params["weight_hh_l0"].shape
    if rows != len(GATES) * hidden_size:
        raise ShapeError(f"parameter weight_hh_l0 must have shape (4H, H), got {(rows, hidden_size)}")
    return Cell(
        input_size=params["weight_ih_l0"].shape[1],
        hidden_size=hidden_size,
        num_layers=num_layers,
        bias="bias_l0" in params,
        dropout=dropout,
        bidirectional="weight_ih_l0_reverse" in params,
        dtype=params["weight_ih_l0"].dtype,
    )
