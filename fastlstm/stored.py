"""class Stored: saving a model to a file, and loading it."""

from __future__ import annotations

import os
from typing import Any, BinaryIO, Self

import numpy as np

from fastlstm import checks, dispatch, storage
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.errors import ModelFileError

__all__ = ["Stored", "on_host"]


class Stored:
    """`save` and `load` of a recurrent model."""

    cell: Cell
    params: dict[str, Array]
    batch_first: bool
    _dropout_key: Any

    @classmethod
    def _from(cls, cell: Cell, params: dict[str, Array], batch_first: bool, dropout_key: int = 0) -> Self:
        raise NotImplementedError

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
        >>> from fastlstm import LSTM
        >>> lstm, file = LSTM(input_size=3, hidden_size=8, seed=0), io.BytesIO()
        >>> lstm.save(file)
        >>> position = file.seek(0)
        >>> LSTM.load(file)
        LSTM(3, 8, dtype=float32)  # 384 parameters
        """
        given = checks.params(self.cell, self.params)
        params = {name: on_host(name, value) for name, value in given.items()}
        storage.save(path, self.cell, params, self.batch_first, self._dropout_key if self.cell.draws else None)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | BinaryIO) -> Self:
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
        is_rnn = saved.cell.nonlinearity is not None
        if is_rnn != (cls.__name__ == "RNN"):
            raise ModelFileError(
                f"the file holds {'a plain RNN: use RNN.load' if is_rnn else 'an LSTM: use LSTM.load'}"
            )
        return cls._from(saved.cell, saved.params, saved.batch_first, saved.dropout_key or 0)


def on_host(name: str, value: Array) -> np.ndarray[Any, Any]:
    """Return a parameter as a NumPy array."""
    host: np.ndarray[Any, Any] = value if dispatch.kind_of(name, value).library == "numpy" else value.get()
    return host
