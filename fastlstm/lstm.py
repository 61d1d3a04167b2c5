"""class LSTM(Exchange): the parameters of a model and the calls on them. What people touch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from fastlstm import checks, interchange, parameters, storage
from fastlstm.backends.base import Array
from fastlstm.cell import Cell, integer
from fastlstm.errors import ArgumentError, shown
from fastlstm.exchange import Exchange
from fastlstm.frozen import FrozenParams
from fastlstm.recurrent import on_host

__all__ = ["LSTM"]


class LSTM(Exchange):
    """A long short-term memory network over NumPy or CuPy arrays.

    The constructor and the call follow ``torch.nn.LSTM``. The equations are those of Hochreiter and
    Schmidhuber (1997) with the forget gate of Gers, Schmidhuber and Cummins (2000); they stand in
    :mod:`fastlstm.backends.reference`.

    Parameters
    ----------
    input_size : int
        Number of input features I.
    hidden_size : int
        Number of hidden units H.
    num_layers : int
        Number of stacked layers L.
    bias : bool
        Whether the pre-activations have a bias (one, where PyTorch adds two).
    batch_first : bool
        Whether input and output are (B, T, features) in place of (T, B, features); the states never are.
    dropout : float
        Probability in [0, 1) of dropping an output of every layer but the last; in :meth:`forward` only.
    bidirectional : bool
        Whether each layer also runs backwards in time; the outputs stand side by side.
    proj_size : int
        Must be 0: projections are not supported yet.
    peephole : bool
        Whether the gates also see the cell state (Gers, Schraudolph and Schmidhuber 2002): i and f the one before the
        step, o the new one. Each unit has three more parameters, ``weight_peephole_l0`` (3, H).
    dtype : dtype
        float32 or float64: the dtype of parameters, inputs and outputs.
    seed : None, int, SeedSequence, BitGenerator or Generator
        Determines the initial parameters and the dropout masks, as for :func:`numpy.random.default_rng`.

    Attributes
    ----------
    params : dict of str to array
        The live parameters: change their contents, or replace them with arrays of the same shape and dtype. Those of
        a frozen model (:meth:`freeze`) cannot change.
    cell : Cell
        Sizes, dtype and variant of the model.
    batch_first : bool
        As given.

    Examples
    --------
    >>> import numpy as np
    >>> lstm = LSTM(input_size=3, hidden_size=8, seed=0)
    >>> lstm
    LSTM(3, 8, dtype=float32)  # 384 parameters
    >>> x = np.ones((5, 2, 3), np.float32)  # 5 time steps, 2 sequences
    >>> y, (h_n, c_n) = lstm(x)
    >>> y.shape, h_n.shape
    ((5, 2, 8), (1, 2, 8))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        peephole: bool = False,
        dtype: Any = np.float32,
        seed: Any = None,
    ) -> None:
        if integer(proj_size) != 0:
            raise ArgumentError(f"proj_size must be 0, got {shown(proj_size)}: projections are not supported yet")
        cell = Cell(input_size, hidden_size, num_layers, bias, dropout, bidirectional, dtype, peephole)
        checks.flag("batch_first", batch_first)  # before the parameters are drawn
        rng = parameters.generator(seed)
        self._assemble(cell, parameters.initialise(cell, rng), batch_first, _new_key(rng))

    def save(self, path: str | os.PathLike[str] | BinaryIO) -> None:
        """Write the model to a file in the safetensors format.

        A file at a path appears whole or not at all: it is written beside `path`, synced, and renamed over it. A file
        object is written to from its current position on, and is neither flushed, synced nor closed; an error may
        leave a part of the model in it, which :meth:`load` refuses.

        With dropout between layers, the file also has what determines the next masks: the model that is loaded draws
        the masks that this one would draw next.

        Parameters
        ----------
        path : str, path-like or binary file object
            Where to write; an existing file is replaced.

        Raises
        ------
        ArgumentError
            If `path` is neither a path nor a binary file object that can be written to.
        OSError
            If the file cannot be written.

        Examples
        --------
        >>> import io
        >>> lstm, file = LSTM(input_size=3, hidden_size=8, seed=0), io.BytesIO()
        >>> lstm.save(file)
        >>> position = file.seek(0)
        >>> LSTM.load(file)
        LSTM(3, 8, dtype=float32)  # 384 parameters
        """
        given = checks.params(self.cell, self.params)
        params = {name: on_host(name, value) for name, value in given.items()}
        draws_masks = self.cell.dropout and self.cell.num_layers > 1
        storage.save(path, self.cell, params, self.batch_first, self._dropout_key if draws_masks else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | BinaryIO) -> LSTM:
        """Read a model that :meth:`save` wrote; its parameters are NumPy arrays.

        Parameters
        ----------
        path : str, path-like or binary file object
            The file. A file object is read from its current position to its end.

        Raises
        ------
        ArgumentError
            If `path` is neither a path nor a binary file object that can be read from.
        ModelFileError
            If the file is broken, truncated or foreign; nothing large is allocated.
        OSError
            If the file cannot be opened.

        Notes
        -----
        Dropout masks go on where they were when the model was saved. Files of format 1 do not say where that was:
        all models from such files draw the same masks, from the first on.
        """
        saved = storage.load(path)
        return cls._from(saved.cell, saved.params, saved.batch_first, saved.dropout_key or 0)

    @classmethod
    def from_torch_state_dict(
        cls,
        state_dict: Mapping[str, Array],
        *,
        prefix: str = "",
        batch_first: bool = False,
        dropout: float = 0.0,
        seed: Any = None,
    ) -> LSTM:
        """Build a model from the weights of a ``torch.nn.LSTM``, or of one layer from those of an ``LSTMCell``.

        Parameters
        ----------
        state_dict : mapping of str to numpy.ndarray
            ``{name: tensor.numpy() for name, tensor in module.state_dict().items()}``. PyTorch's two biases
            are added.
        prefix : str
            What stands before each name, for an LSTM inside a larger module; names without it are left out.
        batch_first, dropout
            As in the constructor: a state dict does not hold them.
        seed : None, int, SeedSequence, BitGenerator or Generator
            Determines the dropout masks, as for :func:`numpy.random.default_rng`; without it, each model draws others.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            If the mapping is not that of a ``torch.nn.LSTM`` without projections.
        """
        cell, params = interchange.from_torch_state_dict(state_dict, prefix=prefix, dropout=dropout)
        return cls._from(cell, params, batch_first, _new_key(parameters.generator(seed)))

    def to_torch_state_dict(self, *, prefix: str = "") -> dict[str, np.ndarray[Any, Any]]:
        """Return the weights under PyTorch's names: the inverse of :meth:`from_torch_state_dict`.

        The bias goes to ``bias_ih``, and ``bias_hh`` is zero.
        """
        given = checks.params(self.cell, self.params)
        params = {name: on_host(name, value) for name, value in given.items()}
        return interchange.to_torch_state_dict(self.cell, params, prefix=prefix)

    def __repr__(self) -> str:
        cell = self.cell
        options = [
            f"{name}={value!r}"
            for name, value, default in (
                ("num_layers", cell.num_layers, 1),
                ("bias", cell.bias, True),
                ("batch_first", self.batch_first, False),
                ("dropout", cell.dropout, 0.0),
                ("bidirectional", cell.bidirectional, False),
                ("peephole", cell.peephole, False),
            )
            if value != default
        ]
        arguments = ", ".join([str(cell.input_size), str(cell.hidden_size), *options, f"dtype={cell.dtype.name}"])
        frozen = ".freeze()" if isinstance(self.params, FrozenParams) else ""
        return f"LSTM({arguments}){frozen}  # {self.num_parameters:,} parameters"


def _new_key(rng: np.random.Generator) -> int:
    """Draw where the dropout masks of a new model start."""
    return int(rng.integers(2**63))
