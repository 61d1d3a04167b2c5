"""Parameters of a cell without the rows of some gates, brought to those of one that has them all; and gradients back.

The kernels have four gates, each with a row for each unit. A gate that does not exist gets rows of zeros, whose
pre-activations the cell step does not read; rows that the units of a block share are repeated for each of them. Of the
gradients, the former are left out and the latter summed. The weights are copied once a call, and little beside its
products; those of a frozen model once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from fastlstm.backends.base import Array, Params
from fastlstm.cell import Cell
from fastlstm.parameters import GATES, PEEPHOLES, gate_rows, peepholes

__all__ = ["fold", "is_folded", "unfold"]

_OF_GATES = re.compile("weight_[ih]h_|bias_")


def is_folded(cell: Cell) -> bool:
    """Say whether rows are missing."""
    return cell.gates != GATES or cell.block_size > 1


def unfold(cell: Cell, params: Params) -> dict[str, Array]:
    """Return the parameters with rows for all gates and units: new arrays, C-contiguous."""
    return {name: _unfolded(cell, name, array) for name, array in params.items()}


def _unfolded(cell: Cell, name: str, array: Array) -> Array:
    units = cell.hidden_size
    if name.startswith("weight_peephole"):
        rows = np.zeros((len(PEEPHOLES), units), array.dtype)
        rows[[PEEPHOLES.index(gate) for gate in peepholes(cell)]] = array
        return rows
    if not _OF_GATES.match(name):
        return array
    full = np.zeros((len(GATES), units, *array.shape[1:]), array.dtype)
    for gate in cell.gates:
        given = array[gate_rows(cell, gate)]
        # The units of a block lie side by side.
        full[GATES.index(gate)].reshape(len(given), units // len(given), *array.shape[1:])[:] = given[:, None]
    return full.reshape(len(GATES) * units, *array.shape[1:])


def fold(cell: Cell, grads: Mapping[str, Array]) -> dict[str, Array]:
    """Return the gradients by the parameters that there are."""
    return {name: _folded(cell, name, array) for name, array in grads.items()}


def _folded(cell: Cell, name: str, array: Array) -> Array:
    if name.startswith("weight_peephole"):
        return array[[PEEPHOLES.index(gate) for gate in peepholes(cell)]]
    if not _OF_GATES.match(name):
        return array
    by_gate = array.reshape(len(GATES), cell.hidden_size, *array.shape[1:])
    found: Array = np.empty((cell.rows, *array.shape[1:]), array.dtype)
    for gate in cell.gates:
        blocks = cell.gate_size(gate)
        parts = by_gate[GATES.index(gate)].reshape(blocks, cell.hidden_size // blocks, *array.shape[1:])
        found[gate_rows(cell, gate)] = parts.sum(axis=1) if parts.shape[1] > 1 else parts[:, 0]
    return found
