"""class HasPrecision: what the matrix products of a model may round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastlstm.cell import Cell

__all__ = ["EXACT", "HasPrecision"]

EXACT = {"precision": "float32"}


class HasPrecision:
    """A model whose cell has a precision."""

    cell: Cell

    @property
    def precision(self) -> str:
        """The format to which matrix products of a float32 model on a GPU may round their factors.

        ``float32``, by default: nothing. ``tf32``: 11 significant bits, as ``torch.backends.cudnn.allow_tf32`` has
        cuDNN do. ``bf16``: 8. Sums, the cell state, the gates, all results and all gradients are float32 in any case.

        It is a permission: what is faster without rounding, or cannot round, computes in float32. So do the CPU,
        :meth:`step`, and GPUs before compute capability 8.0; ``lstm.plan(x)`` says what a call does. It is no part of
        the model: :meth:`save` does not write it, a model that was loaded has ``float32``, and setting it does not
        touch the parameters. A backward pass has the precision of the forward pass that left its tape.

        Raises
        ------
        ArgumentError
            When it is set to another name, or the model is float64.

        Examples
        --------
        >>> from fastlstm import LSTM
        >>> lstm = LSTM(input_size=3, hidden_size=8, seed=0)
        >>> lstm.precision = "tf32"
        >>> lstm
        LSTM(3, 8, precision='tf32', dtype=float32)  # 384 parameters
        """
        return self.cell.precision

    @precision.setter
    def precision(self, name: Any) -> None:
        self.cell = replace(self.cell, precision=name)
