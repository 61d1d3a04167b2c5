"""JAX as a side: one jitted ``lax.scan`` over the steps, after one product of all inputs with W_ih.

This is how JAX's users write an LSTM: the library itself has none on the CPU. Its products are held to the full
precision of the dtype. On the CPU each call is waited for, because JAX would run several at once; a GPU runs them one
after the other, so there the last one is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any

import numpy as np

from fastlstm.backends.cpu_limits import usable_cores
from fastlstm.bench import sides
from fastlstm.bench.sides import CHECKED_STEPS, Side
from fastlstm.bench.work import Array, Problem
from fastlstm.errors import BackendError

__all__ = ["cpu", "cuda", "start"]

THREADS = "PJRT_NPROC"  # the size of its CPU pool, read when that starts


def start(threads: int) -> str | None:
    """Start JAX with so many threads; it starts them once, so another number than the first cannot be had."""
    if "jax" not in sys.modules:
        os.environ.setdefault(THREADS, str(threads))
    import_module("jax").devices("cpu")
    has = os.environ.get(THREADS, str(usable_cores()))
    return None if has == str(threads) else f"JAX runs on {has} threads in this process, and cannot change to {threads}"


@contextlib.contextmanager
def _on(problem: Problem, threads: int, platform: str) -> Iterator[Side]:
    if (reason := start(threads)) is not None:
        raise BackendError(reason)
    jax = import_module("jax")
    lax, jnp = jax.lax, jax.numpy
    work = problem.work
    enable_x64 = (jax if hasattr(jax, "enable_x64") else import_module("jax.experimental")).enable_x64

    def held(function: Callable[[], Any]) -> Any:
        """Call with the precision held, which is part of what is compiled."""
        with enable_x64(work.dtype == "float64"), jax.default_matmul_precision("highest"):
            return function()

    device = jax.devices(platform)[0]
    zeros = np.zeros((work.batch, work.hidden), work.dtype)
    params, x, dy, zero = held(lambda: jax.device_put((problem.model.params, problem.x, problem.dy, zeros), device))

    def cell(params: Any, state: Any, inputs: Any) -> Any:
        """One step, from the input's products with W_ih."""
        h, c = state
        i, f, g, o = jnp.split(inputs + h @ params["weight_hh_l0"].T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def project(params: Any, x: Any) -> Any:
        return x @ params["weight_ih_l0"].T + params["bias_l0"]

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def forward(params: Any, x: Any) -> Any:
        return lax.scan(lambda state, inputs: cell(params, state, inputs), (zero, zero), project(params, x))[1]

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def both(params: Any, x: Any, dy: Any) -> Any:
        y, pull = jax.vjp(forward, params, x)
        grads, dx = pull(dy)
        return y, dx, *(grads[name] for name in sides.GRADIENTS)

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def step(params: Any, x_t: Any, state: Any) -> Any:
        return cell(params, state, project(params, x_t))

    x_t, state = held(lambda: x[0]), (zero, zero)

    def launch() -> Any:
        nonlocal state
        if work.kind == "infer":
            return (forward(params, x),)
        if work.kind == "train":
            return both(params, x, dy)
        state, h = step(params, x_t, state)
        return h

    def call() -> Any:
        return jax.block_until_ready(launch())

    def outputs() -> tuple[Array, ...]:
        nonlocal state
        if work.kind == "stream":
            state = (zero, zero)
            return (np.stack([np.asarray(call()) for _ in range(CHECKED_STEPS)]),)
        return tuple(np.asarray(value) for value in call())

    def seconds(ignored: Callable[[], Any], count: int) -> float:
        if platform == "cpu":
            return float(held(lambda: sides.host_seconds(call, count)))
        begin = time.perf_counter()
        held(lambda: [launch() for _ in range(count - 1)])
        held(call)
        return (time.perf_counter() - begin) / count

    yield Side(lambda: held(call), lambda: held(outputs), seconds)


def cpu(problem: Problem, threads: int) -> AbstractContextManager[Side]:
    """JAX on the CPU."""
    return _on(problem, threads, "cpu")


def cuda(problem: Problem, threads: int) -> AbstractContextManager[Side]:
    """JAX on the GPU, by the host's clock until the last result is there."""
    return _on(problem, threads, "gpu")
