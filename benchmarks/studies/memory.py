"""What a training call allocates, beyond what it is given and what it returns, and what it promises.

The promise stands at :meth:`fastlstm.LSTM.backward`: for each layer and direction at most seven numbers for each
hidden unit and time step, H rounded up to whole vectors, and what does not grow with T. ``tracemalloc`` sees all memory
of NumPy's arrays, in which the kernels work; they allocate nothing themselves.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np

import fastlstm
from fastlstm import LSTM
from fastlstm.backends.cpu.workspace import POOL

from .record import OURS, Case

ABOUT = (
    "Most bytes allocated at once during forward and backward of one layer, beyond inputs and outputs; the outputs are"
    " y, the states and every gradient. Measured for T steps and for twice as many: what the second half added is what"
    " grows with T, in numbers of the dtype for each hidden unit, step and sequence. At most seven are promised, where"
    " H is a multiple of the processor's vectors."
)
SIDES = (OURS,)
SHAPES = ((100, 32, 64, 128), (365, 64, 32, 256), (1000, 32, 10, 128), (16384, 8, 16, 64))
DTYPES = ("float32", "float64")
GROWING, FIXED = "numbers per unit, step and sequence", "bytes that do not grow with T"


def measure(threads: int, seconds: float) -> Iterator[Case]:
    """Measure each shape; there is nothing to repeat, so `seconds` is not needed."""
    fastlstm.set_num_threads(threads)
    for dtype in DTYPES:
        for shape in SHAPES:
            steps, batch, inputs, hidden = shape
            model = LSTM(inputs, hidden, dtype=dtype, seed=0)
            once, twice = extra_bytes(model, steps, batch), extra_bytes(model, 2 * steps, batch)
            growing = (twice - once) / (steps * batch * hidden * model.cell.dtype.itemsize)
            facts = {GROWING: growing, FIXED: 2 * once - twice}
            yield Case(f"{','.join(map(str, shape))} {dtype}", {OURS: (float(once),)}, "bytes", facts)


def extra_bytes(model: LSTM, steps: int, batch: int, lengths: Any = None, *, recompute: bool = False) -> int:
    """Most bytes that a training pass holds at once beyond its inputs and outputs."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, batch, model.cell.input_size)).astype(model.cell.dtype)
    dy = rng.standard_normal((steps, batch, model.cell.output_size)).astype(model.cell.dtype)

    def train() -> tuple[Any, ...]:
        y, state, tape = model.forward(x, lengths=lengths, recompute=recompute)
        grads = model.backward(tape, dy)
        return y, *state, grads.x, *grads.state, *grads.params.values()

    train()  # compiles, and starts the threads
    POOL.clear()  # what is kept from earlier calls would not be counted
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        outputs = train()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return most - before - sum(array.nbytes for array in outputs)
