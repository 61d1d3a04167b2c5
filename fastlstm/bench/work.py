"""One thing to compute and to time: sizes, dtype, and what for; and the arrays that go with it.

>>> work = Work.parse("100,32,64,128", kind="train")
>>> work.name, work.operations
('100,32,64,128', 1874853888)
>>> problem = Problem.of(work)
>>> problem.x.shape, problem.dy.shape
((100, 32, 64), (100, 32, 128))

A :class:`Work` is a description, can be compared and kept in a file. A :class:`Problem` holds the model and the data,
the same for all sides.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlstm.errors import ArgumentError
from fastlstm.lstm import LSTM

__all__ = ["DTYPES", "KINDS", "Problem", "Work"]

KINDS = {
    "infer": "inference over whole sequences",
    "train": "forward and backward pass, every gradient",
    "stream": "one time step, the state fed back",
}
DTYPES = ("float32", "float64")
MOST_NUMBERS = 1 << 40  # in the arrays of a work; what a machine cannot hold of fewer, it says itself

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Work:
    """What is computed: one layer in one direction, from a zero state.

    Parameters
    ----------
    steps, batch, inputs, hidden : int
        T, B, I and H, at least 1. When streaming, T is 1.
    dtype : {"float32", "float64"}
        The dtype of everything.
    kind : {"infer", "train", "stream"}
        What for; :data:`KINDS` says it in words.
    lengths : tuple of int, optional
        The length of each sequence of a ragged batch, in 1..T.

    Raises
    ------
    ArgumentError
        If one of them makes no sense.
    """

    steps: int
    batch: int
    inputs: int
    hidden: int
    dtype: str = "float32"
    kind: str = "infer"
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for size in self.shape:
            if type(size) is not int or size < 1:
                raise ArgumentError(f"a shape is four integers of at least 1, T,B,I,H, got {self.shape}")
        rows = self.steps * self.batch
        if rows * (self.inputs + self.hidden) + self.hidden * (self.inputs + self.hidden) > MOST_NUMBERS:
            raise ArgumentError(f"the shape {self.name} is more than a machine can hold")
        if self.dtype not in DTYPES:
            raise ArgumentError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.kind not in KINDS:
            raise ArgumentError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "stream" and (self.steps != 1 or self.lengths is not None):
            raise ArgumentError(f"streaming takes one step at a time: T=1 and no lengths, got {self.shape}")
        if self.lengths is not None and (
            len(self.lengths) != self.batch or any(type(n) is not int or not 1 <= n <= self.steps for n in self.lengths)
        ):
            raise ArgumentError(f"lengths must be {self.batch} integers in 1..{self.steps}")

    @classmethod
    def parse(cls, text: str, dtype: str = "float32", kind: str = "infer") -> Work:
        """Read ``T,B,I,H``; when streaming, whatever T is becomes 1.

        Raises
        ------
        ArgumentError
            If the text is anything else.
        """
        parts = text.split(",")
        if len(parts) != 4 or not all(part.strip().isdecimal() and len(part) < 16 for part in parts):
            raise ArgumentError(f"a shape is four integers of at least 1, T,B,I,H, got {text!r}")
        steps, batch, inputs, hidden = map(int, parts)
        return cls(1 if kind == "stream" and steps else steps, batch, inputs, hidden, dtype, kind)

    @classmethod
    def ragged(
        cls, steps: int, batch: int, inputs: int, hidden: int, dtype: str = "float32", kind: str = "train"
    ) -> Work:
        """Make a ragged batch: lengths from half of T to T, the same ones each time."""
        lengths = np.random.default_rng(5).integers((steps + 1) // 2, steps + 1, batch)
        return cls(steps, batch, inputs, hidden, dtype, kind, tuple(lengths.tolist()))

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """T, B, I, H."""
        return self.steps, self.batch, self.inputs, self.hidden

    @property
    def name(self) -> str:
        """The shape as text, as ``--shape`` takes it."""
        return ",".join(map(str, self.shape)) + (" ragged" if self.lengths is not None else "")

    @property
    def rows(self) -> int:
        """N, the time steps of all sequences together, without padding."""
        return self.steps * self.batch if self.lengths is None else sum(self.lengths)

    @property
    def recurrent_rows(self) -> int:
        """Those of the rows that have a state to multiply: a sequence begins with none, but a stream goes on."""
        return self.rows if self.kind == "stream" else self.rows - self.batch

    @property
    def operations(self) -> int:
        """Multiplications and additions of the matrix products that are needed; training has three times as many.

        That a side multiplies a first step's state of zeros as well does not count.
        """
        products = self.rows * self.inputs + self.recurrent_rows * self.hidden
        return 8 * self.hidden * products * (3 if self.kind == "train" else 1)

    @property
    def bytes(self) -> int:
        """Bytes that have to be moved at least: every input read once, every result written once.

        These are parameters, input and output (when streaming, the two states in and out too); in training also the
        output's gradient, and the gradients by the input and the parameters. A single step from no state needs no
        recurrent weights. What a machine keeps between the steps, and reads again when its caches are too small for it,
        comes on top.
        """
        parameters = 4 * self.hidden * (self.inputs + self.hidden + 1)
        count = parameters + self.rows * (self.inputs + self.hidden)
        if self.kind == "train":
            count *= 2
        if not self.recurrent_rows:
            count -= 4 * self.hidden * self.hidden
        if self.kind == "stream":
            count += 3 * self.batch * self.hidden  # h and c in, c out; h out is the output
        return count * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class Problem:
    """A work with its model and its data, the same for all sides; nobody changes them.

    Attributes
    ----------
    work : Work
        What it is made for.
    model : LSTM
        The model, its parameters NumPy arrays.
    x : (T, B, I) array
        The input.
    dy : (T, B, H) array
        The output's gradient; zero past each sequence's length.
    """

    work: Work
    model: LSTM
    x: Array
    dy: Array

    @classmethod
    def of(cls, work: Work) -> Problem:
        """Draw a model and data, the same ones for the same work."""
        rng = np.random.default_rng(1)
        x = rng.standard_normal((work.steps, work.batch, work.inputs), np.float32).astype(work.dtype)
        dy = rng.standard_normal((work.steps, work.batch, work.hidden), np.float32).astype(work.dtype)
        if work.lengths is not None:
            dy[np.arange(work.steps)[:, None] >= np.array(work.lengths)] = 0
        return cls(work, LSTM(work.inputs, work.hidden, dtype=work.dtype, seed=0), x, dy)

    @functools.cached_property
    def frozen_or_trained(self) -> LSTM:
        """The model as somebody who wants it fast would have it: frozen, unless it is trained.

        For ONNX Runtime and OpenVINO, which only infer, the parameters are constants, too.
        """
        return self.model if self.work.kind == "train" else self.model.freeze()

    @property
    def lengths(self) -> Array | None:
        """The lengths as an array, (B,) int64, or None."""
        return None if self.work.lengths is None else np.array(self.work.lengths, np.int64)
