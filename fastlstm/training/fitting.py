"""The training loop, as a function: what it is given is checked here, and :mod:`fastlstm.training.loop` runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from fastlstm import checks, parameters
from fastlstm.backends.base import Array
from fastlstm.cell import real
from fastlstm.errors import ArgumentError, BackendError, shown
from fastlstm.training import arguments
from fastlstm.training.agreement import fingerprint
from fastlstm.training.history import History
from fastlstm.training.loop import SCHEDULES, Loss, Run
from fastlstm.training.losses import mean_squared_error
from fastlstm.training.model import Model
from fastlstm.training.optimisers import Adam, Optimiser
from fastlstm.training.processes import abort_on_error, checked_comm, refuse_together
from fastlstm.training.samples import Samples
from fastlstm.training.trial import check_counts, check_losses

__all__ = ["fit"]

MOST_EPOCHS = 10**9  # more are a mistake


def fit(
    model: Model,
    x: Any,
    y: Any,
    *,
    lengths: Any = None,
    mask: Any = None,
    loss: Loss | Mapping[str, Loss] = mean_squared_error,
    loss_arrays: Mapping[str, Array] | None = None,
    optimiser: Optimiser | None = None,
    epochs: int = 50,
    batch_size: int = 32,
    shuffle: bool = True,
    validation: Any = None,
    patience: int | None = None,
    schedule: str | Callable[[int], float] = "constant",
    clip_norm: float | None = None,
    seed: Any = None,
    recompute: bool = False,
    progress: bool = False,
    callback: Callable[[Model, History], Any] | None = None,
    comm: Any = None,
) -> History:
    """Train a model in mini-batches.

    Parameters
    ----------
    model : Model
        The model; its parameters are changed in place. If it scales and has no scaler yet, the training data are
        measured first, without those for validation.
    x : array, (T, N, I), (N, T, I) if the model is `batch_first`, or list of N arrays (T_i, I)
        The inputs, of the model's library and dtype.
    y : array, list of arrays, or dict of these by head
        The targets: (N, K), or if the model's output is ``sequence`` laid out as `x`, with K in place of I. The axis of
        a K of one may be left out. Integers are classes, without an axis K.
    lengths : (N,) integers, optional
        The length of each sequence, for an array.
    mask : array or list, (N,), or laid out as `x` without its last axis, optional
        Which positions count: bool, or weights of at least zero. Elsewhere `y` may be NaN.
    loss : function, or mapping of str to function by head
        ``loss(prediction, target, mask, **arrays) -> value, gradient``, such as :func:`mean_squared_error`, a
        ``functools.partial`` of one, or your own. It gets (B, K), or (T, B, K) for outputs at each step. Those of
        several heads are added. Each is tried before the run, on a batch of each data set with a prediction of zeros.
    loss_arrays : mapping of str to array (N, ...), optional
        More arguments of the loss, of which it gets the batch's part: ``{"deviation": s}`` for
        :func:`nash_sutcliffe_loss`.
    optimiser : SGD, Adam or AdamW, optional
        An optimiser of `model`, such as ``Adam(model, lr=5e-3)``; ``Adam(model)`` by default.
    epochs : int
        The most passes over the data.
    batch_size : int
        Sequences in a batch.
    shuffle : bool
        Whether each epoch has the sequences in another order.
    validation : float, tuple (x, y), or mapping, optional
        Data that are not trained on: a share of the sequences in (0, 1), drawn at random; or others, of which a mapping
        may also have `lengths`, `mask` and `loss_arrays`. The parameters with the least loss of these are restored at
        the end.
    patience : int, optional
        Stop after so many epochs without a smaller validation loss.
    schedule : {"constant", "linear", "cosine"} or function
        By what the learning rate is multiplied: falling to zero over the run, or ``schedule(epoch)``, from epoch 0 on.
        The optimiser's rate is set back at the end.
    clip_norm : float, optional
        The largest global norm of the gradients: see :func:`clip_by_global_norm`.
    seed : None, int, SeedSequence, BitGenerator or Generator
        Determines the order of the sequences and what is drawn for validation.
    recompute : bool
        Save memory: see :meth:`fastlstm.LSTM.forward`.
    progress : bool
        Whether to show a progress bar on stderr; needs tqdm.
    callback : function, optional
        ``callback(model, history)``, called after each epoch; the run stops if it returns True.
    comm : mpi4py.MPI.Comm, optional
        Train in all processes of a communicator. Each is given the same data and takes its part of each batch, the
        gradients are averaged by :func:`allreduce`, and the parameters, the seed and the rates of a schedule are those
        of process 0. The losses are those of one process, but for rounding; dropout masks are others. Data and options
        other than `progress`, `callback` and `seed` must be the same everywhere, which is checked: the data by a
        checksum, of more than 1 GiB by that of evenly spaced parts. An exception in one process ends the job.

    Returns
    -------
    History
        Losses, rates and times of each epoch, and why the run ended. It ends early if the loss is not finite.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, ArrayTypeError
        Before any work, if an argument does not fit, a class is out of range, or no position counts. What `schedule`,
        `callback` or a loss of your own raises later ends the run, with the parameters of the last step and their
        scaler.
    BackendError
        If `progress` is asked for and tqdm is not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from fastlstm import LSTM
    >>> from fastlstm.training import Adam, Linear, Model, fit
    >>> x = np.random.default_rng(0).normal(size=(10, 64, 1)).astype(np.float32)  # (T, N, I)
    >>> model = Model(LSTM(1, 8, seed=0), Linear(8, 1, seed=1), scale=True)
    >>> history = fit(model, x, x.sum(axis=0), optimiser=Adam(model, lr=0.02), epochs=20, validation=0.25, seed=0)
    >>> history.validation_loss[-1] < 0.5 * history.validation_loss[0]
    True
    """
    checked_comm(comm, "Allreduce", "Bcast", "bcast", "allgather", "Abort", "Get_rank", "Get_size", optional=True)
    with refuse_together(comm) as common:
        run = Run(
            model=_model(model),
            losses=_losses(model, loss),
            optimiser=_optimiser(model, optimiser),
            epochs=arguments.count("epochs", epochs, least=1, most=MOST_EPOCHS),
            batch_size=arguments.count("batch_size", batch_size, least=1),
            shuffle=checks.flag("shuffle", shuffle),
            patience=_patience(patience, validation),
            schedule=_schedule(schedule),
            clip_norm=None if clip_norm is None else arguments.number("clip_norm", clip_norm, above=0.0),
            recompute=checks.flag("recompute", recompute),
            progress=_progress(progress),
            callback=_function("callback", callback),
            comm=comm,
        )
        rng = parameters.generator(seed)
        data, held_out = _samples(model, x, y, lengths, mask, loss_arrays), _other_data(model, validation)
        check_losses(run, data, "training")
        if held_out is not None:
            check_losses(run, held_out, "validation")
        if comm is not None and comm.Get_size() > 1:
            common.update(fingerprint(run, data, held_out, validation))
    with abort_on_error(comm):
        rng = run.same_generator(rng)
    if held_out is None and validation is not None:
        with refuse_together(comm):
            data, held_out = _divided(data, float(validation), rng)
            check_counts(data, run.batch_size, "training")
            check_counts(held_out, run.batch_size, "validation")
    with abort_on_error(comm), _measured(run, data):
        return run.train(data, held_out, rng)


@contextlib.contextmanager
def _measured(run: Run, data: Samples) -> Iterator[None]:
    """Measure the data if the model needs a scaler; one that no step was made with does not stay after an error."""
    model, steps = run.model, run.optimiser.steps
    fresh = model.scale and model.scaler is None
    if fresh:
        model.scaler = data.measure()
    try:
        yield
    except BaseException:
        if fresh and run.optimiser.steps == steps:
            model.scaler = None
        raise


def _model(given: Any) -> Model:
    if not isinstance(given, Model):
        raise ArgumentError(f"model must be a fastlstm.training.Model, got {shown(given)}")
    return given


def _losses(model: Model, given: Any) -> dict[str, Loss]:
    found = dict(given) if isinstance(given, Mapping) else dict.fromkeys(model.heads, given)
    if found.keys() != model.heads.keys():
        raise ArgumentError(f"loss must be a function, or a mapping with the names of the heads, {list(model.heads)}")
    for value in found.values():
        if not callable(value):
            raise ArgumentError(f"loss must be a function such as mean_squared_error, got {shown(value)}")
    return found


def _optimiser(model: Model, given: Any) -> Optimiser:
    if given is None:
        given = Adam(model)
    if not isinstance(given, Optimiser):
        raise ArgumentError(f"optimiser must be one such as Adam(model, lr=1e-3), got {shown(given)}")
    params = given.params
    if params.keys() != model.params.keys() or any(params[name] is not value for name, value in model.params.items()):
        raise ArgumentError("optimiser must be one of this model, such as Adam(model, lr=1e-3)")
    given.check()
    return given


def _patience(given: Any, validation: Any) -> int | None:
    if given is None:
        return None
    if validation is None:
        raise ArgumentError("patience counts epochs without a smaller validation loss: give validation data, too")
    return arguments.count("patience", given, least=1)


def _schedule(given: Any) -> Callable[[int], float] | str:
    if isinstance(given, str) and given in SCHEDULES:
        return given
    if isinstance(given, str) or not callable(given):
        names = ", ".join(map(repr, SCHEDULES))
        raise ArgumentError(f"schedule must be one of {names} or a function of the epoch, got {shown(given)}")
    function: Callable[[int], float] = given
    return function


def _progress(given: Any) -> bool:
    if not checks.flag("progress", given):
        return False
    try:
        import tqdm
    except ImportError as error:
        raise BackendError("progress needs tqdm: pip install tqdm") from error
    return bool(tqdm)


def _function(name: str, given: Any) -> Any:
    if given is not None and not callable(given):
        raise ArgumentError(f"{name} must be a function, got {shown(given)}")
    return given


def _samples(model: Model, *given: Any) -> Samples:
    """Return the data, whose values are checked; `given` are x, y, lengths, mask and loss_arrays."""
    found = Samples(model, *given)
    found.check_values()
    return found


def _other_data(model: Model, given: Any) -> Samples | None:
    """Return the data for validation, or None if a share of the others is asked for, or none."""
    if given is None:
        return None
    names = ("x", "y", "lengths", "mask", "loss_arrays")
    if isinstance(given, tuple) and len(given) == 2:
        given = dict(zip(names, given, strict=False))
    if isinstance(given, Mapping):
        if not {"x", "y"} <= given.keys() <= set(names):
            raise ArgumentError(f"validation must have x and y, and may have {', '.join(names[2:])}")
        return _samples(model, *(given.get(name) for name in names))
    if not 0.0 < real(given) < 1.0:
        raise ArgumentError(f"validation must be a share in (0, 1), a pair (x, y) or a mapping, got {shown(given)}")
    return None


def _divided(data: Samples, share: float, rng: np.random.Generator) -> tuple[Samples, Samples]:
    """Draw a share of the samples, at least one, for validation; one stays for training."""
    if data.count < 2:
        raise ArgumentError("a share for validation takes at least two sequences")
    order = rng.permutation(data.count)
    held_out = min(max(1, round(share * data.count)), data.count - 1)
    return data.select(np.sort(order[held_out:])), data.select(np.sort(order[:held_out]))
