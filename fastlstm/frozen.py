"""Parameters that cannot change, so that a backend may keep packed weights between calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.errors import FrozenError

__all__ = ["FrozenParams"]


class FrozenParams(dict[str, Array]):
    """The parameters of a frozen model: an immutable dict of read-only arrays.

    Its values are read-only views of memory that only this object refers to: NumPy refuses to make them writeable.

    Parameters
    ----------
    cell : Cell
        The model's description.
    params : mapping of str to numpy.ndarray
        Its parameters, checked; they are copied.

    Attributes
    ----------
    cell : Cell
        As given.
    arrays : dict of str to numpy.ndarray
        The same memory, writeable, for the kernels: they take no read-only arrays, but do not change these.
    kept : dict
        What a backend derives from the parameters, such as packed weights, under its own key.

    Examples
    --------
    >>> import fastlstm
    >>> params = fastlstm.LSTM(3, 2, seed=0).freeze().params
    >>> params["bias_l0"][0] = 1.0
    Traceback (most recent call last):
        ...
    ValueError: assignment destination is read-only
    """

    __slots__ = ("arrays", "cell", "kept")

    def __init__(self, cell: Cell, params: Mapping[str, Array]) -> None:
        self.cell = cell
        self.arrays = {name: np.array(value, order="C") for name, value in params.items()}
        self.kept: dict[Any, Any] = {}
        super().__init__((name, _read_only(value)) for name, value in self.arrays.items())

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise FrozenError("the parameters of a frozen model cannot change, those of its copy lstm.to(numpy) can")

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __copy__(self) -> FrozenParams:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenParams:
        return self

    def __reduce__(self) -> Any:
        return FrozenParams, (self.cell, dict(self.arrays))


def _read_only(array: Array) -> Array:
    """Return a view whose base is a read-only buffer; the writeable flag of a plain view could be set again."""
    return np.asarray(memoryview(array).toreadonly())
