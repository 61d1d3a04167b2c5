"""Losses tried before a run: what would fail in a later batch, or in the validation after an epoch, fails before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError
from fastlstm.training.loop import Loss, Run
from fastlstm.training.losses import softmax_cross_entropy
from fastlstm.training.samples import Batch, Samples

__all__ = ["check_counts", "check_losses"]


def check_losses(run: Run, data: Samples, kind: str) -> None:
    """Check that the losses take the data; `kind` says which they are, ``training`` or ``validation``.

    Each loss is called for the first batch in which a position counts, with a prediction of zeros. The library's own
    losses that read `loss_arrays` are called for all batches, because they check the values. What this costs is little
    beside an epoch.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        If a loss does not take its arguments, returns no pair, a class is out of range, or no position counts.
    """
    for name, loss in run.losses.items():
        head, of = ("" if run.model.single_head else f" of {name}"), ("validation's " if kind == "validation" else "")
        _check_signature(f"loss{head}", loss, data.arrays)
        if _function(loss) is softmax_cross_entropy:
            data.check_classes(name, f"{of}y{head}")
    batches = _counting(data, run.batch_size, kind)
    everywhere = data.arrays and any(_is_ours(loss) for loss in run.losses.values())
    for number, batch in enumerate(batches):
        if number and not everywhere:
            break
        try:
            with np.errstate(all="ignore"):  # large targets that are not scaled yet
                run.loss(batch, _zeros(run, batch))
        except Exception as error:
            error.add_note(f"fastlstm: the loss was tried on the {kind} data")
            raise


def check_counts(data: Samples, size: int, kind: str) -> None:
    """Check that a position counts at all."""
    next(_counting(data, size, kind))


def _counting(data: Samples, size: int, kind: str) -> Iterator[Batch]:
    """Yield the batches in which a position counts, of which there must be one."""
    found = False
    for chosen in data.batches(np.arange(data.count), size):
        if data.weight(chosen) > 0:
            found = True
            yield data.batch(chosen)
    if not found:
        raise ArgumentError(f"no position of the {kind} data counts: the mask and the lengths leave out all of them")


def _function(loss: Loss) -> Any:
    """Return the function of a loss whose options are set by functools.partial."""
    return loss.func if isinstance(loss, functools.partial) else loss


def _is_ours(loss: Loss) -> bool:
    return str(getattr(_function(loss), "__module__", "")).startswith("fastlstm.training.")


def _check_signature(label: str, loss: Loss, arrays: dict[str, Array]) -> None:
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):  # a compiled function that has none
        return
    try:
        signature.bind(None, None, None, **arrays)
    except TypeError as error:
        given = ", ".join(["prediction", "target", "mask", *arrays])
        raise ArgumentError(f"{label} must take ({given}), the last ones from loss_arrays: {error}") from error


def _zeros(run: Run, batch: Batch) -> Any:
    """Return a prediction of zeros for a batch, in the model's layout."""
    model = run.model
    lead = batch.x.shape[:2] if model.output == "sequence" else (batch.x.shape[0 if model.batch_first else 1],)
    xp = array_namespace(batch.x)
    found = {
        name: xp.zeros((*lead, head.params["weight"].shape[0]), dtype=model.dtype) for name, head in model.heads.items()
    }
    return next(iter(found.values())) if model.single_head else found
