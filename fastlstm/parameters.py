"""Names, shapes, gate order and initialisation of the parameters: one table, which is all that knows the layout.

The parameters are named and laid out as in ``torch.nn.LSTM``, except that there is one bias where
PyTorch keeps two that are only ever added:

======================  ===================  ================================================================
name                    shape                meaning
======================  ===================  ================================================================
``weight_ih_l0``        (4H, I)              input weights; (4H, D*H) in the layers above
``weight_hh_l0``        (4H, H)              recurrent weights
``bias_l0``             (4H,)                bias of the pre-activations
``weight_peephole_l0``  (3, H)               peephole weights of i, f and o, of a cell with ``peephole=True``
======================  ===================  ================================================================

The rows of a weight or bias come in four blocks of H, one per gate, in the order of :data:`GATES`: input gate i,
forget gate f, candidate g, output gate o. The number in the name is the layer; the reverse direction of a
bidirectional layer carries the suffix ``_reverse``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError, ShapeError, refused, shown

__all__ = [
    "GATES", "PEEPHOLES", "TABLE", "Parameter", "axes", "cell_of", "direction_names", "generator", "initialise",
    "shapes",
]  # fmt: skip

GATES = ("i", "f", "g", "o")
PEEPHOLES = ("i", "f", "o")  # rows of weight_peephole


class Parameter(NamedTuple):
    """One row of the table: a parameter that each layer and direction has."""

    role: str  # what its name begins with, and the field of `backends.layers.Weights` that holds it
    axes: str  # of its shape, for messages
    exists: Callable[[Cell], bool]
    shape: Callable[[Cell, int], tuple[int, ...]]  # of a cell and the number of a layer
    initialise: Callable[[Cell, np.random.Generator, tuple[int, ...]], np.ndarray[Any, Any]]


def _uniform(cell: Cell, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Draw from ±1/sqrt(H)."""
    bound = 1.0 / np.sqrt(cell.hidden_size)
    return rng.uniform(-bound, bound, shape)


def _remember(cell: Cell, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return zeros, and ones for the forget gate."""
    values = np.zeros(shape)
    values[gate_rows(cell, "f")] = 1.0
    return values


def _rows(cell: Cell) -> int:
    return len(GATES) * cell.hidden_size


TABLE = (
    Parameter(
        "weight_ih", "(4H, I)", lambda cell: True, lambda cell, layer: (_rows(cell), cell.layer_input_size(layer)),
        _uniform,
    ),
    Parameter("weight_hh", "(4H, H)", lambda cell: True, lambda cell, _: (_rows(cell), cell.hidden_size), _uniform),
    Parameter("bias", "(4H,)", lambda cell: cell.bias, lambda cell, _: (_rows(cell),), _remember),
    Parameter(
        "weight_peephole", "(3, H)", lambda cell: cell.peephole,
        lambda cell, _: (len(PEEPHOLES), cell.hidden_size), _uniform,
    ),
)  # fmt: skip


def direction_names(cell: Cell, layer: int, direction: int) -> dict[str, str]:
    """Names of the parameters of one layer and direction (0 forward, 1 reverse), by their roles; not to be changed."""
    return _direction_names(layer, direction, cell.bias, cell.peephole)


@functools.lru_cache(maxsize=64)
def _direction_names(layer: int, direction: int, bias: bool, peephole: bool) -> dict[str, str]:
    suffix = f"l{layer}" + ("_reverse" if direction else "")
    like = Cell(1, 1, bias=bias, peephole=peephole)
    return {row.role: f"{row.role}_{suffix}" for row in TABLE if row.exists(like)}


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
    found: dict[str, tuple[int, ...]] = {}
    for layer, direction in directions(cell):
        names = direction_names(cell, layer, direction)
        found |= {names[row.role]: row.shape(cell, layer) for row in TABLE if row.role in names}
    return found


def axes(name: str) -> str:
    """Return the axes of the parameter called `name`, for messages."""
    return next(row.axes for row in TABLE if name.startswith(row.role))


def gate_rows(cell: Cell, gate: str) -> slice:
    """Rows of a weight or bias that belong to `gate`, one of :data:`GATES`."""
    start = GATES.index(gate) * cell.hidden_size
    return slice(start, start + cell.hidden_size)


def generator(seed: Any) -> np.random.Generator:
    """Return the random generator that a `seed` of a model stands for.

    Raises
    ------
    ArgumentError
        If it does not suit :func:`numpy.random.default_rng`.
    """
    try:
        return np.random.default_rng(seed)
    except Exception as error:
        if not refused(seed, error):
            raise
        raise ArgumentError(f"seed must suit numpy.random.default_rng, got {shown(seed)}") from error


def initialise(cell: Cell, seed: Any = None) -> dict[str, np.ndarray[Any, Any]]:
    """Draw new parameters as NumPy arrays.

    Weights, of peepholes too, are uniform in ±1/sqrt(H); biases are zero, except the forget gate's, which are one,
    so that a fresh cell remembers (Gers, Schmidhuber and Cummins 2000; Jozefowicz, Zaremba and Sutskever 2015).

    Parameters
    ----------
    cell : Cell
        The model's description.
    seed : None, int, SeedSequence, BitGenerator or Generator
        As for :func:`numpy.random.default_rng`. The draws do not depend on the dtype.
    """
    rng = np.random.default_rng(seed)
    params = {}
    for layer, direction in directions(cell):
        names = direction_names(cell, layer, direction)
        for row in TABLE:
            if row.role in names:
                values = row.initialise(cell, rng, row.shape(cell, layer))
                params[names[row.role]] = values.astype(cell.dtype)
    return params


_NAME = re.compile(rf"(?:{'|'.join(row.role for row in TABLE)})_l([0-9]{{1,9}})(_reverse)?")
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
        peephole="weight_peephole_l0" in params,
    )
