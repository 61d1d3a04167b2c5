"""The table of parameters: names, shapes, gate order and initialisation. No other file knows the layout.

The parameters are named and laid out as in ``torch.nn.LSTM``, except that there is one bias where
PyTorch keeps two that are only ever added:

======================  ===================  ================================================================
name                    shape                meaning
======================  ===================  ================================================================
``weight_ih_l0``        (4H, I)              input weights; (4H, D*H) in the layers above
``weight_hh_l0``        (4H, H)              recurrent weights
``bias_l0``             (4H,)                bias of the pre-activations
``weight_peephole_l0``  (3, H)               peephole weights of i, f and o, of a cell with ``peephole=True``
``weight_hr_l0``        (P, H)               projection of the cell's output, with ``proj_size=P``
``ln_gain_ih_l0``       (4H,)                gain of the normalised input products, with ``layer_norm=True``
``ln_gain_hh_l0``       (4H,)                gain of the normalised recurrent products
``ln_gain_c_l0``        (H,)                 gain of the normalised cell state
``ln_bias_c_l0``        (H,)                 bias of the normalised cell state
======================  ===================  ================================================================

The rows of a weight or bias come in four blocks of H, one per gate, in the order of :data:`GATES`: input gate i,
forget gate f, candidate g, output gate o. The rows of a gate that does not exist are left out (``forget_gate=False``
and ``coupled=True``: i, g, o; peepholes: i, o); a plain RNN has one block. With ``block_size=S``, i, f and o have H/S
rows, and peepholes still one weight for each unit. With ``proj_size=P``, h has P features and ``weight_hh_l0`` P
columns. The number in the name is the layer; the reverse direction of a bidirectional layer carries the suffix
``_reverse``.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlstm.cell import Cell, real
from fastlstm.errors import ArgumentError, ShapeError, refused, shown

__all__ = [
    "GATES", "PEEPHOLES", "TABLE", "Parameter", "axes", "cell_of", "direction_names", "gate_rows", "generator",
    "initialise", "peepholes", "shapes",
]  # fmt: skip

GATES = ("i", "f", "g", "o")
PEEPHOLES = ("i", "f", "o")  # rows of weight_peephole


class Parameter(NamedTuple):
    """One row of the table: a parameter that each layer and direction has."""

    role: str  # what its name begins with, and the field of `backends.layers.Weights` that holds it
    axes: str  # of its shape, for messages
    exists: Callable[[Cell], bool]
    shape: Callable[[Cell, int], tuple[int, ...]]  # of a cell and the number of a layer
    # Of a cell, a shape, and the forget gate's initial bias.
    initialise: Callable[[Cell, np.random.Generator, tuple[int, ...], float], np.ndarray[Any, Any]]


def _uniform(cell: Cell, rng: np.random.Generator, shape: tuple[int, ...], forget_bias: float) -> np.ndarray[Any, Any]:
    """Draw from ±1/sqrt(H)."""
    bound = 1.0 / np.sqrt(cell.hidden_size)
    return rng.uniform(-bound, bound, shape)


def _remember(cell: Cell, rng: np.random.Generator, shape: tuple[int, ...], forget_bias: float) -> np.ndarray[Any, Any]:
    """Return zeros, and for the forget gate its initial bias."""
    values = np.zeros(shape)
    if "f" in cell.gates:
        values[gate_rows(cell, "f")] = forget_bias
    return values


def _constant(number: float) -> Any:
    """Return a function that returns an array of one number."""
    return lambda cell, rng, shape, forget_bias: np.full(shape, number)


def _has_norm(cell: Cell) -> bool:
    return cell.layer_norm


def _rows(cell: Cell, layer: int) -> tuple[int, ...]:
    return (cell.rows,)


def _units(cell: Cell, layer: int) -> tuple[int, ...]:
    return (cell.hidden_size,)


TABLE = (
    Parameter(
        "weight_ih", "(4H, I)", lambda cell: True, lambda cell, layer: (cell.rows, cell.layer_input_size(layer)),
        _uniform,
    ),
    Parameter("weight_hh", "(4H, H)", lambda cell: True, lambda cell, _: (cell.rows, cell.h_size), _uniform),
    Parameter("bias", "(4H,)", lambda cell: cell.bias, _rows, _remember),
    Parameter(
        "weight_peephole", "(3, H)", lambda cell: cell.peephole,
        lambda cell, _: (len(peepholes(cell)), cell.hidden_size), _uniform,
    ),
    Parameter(
        "weight_hr", "(P, H)", lambda cell: cell.proj_size > 0,
        lambda cell, _: (cell.proj_size, cell.hidden_size), _uniform,
    ),
    Parameter("ln_gain_ih", "(4H,)", _has_norm, _rows, _constant(1.0)),
    Parameter("ln_gain_hh", "(4H,)", _has_norm, _rows, _constant(1.0)),
    Parameter("ln_gain_c", "(H,)", _has_norm, _units, _constant(1.0)),
    Parameter("ln_bias_c", "(H,)", _has_norm, _units, _constant(0.0)),
)  # fmt: skip


def peepholes(cell: Cell) -> tuple[str, ...]:
    """The gates that peepholes reach, one for each row of their weights."""
    return tuple(gate for gate in PEEPHOLES if gate in cell.gates)


def direction_names(cell: Cell, layer: int, direction: int) -> dict[str, str]:
    """Names of the parameters of one layer and direction (0 forward, 1 reverse), by their roles; not to be changed."""
    return _direction_names(layer, direction, tuple(row.role for row in TABLE if row.exists(cell)))


@functools.lru_cache(maxsize=64)
def _direction_names(layer: int, direction: int, roles: tuple[str, ...]) -> dict[str, str]:
    suffix = f"l{layer}" + ("_reverse" if direction else "")
    return {role: f"{role}_{suffix}" for role in roles}


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
    """Rows of a weight or bias that belong to `gate`, one of ``cell.gates``."""
    start = sum(cell.gate_size(before) for before in cell.gates[: cell.gates.index(gate)])
    return slice(start, start + cell.gate_size(gate))


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


def initialise(cell: Cell, seed: Any = None, forget_bias: float = 1.0) -> dict[str, np.ndarray[Any, Any]]:
    """Draw new parameters as NumPy arrays.

    Weights, of peepholes and projections too, are uniform in ±1/sqrt(H); gains are one; biases are zero, except the
    forget gate's, which are one, so that a fresh cell remembers (Gers, Schmidhuber and Cummins 2000; Jozefowicz,
    Zaremba and Sutskever 2015).

    Parameters
    ----------
    cell : Cell
        The model's description.
    seed : None, int, SeedSequence, BitGenerator or Generator
        As for :func:`numpy.random.default_rng`. The draws do not depend on the dtype.
    forget_bias : float
        The bias of the forget gate.

    Raises
    ------
    ArgumentError
        If `forget_bias` is not a finite number, or not 1 for a cell without a bias of a forget gate.
    """
    forget_bias = _forget_bias(cell, forget_bias)
    rng = np.random.default_rng(seed)
    params = {}
    for layer, direction in directions(cell):
        names = direction_names(cell, layer, direction)
        for row in TABLE:
            if row.role in names:
                values = row.initialise(cell, rng, row.shape(cell, layer), forget_bias)
                params[names[row.role]] = values.astype(cell.dtype)
    return params


def _forget_bias(cell: Cell, given: Any) -> float:
    """Check an initial bias of the forget gate."""
    number = real(given)
    if not math.isfinite(number):
        raise ArgumentError(f"forget_bias must be a finite number, got {shown(given)}")
    if number != 1.0 and not (cell.bias and "f" in cell.gates):
        raise ArgumentError(f"forget_bias is {number}, but this cell has no bias of a forget gate")
    return number


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

    Notes
    -----
    Peepholes, projections and layer norm show in the names. What does not show there is that of the plain LSTM.

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
    rows, features = params["weight_hh_l0"].shape
    projection = getattr(params.get("weight_hr_l0"), "shape", None)
    hidden_size = projection[1] if projection is not None and len(projection) == 2 else features
    if rows != len(GATES) * hidden_size or (projection is not None and projection != (features, hidden_size)):
        raise ShapeError(
            f"parameter weight_hh_l0 must have shape (4H, H), got {(rows, features)}; a cell without a forget gate,"
            " with blocks of units, or a plain RNN, is given as `cell`"
        )
    return Cell(
        input_size=params["weight_ih_l0"].shape[1],
        hidden_size=hidden_size,
        num_layers=num_layers,
        bias="bias_l0" in params,
        dropout=dropout,
        bidirectional="weight_ih_l0_reverse" in params,
        dtype=params["weight_ih_l0"].dtype,
        peephole="weight_peephole_l0" in params,
        proj_size=0 if projection is None else features,
        layer_norm="ln_gain_ih_l0" in params,
    )
