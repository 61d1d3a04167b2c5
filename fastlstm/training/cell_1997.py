"""The initial parameters of the cell of 1997, as its paper has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fastlstm import parameters
from fastlstm.cell import real
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, FrozenError, shown
from fastlstm.frozen import FrozenParams
from fastlstm.recurrent import Recurrent
from fastlstm.training import arguments

__all__ = ["initialise_1997"]


def initialise_1997(
    lstm: Recurrent,
    seed: Any = None,
    *,
    scale: float = 0.1,
    input_gates: Sequence[float] | None = None,
    output_gates: Sequence[float] | None = None,
) -> None:
    """Draw all parameters of a model anew, in place, as Hochreiter and Schmidhuber did (1997, section 5).

    Weights and biases are uniform in ±scale; gains of layer norm, which the paper does not have, are one. Negative
    biases of gates keep the memory blocks closed at first, and different ones have the blocks come into use one after
    the other, so that two do not store the same thing.

    Parameters
    ----------
    lstm : LSTM
        A model of NumPy or CuPy arrays, with biases.
    seed : None, int, SeedSequence, BitGenerator or Generator
        As for :func:`numpy.random.default_rng`.
    scale : float
        Bound of the parameters, above 0. The paper has 0.1, and 0.2 in its first two experiments.
    input_gates, output_gates : sequence of float, optional
        The biases of these gates of each layer and direction, one a memory block: in the paper -3 and -6, or -2 and
        -4, of the input gates; -1, -2, -3 and so on of the output gates. Drawn like the others if None.

    Raises
    ------
    ArgumentError
        If the model is no LSTM with biases, a bias is no finite number, or there are not as many as blocks.
    FrozenError
        If the model is frozen.

    Examples
    --------
    >>> from fastlstm import LSTM
    >>> from fastlstm.training import initialise_1997
    >>> lstm = LSTM(3, 4, forget_gate=False, block_size=2, truncated=True, activations=("sigmoid", "1997", "1997"))
    >>> initialise_1997(lstm, seed=0, input_gates=(-3, -6))
    >>> lstm.params["bias_l0"][:2].tolist()
    [-3.0, -6.0]
    """
    cell = getattr(lstm, "cell", None)
    if not isinstance(lstm, Recurrent) or cell is None or cell.nonlinearity or not cell.bias:
        raise ArgumentError(f"lstm must be an LSTM with biases, got {shown(lstm)}")
    bound = arguments.number("scale", scale, above=0.0, below=1e30)
    if isinstance(lstm.params, FrozenParams):
        raise FrozenError("the parameters of a frozen model cannot change: initialise the model before freeze()")
    rng = parameters.generator(seed)
    blocks = cell.hidden_size // cell.block_size
    given = {
        gate: _biases(name, values, blocks)
        for gate, name, values in (("i", "input_gates", input_gates), ("o", "output_gates", output_gates))
        if values is not None
    }
    for name, array in lstm.params.items():
        values = np.ones(array.shape) if name.startswith("ln_gain") else rng.uniform(-bound, bound, array.shape)
        if name.startswith("bias_"):
            for gate, biases in given.items():
                values[parameters.gate_rows(cell, gate)] = biases
        array[...] = array_namespace(array).asarray(values, dtype=array.dtype)


def _biases(name: str, values: Any, blocks: int) -> list[float]:
    if isinstance(values, str) or not hasattr(values, "__len__") or len(values) != blocks:
        raise ArgumentError(f"{name} must be {blocks} numbers, one a memory block, got {shown(values)}")
    found = [real(value) for value in values]
    if not np.isfinite(found).all():
        raise ArgumentError(f"{name} must be finite numbers, got {shown(values)}")
    return found
