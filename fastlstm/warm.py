"""Compile the CPU kernels ahead of time: for container images, read-only installations, and a fast first call."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np

from fastlstm.backends.cpu.schedule import FEW_ROWS
from fastlstm.dispatch import backend_named, use_backend
from fastlstm.errors import KernelCacheWarning
from fastlstm.lstm import LSTM

__all__ = ["Report", "warm"]


class Report(NamedTuple):
    """The result of :func:`warm`."""

    compiled: dict[str, int]  # by kernel: the number of compilations, one for each dtype and kind of arguments
    loaded: dict[str, int]  # by kernel: the number loaded from disk
    seconds: float
    cache: str  # the folders that were used, or the reason why there is none
    problem: str | None  # the reason why the next process will not find all of these kernels


def warm(dtypes: Sequence[str], *, train: bool = False, step: bool = False, loops: bool = False) -> Report:
    """Compile every kernel that later processes need, or find it on disk, and have all in one folder.

    Each kind of call is made once on a small model. That is enough: there is one kernel for long calls, one for short
    calls and one for cells with phases, such as layer norm and projections, and each serves all sizes. Left out are the
    routines of other variants than peepholes, such as activations, which take half a second each.

    Parameters
    ----------
    dtypes : sequence of {"float32", "float64"}
        The dtypes of the models.
    train : bool
        Also compile the kernels for training.
    step : bool
        Also make single time steps. They share the kernels of short calls.
    loops : bool
        Also compile the kernels of closed loops: ``lstm.unroll`` and ``lstm.compiled``.

    Returns
    -------
    Report

    Raises
    ------
    BackendError
        If the CPU backend cannot run on this machine.
    """
    backend_named("cpu")
    thread_pool: Any = import_module("fastlstm.backends.cpu.thread_pool")
    cache = import_module("fastlstm.kernels.cpu.kernel_cache")
    jit = import_module("fastlstm.kernels.cpu.jit")
    cache.announce(silently=True)
    problem: str | None = jit.PLAIN or (cache.describe() if cache.SOURCES is None else None)
    if problem is not None:  # no kernel would be kept on disk
        return Report({}, {}, 0.0, "none", problem)
    start, before = time.perf_counter(), _counts(jit.KERNELS)
    with warnings.catch_warnings(), use_backend("cpu"), cache.gather():
        warnings.simplefilter("ignore", KernelCacheWarning)  # the report has it
        for dtype in dtypes:
            _run(dtype, train, step)
            if loops:
                _run_loops(dtype)
        # With more than one thread: workers run `serve`; `run_records` runs both directions at once.
        jit.compile_for(import_module("fastlstm.kernels.cpu.worker").serve, (0, 0))
        records = thread_pool.new_records(2), thread_pool.NO_TEAM, 0
        jit.compile_for(import_module("fastlstm.kernels.cpu.thread_team").run_records, records)
    compiled, loaded = (after - past for after, past in zip(_counts(jit.KERNELS), before, strict=True))
    where = ", ".join(map(str, cache.used)) or cache.describe()
    return Report(dict(compiled), dict(loaded), time.perf_counter() - start, where, cache.problem or cache.elsewhere())


def _counts(kernels: Sequence[Any]) -> tuple[Counter[str], Counter[str]]:
    """Count compilations and loads of each kernel."""
    compiled, loaded = Counter[str](), Counter[str]()
    for kernel in kernels:
        compiled[kernel.__name__] += sum(kernel.stats.cache_misses.values())
        loaded[kernel.__name__] += sum(kernel.stats.cache_hits.values())
    return compiled, loaded


def _run(dtype: str, train: bool, step: bool) -> None:
    """Make each kind of call once, with a small and a large batch, and some with peepholes and layer norm."""
    model, x = LSTM(3, 4, dtype=np.dtype(dtype), seed=0), np.ones((2, 2, 3), dtype)
    LSTM(3, 4, peephole=True, dtype=np.dtype(dtype), seed=0)(x)
    with_phases = LSTM(3, 4, layer_norm=True, dtype=np.dtype(dtype), seed=0)
    with_phases(x)
    if train:
        y, _, tape = with_phases.forward(x)
        with_phases.backward(tape, y)
    model(x, lengths=[1, 2])
    frozen = model.freeze()
    inputs = [np.ones((steps, FEW_ROWS, 3), dtype)[:, :batch] for steps, batch in ((32, FEW_ROWS), (1, 1))]
    for x in inputs:
        for each in (model, frozen):
            each(x)
            if step:
                each.step(x[0])
        for recompute in (False, True) if train else ():
            y, _, tape = model.forward(x, recompute=recompute)
            model.backward(tape, y)


def _run_loops(dtype: str) -> None:
    """Take one step forward and back, with the kernels that Python calls, and have those that compiled code calls."""
    model, x = LSTM(3, 4, dtype=np.dtype(dtype), seed=0), np.ones((1, 3), dtype)
    run = model.unroll(steps=1, batch=1)
    y = run.step(x)
    back = run.backward()
    back.step(y)
    back.finish()
    model.compiled().tape(1, 1)
