"""The checks of arguments, done before any work: nothing has been changed when one of them raises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastlstm import parameters
from fastlstm.backends.base import Array
from fastlstm.cell import Cell, integer
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError, ShapeError, shown
from fastlstm.frozen import FrozenParams

__all__ = [
    "array",
    "direction",
    "dropout_seed",
    "flag",
    "h_alone",
    "lengths",
    "params",
    "resets",
    "state",
    "state_gradient",
]


def array(name: str, value: Any, like: Array, shape: tuple[int | None, ...], axes: str) -> Array:
    """Check one array against the model's parameters.

    Parameters
    ----------
    name : str
        The name of the argument, for the message.
    value : object
        The argument.
    like : array
        One of the model's parameters: `value` must have its library, device and dtype.
    shape : tuple of int or None
        The size of each axis; None allows any.
    axes : str
        The axes' names, for the message.

    Returns
    -------
    array
        `value`, in native byte order.

    Raises
    ------
    ArrayTypeError, DTypeError, ShapeError, shown
        With the name of the argument, what was expected and what was given.
    """
    if type(value) is not type(like):
        _same_library(name, value, like)
    if value.device != like.device:
        raise ArrayTypeError(f"{name} is on {value.device}, but the parameters are on {like.device}")
    if value.dtype != like.dtype:
        value = _same_dtype(name, value, like)
    value = _without_subclass(value)
    if value.shape != shape and not _fits(value.shape, shape):
        expected = ", ".join("any" if s is None else str(s) for s in shape)
        raise ShapeError(f"{name} must have shape {axes} = ({expected}), got {tuple(value.shape)}")
    return value


def _without_subclass(value: Array) -> Array:
    """View an array of a subclass that has passed, such as numpy.memmap, as what prepared calls take."""
    return value.view(np.ndarray) if isinstance(value, np.ndarray) and type(value) is not np.ndarray else value


def _fits(sizes: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    if len(sizes) != len(expected):
        return False
    for size, wanted in zip(sizes, expected, strict=True):  # noqa: SIM110  (a generator takes twice as long)
        if wanted is not None and size != wanted:
            return False
    return True


def _same_library(name: str, value: Any, like: Array) -> None:
    kind, expected = kind_of(name, value), kind_of("parameters", like)
    if kind != expected:
        raise ArrayTypeError(
            f"{name} is a {kind.library} array, but the parameters are {expected.library} arrays: move the model with"
            f" lstm.to({kind.library}) or the array with {expected.library}.asarray"
        )


def _same_dtype(name: str, value: Array, like: Array) -> Array:
    if value.dtype.newbyteorder("=") == like.dtype:
        return value.astype(like.dtype)
    raise DTypeError(
        f"{name} has dtype {value.dtype}, but the model is {like.dtype}: convert one of them, for example with"
        f" {name}.astype({like.dtype.name!r})"
    )


def params(cell: Cell, given: Mapping[str, Any]) -> dict[str, Array]:
    """Check the parameters of a model: names, one library and device, dtype and shapes; return them in order."""
    if isinstance(given, FrozenParams) and given.cell == cell:
        return given
    shapes = parameters.shapes(cell)
    if given.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - given.keys()), sorted(map(str, given.keys() - shapes.keys()))
        raise ArgumentError(
            "the parameters do not fit the model:"
            + (f" missing {', '.join(missing)};" if missing else "")
            + (f" unknown {', '.join(unknown)};" if unknown else "")
        )
    like = given["weight_ih_l0"]
    kind_of("weight_ih_l0", like)
    like = _without_subclass(like)
    if like.dtype != cell.dtype:
        if like.dtype.newbyteorder("=") != cell.dtype:
            raise DTypeError(f"parameter weight_ih_l0 has dtype {like.dtype}, but the model is {cell.dtype}")
        like = like.astype(cell.dtype)
    kind, device, dtype = type(like), like.device, like.dtype
    checked = {}
    for name, shape in shapes.items():
        value = given[name]
        if not (type(value) is kind and value.shape == shape and value.dtype == dtype and value.device == device):
            # Convert it to native byte order, or raise.
            value = array(name, value, like, shape, parameters.axes(name))
        checked[name] = value
    return checked


def state(cell: Cell, given: Any, batch: int | None, like: Array) -> tuple[Array | None, Array | None]:
    """Check an initial state `(h0, c0)`; `batch` is None for unbatched input, whose states have no batch axis."""
    return _pair("state", ("h0", "c0"), cell, given, batch, like)


def state_gradient(cell: Cell, given: Any, batch: int | None, like: Array) -> tuple[Array | None, Array | None]:
    """Check the gradients `(dh_n, dc_n)` of the final states; either may be None."""
    return _pair("dstate", ("dh_n", "dc_n"), cell, given, batch, like, optional=True)


def h_alone(name: str, given: Any) -> Any:
    """Refuse a pair where a plain RNN takes h alone; what is no array is refused with the other arguments."""
    if isinstance(given, tuple | list):
        raise ArgumentError(f"{name} of a plain RNN is one array, of h, got {shown(given)}")
    return given


def direction(cell: Cell) -> None:
    """Refuse a model that needs the whole sequence."""
    if cell.bidirectional:
        raise ArgumentError(
            "a bidirectional model cannot be run step by step: its reverse direction starts at the sequence's end"
        )
    if cell.reverse:
        raise ArgumentError("a model with reverse=True cannot be run step by step: it starts at the sequence's end")


def _pair(
    name: str,
    parts: tuple[str, str],
    cell: Cell,
    given: Any,
    batch: int | None,
    like: Array,
    optional: bool = False,
) -> tuple[Array | None, Array | None]:
    if given is None:
        return None, None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise ArgumentError(f"{name} must be a pair ({parts[0]}, {parts[1]}), got {type(given).__qualname__}")
    rows = cell.num_layers * cell.num_directions
    leading = (rows,) if batch is None else (rows, batch)
    checked: list[Array | None] = []
    sizes = (cell.h_size, "P" if cell.proj_size else "H"), (cell.c_size, "H")
    for part, value, (size, letter) in zip(parts, given, sizes, strict=True):
        if value is None and optional:
            checked.append(None)
            continue
        axes = f"(L*D, {letter})" if batch is None else f"(L*D, B, {letter})"
        checked.append(array(part, value, like, (*leading, size), axes))
    return checked[0], checked[1]


def lengths(given: Any, steps: int, batch: int | None) -> np.ndarray[Any, Any] | None:
    """Check the lengths of a ragged batch; return them as (B,) int64 on the host, or None."""
    if given is None:
        return None
    if batch is None:
        raise ArgumentError("lengths need a batch: for one sequence, pass its first steps only")
    if type(given) is np.ndarray and given.dtype == np.int64 and given.dtype.isnative:
        values = given.copy()
    else:
        values = _integers(given, batch)
    if values.shape != (batch,):
        raise ShapeError(f"lengths must have shape (B,) = ({batch},), got {values.shape}")
    if batch:
        few = values.tolist() if batch <= _FEW_LENGTHS else None
        low, high = (min(few), max(few)) if few else (values.min(), values.max())
        if low < 0 or high > steps:
            raise ArgumentError(f"lengths must be in 0..T = 0..{steps}, got {low} to {high}")
    return values


def resets(given: Any, like: Array, shape: tuple[int, ...]) -> Array | None:
    """Check where states are set to zero: booleans of the parameters' library, one for each step and sequence."""
    if given is None:
        return None
    if type(given) is not type(like):
        _same_library("resets", given, like)
    if given.device != like.device:
        raise ArrayTypeError(f"resets is on {given.device}, but the parameters are on {like.device}")
    if given.dtype != np.bool_:
        raise DTypeError(f"resets must be booleans, got dtype {given.dtype}")
    if given.shape != shape:
        axes = "(T,)" if len(shape) == 1 else "of x without its features"
        raise ShapeError(f"resets must have shape {axes} = {shape}, got {tuple(given.shape)}")
    return given


_FEW_LENGTHS = 64  # up to this many, Python compares faster than NumPy


def _integers(given: Any, batch: int) -> np.ndarray[Any, Any]:
    """Return lengths as a new array of int64, of any shape."""
    listed = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    # Anything that NumPy converts to an array on the host, such as a pandas Series: lengths are copied in any case.
    if not (listed or hasattr(type(given), "__array__")):
        raise ArrayTypeError(
            f"lengths must be a NumPy array, a list or a pandas Series, got {_type_name(given)}:"
            " they are read on the host"
        )
    if isinstance(given, np.ndarray):
        kind_of("lengths", given)  # refuses masked arrays, whose mask would be lost
    try:
        values = np.asarray(given)
    except (TypeError, ValueError, RuntimeError) as error:
        if listed:
            raise ShapeError(f"lengths must have shape (B,) = ({batch},), got a ragged list") from error
        raise ArrayTypeError(
            f"lengths are read on the host, and NumPy can make no array of a {_type_name(given)}: {error}"
        ) from error
    if values.size == 0 and not isinstance(given, np.ndarray):
        values = values.astype(np.int64)
    if values.dtype.kind not in "iu":
        raise DTypeError(f"lengths must be integers, got dtype {values.dtype}")
    return values.astype(np.int64)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def flag(name: str, given: Any) -> bool:
    """Check a flag: True or False, and no other value that Python would take for either."""
    if not isinstance(given, (bool, np.bool_)):
        raise ArgumentError(f"{name} must be True or False, got {shown(given)}")
    return bool(given)


def dropout_seed(given: Any) -> int:
    """Check what determines the dropout masks: an integer of at least 0."""
    seed = integer(given)
    if seed is None or seed < 0:
        raise ArgumentError(f"dropout_seed must be an integer of at least 0, got {shown(given)}")
    return seed
