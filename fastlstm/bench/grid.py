"""The grids: the sizes that are measured.

>>> [work.name for work in small("float32", "stream")]
['1,1,32,64', '1,32,64,128', '1,1,32,64, unbatched', '1,1,32,64, 2 layers']
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

from fastlstm.bench.work import Work

__all__ = ["GOALS", "GRIDS", "crossover", "of_shapes", "works"]

SMALL = {
    "infer": (
        (1, 1, 128, 256), (100, 1, 32, 64), (100, 1, 128, 256), (10, 32, 64, 128), (100, 32, 64, 128),
        (100, 256, 64, 128), (100, 32, 64, 32), (100, 32, 64, 512), (365, 64, 32, 256), (50, 64, 512, 512),
    ),
    "train": ((100, 1, 32, 64), (100, 32, 64, 128), (100, 64, 32, 256), (50, 64, 512, 512)),
    "stream": ((1, 1, 32, 64), (1, 32, 64, 128)),
}  # fmt: skip
CENTRE, STEP, RAGGED = (100, 32, 64, 128), (1, 1, 32, 64), (100, 64, 32, 128)
# Of the centre, or of the step of a stream.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "infer": ({"layers": 2}, {"bidirectional": True}),
    "train": ({"layers": 2, "bidirectional": True},),
    "stream": ({"unbatched": True}, {"layers": 2}),
}

STEPS = (1, 3, 10, 30, 100, 300, 1000, 3000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HIDDENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# The map of where a GPU pays: T steps of B sequences, as many inputs as hidden units.
MAP_STEPS = 50
MAP_BATCHES = (1, 4, 16, 64, 256)
MAP_HIDDENS = (32, 64, 128, 256, 512, 1024)
# The shapes for which the project has goals, see benchmarks/goals.py.
GOALS = ((1, 1, 32, 64), (1, 1, 128, 256), (100, 1, 32, 64), (100, 1, 128, 256), (100, 32, 64, 128),
         (365, 64, 32, 256), (50, 64, 512, 512), (50, 64, 1024, 1024))  # fmt: skip
RAGGED_GOAL = (365, 64, 32, 128)


def small(dtype: str, kind: str) -> list[Work]:
    """Return the default grid, with a row for each kind of call."""
    found = [Work(*shape, dtype, kind) for shape in SMALL[kind]]
    found += [Work(*(STEP if kind == "stream" else CENTRE), dtype, kind, **variant) for variant in VARIANTS[kind]]
    return found + ([Work.ragged(*RAGGED, dtype, kind)] if kind == "train" else [])


def full(dtype: str, kind: str) -> list[Work]:
    """Return the small grid, and sweeps of T, B and H through :data:`CENTRE`."""
    steps, batch, inputs, hidden = CENTRE
    t = 1 if kind == "stream" else steps
    found = small(dtype, kind)
    found += [Work(t, b, inputs, hidden, dtype, kind) for b in BATCHES]
    found += [Work(t, batch, inputs, h, dtype, kind) for h in HIDDENS]
    return found + [Work(t, batch, inputs, hidden, dtype, kind) for t in STEPS if kind != "stream"]


def goals(dtype: str, kind: str) -> list[Work]:
    """Return the shapes for which there are goals; the ragged batch with training, and two single steps."""
    found = [Work(*shape, dtype, kind) for shape in (GOALS[:2] if kind == "stream" else GOALS)]
    return found + ([Work.ragged(*RAGGED_GOAL, dtype, kind)] if kind == "train" else [])


def crossover(dtype: str, kind: str, every: int = 1) -> list[Work]:
    """Return the sizes of the map of where a GPU pays, for our own sides; the small grid has every second of them."""
    sizes = itertools.product(MAP_HIDDENS[::every], MAP_BATCHES[::every]) if kind != "stream" else ()
    return [Work(MAP_STEPS, batch, hidden, hidden, dtype, kind) for hidden, batch in sizes]


def works(make: Callable[[str, str], Iterable[Work]], dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return what `make` gives for each dtype and kind, each work once."""
    pairs = itertools.product(dtypes, kinds)
    return list(dict.fromkeys(work for dtype, kind in pairs for work in make(dtype, kind)))


def of_shapes(texts: Iterable[str], dtypes: Iterable[str], kinds: Iterable[str], **options: Any) -> list[Work]:
    """Return one work for each shape, dtype and kind."""
    return works(lambda dtype, kind: [Work.parse(text, dtype, kind, **options) for text in texts], dtypes, kinds)


GRIDS = {"small": small, "full": full, "goals": goals}
