"""class Model: recurrent layers, heads and scaling as one object, with one mapping of parameters and one file."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array
from fastlstm.cell import Cell
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, shown
from fastlstm.frozen import FrozenParams
from fastlstm.functional import Tape
from fastlstm.lstm import LSTM
from fastlstm.training import model_file, parts
from fastlstm.training.joined import Joined, join
from fastlstm.training.linear import Linear
from fastlstm.training.losses import length_mask
from fastlstm.training.ragged import pad
from fastlstm.training.scaler import Scaler

__all__ = ["OUTPUTS", "Model", "ModelTape"]

OUTPUTS = ("last", "mean", "sequence")
_SHARES = {"sum": 1.0, "mean": 0.5}  # of each direction in what a merge puts together


class ModelTape(NamedTuple):
    """The tape of a model, from :meth:`Model.forward` for :meth:`Model.backward`."""

    tapes: tuple[Tape, ...]  # one for each LSTM
    features: Array  # what the heads read: (B, F), or shaped as the last LSTM's output
    lengths: np.ndarray[Any, Any] | None
    shape: tuple[int, ...]  # of the last LSTM's output
    ends: Array | None  # (2, B, H) the final h of both directions, where the heads read their product


class Model:
    """One LSTM or several, one after another, with linear heads on the last one's output; and the scaling of the data.

    Parameters
    ----------
    lstm : LSTM, or list of LSTM
        The recurrent part. Of several, each reads the outputs of the one before.
    head : Linear, or mapping of str to Linear
        What turns features into predictions. Of several, each is another object, with its own prediction and target
        under its name.
    output : {"last", "mean", "sequence"}
        What the heads read: each sequence's last hidden state (with both directions, the end of each, put together as
        the LSTM's `merge` says), the mean of its outputs, or the output at each time step.
    scale : bool
        Whether inputs and targets are scaled to mean 0 and deviation 1, as :func:`fit` measures them in the training
        data; class indices never are.

    Attributes
    ----------
    params : mapping of str to array
        The live parameters of all parts: ``lstm.weight_ih_l0`` or, of several, ``lstm0.weight_ih_l0``, and
        ``head.weight`` or ``<name>.weight``.
    lstms, heads : dict
        The parts by name. They are those that were given, not copies.
    output : str
        As given.
    scaler : Scaler or None
        None if nothing is scaled, or not measured yet. It is no part of `params`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        If an argument does not fit, or the parts do not fit each other.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import LSTM
    >>> from fastlstm.training import Linear, Model
    >>> model = Model(LSTM(3, 8, seed=0), Linear(8, 1, seed=1))
    >>> list(model.params)
    ['lstm.weight_ih_l0', 'lstm.weight_hh_l0', 'lstm.bias_l0', 'head.weight', 'head.bias']
    >>> model.predict(np.ones((5, 2, 3), np.float32)).shape  # 5 time steps, 2 sequences
    (2, 1)
    """

    def __init__(
        self,
        lstm: LSTM | Sequence[LSTM],
        head: Linear | Mapping[str, Linear],
        *,
        output: str = "last",
        scale: bool = False,
    ) -> None:
        lstms, heads = parts.named_lstms(lstm), parts.named_heads(head)
        if not isinstance(output, str) or output not in OUTPUTS:
            raise ArgumentError(f"output must be one of {', '.join(map(repr, OUTPUTS))}, got {shown(output)}")
        scale = checks.flag("scale", scale)
        parts.check_sizes(lstms, heads)
        self._assemble(lstms, heads, isinstance(head, Linear), output, scale, None)

    def _assemble(
        self, lstms: dict[str, LSTM], heads: dict[str, Linear], single: bool, output: str, scale: bool,
        scaler: Scaler | None,
    ) -> Model:  # fmt: skip
        self.lstms, self.heads, self.single_head = lstms, heads, single
        self.output, self.scale, self.scaler = output, scale, scaler
        return self

    @property
    def params(self) -> Joined:
        """The live parameters of all parts."""
        return join(**self.lstms, **self.heads)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of parameters, inputs and predictions."""
        return self._first.cell.dtype

    @property
    def batch_first(self) -> bool:
        """Whether sequences are (B, T, features) in place of (T, B, features)."""
        return self._first.batch_first

    @property
    def _first(self) -> LSTM:
        return next(iter(self.lstms.values()))

    @property
    def num_parameters(self) -> int:
        """Number of trainable numbers in the model."""
        return sum(int(np.prod(value.shape)) for value in self.params.values())

    def __call__(self, x: Array, lengths: Any = None) -> Any:
        """Run the model for inference: what :meth:`forward` predicts, without dropout and without a tape."""
        return self._unnamed(self._infer(x, lengths)[0])

    def forward(self, x: Array, lengths: Any = None, *, recompute: bool = False) -> tuple[Any, ModelTape]:
        """Run the model for training, with dropout, and keep what :meth:`backward` needs.

        Parameters
        ----------
        x : array, (T, B, I), or (B, T, I) if the LSTMs are `batch_first`
            The inputs, in their own units.
        lengths : (B,) integers, optional
            The length of each sequence.
        recompute : bool
            Save memory: see :meth:`fastlstm.LSTM.forward`.

        Returns
        -------
        prediction : array or dict of str to array
            (B, K), or (T, B, K) or (B, T, K) if `output` is ``sequence``; of several heads a dict. Of a model that
            scales its targets it is the prediction of the scaled ones.
        tape : ModelTape
            For :meth:`backward`.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError, BackendError
            Before any work, if an argument does not fit.
        """
        x, lengths = self._checked(x, lengths)
        tapes = []
        for lstm in self.lstms.values():
            x, (h_n, _), tape = lstm.forward(x, None, lengths, recompute=recompute)
            tapes.append(tape)
        features = self._features(x, h_n, lengths)
        prediction = {name: head(features) for name, head in self.heads.items()}
        ends = h_n[-2:] if self.output == "last" and self._last.merge == "product" else None
        return self._unnamed(prediction), ModelTape(tuple(tapes), features, lengths, x.shape, ends)

    def backward(self, tape: ModelTape, dprediction: Any) -> Joined:
        """Back-propagate through the forward pass that left `tape`.

        Parameters
        ----------
        tape : ModelTape
            From :meth:`forward`.
        dprediction : array or mapping of str to array
            The loss's gradient by the prediction, shaped as it.

        Returns
        -------
        Joined
            The gradient of each parameter, under its name in `params`.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError
            Before any work, if an argument does not fit.
        """
        if not isinstance(tape, ModelTape) or len(tape.tapes) != len(self.lstms):
            raise ArgumentError("the tape is of another model")
        given = self.by_head("dprediction", dprediction)
        head_grads = {name: head.backward(tape.features, given[name]) for name, head in self.heads.items()}
        dfeatures = sum(grads.x for grads in head_grads.values())
        dy, dstate = self._spread(dfeatures, tape)
        grads: dict[str, Any] = {}
        first = next(iter(self.lstms))
        for (name, lstm), passed in zip(reversed(self.lstms.items()), reversed(tape.tapes), strict=True):
            # Nothing asks for the gradient by the model's own input.
            grads[name] = lstm.backward(passed, dy, dstate, input_gradient=name != first)
            dy, dstate = grads[name].x, None
        return join(**{name: grads[name] for name in self.lstms}, **head_grads)

    def predict(self, x: Any, lengths: Any = None) -> Any:
        """Predict, without dropout, in the units of the targets.

        Parameters
        ----------
        x : array, (T, B, I), (B, T, I) if the LSTMs are `batch_first`, or list of arrays (T_i, I)
            The inputs, in their own units.
        lengths : (B,) integers, optional
            The length of each sequence, for an array.

        Returns
        -------
        array, list of array, or dict of these
            (B, K). If `output` is ``sequence``, shaped as `x` but for the last axis and zero past each length, or of a
            list a list of (T_i, K). Of several heads a dict. A classifier's predictions are logits.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, ArrayTypeError, BackendError
            Before any work, if an argument does not fit.
        """
        listed = isinstance(x, list | tuple)
        if listed:
            if lengths is not None:
                raise ArgumentError("lengths are those of the sequences: leave them out where x is a list")
            x, lengths = pad("x", x, self._first.params["weight_ih_l0"], self._first.cell.input_size)
            x = x.swapaxes(0, 1) if self.batch_first else x
        predictions, lengths = self._infer(x, lengths)
        return self._unnamed({name: self._finished(name, p, lengths, listed) for name, p in predictions.items()})

    def _infer(self, x: Any, lengths: Any) -> tuple[dict[str, Array], np.ndarray[Any, Any] | None]:
        x, lengths = self._checked(x, lengths)
        for lstm in self.lstms.values():
            x, (h_n, _) = lstm(x, None, lengths)
        features = self._features(x, h_n, lengths)
        if isinstance(lstm.params, FrozenParams):
            return {name: _row_by_row(head, features) for name, head in self.heads.items()}, lengths
        return {name: head(features) for name, head in self.heads.items()}, lengths

    def _finished(self, name: str, prediction: Array, lengths: Any, listed: bool) -> Any:
        """Bring the prediction of one head to the units of its targets."""
        if self.scaler is not None:
            prediction = self.scaler.restore(name, prediction)
        if self.output != "sequence" or lengths is None:
            return prediction
        if listed:
            rows = prediction if self.batch_first else prediction.swapaxes(0, 1)
            return [row[:length].copy() for row, length in zip(rows, lengths, strict=True)]
        xp = array_namespace(prediction)
        steps = prediction.shape[1 if self.batch_first else 0]
        inside = xp.asarray(length_mask(lengths, steps, self.batch_first))
        return xp.where(inside[..., None], prediction, prediction.dtype.type(0))

    def _checked(self, x: Any, lengths: Any) -> tuple[Array, np.ndarray[Any, Any] | None]:
        like, cell = self._first.params["weight_ih_l0"], self._first.cell
        x = checks.array("x", x, like, (None, None, cell.input_size), "(B, T, I)" if self.batch_first else "(T, B, I)")
        batch, steps = x.shape[:2] if self.batch_first else x.shape[1::-1]
        lengths = checks.lengths(lengths, steps, batch)
        return (x if self.scaler is None else self.scaler.scale("x", x)), lengths

    def _features(self, y: Array, h_n: Array, lengths: np.ndarray[Any, Any] | None) -> Array:
        """Return what the heads read, of the last LSTM's output and final states."""
        if self.output == "sequence":
            return y
        if self.output == "mean":
            return y.sum(axis=self._time) * self._shares(y, lengths)
        ends, merge = h_n[-self._last.num_directions :], self._last.merge  # (D, B, H)
        if merge == "concat":
            return ends.swapaxes(0, 1).reshape(ends.shape[1], len(ends) * ends.shape[2])
        return ends[0] * ends[1] if merge == "product" else ends.sum(axis=0) * ends.dtype.type(_SHARES[merge])

    def _spread(self, dfeatures: Array, tape: ModelTape) -> tuple[Array | None, Any]:
        """Bring the gradient by the features back to the last LSTM's output, or to its final states."""
        xp = array_namespace(dfeatures)
        if self.output == "sequence":
            return dfeatures, None
        if self.output == "mean":
            dy = xp.expand_dims(dfeatures * self._shares(dfeatures, tape.lengths, tape.shape), self._time)
            return xp.broadcast_to(dy, tape.shape), None  # what it says past each length is ignored
        last, directions = self._last, self._last.num_directions
        dh = xp.zeros((last.num_layers * directions, len(dfeatures), last.h_size), dtype=dfeatures.dtype)
        if last.merge == "concat":
            dh[-directions:] = dfeatures.reshape(len(dfeatures), directions, last.h_size).swapaxes(0, 1)
        elif tape.ends is not None:
            dh[-2:] = dfeatures * tape.ends[::-1]
        else:
            dh[-2:] = dfeatures * dfeatures.dtype.type(_SHARES[last.merge])
        return None, (dh, None)

    def _shares(self, like: Array, lengths: Any, shape: tuple[int, ...] | None = None) -> Array:
        """Return one divided by the number of steps of each sequence, (B, 1); for none at all, one."""
        steps = (shape or like.shape)[self._time]
        batch = (shape or like.shape)[1 - self._time]
        counts = np.full(batch, steps) if lengths is None else lengths
        return array_namespace(like).asarray(1 / np.maximum(counts, 1)[:, None], dtype=like.dtype)

    @property
    def _time(self) -> int:
        return 1 if self.batch_first else 0

    @property
    def _last(self) -> Cell:
        return list(self.lstms.values())[-1].cell

    def by_head(self, name: str, values: Any) -> dict[str, Any]:
        """Return values, such as targets, by the names of their heads; of a single head they have none."""
        if self.single_head:
            return {next(iter(self.heads)): values}
        if not isinstance(values, Mapping) or values.keys() != self.heads.keys():
            raise ArgumentError(f"{name} must be a mapping with the names of the heads, {', '.join(self.heads)}")
        return dict(values)

    def _unnamed(self, values: dict[str, Any]) -> Any:
        return next(iter(values.values())) if self.single_head else values

    def freeze(self) -> Model:
        """Copy the model to one for inference: see :meth:`fastlstm.LSTM.freeze`.

        What it predicts for a sequence is bit-identical whatever else is in the batch.
        """
        frozen = {name: lstm.freeze() for name, lstm in self.lstms.items()}
        copied = copy.deepcopy(self.heads), self.single_head, self.output, self.scale, copy.deepcopy(self.scaler)
        return copy.copy(self)._assemble(frozen, *copied)

    def to(self, library: ModuleType) -> Model:
        """Copy the model to another array library, ``numpy`` or ``cupy``; see :meth:`fastlstm.LSTM.to`."""
        moved = copy.copy(self)
        return moved._assemble(
            {name: lstm.to(library) for name, lstm in self.lstms.items()},
            {name: head.to(library) for name, head in self.heads.items()},
            self.single_head, self.output, self.scale, None if self.scaler is None else self.scaler.to(library),
        )  # fmt: skip

    def save(self, path: str | os.PathLike[str] | BinaryIO) -> None:
        """Write the whole model to one file in the safetensors format, all of it or nothing.

        The tensors have the names of `params`, and those of the scaler stand under ``scaler.``. What
        :meth:`fastlstm.LSTM.save` says of paths, file objects and dropout masks holds here.

        Raises
        ------
        ArgumentError
            If `path` is neither a path nor a binary file object that can be written to.
        OSError
            If the file cannot be written.
        """
        model_file.save(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str] | BinaryIO) -> Model:
        """Read a model that :meth:`save` wrote; its parameters are NumPy arrays.

        Raises
        ------
        ArgumentError
            If `path` is neither a path nor a binary file object that can be read from.
        ModelFileError
            If the file is broken, truncated or foreign; nothing large is allocated.
        OSError
            If the file cannot be opened.
        """
        return cls.__new__(cls)._assemble(*model_file.load(path))

    def __repr__(self) -> str:
        named = [f"{name}={part!r}".partition("  #")[0] for name, part in (self.lstms | self.heads).items()]
        scaled = "" if not self.scale else ", scale=True"
        return f"Model({', '.join(named)}, output={self.output!r}{scaled})  # {self.num_parameters:,} parameters"


def _row_by_row(head: Linear, features: Array) -> Array:
    """Apply a head with sums in an order that does not depend on the number of rows, as it may in BLAS."""
    weight, bias = head.params["weight"], head.params.get("bias")
    y: Array = np.einsum("...h,kh->...k", np.ascontiguousarray(features), np.ascontiguousarray(weight))
    return y if bias is None else y + bias
