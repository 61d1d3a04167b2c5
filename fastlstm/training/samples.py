"""The data of a training run: checked once, then given out in batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from fastlstm import checks
from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError, DTypeError, ShapeError
from fastlstm.training import arguments, ragged
from fastlstm.training.losses import length_mask
from fastlstm.training.model import Model
from fastlstm.training.scaler import Moments, Scaler

__all__ = ["Batch", "Samples"]

PIECE = 256  # samples that are looked at together in the checks
LARGE = 2**30  # bytes of inputs beyond which `contents` has only some of the pieces: some seconds to sum up


class Batch(NamedTuple):
    """Some of the samples, as the model and the losses take them."""

    x: Array  # (T, B, I), or (B, T, I) if the model is batch_first
    lengths: np.ndarray[Any, Any] | None  # (B,)
    targets: dict[str, Array]  # by head: (B, ...) or, for outputs at each step, (T, B, ...)
    mask: Array | None  # (B,) or (T, B): which positions count
    arrays: dict[str, Array]  # (B, ...): more arguments of the loss
    weight: float  # number of positions that count, or the sum of their weights


class Samples:
    """Inputs and targets, with what belongs to each of them.

    Parameters
    ----------
    model : Model
        What they are for: it says where the axis of samples is, and which library and dtype they have.
    x, y, lengths, mask, loss_arrays
        As for :func:`fastlstm.training.fit`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        If something does not fit. Values are looked at by :meth:`check_values`.
    """

    def __init__(
        self, model: Model, x: Any, y: Any, lengths: Any = None, mask: Any = None, loss_arrays: Any = None
    ) -> None:
        self.model = model
        self.like = next(iter(model.lstms.values())).params["weight_ih_l0"]
        self.stepwise = model.output == "sequence"
        self.listed = isinstance(x, list | tuple)
        self._take_inputs(x, lengths)
        if not self.count:
            raise ArgumentError("x must have at least one sequence")
        self.y = {name: self._target(name, value) for name, value in model.by_head("y", y).items()}
        self.mask = None if mask is None else self._per_position("mask", mask, 0)
        if mask is not None and self._dtype(self.mask).kind != "b" and self._dtype(self.mask) != model.dtype:
            raise DTypeError(f"mask must be bool or {model.dtype}, got {self._dtype(self.mask)}")
        self.arrays = self._loss_arrays(loss_arrays)

    def _take_inputs(self, x: Any, lengths: Any) -> None:
        features = next(iter(self.model.lstms.values())).cell.input_size
        self.lengths: np.ndarray[Any, Any] | None
        if self.listed:
            if lengths is not None:
                raise ArgumentError("lengths are those of the sequences: leave them out where x is a list")
            self.x: Any = ragged.checked("x", x, self.like, features)
            self.lengths = np.array([len(sequence) for sequence in self.x], dtype=np.int64)
            self.count, self.steps = len(self.x), max(len(sequence) for sequence in self.x)
            return
        axes = "(N, T, I)" if self.model.batch_first else "(T, N, I)"
        self.x = checks.array("x", x, self.like, (None, None, features), axes)
        self.count, self.steps = self.x.shape[:2] if self.model.batch_first else self.x.shape[1::-1]
        self.lengths = checks.lengths(lengths, self.steps, self.count)

    def _target(self, name: str, value: Any) -> Any:
        label = "y" if self.model.single_head else f"y of {name}"
        columns = self.model.heads[name].params["weight"].shape[0]
        found = self._per_position(label, value, columns)
        kind = self._dtype(found)
        if kind.kind not in "iub" and kind != self.model.dtype:
            raise DTypeError(f"{label} has dtype {kind}, but the model is {self.model.dtype}: convert one of them")
        return found

    def _per_position(self, name: str, value: Any, columns: int) -> Any:
        """Check what stands beside each sequence or, for outputs at each step, beside each step.

        With `columns`, numbers may have an axis of this size, and must if it is above one.
        """
        if self.listed and self.stepwise:
            return self._list_per_position(name, value, columns)
        arguments.same_library(name, value, "the parameters", self.like)
        order = (self.count, self.steps) if self.model.batch_first else (self.steps, self.count)
        return _with_columns(name, _native(value), order if self.stepwise else (self.count,), columns)

    def _list_per_position(self, name: str, value: Any, columns: int) -> Any:
        assert self.lengths is not None
        if not isinstance(value, list | tuple) or len(value) != self.count:
            raise ArgumentError(f"{name} must be a list of {self.count} arrays, one for each sequence")
        found = []
        for k, (part, length) in enumerate(zip(value, self.lengths.tolist(), strict=True)):
            arguments.same_library(f"{name}[{k}]", part, "the parameters", self.like)
            found.append(_with_columns(f"{name}[{k}]", _native(part), (length,), columns))
        if len({(part.dtype, part.ndim) for part in found}) > 1:
            raise ArgumentError(f"all arrays in {name} must have the same dtype and number of axes")
        return found

    @staticmethod
    def _dtype(value: Any) -> np.dtype[Any]:
        found: np.dtype[Any] = (value[0] if isinstance(value, list) else value).dtype
        return found

    def _loss_arrays(self, given: Any) -> dict[str, Array]:
        if given is None:
            return {}
        if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
            raise ArgumentError("loss_arrays must be a mapping from names of the loss's arguments to arrays")
        found = {}
        for name, value in given.items():
            arguments.same_library(f"loss_arrays {name}", value, "the parameters", self.like)
            if value.ndim == 0 or value.shape[0] != self.count:
                raise ShapeError(
                    f"loss_arrays {name} must have shape (N, ...) = ({self.count}, ...), got {value.shape}"
                )
            found[name] = _native(value)
        return found

    def select(self, chosen: np.ndarray[Any, Any]) -> Samples:
        """Return some of the samples as a data set of their own; arrays are copied."""
        other = Samples.__new__(Samples)
        other.__dict__ |= self.__dict__
        other.count = len(chosen)
        other.x = self._pick(self.x, chosen, True)
        other.y = {name: self._pick(value, chosen, self.stepwise) for name, value in self.y.items()}
        other.mask = None if self.mask is None else self._pick(self.mask, chosen, self.stepwise)
        other.lengths = None if self.lengths is None else self.lengths[chosen]
        other.arrays = {name: self._pick(value, chosen, False) for name, value in self.arrays.items()}
        return other

    def _pick(self, values: Any, chosen: np.ndarray[Any, Any], stepwise: bool) -> Any:
        if isinstance(values, list):
            return [values[k] for k in chosen]
        index = array_namespace(values).asarray(chosen)
        return values[index] if self.model.batch_first or not stepwise else values[:, index]

    def batch(self, chosen: np.ndarray[Any, Any]) -> Batch:
        """Return a batch of samples, as many steps long as the longest of them."""
        lengths = None if self.lengths is None else self.lengths[chosen]
        steps = self.steps if lengths is None else int(lengths.max(initial=0))
        targets = {name: self._positions(value, chosen, steps) for name, value in self.y.items()}
        mask, weight = self._mask(chosen, lengths, steps)
        if self.listed:
            assert lengths is not None
            x = ragged.stack([self.x[k] for k in chosen], lengths)
            x = x.swapaxes(0, 1) if self.model.batch_first else x
        else:
            x = self._pick(self.x, chosen, True)
            x = x[:, :steps] if self.model.batch_first else x[:steps]
        arrays = {name: self._pick(value, chosen, False) for name, value in self.arrays.items()}
        return Batch(x, lengths, targets, mask, arrays, weight)

    def _positions(self, values: Any, chosen: np.ndarray[Any, Any], steps: int) -> Array:
        """Bring what stands beside positions into a batch: (B, ...) or (T, B, ...)."""
        if isinstance(values, list):
            parts = [values[k] for k in chosen]
            return ragged.stack(parts, np.array([len(part) for part in parts], dtype=np.int64))
        found: Array = self._pick(values, chosen, self.stepwise)
        if not self.stepwise:
            return found
        return (found.swapaxes(0, 1) if self.model.batch_first else found)[:steps]

    def _mask(
        self, chosen: np.ndarray[Any, Any], lengths: np.ndarray[Any, Any] | None, steps: int
    ) -> tuple[Array | None, float]:
        """Return which positions of a batch count, and how much they do together."""
        given = None if self.mask is None else self._positions(self.mask, chosen, steps)
        if self.stepwise and lengths is not None:
            inside = array_namespace(self.like).asarray(length_mask(lengths, steps))
            given = inside if given is None else given * inside
        if given is not None:
            return given, float(given.sum(dtype=np.float64))
        return None, float(len(chosen) * (steps if self.stepwise else 1))

    def weight(self, chosen: np.ndarray[Any, Any]) -> float:
        """Return how much the positions of a batch count together."""
        lengths = None if self.lengths is None else self.lengths[chosen]
        return self._mask(chosen, lengths, self.steps if lengths is None else int(lengths.max(initial=0)))[1]

    def batches(self, order: np.ndarray[Any, Any], size: int) -> Iterator[np.ndarray[Any, Any]]:
        """Cut an order of the samples into batches."""
        for first in range(0, len(order), size):
            yield order[first : first + size]

    def check_values(self) -> None:
        """Look for NaN and infinities in what is trained on.

        Raises
        ------
        ArgumentError
            If there is one in x within a sequence, or in y at a position that counts.
        """
        for batch in self._pieces():
            if not bool(array_namespace(self.like).isfinite(self._inside(batch)).all()):
                raise ArgumentError("x has NaN or infinite values within the sequences: fill them first")
            for name, target in batch.targets.items():
                xp = array_namespace(target)
                if target.dtype.kind == "f" and not bool(xp.isfinite(_counted(target, batch.mask)).all()):
                    raise ArgumentError(
                        f"y{'' if self.model.single_head else f' of {name}'} has NaN or infinite values at positions"
                        " that count: leave them out by a mask"
                    )
        if self.mask is not None:
            self._check_mask()

    def _check_mask(self) -> None:
        for batch in self._pieces():
            weights = batch.mask
            if weights is not None and weights.dtype.kind == "f":
                least, total = float(weights.min()), float(weights.sum(dtype=np.float64))
                if not (least >= 0 and total < np.inf):
                    raise ArgumentError("mask must have finite weights of at least zero")

    def check_classes(self, name: str, label: str) -> None:
        """Look for classes outside 0..K-1 in the integer targets of a head, where they count.

        Raises
        ------
        ArgumentError
            If there is one.
        """
        classes = self.model.heads[name].params["weight"].shape[0]
        first = self.y[name][0] if isinstance(self.y[name], list) else self.y[name]
        if first.dtype.kind not in "iu" or first.ndim > 1 + (self.stepwise and not self.listed):
            return
        for chosen in self.batches(np.arange(self.count), PIECE):
            lengths = None if self.lengths is None else self.lengths[chosen]
            steps = self.steps if lengths is None else int(lengths.max(initial=0))
            target = _counted(self._positions(self.y[name], chosen, steps), self._mask(chosen, lengths, steps)[0])
            if bool(((target < 0) | (target >= classes)).any()):
                raise ArgumentError(f"{label} must be in 0..K-1 = 0..{classes - 1} at every position that counts")

    def _pieces(self, step: int = 1) -> Iterator[Batch]:
        for chosen in itertools.islice(self.batches(np.arange(self.count), PIECE), None, None, step):
            yield self.batch(chosen)

    def contents(self) -> Iterator[tuple[str, Array]]:
        """Yield what has an influence, piece by piece with its name: neither padding nor targets that do not count.

        Of data of more than LARGE bytes these are only some pieces, evenly spaced.
        """
        size = sum(value.nbytes for value in self.x) if self.listed else self.x.nbytes
        for batch in self._pieces(max(1, -(-size // LARGE))):
            yield "x", self._inside(batch)
            for name, target in batch.targets.items():
                yield "y" if self.model.single_head else f"y of {name}", _counted(target, batch.mask)
            if self.mask is not None and batch.mask is not None:
                yield "mask", batch.mask
        if self.lengths is not None:
            yield "lengths", self.lengths
        for name, value in self.arrays.items():
            yield f"loss_arrays {name}", value

    def _inside(self, batch: Batch) -> Array:
        """Return the inputs within their sequences, (positions, I)."""
        x = batch.x.swapaxes(0, 1) if self.model.batch_first else batch.x
        if batch.lengths is None:
            return x.reshape(-1, x.shape[-1])
        return x[array_namespace(x).asarray(length_mask(batch.lengths, x.shape[0]))]

    def measure(self) -> Scaler:
        """Measure mean and deviation of the inputs within their sequences, and of the targets that count."""
        scaled = {name: value for name, value in self.y.items() if self._dtype(value).kind == "f"}
        columns = {name: (value[0] if isinstance(value, list) else value).shape[-1] for name, value in scaled.items()}
        columns["x"] = next(iter(self.model.lstms.values())).cell.input_size
        moments = {name: Moments(count) for name, count in columns.items()}
        for add in (Moments.add, Moments.add_again):
            for batch in self._pieces():
                add(moments["x"], self._inside(batch))
                for name in scaled:
                    target = _counted(batch.targets[name], batch.mask)
                    add(moments[name], target.reshape(-1, columns[name]))
        xp, arrays = array_namespace(self.like), {}
        for name, found in moments.items():
            # One target may serve all outputs of a head, such as those of a quantile loss.
            outputs = columns["x"] if name == "x" else self.model.heads[name].params["weight"].shape[0]
            for kind, values in (("mean", found.mean), ("deviation", found.deviation(self.like.dtype))):
                arrays[f"{name}.{kind}"] = xp.array(np.broadcast_to(values, outputs), dtype=self.like.dtype)
        return Scaler(arrays)


def _native(value: Array) -> Array:
    native = value.dtype.newbyteorder("=")
    return value if value.dtype == native else value.astype(native)


def _with_columns(name: str, value: Array, shape: tuple[int, ...], columns: int) -> Array:
    """Check the shape of what stands beside positions; a single column may be left out."""
    if not columns:
        if value.shape != shape:
            raise ShapeError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
        return value
    if value.shape[: len(shape)] == shape:
        if value.ndim == len(shape):
            return value if value.dtype.kind in "iu" else value[..., None]  # integers are classes
        elif value.ndim == len(shape) + 1 and value.shape[-1] in {1, columns}:
            return value
    raise ShapeError(f"{name} must have shape {(*shape, columns)}, or {shape} for classes, got {tuple(value.shape)}")


def _counted(values: Array, mask: Array | None) -> Array:
    """Return the values at the positions that count, one after another."""
    return values if mask is None else values[mask > 0]
