"""Many independent streams in one service: river gauges, machines, users, each with a state of its own.

An example to copy from, not a part of the API. All states are in one pair of arrays, a column for each stream, so that
the streams that have news are advanced by one call. Streams come and go; a freed column is used again. The states can
be saved to a file and continued in another process, to the last bit: results of a frozen model are bit-identical
whichever other streams a stream is computed with.

>>> import numpy as np
>>> from fastlstm import LSTM, DTypeError, ModelFileError, ShapeError
>>> streams = Streams(LSTM(input_size=2, hidden_size=4, seed=0))
>>> found = streams.step({"Neckar": np.ones(2, np.float32), "Fils": np.zeros(2, np.float32)})
>>> found["Neckar"].shape, sorted(streams)
((4,), ['Fils', 'Neckar'])
>>> streams.close("Fils")
>>> list(streams)
['Neckar']
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastlstm import LSTM, DTypeError, ModelFileError, ShapeError

__all__ = ["Streams"]

Array = np.ndarray[Any, Any]


class Streams:
    """Streams by name, all through one model; a stream begins, from a state of zeros, at its first step.

    Parameters
    ----------
    lstm : LSTM
        A model of one direction, on NumPy arrays.
    """

    def __init__(self, lstm: LSTM) -> None:
        self.lstm = lstm.freeze()
        self._columns: dict[str, int] = {}
        self._free: list[int] = []
        self._h, self._c = self._states(0)  # (L, columns, H) each

    def __len__(self) -> int:
        return len(self._columns)

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def step(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Advance the streams that have news by one time step, in one call.

        Parameters
        ----------
        inputs : mapping of str to (I,) array
            The input of each of these streams.

        Returns
        -------
        dict of str to (H,) array
            The output of each.
        """
        x = (
            np.stack(list(inputs.values()))
            if inputs
            else np.empty((0, self.lstm.cell.input_size), self.lstm.cell.dtype)
        )
        known = [name for name in inputs if name in self._columns]
        new = [name for name in inputs if name not in self._columns]
        h, c = self._states(len(inputs))
        places = [place for place, name in enumerate(inputs) if name in self._columns]
        columns = [self._columns[name] for name in known]
        h[:, places], c[:, places] = self._h[:, columns], self._c[:, columns]
        y, (h, c) = self.lstm.step(x, (h, c))  # refuses what does not fit; until then nothing has changed
        for name in new:
            self._open(name)
        columns = [self._columns[name] for name in inputs]
        self._h[:, columns], self._c[:, columns] = h, c
        return dict(zip(inputs, y, strict=True))

    def close(self, name: str) -> None:
        """Forget a stream."""
        self._free.append(self._columns.pop(name))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write all states to a file, which appears whole or not at all. The model is saved by ``lstm.save``."""
        columns = list(self._columns.values())
        path, temporary = Path(path), Path(f"{os.fspath(path)}.new")
        with open(temporary, "wb") as file:
            np.savez(file, names=np.array(list(self._columns), str), h=self._h[:, columns], c=self._c[:, columns])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)

    @classmethod
    def load(cls, lstm: LSTM, path: str | os.PathLike[str]) -> Streams:
        """Continue the streams of a file.

        Raises
        ------
        ModelFileError
            If it is not what :meth:`save` writes.
        ShapeError, DTypeError
            If its states are those of a model of other sizes, or of another dtype.
        """
        streams = cls(lstm)
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as saved:
                names, *states = [saved[name] for name in ("names", "h", "c")]
            columns = {str(name): column for column, name in enumerate(names)}
            if len(columns) != len(names):
                raise ValueError("a name is there twice")
        except (ValueError, TypeError, LookupError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ModelFileError(f"{os.fspath(path)} is no file of streams: {error}") from error
        for name, found, expected in zip("hc", states, streams._states(len(columns)), strict=True):
            if found.shape != expected.shape:
                raise ShapeError(f"{name} in the file has shape {found.shape}, and the model needs {expected.shape}")
            if found.dtype != expected.dtype:
                raise DTypeError(f"{name} in the file is {found.dtype}, and the model {expected.dtype}")
        streams._columns, (streams._h, streams._c) = columns, states
        return streams

    def _open(self, name: str) -> None:
        if not self._free:
            columns = self._h.shape[1]
            more = max(16, columns)  # doubled, so that a column is moved a few times at most
            self._free = list(range(columns + more - 1, columns - 1, -1))
            before = self._h, self._c
            self._h, self._c = map(np.hstack, zip(before, self._states(more), strict=True))
        self._columns[name] = self._free.pop()

    def _states(self, columns: int) -> tuple[Array, Array]:
        cell = self.lstm.cell
        h, c = (np.zeros((cell.num_layers, columns, size), cell.dtype) for size in (cell.h_size, cell.c_size))
        return h, c
