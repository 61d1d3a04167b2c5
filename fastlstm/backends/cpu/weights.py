"""Weights as the kernels take them: unpacked, or packed and kept if they never change."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.base import Array, Params
from fastlstm.backends.cpu.workspace import one_block
from fastlstm.backends.folding import Folding, is_folded
from fastlstm.cell import Cell
from fastlstm.errors import ArgumentError
from fastlstm.frozen import FrozenParams
from fastlstm.kernels.cpu.cell_step import COUPLED, GATES, NONE, OWN, Variant, cell_addresses
from fastlstm.kernels.cpu.jit import VECTOR_BYTES
from fastlstm.kernels.cpu.vector import lanes
from fastlstm.kernels.cpu.weight_packing import pack_weights
from fastlstm.parameters import PEEPHOLES, direction_names

__all__ = ["PACKED", "Packed", "Size", "again", "frozen_arrays", "packed_model", "size_of", "variant_of"]

# Under these keys they are kept with weights that never change.
PACKED, UNFOLDED = "packed for the CPU backend", "with rows for all gates, for the CPU backend"


def again(vector_bytes: int, make: Callable[..., Any], *arguments: Any) -> Any:
    """Make anew what was pickled with a tape, and holds addresses of the process that pickled it."""
    if vector_bytes != VECTOR_BYTES:
        raise ArgumentError(
            f"the tape was made with vectors of {vector_bytes} bytes, and here they have {VECTOR_BYTES}"
        )
    return make(*arguments)


class Size(NamedTuple):
    """One layer in one direction: its sizes, and its variant of the cell."""

    inputs: int  # I
    hidden: int  # H
    width: int  # V, lanes of a vector
    blocks: int  # vectors that H takes
    own: int  # rows of a variant's own parameters, E
    biased: bool
    dtype: Any
    addresses: tuple[int, ...]  # of the variant's routines
    truncated: bool = False
    reverse: bool = False  # whether the first direction runs backwards in time

    @property
    def stride(self) -> int:
        """H padded to whole vectors."""
        return self.blocks * self.width

    @property
    def packed_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the packed weights and the packed bias."""
        return (self.blocks * (self.inputs + self.hidden), GATES, self.width), (2, self.blocks, GATES, self.width)


@functools.lru_cache(maxsize=256)
def size_of(cell: Cell, layer: int) -> Size:
    """Return the size of one layer of a model; compiles the routines of its variant, if it has any."""
    width = lanes(cell.dtype)
    return Size(
        cell.layer_input_size(layer), cell.hidden_size, width, -(-cell.hidden_size // width),
        len(PEEPHOLES) if cell.peephole else 0, cell.bias, cell.dtype, cell_addresses(variant_of(cell), cell.dtype),
        cell.truncated, cell.reverse,
    )  # fmt: skip


def variant_of(cell: Cell) -> Variant:
    """Return what the routines of a cell are compiled for."""
    forget = COUPLED if cell.coupled else OWN if cell.forget_gate else NONE
    # What shared gates see of their blocks is the driver's.
    return Variant(cell.peephole and not cell.sees_blocks, forget, cell.activations, cell.clip, cell.cell_clip)


def frozen_arrays(cell: Cell, params: FrozenParams) -> Params:
    """Return the parameters of a frozen model as the kernels take them, with rows for all gates."""
    if not is_folded(cell):
        return params.arrays
    found: Params | None = params.kept.get(UNFOLDED)
    if found is None:
        found = params.kept.setdefault(UNFOLDED, Folding(cell).unfold(params.arrays))
    return found


class Packed(NamedTuple):
    """The packed weights of a frozen model."""

    weights: list[Array]  # for each direction, those of all layers one after the other
    bias: list[Array]
    own: list[Array]  # (L * E, H)
    layers: list[list[tuple[Array, Array]]]  # for each layer and direction, views of its part
    at_once: list[Array]  # the first arguments of a kernel that runs all layers of one direction


def packed_model(cell: Cell, params: FrozenParams) -> Packed:
    """Return the packed weights of a frozen model, packed at its first call."""
    found: Packed | None = params.kept.get(PACKED)
    if found is None:
        found = params.kept.setdefault(PACKED, _pack(cell, params))  # another thread may have been faster
    return found


def _pack(cell: Cell, params: FrozenParams) -> Packed:
    sizes = [size_of(cell, layer) for layer in range(cell.num_layers)]
    found, arrays = Packed([], [], [], [[] for _ in sizes], []), frozen_arrays(cell, params)
    for direction in range(cell.num_directions):
        shapes = [shape for number in (0, 1) for size in sizes for shape in size.packed_shapes[number : number + 1]]
        counts = [int(np.prod(shape)) for shape in shapes]
        half = sum(counts[: len(sizes)])
        (memory,) = one_block(cell.dtype, (sum(counts),), lasting=True)
        flat = np.split(memory, np.cumsum(counts)[:-1])
        parts = [part.reshape(shape) for part, shape in zip(flat, shapes, strict=True)]
        own = []
        for layer, size in enumerate(sizes):
            names = direction_names(cell, layer, direction)
            given = {role: arrays[name] for role, name in names.items()}
            bias = given.get("bias", np.empty(0, cell.dtype))
            packed, packed_bias = parts[layer], parts[len(sizes) + layer]
            pack_weights(given["weight_ih"], given["weight_hh"], bias, packed, packed_bias)
            found.layers[layer].append((packed, packed_bias))
            own.append(given.get("weight_peephole", np.empty((0, size.hidden), cell.dtype)))
        found.weights.append(memory[:half])
        found.bias.append(memory[half:])
        found.own.append(np.concatenate(own))
    found.at_once.extend((found.weights[0], found.bias[0], found.own[0]))
    return found
