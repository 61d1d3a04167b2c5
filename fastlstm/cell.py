"""The description of a model: sizes, dtype and variant, as one immutable value that every layer below reads."""

from __future__ import annotations

import functools
import math
import operator
import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError, DTypeError, refused, shown

__all__ = ["PRECISIONS", "Cell", "float_dtype", "integer", "real"]

MAX_LAYERS = 2**20  # more are a mistake, and their names alone would fill the memory
FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
# The fields that make another cell of the LSTM, with the values of the plain one.
VARIANTS: dict[str, Any] = {
    "peephole": False,
    "proj_size": 0,
    "forget_gate": True,
    "coupled": False,
    "block_size": 1,
    "truncated": False,
    "activations": ("sigmoid", "tanh", "tanh"),
    "clip": None,
    "cell_clip": None,
    "layer_norm": False,
    "recurrent_dropout": 0.0,
    "zoneout": (0.0, 0.0),
    "reverse": False,
    "merge": "concat",
    "nonlinearity": None,
}
ACTIVATIONS = ("sigmoid", "tanh", "relu", "hard_sigmoid", "softsign", "identity", "1997")
MERGES = ("concat", "sum", "mean", "product")
NONLINEARITIES = ("tanh", "relu")
PRECISIONS = ("float32", "tf32", "bf16")
# Variants that a plain RNN may have too: all others concern gates or the cell state.
_OF_RNN = ("reverse", "merge", "nonlinearity")


@dataclass(frozen=True)
class Cell:
    """The description of a (stacked, possibly bidirectional) LSTM.

    A cell holds no numbers of the model, only what determines their names and
    shapes and how a backend runs them. A variant of the LSTM is a field here
    that the kernels read; it is not another class.

    Parameters
    ----------
    input_size : int
        Number of input features I, at least 1.
    hidden_size : int
        Number of hidden units H, at least 1.
    num_layers : int
        Number of stacked layers L, at least 1.
    bias : bool
        Whether the pre-activations have a bias.
    dropout : float
        Probability in [0, 1) of dropping an output of every layer but the last, in training only.
    bidirectional : bool
        Whether each layer also runs backwards in time.
    dtype : numpy.dtype
        float32 or float64, the dtype of parameters, inputs and outputs.
    peephole : bool
        Whether the gates also see the cell state: i and f the one before the step, o the new one.
    proj_size : int
        Number P of features of h, which is a projection of the H outputs of the cell; 0 for no projection.
    forget_gate : bool
        False: f = 1, as in the cell of 1997.
    coupled : bool
        Whether f = 1 - i in place of a forget gate of its own.
    block_size : int
        Number S of consecutive units that share the gates i, f and o; divides H. A peephole of a shared gate sees the
        cell states of the whole block, each by a weight of its own.
    truncated : bool
        Whether the gradient by the h of the step before is set to zero, as in 1997.
    activations : tuple of str
        Of the gates, the candidate and the output; each one of :data:`ACTIVATIONS`.
    clip : float or None
        Bound of the pre-activations: they are clipped to [-clip, clip].
    cell_clip : float or None
        Bound of the cell state.
    layer_norm : bool
        Whether input products, recurrent products and the cell state are normalised.
    recurrent_dropout : float
        Probability in [0, 1) of dropping an h on its way into the next step, the same for a whole sequence; in
        training only.
    zoneout : tuple of float
        Probabilities in [0, 1) that a unit keeps the c, the h of the step before, in this order.
    reverse : bool
        Whether the only direction runs backwards in time.
    merge : str
        How the outputs of two directions are put together, one of :data:`MERGES`.
    nonlinearity : str or None
        "tanh" or "relu": a plain RNN in place of an LSTM. Its state is h alone; c has no features.
    precision : str
        What float32 products may round their factors to, one of :data:`PRECISIONS`. It says how a model is run and
        not which one it is: cells that differ in it alone are equal, and files do not have it.

    Raises
    ------
    ArgumentError
        If a size is not a positive integer, or so large that the parameters cannot be addressed, a probability is
        outside [0, 1), a field has an invalid value, or two fields exclude each other.
    DTypeError
        If `dtype` is neither float32 nor float64.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    dropout: float = 0.0
    bidirectional: bool = False
    dtype: np.dtype[Any] = FLOAT_DTYPES[0]
    peephole: bool = False
    proj_size: int = 0
    forget_gate: bool = True
    coupled: bool = False
    block_size: int = 1
    truncated: bool = False
    activations: tuple[str, str, str] = ("sigmoid", "tanh", "tanh")
    clip: float | None = None
    cell_clip: float | None = None
    layer_norm: bool = False
    recurrent_dropout: float = 0.0
    zoneout: tuple[float, float] = (0.0, 0.0)
    reverse: bool = False
    merge: str = "concat"
    nonlinearity: str | None = None
    precision: str = field(default="float32", compare=False)

    def __post_init__(self) -> None:
        checks: dict[Any, tuple[str, ...]] = {
            _positive_integer: ("input_size", "hidden_size", "num_layers", "block_size"),
            _flag: (
                "bias",
                "bidirectional",
                "peephole",
                "forget_gate",
                "coupled",
                "truncated",
                "layer_norm",
                "reverse",
            ),
            _probability: ("dropout", "recurrent_dropout"),
            _bound: ("clip", "cell_clip"),
            _activations: ("activations",),
            _zoneout: ("zoneout",),
            _projection: ("proj_size",),
        }
        for check, names in checks.items():
            for name in names:
                object.__setattr__(self, name, check(name, getattr(self, name)))
        object.__setattr__(self, "dtype", float_dtype(self.dtype))
        _one_of("merge", self.merge, MERGES)
        _one_of("precision", self.precision, PRECISIONS)
        if self.nonlinearity is not None:
            _one_of("nonlinearity", self.nonlinearity, NONLINEARITIES)
        _check_combination(self)
        _check_addressable(self)

    @functools.cached_property
    def calls(self) -> dict[Any, Any]:
        """The prepared calls of this cell, by signature (see ``calls.py``); they are not part of its value."""
        return {}

    @functools.cached_property
    def in_inference(self) -> Cell:
        """The cell of a call that draws no masks: recurrent dropout, which is of training only, is left out."""
        return replace(self, recurrent_dropout=0.0) if self.recurrent_dropout else self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("calls", "in_inference")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @property
    def num_directions(self) -> int:
        """Number of directions D of each layer, 1 or 2."""
        return 2 if self.bidirectional else 1

    @property
    def h_size(self) -> int:
        """Number of features of h, and of the output of one direction: P with a projection, else H."""
        return self.proj_size or self.hidden_size

    @property
    def c_size(self) -> int:
        """Number of features of c: H, or 0 for a plain RNN."""
        return 0 if self.nonlinearity else self.hidden_size

    @property
    def output_size(self) -> int:
        """Number of features of the output, D * H; of a merged one, H."""
        return self.h_size * (self.num_directions if self.merge == "concat" else 1)

    @property
    def gates(self) -> tuple[str, ...]:
        """The gates that have rows in weights and biases, in this order; the one of a plain RNN is called a."""
        if self.nonlinearity:
            return ("a",)
        return ("i", "f", "g", "o") if self.forget_gate and not self.coupled else ("i", "g", "o")

    def gate_size(self, gate: str) -> int:
        """Number of rows of a gate: H for the candidate, else one for each block of units."""
        return self.hidden_size if gate in "ga" else self.hidden_size // self.block_size

    @property
    def rows(self) -> int:
        """Number of rows of the weights, 4H for the plain LSTM."""
        return sum(map(self.gate_size, self.gates))

    @property
    def sees_blocks(self) -> bool:
        """Whether a gate sees the cell states of a whole block of units: with peepholes of shared gates."""
        return self.peephole and self.block_size > 1

    @property
    def draws(self) -> bool:
        """Whether training draws random masks."""
        between = self.dropout > 0 and self.num_layers > 1
        return between or self.recurrent_dropout > 0 or max(self.zoneout) > 0

    @property
    def is_plain(self) -> bool:
        """Whether it is the plain LSTM, with the forget gate of 2000 and without any variant."""
        return all(getattr(self, name) == value for name, value in VARIANTS.items())

    def layer_input_size(self, layer: int) -> int:
        """Number of features that layer number `layer` reads: I for the first, those of the output for the others."""
        return self.input_size if layer == 0 else self.output_size

    def with_dtype(self, dtype: Any) -> Cell:
        """Return the same cell in another dtype; in float64 its products round nothing."""
        precision = self.precision if np.dtype(dtype) == FLOAT_DTYPES[0] else "float32"
        return replace(self, dtype=np.dtype(dtype), precision=precision)

    def describe(self) -> dict[str, Any]:
        """Describe the cell by plain Python values, for files and messages; ``Cell(**cell.describe())`` is equal.

        A variant that is switched off is left out, so that a plain model's file is one that older versions read; and
        so is the precision, which is no part of the model.
        """
        described = asdict(self) | {"dtype": self.dtype.name}
        del described["precision"]
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in described.items()
            if name not in VARIANTS or value != VARIANTS[name]
        }


def integer(value: Any) -> int | None:
    """Return a single integer as Python's, or None if `value` is none: a bool, a float or an array of some axes."""
    try:
        return None if isinstance(value, bool | np.bool_) else operator.index(value)
    except Exception as error:
        if not refused(value, error):
            raise
        return None


def real(value: Any) -> float:
    """Return a single real number as a float, or NaN if `value` is none, or too large for a float."""
    # float() would take a string, a complex scalar of NumPy with a warning, and an array of one entry.
    if isinstance(value, bool | str | bytes | bytearray | memoryview):
        return math.nan
    try:
        if getattr(value, "ndim", 0) != 0 or getattr(getattr(value, "dtype", None), "kind", "f") not in "iuf":
            return math.nan
        return float(value)
    except Exception as error:
        if not refused(value, error):
            raise
        return math.nan


def _positive_integer(name: str, value: Any) -> int:
    number = integer(value)
    if number is None or number < 1:
        raise ArgumentError(f"{name} must be an integer of at least 1, got {shown(value)}")
    return number


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def _projection(name: str, value: Any) -> int:
    number = integer(value)
    if number is None or number < 0:
        raise ArgumentError(f"{name} must be an integer of at least 0, got {shown(value)}")
    return number


def _bound(name: str, value: Any) -> float | None:
    if value is None:
        return None
    number = real(value)
    if not 0.0 < number < math.inf:
        raise ArgumentError(f"{name} must be None or a positive number, got {shown(value)}")
    return number


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {shown(value)}")


def _activations(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, tuple | list) or len(value) != 3:
        raise ArgumentError(f"{name} must name three functions, of gates, candidate and output, got {shown(value)}")
    for part, function in zip(("gates", "candidate", "output"), value, strict=True):
        _one_of(f"{name} of the {part}", function, ACTIVATIONS)
    if value[0] == "1997":
        raise ArgumentError("the gates of the 1997 cell are sigmoid: activations=('sigmoid', '1997', '1997')")
    return tuple(str(function) for function in value)


def _zoneout(name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise ArgumentError(f"{name} must be a pair of probabilities, of c and of h, got {shown(value)}")
    c, h = (_probability(f"{name} of {part}", number) for part, number in zip("ch", value, strict=True))
    return c, h


def _check_combination(cell: Cell) -> None:
    """Refuse fields that mean nothing together."""
    if cell.nonlinearity:
        wrong = [name for name in VARIANTS if name not in _OF_RNN and getattr(cell, name) != VARIANTS[name]]
        if wrong:
            raise ArgumentError(f"a plain RNN has neither gates nor a cell state: {', '.join(wrong)} mean nothing")
    if cell.coupled and not cell.forget_gate:
        raise ArgumentError("coupled=True sets f = 1 - i, but forget_gate=False sets f = 1: choose one of them")
    if cell.hidden_size % cell.block_size:
        raise ArgumentError(
            f"hidden_size must be a multiple of block_size, got {shown(cell.hidden_size)} and {shown(cell.block_size)}"
        )
    if cell.proj_size >= cell.hidden_size:
        raise ArgumentError(
            f"proj_size must be smaller than hidden_size, got {shown(cell.proj_size)} and {shown(cell.hidden_size)}"
        )
    if cell.reverse and cell.bidirectional:
        raise ArgumentError("reverse=True runs the only direction backwards: a bidirectional model has both directions")
    if cell.precision != "float32" and cell.dtype != FLOAT_DTYPES[0]:
        raise ArgumentError(f"precision={cell.precision!r} is for float32: a {cell.dtype.name} model rounds no factors")
    if cell.merge != "concat" and not cell.bidirectional:
        raise ArgumentError(f"merge={cell.merge!r} is for two directions: bidirectional is False")


def _check_addressable(cell: Cell) -> None:
    """Refuse sizes whose parameters no machine can address, before anything is made for each of the layers."""
    columns = max(cell.input_size, cell.output_size, cell.hidden_size)
    if cell.num_layers > MAX_LAYERS:
        raise ArgumentError(f"num_layers must be at most {MAX_LAYERS}, got {shown(cell.num_layers)}")
    if cell.rows * columns * cell.dtype.itemsize > sys.maxsize:
        raise ArgumentError(
            f"input_size and hidden_size are too large: the weights of input_size {shown(cell.input_size)} and"
            f" hidden_size {shown(cell.hidden_size)} cannot be addressed"
        )


def _probability(name: str, value: Any) -> float:
    number = real(value)
    if not 0.0 <= number < 1.0:
        raise ArgumentError(f"{name} must be a number in [0, 1), got {shown(value)}")
    return number


def float_dtype(value: Any) -> np.dtype[Any]:
    """Return float32 or float64 in native byte order, or refuse what is given."""
    try:
        if value is None:
            raise TypeError("NumPy takes None for float64")
        dtype: np.dtype[Any] = np.dtype(value).newbyteorder("=")
    except Exception as error:
        if not refused(value, error):
            raise
        raise DTypeError(f"dtype must be float32 or float64, got {shown(value)}") from error
    if dtype not in FLOAT_DTYPES:
        raise DTypeError(f"dtype must be float32 or float64, got {dtype.name}")
    return FLOAT_DTYPES[FLOAT_DTYPES.index(dtype)]  # NumPy's own object, as most arrays have it: found by identity
