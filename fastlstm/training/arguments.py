"""The checks that losses, layers and optimisers share; each raises before any work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastlstm.backends.base import Array
from fastlstm.cell import FLOAT_DTYPES, integer, real
from fastlstm.dispatch import kind_of
from fastlstm.errors import ArgumentError, ArrayTypeError, DTypeError, shown

__all__ = ["Number", "arrays", "count", "floating", "mapping", "number", "same_library", "same_names"]


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


def mapping(name: str, source: Any) -> Mapping[str, Array]:
    """Return the mapping from names to arrays that `source` is, or that it has as its `params`."""
    found = source if isinstance(source, Mapping) else getattr(source, "params", None)
    if not isinstance(found, Mapping):
        raise ArgumentError(
            f"{name} must be a mapping from names to arrays, or have one as its params, got {type(source).__qualname__}"
        )
    if not all(isinstance(key, str) for key in found):
        raise ArgumentError(f"the names in {name} must be strings")
    return found


def arrays(name: str, kind: str, source: Any) -> dict[str, Array]:
    """Check a non-empty mapping from names to float arrays, or what has one; return them in native byte order."""
    found = {key: floating(f"{kind} {key}", value) for key, value in mapping(name, source).items()}
    if not found:
        raise ArgumentError(f"{name} must have at least one array")
    return found


def same_names(kind: str, given: Any, expected: Mapping[str, Any]) -> None:
    """Check that `given` is a mapping with the names of the parameters `expected`."""
    if isinstance(given, Mapping) and given.keys() == expected.keys():
        return
    names = given.keys() if isinstance(given, Mapping) else ()
    missing, unknown = sorted(expected.keys() - names), sorted(shown(name) for name in names - expected.keys())
    raise ArgumentError(
        f"each parameter needs one {kind}, under its name;"
        f" missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown) or 'none'}"
    )


def number(
    name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf, below: float = math.inf
) -> float:
    """Check that `value` is a number with ``above < value``, ``least <= value < below``; return it as a float.

    Infinity passes where no upper bound is given; NaN never does, nor does an integer beyond the range of floats.
    """
    result = real(value)
    if above < result and least <= result and (result < below or below == math.inf):
        return result
    bounds = [f"above {above}"] * (above > -math.inf) + [f"at least {least}"] * (least > -math.inf)
    bounds += [f"below {below}"] * (below < math.inf)
    raise ArgumentError(f"{name} must be a number {' and '.join(bounds)}, got {shown(value)}")


class Number:
    """An attribute that is checked by :func:`number` whenever it is set."""

    def __init__(self, **bounds: float) -> None:
        self.bounds = bounds

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: Any, owner: type | None = None) -> float:
        if instance is None:
            raise AttributeError(self.name)
        found: float = instance.__dict__[self.name]
        return found

    def __set__(self, instance: Any, value: Any) -> None:
        instance.__dict__[self.name] = number(self.name, value, **self.bounds)


def count(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Check that `value` is an integer with ``least <= value <= most``; return it."""
    result = integer(value)
    if result is None or result < least:
        raise ArgumentError(f"{name} must be an integer of at least {least}, got {shown(value)}")
    if most is not None and result > most:
        raise ArgumentError(f"{name} must be at most {most}, got {shown(value)}")
    return result
