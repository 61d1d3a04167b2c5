"""Model files for tests: parameters with special values, and what a file has to hold."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tolerances import assert_identical

from fastlstm import parameters, storage
from fastlstm.cell import Cell

SMALL = Cell(input_size=2, hidden_size=1, dropout=0.25)
needs_posix = pytest.mark.skipif(os.name != "posix", reason="the test is about POSIX file systems")


def draw(cell: Cell, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw parameters with the values in them that careless copies change: -0.0, NaN, infinities, denormals."""
    rng = np.random.default_rng(seed)
    params = {name: rng.normal(size=shape).astype(cell.dtype) for name, shape in parameters.shapes(cell).items()}
    special = [-0.0, np.nan, np.inf, -np.inf, np.finfo(cell.dtype).smallest_subnormal]
    for value, array in zip(special, itertools.cycle(params.values())):
        array.flat[rng.integers(array.size)] = value
    return params


def bits(params: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays as integers, which compare bit for bit."""
    return {name: value.view(f"i{value.itemsize}") for name, value in params.items()}


def saved(path: Path, cell: Cell = SMALL, seed: int = 0, batch_first: bool = False) -> bytes:
    storage.save(path, cell, draw(cell, seed), batch_first)
    return path.read_bytes()


def assert_is(path: Path, cell: Cell, seed: int, batch_first: bool = False) -> None:
    found = storage.load(path)
    assert (found.cell, found.batch_first, found.dropout_key) == (cell, batch_first, None)
    assert_identical(bits(found.params), bits(draw(cell, seed)))


def left_over(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".tmp")]


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


def split(data: bytes) -> tuple[dict, bytes]:
    """Take a file apart: the header as Python values, and the tensors' bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]
