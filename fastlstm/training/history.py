"""The record of a training run, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["History"]


@dataclass(repr=False)
class History:
    """The record of a run of :func:`fastlstm.training.fit`.

    Attributes
    ----------
    loss : list of float
        The mean training loss of each epoch, as it was before each step.
    validation_loss : list of float
        The loss of the validation data after each epoch; empty without such data.
    learning_rate : list of float
        The optimiser's, in each epoch.
    gradient_norm : list of float
        The largest norm of the gradients of a batch, before clipping, in each epoch; empty if they are not clipped.
    seconds : list of float
        How long each epoch took, with its validation.
    best_epoch : int or None
        The epoch, from 0 on, with the least validation loss, whose parameters the model has; None without validation.
    stopped : str
        Why the run ended.
    """

    loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    learning_rate: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = ""

    def __repr__(self) -> str:
        losses = f", loss {self.loss[-1]:.4g}" if self.loss else ""
        if self.best_epoch is not None:
            losses += f", best validation loss {self.validation_loss[self.best_epoch]:.4g} (epoch {self.best_epoch})"
        return f"<History of {len(self.loss)} epochs{losses}; stopped: {self.stopped or 'not yet'}>"
