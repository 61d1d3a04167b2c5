"""Closed loops on any backend: each step of a layer is a training call with a tape of its own.

This runs where no kernels of closed loops do: on the reference, and for variants of the cell that need more phases in a
step than the loops of the CPU and of the GPU have.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastlstm.backends.base import Array, Backend, Dropout, Params, Signature
from fastlstm.backends.layers import dropout_mask
from fastlstm.cell import Cell
from fastlstm.frozen import FrozenParams
from fastlstm.parameters import direction_names

__all__ = ["Stepwise"]


class _Layer:
    """One layer as a model of its own, its parameters under the names that it has there."""

    def __init__(self, backend: Backend, cell: Cell, params: Params, number: int, batch: int) -> None:
        self.cell = replace(cell, input_size=cell.layer_input_size(number), num_layers=1, dropout=0.0)
        there, here = direction_names(cell, number, 0), direction_names(self.cell, 0, 0)
        self.names = {here[role]: name for role, name in there.items()}
        self.params = {name: params[of_model] for name, of_model in self.names.items()}
        self.call = backend.prepare(self.cell, Signature(1, batch, True, False))
        self.tapes: list[Any] = []


class Stepwise:
    """A run on a backend's calls for one step (see ``base.Unrolled``).

    Parameters
    ----------
    backend : Backend
    xp : module
        The array library.
    others
        As for ``base.Backend.unroll``.
    """

    def __init__(
        self, backend: Backend, xp: Any, cell: Cell, params: Params, steps: int, batch: int, h0: Array | None,
        c0: Array | None, dropout: Dropout | None,
    ) -> None:  # fmt: skip
        arrays = params.arrays if isinstance(params, FrozenParams) else params
        self._xp = xp
        self._layers = [_Layer(backend, cell, arrays, number, batch) for number in range(cell.num_layers)]
        # Of a cell with other states than H numbers each, the description says so.
        sizes = getattr(cell, "h_size", cell.hidden_size), getattr(cell, "c_size", cell.hidden_size)
        given = (
            xp.zeros((cell.num_layers, batch, size), cell.dtype) if state is None else state
            for state, size in zip((h0, c0), sizes, strict=True)
        )
        self._h, self._c = ([xp.array(state[n : n + 1]) for n in range(cell.num_layers)] for state in given)
        self._y_shape = (1, batch, cell.output_size)
        self._dtype = cell.dtype
        self._masks: list[Array | None] = [None] * cell.num_layers
        self._key = None if dropout is None else dropout.key
        if dropout is not None and dropout.probability:
            like = xp.empty((steps, batch, cell.output_size), cell.dtype)
            for number in range(1, cell.num_layers):
                self._masks[number] = dropout_mask(xp, dropout, number, like)
        self._dh: list[Array] = []
        self._dc: list[Array] = []
        self._names = tuple(params)
        self._sums: dict[str, Array] = {}
        self._taken, self._left = 0, -1

    def step(self, x: Array) -> Array:
        """Run the next step (see ``base.Unrolled.step``)."""
        x = self._xp.array(x[None])  # a tape refers to its input
        for number, layer in enumerate(self._layers):
            mask = self._masks[number]
            if mask is not None:
                x = x * mask[self._taken : self._taken + 1]
            # The masks within the layers are those of a call for the whole sequence, too.
            draws = None if self._key is None else Dropout(0.0, self._key, number, self._taken)
            x, self._h[number], self._c[number], tape = layer.call.forward(
                layer.params, x, self._h[number], self._c[number], None, draws, False
            )
            layer.tapes.append(tape)
        self._taken += 1
        return self._xp.array(x[0])

    def state(self) -> tuple[Array, Array]:
        """Return the state after the last step (see ``base.Unrolled.state``)."""
        return self._joined(self._h), self._joined(self._c)

    def begin_back(self, dh: Array | None, dc: Array | None) -> None:
        """Start the way back (see ``base.Unrolled.begin_back``)."""
        self._dh, self._dc = (
            [self._xp.array(self._xp.zeros_like(states[n]) if d is None else d[n : n + 1]) for n in range(len(states))]
            for d, states in zip((dh, dc), (self._h, self._c), strict=True)
        )
        self._left = self._taken

    def step_back(self, dh: Array | None) -> Array:
        """Take the gradients back through one step (see ``base.Unrolled.step_back``)."""
        self._left -= 1
        dy = self._xp.zeros(self._y_shape, self._dtype) if dh is None else dh[None]
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            result = layer.call.backward(layer.params, layer.tapes[self._left], dy, self._dh[number], self._dc[number])
            layer.tapes[self._left] = None
            self._dh[number], self._dc[number] = result.h0, result.c0
            for name, gradient in result.params.items():
                of_model = layer.names[name]
                known = self._sums.get(of_model)
                self._sums[of_model] = gradient if known is None else known + gradient
            mask = self._masks[number]
            dy = result.x if mask is None else result.x * mask[self._left : self._left + 1]
        return dy[0]

    def state_gradient(self) -> tuple[Array, Array]:
        """Return the gradients by the state before the last step taken back (see ``base.Unrolled.state_gradient``)."""
        return self._joined(self._dh), self._joined(self._dc)

    def finish(self) -> dict[str, Array]:
        """Return the gradients by the parameters (see ``base.Unrolled.finish``)."""
        for layer in self._layers:
            for name, of_model in layer.names.items():
                if of_model not in self._sums:  # there was no step
                    self._sums[of_model] = self._xp.zeros_like(layer.params[name])
        return {name: self._xp.array(self._sums[name]) for name in self._names}

    def _joined(self, layers: list[Array]) -> Array:
        return self._xp.concatenate(layers)
