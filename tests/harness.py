"""Shared by the tests: the backends under test, problems made from a case, and one function that solves them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cuda_row
import numpy as np

from fastlstm import dispatch
from fastlstm.cell import Cell
from fastlstm.functional import lstm_backward, lstm_forward
from fastlstm.parameters import shapes

Arrays = dict[str, np.ndarray]

DROPOUT_SEED = 7

# The names that `backend` is parametrised over. A backend that is asked for by name must be there; without the
# variable, one that is missing here is skipped, and the skips are counted after the run.
KNOWN_BACKENDS = ("reference", "cpu", "cuda")
CHOSEN_BACKENDS = tuple(name for name in os.environ.get("FASTLSTM_TEST_BACKENDS", "").split(",") if name)


@dataclass(frozen=True)
class BackendUnderTest:
    """One backend and the way into and out of its array library."""

    name: str

    @property
    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.name == "cuda":
            return cuda_row.missing()
        if self.name not in dispatch.TABLE["numpy", "ndarray"].backends:
            return f"the {self.name} backend takes no NumPy arrays here (is NUMBA_DISABLE_JIT set?)"
        if importlib.util.find_spec(f"fastlstm.backends.{self.name}") is None:
            return f"there is no fastlstm.backends.{self.name}"
        return None

    @property
    def bitwise(self) -> bool:
        """Whether equal numbers give equal bits in any memory layout; BLAS, which the reference calls, does not."""
        return self.name != "reference"

    @property
    def is_numpy(self) -> bool:
        """Whether it takes NumPy arrays, in all their layouts and dtypes."""
        return self.name != "cuda"

    @property
    def flushes(self) -> bool:
        """Whether float32 numbers below the normal ones may become zero: CuPy compiles so, cuBLAS does not promise."""
        return self.name == "cuda" and cuda_row.on_gpu()

    @property
    def is_slow(self) -> bool:
        """Whether a time step takes tens of microseconds or more: the interpreter runs it, or the stand-in does."""
        return self.name == "reference" or (self.name == "cuda" and not cuda_row.on_gpu())

    @staticmethod
    def shares_memory(one: Any, other: Any) -> bool:
        """Whether two arrays of the backend's library overlap in memory."""
        return bool(dispatch.array_namespace(one).shares_memory(one, other))

    @contextlib.contextmanager
    def active(self) -> Iterator[BackendUnderTest]:
        """Force this backend; threads started inside need it again."""
        library = cuda_row.installed() if self.name == "cuda" else contextlib.nullcontext()
        with library, dispatch.use_backend(self.name):
            yield self

    @property
    def implementation(self) -> Any:
        """The object that fulfils the Protocol."""
        return dispatch.backend_named(self.name)

    def array(self, value: np.ndarray) -> Any:
        """Bring a NumPy array into this backend's library, as it is."""
        return cuda_row.array(value) if self.name == "cuda" else value

    def host(self, value: Any) -> np.ndarray:
        """Bring a result back to NumPy."""
        if self.name == "cuda":
            return cuda_row.host(value)
        assert type(value) is np.ndarray
        return value


REFERENCE = BackendUnderTest("reference")


@dataclass(frozen=True)
class Case:
    """Sizes and flags of one problem; equal cases make equal problems."""

    steps: int
    batch: int
    inputs: int
    hidden: int
    layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    batch_first: bool = False
    state: bool = True
    lengths: str | tuple[int, ...] | None = None  # "positive": 1..T; "zeros": 0..T, some 0, unsorted; or as given
    dropout: float = 0.0
    peephole: bool = False
    fields: tuple[tuple[str, Any], ...] = ()  # more fields of the cell
    resets: bool = False
    one_hot: bool = False  # x has a single one per step, dy a single one in all
    seed: int = 0

    @property
    def cell(self) -> Cell:
        sizes = self.inputs, self.hidden, self.layers
        fields = {"peephole": self.peephole} | dict(self.fields)
        return Cell(*sizes, self.bias, self.dropout, self.bidirectional, np.float64, **fields)

    def __str__(self) -> str:
        named = ("bidirectional", "batch_first", "peephole", "resets")
        flags = [f"L{self.layers}"] + [name for name in named if getattr(self, name)]
        flags += [name for name, on in (("nobias", not self.bias), ("nostate", not self.state)) if on]
        flags += [f"{name}={value}" for name, value in self.fields]
        flags += ["one_hot"] * self.one_hot + [f"dropout{self.dropout}"] * bool(self.dropout)
        ragged = [f"lengths-{self.lengths if isinstance(self.lengths, str) else 'given'}"] * (self.lengths is not None)
        return "-".join([f"T{self.steps}", f"B{self.batch}", f"I{self.inputs}", f"H{self.hidden}", *flags, *ragged])


@dataclass(frozen=True)
class Problem:
    """All arrays that enter a forward and a backward pass, and the options that go with them."""

    cell: Cell
    params: Arrays
    x: np.ndarray  # in the caller's layout
    state: tuple[np.ndarray, np.ndarray] | None
    lengths: np.ndarray | None
    dy: np.ndarray
    dstate: tuple[np.ndarray, np.ndarray]
    batch_first: bool = False
    resets: np.ndarray | None = None  # in the caller's layout

    def astype(self, dtype: Any) -> Problem:
        """Return the same numbers in another dtype."""
        pair = lambda arrays: None if arrays is None else tuple(a.astype(dtype) for a in arrays)  # noqa: E731
        return dataclasses.replace(
            self,
            cell=dataclasses.replace(self.cell, dtype=np.dtype(dtype)),
            params={name: value.astype(dtype) for name, value in self.params.items()},
            x=self.x.astype(dtype),
            state=pair(self.state),
            dy=self.dy.astype(dtype),
            dstate=pair(self.dstate),
        )


def problem(case: Case) -> Problem:
    """Make the problem of a case: float64 arrays whose values are float32 numbers, so that both dtypes see the same."""
    rng = np.random.default_rng([case.seed, case.steps, case.batch, case.inputs, case.hidden, case.layers])

    def draw(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (scale * rng.uniform(-1, 1, shape)).astype(np.float32).astype(np.float64)

    cell, outer = case.cell, (case.steps, case.batch)
    # Biases are drawn too (a fresh model's are constant), and weights are large enough for the gates to bend.
    params = {name: draw(*shape, scale=1.5 / np.sqrt(shape[-1])) for name, shape in shapes(cell).items()}
    x, dy = draw(*outer, case.inputs), draw(*outer, cell.output_size)
    if case.one_hot:
        x = np.eye(case.inputs)[rng.integers(case.inputs, size=outer)]
        dy = np.zeros_like(dy)
        dy.flat[rng.integers(dy.size)] = 1.0
    sizes = [cell.h_size, cell.c_size] * 2
    states = [draw(cell.num_layers * cell.num_directions, case.batch, size) for size in sizes]
    resets = rng.random(outer) < 0.3 if case.resets else None
    return Problem(
        cell,
        params,
        _batch_first(x) if case.batch_first else x,
        (states[0], states[1]) if case.state else None,
        _lengths(case, rng),
        _batch_first(dy) if case.batch_first else dy,
        (states[2], states[3]),
        case.batch_first,
        _batch_first(resets) if resets is not None and case.batch_first else resets,
    )


def _batch_first(sequence: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(sequence.swapaxes(0, 1))


def _lengths(case: Case, rng: np.random.Generator) -> np.ndarray | None:
    if case.lengths is None:
        return None
    if not isinstance(case.lengths, str):
        return np.array(case.lengths, np.int64)
    lengths = rng.integers(0 if case.lengths == "zeros" else 1, case.steps + 1, case.batch)
    if case.lengths == "zeros":  # a zero in the middle, a full one last: never sorted by descending length
        lengths[case.batch // 2] = 0
        lengths[-1] = case.steps
    return lengths


def model_of(p: Problem) -> dict[str, Any]:
    """Return the description of a problem's model, for fields that its parameters do not show."""
    shown = dataclasses.replace(p.cell, peephole=False, proj_size=0, layer_norm=False)
    return {"dropout": p.cell.dropout} if shown.is_plain else {"cell": p.cell}


def solve(p: Problem, backend: BackendUnderTest) -> Arrays:
    """Run forward and backward on a backend, and return every result on the host, by name."""
    to = backend.array
    params = {name: to(value) for name, value in p.params.items()}
    with backend.active():
        y, (h_n, c_n), tape = lstm_forward(
            params,
            to(p.x),
            p.state and (to(p.state[0]), to(p.state[1])),
            p.lengths,
            batch_first=p.batch_first,
            **model_of(p),
            dropout_seed=DROPOUT_SEED,
            resets=None if p.resets is None else to(p.resets),
        )
        grads = lstm_backward(params, tape, to(p.dy), (to(p.dstate[0]), to(p.dstate[1])))
    return results(backend, y, h_n, c_n, grads)


def results(backend: BackendUnderTest, y: Any, h_n: Any, c_n: Any, grads: Any) -> Arrays:
    """Name all results of a forward and backward pass, on the host."""
    found = {"y": y, "h_n": h_n, "c_n": c_n, "dx": grads.x, "dh0": grads.state[0], "dc0": grads.state[1]}
    found |= {f"d{name}": value for name, value in grads.params.items()}
    return {name: backend.host(value) for name, value in found.items()}
