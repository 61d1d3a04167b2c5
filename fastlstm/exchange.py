"""class Exchange: models from and to the files of other software; each reader is imported when used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from fastlstm import checks, parameters
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.mask_keys import new_key
from fastlstm.recurrent import Recurrent, on_host

if TYPE_CHECKING:
    from fastlstm.interchange.source import PathOrFile

__all__ = ["Exchange"]


class Exchange(Recurrent):
    """Constructors that read the models of other software, and methods that write models for it."""

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
            Common prefix of the LSTM's parameter names, such as ``"lstm."``. The keys of nested dictionaries are part
            of it: ``"state_dict.lstm."``. If it is wrong, the error lists the valid prefixes.
        batch_first, dropout
            As in the constructor: the file does not hold them.
        seed : None, int, SeedSequence, BitGenerator or Generator
            Determines the dropout masks.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError
            If there is no LSTM with this prefix, or fastlstm cannot run it.
        ModelFileError
            If the file is damaged, of an unsupported kind (TorchScript, tar, quantised), or refers to a class or
            function that tensors do not need. Code in a file is never executed.
        OSError
            If the file cannot be opened.
        """
        from fastlstm import interchange
        from fastlstm.interchange.torch_file import load_state_dict

        state_dict = load_state_dict(path, prefix)
        cell, params = interchange.from_torch_state_dict(state_dict, prefix=prefix, dropout=dropout)
        return cls._read(cell, params, batch_first, seed)

    def _host_params(self) -> dict[str, Any]:
        """Check the parameters, and return them as NumPy arrays."""
        return {name: on_host(name, value) for name, value in checks.params(self.cell, self.params).items()}

    @classmethod
    def from_keras(
        cls,
        source: Any,
        layer: str | Sequence[str] | None = None,
        *,
        activations: tuple[str, str, str] | None = None,
        merge: str | None = None,
        batch_first: bool = True,
        dropout: float | None = None,
        recurrent_dropout: float | None = None,
        seed: Any = None,
    ) -> Self:
        """Build a model from an ``LSTM`` or ``Bidirectional(LSTM)`` layer of Keras, or from stacked ones.

        Parameters
        ----------
        source : str, path-like, binary file object, or list of array
            A file (``.keras``, ``.weights.h5``, or the ``.h5`` of older versions), which takes h5py (``pip install
            "fastlstm[keras]"``); or the result of
            ``layer.get_weights()``; or a list of such results, for stacked layers.
        layer : str or sequence of str, optional
            The name of the layer in the file; several become one model of stacked layers. It can be left out if there
            is one LSTM alone; otherwise the error lists the names.
        activations, merge
            As in the constructor. By default they are read from the configuration in a ``.keras`` or ``.h5`` file.
            Weights without a configuration take Keras's defaults: sigmoid, tanh and "concat".
        batch_first : bool
            True, as in Keras.
        dropout, recurrent_dropout : float, optional
            As in the constructor. By default they are read from the configuration, too: `dropout` from the ``Dropout``
            layers between stacked layers. Weights without a configuration have none.
        seed
            As in the constructor.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            If there is no such layer, or it has something that fastlstm does not have; it is named.
        BackendError
            If h5py is missing.
        ModelFileError
            If the file is damaged or foreign.
        OSError
            If the file cannot be opened.

        Notes
        -----
        What affects training only and has no counterpart is not read: a layer's own `dropout`, which Keras applies to
        the input of that layer; regularisers and constraints; ``Dropout`` layers with a `noise_shape`. Both libraries
        drop the same entries of h at each step of a sequence, before the recurrent product; Keras draws one mask for
        each gate, fastlstm one for all gates.
        """
        from fastlstm.interchange import keras

        fields = {"activations": activations, "merge": merge}
        given = {name: value for name, value in fields.items() if value is not None}
        cell, params = keras.from_keras(source, layer, dropout=dropout, recurrent_dropout=recurrent_dropout, **given)
        return cls._read(cell, params, batch_first, seed)

    def to_keras(self, path: str | os.PathLike[str] | None = None) -> list[list[Any]]:
        """Return the weights as Keras has them, and write them to a file if there is a `path`.

        Parameters
        ----------
        path : str or path-like, optional
            A ``.keras`` file, of a Sequential model of these layers, or a ``.weights.h5`` file; written whole or not
            at all. This takes h5py (``pip install "fastlstm[keras]"``).

        Returns
        -------
        list of list of numpy.ndarray
            For each layer, the argument of its ``set_weights()``: kernel, recurrent kernel and bias, for each
            direction.

        Raises
        ------
        ArgumentError
            If the model has a variant that Keras's LSTM does not have; it is named.
        BackendError
            If h5py is missing.
        OSError
            If the file cannot be written.

        Notes
        -----
        A ``.keras`` file has the dropout, as ``Dropout`` layers, and the recurrent dropout, for which Keras draws one
        mask for each gate, fastlstm one for all gates. A truncated gradient, which affects training only, is not
        exported.
        """
        from fastlstm.interchange import keras

        params = self._host_params()
        if path is not None:
            keras.write_keras(path, self.cell, params)
        return keras.to_keras(self.cell, params)

    @classmethod
    def from_gates(
        cls,
        gates: Any,
        order: Sequence[str] | None = None,
        *,
        backward: Any = None,
        transposed: bool = False,
        interleaved: bool = False,
        batch_first: bool = False,
        seed: Any = None,
        **fields: Any,
    ) -> Self:
        """Build a model from weights in any layout: gate by gate, as in a paper, or stacked in any order.

        Parameters
        ----------
        gates : mapping, tuple or list
            ``{"i": (W, U, b), "f": ..., "g": ..., "o": ...}``, with W (H, I) for the input, U (H, H) for the hidden
            state, and a bias b (H,) or none; peephole weights p (H,) of i, f and o may follow. Or a tuple ``(W, U, b)``
            or ``(W, U, b, p)`` of arrays in which the gates are stacked: (4H, I), (4H, H), (4H,), (3, H). Or a list
            of either, one for each layer. g may be called c or a; b may be None.
        order : sequence of str, optional
            The order of the stacked gates, such as "ifgo" or "iofc"; of peepholes, the same without g.
        backward : mapping, tuple or list, optional
            The weights of the second, reverse direction, given likewise.
        transposed : bool
            Whether matrices are (I, H) and (H, H) for ``x @ W``, stacked in their columns.
        interleaved : bool
            Whether stacked rows (columns) go unit by unit, all gates of a unit side by side, as in Chainer.
        batch_first, seed
            As in the constructor.
        **fields
            Other arguments of the constructor: `activations`, `clip`, `cell_clip`, `coupled`, `forget_gate`,
            `truncated`, `reverse`, `merge`, `zoneout`, `dropout`, `recurrent_dropout`. Without a forget gate of its
            own, a cell has the gates i, g and o.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            If a gate is missing or unknown, or shapes or dtypes do not fit each other.

        Examples
        --------
        >>> import numpy as np
        >>> from fastlstm import LSTM
        >>> gate = np.ones((8, 3), np.float32), np.ones((8, 8), np.float32)
        >>> LSTM.from_gates({"f": gate, "i": gate, "o": gate, "c": gate})
        LSTM(3, 8, bias=False, dtype=float32)  # 352 parameters
        """
        from fastlstm.interchange import gates as module

        cell, params = module.from_gates(
            gates, order, backward=backward, transposed=transposed, interleaved=interleaved, **fields
        )
        return cls._read(cell, params, batch_first, seed)

    @classmethod
    def from_onnx(
        cls, source: Any, node: str | Sequence[str] | None = None, *, dropout: float = 0.0, seed: Any = None
    ) -> Self:
        """Build a model from an LSTM node of an ONNX model, or from stacked ones.

        Parameters
        ----------
        source : str, path-like, binary file object or onnx.ModelProto
            The model. This takes onnx (``pip install "fastlstm[onnx]"``).
        node : str or sequence of str, optional
            The name of the node, or of one of its outputs; several become one model of stacked layers. It can be left
            out if there is one LSTM node alone, or if all are the layers of one LSTM; otherwise the error lists them.
        dropout, seed
            As in the constructor.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError
            If there is no such node, or it has something that fastlstm does not have; it is named.
        BackendError
            If onnx is missing.
        ModelFileError
            If the file is damaged or foreign.
        OSError
            If the file cannot be opened.

        Notes
        -----
        Initial states and lengths are arguments of the calls, as they are inputs of the node. A node with ``layout=1``
        makes a model with ``batch_first=True``.
        """
        from fastlstm.interchange import onnx

        cell, params, batch_first = onnx.from_onnx(source, node)
        return cls._read(replace(cell, dropout=dropout), params, batch_first, seed)

    def to_onnx(self, path: str | os.PathLike[str] | BinaryIO, *, state: bool = False, lengths: bool = False) -> None:
        """Write an ONNX model (opset 14) of this LSTM for inference: x to y, h_n and c_n, laid out as in a call.

        Parameters
        ----------
        path : str, path-like or binary file object
            Where to write; a file at a path appears whole or not at all. This takes onnx (``pip install
            "fastlstm[onnx]"``).
        state : bool
            Whether the initial states are inputs of the model, h0 and c0 (L*D, B, H).
        lengths : bool
            Whether the lengths are an input of the model, (B,) int32. For a length of 0, onnxruntime returns zeros
            where fastlstm returns the initial state.

        Raises
        ------
        ArgumentError
            If the model has a variant that ONNX's LSTM does not have; it is named.
        BackendError
            If onnx is missing.
        OSError
            If the file cannot be written.

        Notes
        -----
        Fields that affect training only are not exported: dropout, recurrent dropout and a truncated gradient. The file
        of a float64 model is valid, but onnxruntime, whose LSTM is for float32 alone, cannot run it.
        For an input without steps, onnxruntime's h_n and c_n are not the initial state, as fastlstm's are.
        """
        from fastlstm.interchange import onnx

        checks.flag("state", state), checks.flag("lengths", lengths)
        onnx.write_onnx(path, self.cell, self._host_params(), self.batch_first, state, lengths)
