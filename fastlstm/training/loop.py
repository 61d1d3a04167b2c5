"""The training loop itself: one step, one epoch, one run."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.dispatch import array_namespace
from fastlstm.errors import ArgumentError
from fastlstm.training import arguments
from fastlstm.training.clipping import clip_by_global_norm
from fastlstm.training.history import History
from fastlstm.training.model import Model
from fastlstm.training.optimisers import Optimiser
from fastlstm.training.reduction import allreduce, broadcast
from fastlstm.training.samples import Batch, Samples

__all__ = ["SCHEDULES", "Loss", "Run"]

Loss = Callable[..., tuple[Any, Array]]
SCHEDULES: dict[str, Callable[[float], float]] = {  # the share of the run that is over -> factor of the learning rate
    "constant": lambda _: 1.0,
    "linear": lambda share: 1.0 - share,
    "cosine": lambda share: 0.5 * (1.0 + math.cos(math.pi * share)),
}
# Between the dropout keys of two processes: more passes than any run has.
KEYS_APART = 2**48


@dataclass
class Run:
    """One run of :func:`fastlstm.training.fit`, with its options, which are checked."""

    model: Model
    losses: dict[str, Loss]  # by head
    optimiser: Optimiser
    epochs: int
    batch_size: int
    shuffle: bool
    patience: int | None
    schedule: str | Callable[[int], float]
    clip_norm: float | None
    recompute: bool
    progress: bool
    callback: Callable[[Model, History], Any] | None
    comm: Any  # None for one process

    def same_generator(self, rng: np.random.Generator) -> np.random.Generator:
        """Return a generator that is the same in all processes: that of process 0."""
        found: np.random.Generator = rng if self.comm is None else self.comm.bcast(rng, 0)
        return found

    def train(self, data: Samples, held_out: Samples | None, rng: np.random.Generator) -> History:
        """Train until the epochs are over, or a reason to stop comes."""
        history, best = History(), dict[str, Array]()
        with self._leaving_rate_and_keys() as rate, self._bar() as bar:
            for epoch in range(self.epochs):
                begin = time.perf_counter()
                self.optimiser.lr = rate * self._factor(epoch)
                self._epoch(data, rng.permutation(data.count) if self.shuffle else np.arange(data.count), history)
                if held_out is not None:
                    self._validate(held_out, history, best)
                history.seconds.append(time.perf_counter() - begin)
                history.stopped = self._reason_to_stop(history)
                _advance(bar, history)
                if history.stopped:
                    break
        history.stopped = history.stopped or "all epochs are over"
        for name, value in best.items():
            self.model.params[name][...] = value
        return history

    def _epoch(self, data: Samples, order: np.ndarray[Any, Any], history: History) -> None:
        total = weights = norm = 0.0
        for chosen in data.batches(order, self.batch_size):
            value, weight, length = self._step(data, chosen)
            total, weights = total + value * weight, weights + weight
            norm = float(np.maximum(norm, length))  # NaN stays
        history.loss.append(total / weights if weights else math.nan)
        history.learning_rate.append(self.optimiser.lr)
        if self.clip_norm is not None:
            history.gradient_norm.append(norm)

    def _step(self, data: Samples, chosen: np.ndarray[Any, Any]) -> tuple[float, float, float]:
        """Take one step; return the loss, the weight of the batch, and the norm of the gradients."""
        batch = self._part(data, chosen)
        value, grads = 0.0, None
        if batch is not None:
            prediction, tape = self.model.forward(batch.x, batch.lengths, recompute=self.recompute)
            value, dprediction = self.loss(batch, prediction)
            grads = dict(self.model.backward(tape, dprediction))
        weight = 0.0 if batch is None else batch.weight
        if self.comm is not None:
            weight, value, grads = self._reduced(data.weight(chosen), weight, value, grads)
        if not weight or grads is None:  # nothing in the batch counts
            return 0.0, 0.0, 0.0
        norm = 0.0
        if self.clip_norm is not None:
            grads, length = clip_by_global_norm(grads, self.clip_norm, params=self.model)
            norm = float(length)
        self.optimiser.step(grads)
        return value, weight, norm

    def _part(self, data: Samples, chosen: np.ndarray[Any, Any]) -> Batch | None:
        """Return this process's part of a batch, or None if nothing in it counts."""
        if self.comm is not None:
            chosen = np.array_split(chosen, self.comm.Get_size())[self.comm.Get_rank()]
        if not len(chosen):
            return None
        batch = data.batch(chosen)
        return batch if batch.weight > 0 else None

    def loss(self, batch: Batch, prediction: Any) -> tuple[float, Any]:
        """Return the sum of the heads' losses, and its gradients by their predictions."""
        swap = self.model.batch_first and self.model.output == "sequence"
        total, gradients = 0.0, {}
        for name, found in self.model.by_head("prediction", prediction).items():
            target = batch.targets[name]
            if self.model.scaler is not None and target.dtype.kind == "f":  # integers are classes
                target = self.model.scaler.scale(name, target)
            result = self.losses[name](found.swapaxes(0, 1) if swap else found, target, batch.mask, **batch.arrays)
            if not isinstance(result, tuple) or len(result) != 2:
                raise ArgumentError("loss must return a pair: its value and its gradient by the prediction")
            value, gradient = result
            total += float(value)
            gradients[name] = gradient.swapaxes(0, 1) if swap else gradient
        return total, next(iter(gradients.values())) if self.model.single_head else gradients

    def _reduced(
        self, whole: float, weight: float, value: float, grads: dict[str, Array] | None
    ) -> tuple[float, float, dict[str, Array]]:
        """Average loss and gradients over the processes; `whole` is the weight of the batch, `weight` of this part."""
        params = self.model.params
        xp = array_namespace(next(iter(params.values())))
        if grads is None:
            grads = {name: xp.zeros_like(param) for name, param in params.items()}
        # The loss goes the same way: no parameter has a name without a dot.
        found = allreduce({**grads, "loss": xp.asarray([value], dtype=self.model.dtype)}, self.comm, weight)
        return whole, float(found.pop("loss")[0]), found

    def _validate(self, data: Samples, history: History, best: dict[str, Array]) -> None:
        """Compute the validation loss, and keep the parameters if it is the least so far."""
        total = weights = 0.0
        for chosen in data.batches(np.arange(data.count), self.batch_size):
            batch = self._part(data, chosen)
            if batch is not None:
                total += self.loss(batch, self.model(batch.x, batch.lengths))[0] * batch.weight
                weights += batch.weight
        if self.comm is not None:
            sums = np.array([total, weights])
            receive = np.empty_like(sums)
            self.comm.Allreduce(sums, receive)
            total, weights = receive.tolist()
        loss = total / weights if weights else math.nan
        history.validation_loss.append(loss)
        least = math.inf if history.best_epoch is None else history.validation_loss[history.best_epoch]
        if loss < least:
            history.best_epoch = len(history.validation_loss) - 1
            best |= {name: value.copy() for name, value in self.model.params.items()}

    def _reason_to_stop(self, history: History) -> str:
        stop = self.callback is not None and self.callback(self.model, history) is True
        if self.comm is not None:
            stop = self.comm.bcast(stop, 0)
        if not math.isfinite(history.loss[-1]):
            return "the loss is not finite"
        epoch = len(history.loss) - 1
        since = epoch - (-1 if history.best_epoch is None else history.best_epoch)
        if self.patience is not None and since >= self.patience:
            return f"no smaller validation loss in {self.patience} epochs"
        return "the callback asked for it" if stop else ""

    def _factor(self, epoch: int) -> float:
        if isinstance(self.schedule, str):
            return SCHEDULES[self.schedule](epoch / self.epochs)
        factor = arguments.number("schedule's result", self.schedule(epoch), least=0.0)
        return factor if self.comm is None else float(self.comm.bcast(factor, 0))

    @contextlib.contextmanager
    def _leaving_rate_and_keys(self) -> Iterator[float]:
        """Yield the optimiser's rate, and set it back in the end; all processes then draw the same masks again."""
        rate, keys_apart = self.optimiser.lr, self._start_together()
        try:
            yield rate
        finally:
            self.optimiser.lr = rate
            self._move_keys(-keys_apart)

    def _start_together(self) -> int:
        """Give all processes the parameters of process 0, and keys of other masks; return how far these are apart."""
        if self.comm is None:
            return 0
        broadcast(self.model.params, self.comm)
        lstms = list(self.model.lstms.values())
        for lstm, key in zip(lstms, self.comm.bcast([lstm._dropout_key for lstm in lstms], 0), strict=True):
            lstm._dropout_key = key
        keys_apart: int = self.comm.Get_rank() * KEYS_APART
        self._move_keys(keys_apart)
        return keys_apart

    def _move_keys(self, by: int) -> None:
        for lstm in self.model.lstms.values() if by else ():
            lstm._dropout_key = (lstm._dropout_key + by) % 2**63

    def _bar(self) -> contextlib.AbstractContextManager[Any]:
        """Return the progress bar, in process 0 if it is asked for."""
        if not self.progress or (self.comm is not None and self.comm.Get_rank()):
            return contextlib.nullcontext()
        from tqdm import tqdm

        bar: contextlib.AbstractContextManager[Any] = tqdm(total=self.epochs, desc="training", unit="epoch")
        return bar


def _advance(bar: Any, history: History) -> None:
    """Show an epoch's losses in the progress bar, if there is one."""
    if bar is not None:
        losses = {"loss": history.loss, "validation": history.validation_loss}
        bar.set_postfix({name: f"{values[-1]:.4g}" for name, values in losses.items() if values}, refresh=False)
        bar.update()
