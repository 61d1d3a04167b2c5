"""class Exchange(Recurrent): models from and to the files of other software; each reader is imported when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from fastlstm import parameters
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.recurrent import Recurrent, new_key

if TYPE_CHECKING:
    from fastlstm.interchange.source import PathOrFile

__all__ = ["Exchange"]


class Exchange(Recurrent):
    """The constructors that read what other software wrote, and the methods that write for it."""

    @classmethod
    def _read(cls, cell: Cell, params: dict[str, Array], batch_first: bool, seed: Any) -> Self:
        return cls._from(cell, params, batch_first, new_key(parameters.generator(seed)))

    @classmethod
    def load_torch(
        cls,
        path: PathOrFile,
        prefix: str = "",
        *,
        batch_first: bool = False,
        dropout: float = 0.0,
        seed: Any = None,
    ) -> Self:
        """Read the weights of a ``torch.nn.LSTM`` or ``LSTMCell`` from a file, without PyTorch.

        Parameters
        ----------
        path : str, path-like or binary file object
            A file of ``torch.save(model.state_dict(), path)``, of any version since 0.1.10, or a ``.safetensors`` file
            of any producer.
        prefix : str
            What stands before the names of the LSTM's weights, such as ``"lstm."``; the names of a checkpoint's
            dictionaries belong to it: ``"state_dict.lstm."``. The error that a wrong one raises lists the right ones.
        batch_first, dropout
            As in the constructor: the file does not hold them.
        seed : None, int, SeedSequence, BitGenerator or Generator
            Determines the dropout masks.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError
            If there is no LSTM with this prefix, or fastlstm cannot run it.
        ModelFileError
            If the file is damaged, of another kind (TorchScript, tar, quantised), or refers to anything that tensors do
            not need: nothing in it is ever run.
        OSError
            If the file cannot be opened.
        """
        from fastlstm import interchange
        from fastlstm.interchange.torch_file import load_state_dict

        state_dict = load_state_dict(path, prefix)
        cell, params = interchange.from_torch_state_dict(state_dict, prefix=prefix, dropout=dropout)
        return cls._read(cell, params, batch_first, seed)
