"""Cells that lack rows of some gates: parameters unfolded to those of a plain cell, and gradients folded back.

The kernels have four gates, each with a row for each unit. A gate that does not exist gets rows of zeros, whose
pre-activations the cell step does not read; rows that the units of a block share are repeated for each of them. Of the
gradients, the former are left out and the latter summed. The weights are copied once a call, and little beside its
products; those of a frozen model once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Params
from fastlstm.cell import Cell
from fastlstm.parameters import GATES, PEEPHOLES, direction_names, directions, gate_rows, peepholes

__all__ = ["Folding", "is_folded"]


def is_folded(cell: Cell) -> bool:
    """Say whether rows are missing."""
    return not cell.nonlinearity and (cell.gates != GATES or cell.block_size > 1)


class _Part(NamedTuple):
    """Rows that the kernels have, and the parameters' own that they come from."""

    full: slice
    own: slice
    repeats: int  # S where the units of a block share a row, else 1


class _Rows(NamedTuple):
    """How the rows of a parameter are made up."""

    full: int  # their number in the kernels
    own: int  # and in the parameter
    parts: list[_Part]
    zeros: list[slice]  # of the kernels' rows


class Folding:
    """Unfolds the parameters of a cell, and folds gradients.

    Parameters
    ----------
    cell : Cell
        One with missing rows (:func:`is_folded`).
    xp : module
        The array library of the parameters.
    """

    def __init__(self, cell: Cell, xp: Any = np) -> None:
        self._xp = xp
        names = [direction_names(cell, layer, direction) for layer, direction in directions(cell)]
        rows, of_peepholes = _rows_of_gates(cell), _rows_of_peepholes(cell)
        roles = ("weight_ih", "weight_hh", "bias", "ln_gain_ih", "ln_gain_hh")
        self._rows = {of[role]: rows for of in names for role in roles if role in of}
        self._rows |= {of["weight_peephole"]: of_peepholes for of in names if "weight_peephole" in of}

    def unfold(self, params: Params) -> dict[str, Array]:
        """Return the parameters with rows for all gates and units: new arrays, C-contiguous."""
        found = dict(params)
        for name, rows in self._rows.items():
            own = params[name]
            full = found[name] = self._xp.empty((rows.full, *own.shape[1:]), own.dtype)
            for part in rows.parts:
                if part.repeats == 1:
                    full[part.full] = own[part.own]
                else:  # the units of a block are contiguous
                    full[part.full].reshape(-1, part.repeats, *own.shape[1:])[:] = own[part.own, None]
            for zeros in rows.zeros:
                full[zeros] = 0
        return found

    def fold(self, grads: Mapping[str, Array], out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Return the gradients by the parameters that there are; with `out`, those with rows of their own in these."""
        found = dict(grads)
        for name, rows in self._rows.items():
            full = grads[name]
            own = self._xp.empty((rows.own, *full.shape[1:]), full.dtype) if out is None else out[name]
            found[name] = own
            for part in rows.parts:
                if part.repeats == 1:
                    own[part.own] = full[part.full]
                else:
                    full[part.full].reshape(-1, part.repeats, *full.shape[1:]).sum(axis=1, out=own[part.own])
        return found


def _rows_of_gates(cell: Cell) -> _Rows:
    """Return the rows of a weight or bias."""
    units = cell.hidden_size
    parts, zeros = [], []
    for number, gate in enumerate(GATES):
        full = slice(number * units, (number + 1) * units)
        if gate in cell.gates:
            parts.append(_Part(full, gate_rows(cell, gate), units // cell.gate_size(gate)))
        else:
            zeros.append(full)
    return _Rows(len(GATES) * units, cell.rows, parts, zeros)


def _rows_of_peepholes(cell: Cell) -> _Rows:
    """Return the rows of the weights of peepholes."""
    own = peepholes(cell)
    numbers = [(number, own.index(gate)) for number, gate in enumerate(PEEPHOLES) if gate in own]
    parts = [_Part(slice(full, full + 1), slice(row, row + 1), 1) for full, row in numbers]
    zeros = [slice(number, number + 1) for number, gate in enumerate(PEEPHOLES) if gate not in own]
    return _Rows(len(PEEPHOLES), len(own), parts, zeros)
