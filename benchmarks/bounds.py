"""Lower bounds of a call on this machine, as sides that take turns with it.

The bare microkernel makes as many multiply-adds on data in L1. For a few sequences the weights have to be read, the
recurrent ones at each step that has a state, and again for gradients. A single step is a call from Python.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fastlstm.bench import ceilings
from fastlstm.bench.sides import Side
from fastlstm.bench.work import Problem, Work

TILE, WEIGHTS, CALL = "bare microkernel", "reading the weights", "an empty call"
FEW = 8  # sequences: with more, each weight is used too often for reading it to be the limit


def of(work: Work, threads: int) -> dict[str, Callable[[], contextlib.AbstractContextManager[Side]]]:
    """Return the builders of the bounds that apply to a work."""
    found = {TILE: lambda: _at_once(lambda: ceilings.tile_job(work.dtype, work.operations / threads)[0], threads)}
    if work.batch <= FEW:
        found[WEIGHTS] = lambda: _at_once(lambda: _reading(work, threads), threads)
    if work.steps * work.batch <= FEW and work.kind != "train":
        found[CALL] = lambda: contextlib.nullcontext(_empty_call(Problem.of(work)))
    return found


@contextlib.contextmanager
def _at_once(job: Callable[[], Callable[[], None]], threads: int) -> Iterator[Side]:
    with ceilings.at_once([job() for _ in range(threads)]) as seconds:
        yield Side(lambda: seconds(1), lambda: (seconds(1), ())[1], lambda call, count: seconds(count))


@functools.cache
def reader() -> Any:
    """Compile the loop that reads an array so many times."""
    from fastlstm.kernels.cpu.jit import unkept_kernel
    from fastlstm.kernels.cpu.vector import address, fill, lanes_of, load, offset, store

    @unkept_kernel
    def read(passes, array, total):
        """Add an array up in serpentine order; eight sums, because an addition waits for the one before."""
        start = address(array)
        width = lanes_of(start)
        parts = array.size // (8 * width)
        a = b = c = d = e = f = g = h = fill(start, 0.0)
        for n in range(passes):
            for m in range(parts):
                here = offset(start, (parts - 1 - m if n & 1 else m) * 8 * width)
                a, b = a + load(here), b + load(offset(here, width))
                c, d = c + load(offset(here, 2 * width)), d + load(offset(here, 3 * width))
                e, f = e + load(offset(here, 4 * width)), f + load(offset(here, 5 * width))
                g, h = g + load(offset(here, 6 * width)), h + load(offset(here, 7 * width))
        store(address(total), ((a + b) + (c + d)) + ((e + f) + (g + h)))

    return read


def _reading(work: Work, threads: int) -> Callable[[], None]:
    """Return one thread's share of reading the weights."""
    read, passes = reader(), 2 if work.kind == "train" else 1
    first, each = (np.ones(4 * work.hidden * size // threads, work.dtype) for size in (work.inputs, work.hidden))
    total = np.zeros(64 // each.itemsize, work.dtype)

    def run() -> None:
        read(passes, first, total)
        read(passes * (work.recurrent_rows // work.batch), each, total)

    return run


@functools.cache
def _empty() -> Any:
    from fastlstm.kernels.cpu.jit import unkept_kernel

    @unkept_kernel
    def empty(a, b, c, d, e, f, g, h):
        return True

    return empty


def _empty_call(problem: Problem) -> Side:
    """Call a compiled function that returns at once, with packed weights, bias, input, states and three new arrays."""
    work, params, empty = problem.work, problem.model.params, _empty()
    given = [params["weight_hh_l0"], params["bias_l0"], problem.x[0]]
    state = np.zeros((1, work.batch, work.hidden), work.dtype)

    def call() -> None:
        empty(*given, state, state, np.empty_like(state[0]), np.empty_like(state), np.empty_like(state))

    return Side(call, lambda: (call(), ())[1])
