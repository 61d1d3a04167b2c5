"""The checks that losses, layers and optimisers share; each raises before any work."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

from fastlstm.backends.base import Array
from fastlstm.cell import FLOAT_DTYPES
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError

__all__ = ["count", "floating", "gradients", "number", "same_library"]


def floating(name: str, value: Any) -> Array:
    """Check that `value` is a float32 or float64 array of a known library; return it in native byte order."""
    kind_of(name, value)
    native = value.dtype.newbyteorder("=")
    if native not in FLOAT_DTYPES:
        raise DTypeError(f"{name} must be float32 or float64, got {value.dtype}")
    return value if value.dtype == native else value.astype(native)


def same_library(name: str, value: Any, like_name: str, like: Array) -> Array:
    """Check that `value` is of the library and on the device of `like`; return it."""
    kind, expected = kind_of(name, value), kind_of(like_name, like)
    if kind != expected:
        raise ArrayTypeError(
            f"{name} is a {kind.library} array, but {like_name} is a {expected.library} array:"
            f" convert it with {expected.library}.asarray"
        )
    if value.device != like.device:
        raise ArrayTypeError(f"{name} is on {value.device}, but {like_name} is on {like.device}")
    return value


def gradients(grads: Any) -> dict[str, Array]:
    """Check a non-empty mapping from names to float arrays; return them in native byte order."""
    if not isinstance(grads, Mapping) or not grads:
        raise ArgumentError(f"grads must be a mapping from names to arrays, with at least one, got {type(grads)}")
    return {name: floating(f"gradient {name}", value) for name, value in grads.items()}


def number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> float:
    """Check that `value` is a number with ``above < value``, ``least <= value < below``; return it as a float.

    Infinity passes where no upper bound is given; NaN never does.
    """
    try:
        result = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError):
        result = math.nan
    if above < result and least <= result and (result < below or below == math.inf):
        return result
    bounds = [f"above {above}"] * (above > -math.inf) + [f"at least {least}"] * (least > -math.inf)
    bounds += [f"below {below}"] * (below < math.inf)
    raise ArgumentError(f"{name} must be a number {' and '.join(bounds)}, got {value!r}")


def count(name: str, value: Any) -> int:
    """Check that `value` is an integer of at least zero; return it."""
    try:
        result = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        result = -1
    if result < 0:
        raise ArgumentError(f"{name} must be an integer of at least 0, got {value!r}")
    return result
