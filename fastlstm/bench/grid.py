"""The grids: the sizes that are measured.

>>> [work.title for work in small(("float32",), ("stream",))][:2]
['1,1,32,64 stream float32', '1,1,32,64, unbatched stream float32']
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fastlstm.bench.work import Work

__all__ = ["GOALS", "GRIDS", "crossover", "of_shapes"]

SMALL: dict[str, tuple[tuple[tuple[int, int, int, int], dict[str, Any]], ...]] = {
    "infer": (
        ((1, 1, 128, 256), {}), ((100, 1, 32, 64), {}), ((100, 1, 128, 256), {}), ((10, 32, 64, 128), {}),
        ((100, 32, 64, 128), {}), ((100, 32, 64, 128), {"layers": 2}), ((100, 32, 64, 128), {"bidirectional": True}),
        ((100, 256, 64, 128), {}), ((100, 32, 64, 32), {}), ((100, 32, 64, 512), {}), ((365, 64, 32, 256), {}),
        ((50, 64, 512, 512), {}),
    ),
    "train": (
        ((100, 1, 32, 64), {}), ((100, 32, 64, 128), {}), ((100, 32, 64, 128), {"layers": 2, "bidirectional": True}),
        ((100, 64, 32, 256), {}), ((50, 64, 512, 512), {}),
    ),
    "stream": (
        ((1, 1, 32, 64), {}), ((1, 1, 32, 64), {"unbatched": True}), ((1, 1, 32, 64), {"layers": 2}),
        ((1, 32, 64, 128), {}),
    ),
}  # fmt: skip
RAGGED = (100, 64, 32, 128)

CENTRE = (100, 32, 64, 128)
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


def small(dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the default grid, with a row for each kind of call."""
    kinds = tuple(kinds)
    found = []
    for dtype in dtypes:
        for kind in kinds:
            found += [Work(*shape, dtype, kind, **options) for shape, options in SMALL[kind]]
            found += [Work.ragged(*RAGGED, dtype, kind)] if kind == "train" else []
    return found


def full(dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the small grid, and sweeps of T, B and H through :data:`CENTRE`."""
    dtypes, kinds = tuple(dtypes), tuple(kinds)
    found = small(dtypes, kinds)
    steps, batch, inputs, hidden = CENTRE
    for dtype in dtypes:
        for kind in kinds:
            t = 1 if kind == "stream" else steps
            found += [Work(t, b, inputs, hidden, dtype, kind) for b in BATCHES]
            found += [Work(t, batch, inputs, h, dtype, kind) for h in HIDDENS]
            if kind != "stream":
                found += [Work(t, batch, inputs, hidden, dtype, kind) for t in STEPS]
    return list(dict.fromkeys(found))


def goals(dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the shapes for which there are goals; the ragged batch with training, and two single steps."""
    found = []
    for dtype in tuple(dtypes):
        for kind in kinds:
            shapes = GOALS[:2] if kind == "stream" else GOALS
            found += [Work(*shape, dtype, kind) for shape in shapes]
            found += [Work.ragged(*RAGGED_GOAL, dtype, kind)] if kind == "train" else []
    return found


def crossover(name: str, dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the sizes of the map of where a GPU pays, for our own sides; the small grid has every second of them."""
    every = 1 if name == "full" else 2
    return [
        Work(MAP_STEPS, batch, hidden, hidden, dtype, kind)
        for dtype in tuple(dtypes)
        for kind in kinds
        if kind != "stream"
        for hidden in MAP_HIDDENS[::every]
        for batch in MAP_BATCHES[::every]
    ]


def of_shapes(texts: Iterable[str], dtypes: Iterable[str], kinds: Iterable[str], **options: Any) -> list[Work]:
    """Return one work for each shape, dtype and kind."""
    texts, kinds = tuple(texts), tuple(kinds)
    found = (Work.parse(text, dtype, kind, **options) for dtype in dtypes for kind in kinds for text in texts)
    return list(dict.fromkeys(found))


GRIDS = {"small": small, "full": full, "goals": goals}
