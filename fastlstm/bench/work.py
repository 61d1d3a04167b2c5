"""One thing to compute and to time: sizes, dtype and kind of call; and the model and arrays that go with it.

>>> work = Work.parse("100,32,64,128", kind="train")
>>> work.name, work.operations
('100,32,64,128', 1874853888)
>>> Problem.of(Work(5, 1, 3, 4, layers=2, bidirectional=True)).dy.shape
(5, 1, 8)
"""

from __future__ import annotations

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
MOST_NUMBERS = 1 << 40  # in the arrays of a work; beyond that no machine holds them

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Work:
    """What is computed, from a zero state; ArgumentError if it makes no sense."""

    steps: int  # T, 1 when streaming
    batch: int  # B
    inputs: int  # I
    hidden: int  # H
    dtype: str = "float32"
    kind: str = "infer"  # of KINDS
    lengths: tuple[int, ...] | None = None  # of the sequences of a ragged batch, in 1..T
    layers: int = 1
    bidirectional: bool = False  # not when streaming
    unbatched: bool = False  # ours and torch get x as (T, I), or (I,) when streaming; B is 1

    def __post_init__(self) -> None:
        if any(type(size) is not int or size < 1 for size in (*self.shape, self.layers)) or self.layers > 99:
            words = f"{self.shape} and {self.layers}"
            raise ArgumentError(f"a shape is four integers of at least 1, T,B,I,H, and layers are 1 to 99, got {words}")
        rows = self.steps * self.batch
        if self.layers * (rows + self.hidden) * (self.inputs + self.hidden) > MOST_NUMBERS:
            raise ArgumentError(f"the shape {self.name} is more than a machine can hold")
        if self.dtype not in DTYPES or self.kind not in KINDS:
            raise ArgumentError(f"there is no work {self.kind!r} in {self.dtype!r}; kinds are {', '.join(KINDS)}")
        if self.kind == "stream" and (self.steps != 1 or self.lengths is not None or self.bidirectional):
            raise ArgumentError(f"streaming takes T=1, no lengths and one direction, got {self.name}")
        if self.unbatched and (self.batch != 1 or self.lengths is not None):
            raise ArgumentError(f"an unbatched call has B=1 and no lengths, got {self.name}")

    @classmethod
    def parse(cls, text: str, dtype: str = "float32", kind: str = "infer", **options: Any) -> Work:
        """Read ``T,B,I,H``; T becomes 1 when streaming. ArgumentError if the text is anything else."""
        try:
            steps, batch, inputs, hidden = map(int, text.split(","))
        except ValueError as error:
            raise ArgumentError(f"a shape is four integers of at least 1, T,B,I,H, got {text!r}") from error
        return cls(min(steps, 1) if kind == "stream" else steps, batch, inputs, hidden, dtype, kind, **options)

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
        """The shape as text, and what is special about the call."""
        words = [f"{self.layers} layers"] if self.layers > 1 else []
        words += ["both directions"] * self.bidirectional + ["unbatched"] * self.unbatched
        words += ["ragged"] if self.lengths is not None else []
        return ", ".join([",".join(map(str, self.shape)), *words])

    @property
    def title(self) -> str:
        """The name with kind and dtype."""
        return f"{self.name} {self.kind} {self.dtype}"

    @property
    def rows(self) -> int:
        """N, the time steps of all sequences together, without padding."""
        return self.steps * self.batch if self.lengths is None else sum(self.lengths)

    @property
    def operations(self) -> int:
        """Multiplications and additions of the matrix products that are needed; training has three times as many.

        The first step of a sequence has no state to multiply, a step of a stream has one.
        """
        directions, recurrent = 1 + self.bidirectional, self.rows - self.batch * (self.kind != "stream")
        inputs_of_layers = directions * [self.inputs, *[directions * self.hidden] * (self.layers - 1)]
        products = sum(self.rows * inputs + recurrent * self.hidden for inputs in inputs_of_layers)
        return 8 * self.hidden * products * (3 if self.kind == "train" else 1)


@dataclass(frozen=True, eq=False)
class Problem:
    """A work with its model and data, the same for all sides, which do not change them."""

    work: Work
    model: LSTM  # its parameters are NumPy arrays
    x: Array  # (T, B, I)
    dy: Array  # (T, B, D * H), the output's gradient; zero past each sequence's length
    lengths: Array | None  # (B,) int64

    @classmethod
    def of(cls, work: Work) -> Problem:
        """Draw a model and data, the same ones for the same work."""
        rng = np.random.default_rng(1)
        directions: dict[str, Any] = {"bidirectional": work.bidirectional, "dtype": work.dtype}
        model = LSTM(work.inputs, work.hidden, work.layers, **directions, seed=0)
        x = rng.standard_normal((work.steps, work.batch, work.inputs), np.float32).astype(work.dtype)
        dy = rng.standard_normal((work.steps, work.batch, model.cell.output_size), np.float32).astype(work.dtype)
        lengths = None if work.lengths is None else np.array(work.lengths, np.int64)
        if lengths is not None:
            dy[np.arange(work.steps)[:, None] >= lengths] = 0
        return cls(work, model, x, dy, lengths)
