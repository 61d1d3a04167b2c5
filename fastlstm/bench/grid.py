"""Which sizes are measured: a dozen that can be read at a glance, or sweeps for the pictures.

>>> [work.name for work in small(("float32",), ("stream",))]
['1,1,32,64']
"""

from __future__ import annotations

from collections.abc import Iterable

from fastlstm.bench.work import Work
from fastlstm.errors import ArgumentError

__all__ = ["GRIDS", "crossover", "full", "of_shapes", "small"]

INFER = (
    (1, 1, 128, 256),
    (100, 1, 32, 64),
    (100, 1, 128, 256),
    (100, 32, 64, 128),  # T, B and H are varied from here
    (10, 32, 64, 128),
    (1000, 32, 64, 128),
    (100, 1, 64, 128),
    (100, 256, 64, 128),
    (100, 32, 64, 32),
    (100, 32, 64, 512),
    (365, 64, 32, 256),
    (50, 64, 512, 512),
)
TRAIN = ((100, 1, 32, 64), (100, 32, 64, 128), (100, 64, 32, 256), (50, 64, 512, 512))
RAGGED = (100, 64, 32, 128)
STREAM = ((1, 1, 32, 64),)

CENTRE = (100, 32, 64, 128)
STEPS = (1, 3, 10, 30, 100, 300, 1000, 3000)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
HIDDENS = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
# The map of where a GPU starts to pay: T steps of B sequences, as many inputs as hidden units.
MAP_STEPS = 50
MAP_BATCHES = (1, 4, 16, 64, 256)
MAP_HIDDENS = (32, 64, 128, 256, 512, 1024)
COARSE = 2  # the small grid takes every second of them


def small(dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the default grid."""
    found = []
    for dtype in dtypes:
        for kind in kinds:
            shapes = {"infer": INFER, "train": TRAIN, "stream": STREAM}[kind]
            found += [Work(*shape, dtype, kind) for shape in shapes]
            if kind == "train":
                found.append(Work.ragged(*RAGGED, dtype, kind))
    return found


def full(dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return sweeps of T, B and H through one point, and the sizes of the small grid besides."""
    dtypes, kinds = tuple(dtypes), tuple(kinds)
    found = small(dtypes, kinds)
    steps, batch, inputs, hidden = CENTRE
    for dtype in dtypes:
        for kind in kinds:
            shapes = [(steps, b, inputs, hidden) for b in BATCHES] + [(steps, batch, inputs, h) for h in HIDDENS]
            if kind == "stream":
                shapes = [(1, *rest) for _, *rest in shapes]  # type: ignore[misc]
            else:
                shapes += [(t, batch, inputs, hidden) for t in STEPS]
            found += [Work(*shape, dtype, kind) for shape in shapes]
    return list(dict.fromkeys(found))


def crossover(name: str, dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the sizes of the map over (B, H) of where a GPU starts to pay, for the grid called `name`.

    Only our own sides need them.
    """
    every = 1 if name == "full" else COARSE
    kinds = tuple(kinds)
    return [
        Work(MAP_STEPS, batch, hidden, hidden, dtype, kind)
        for dtype in dtypes
        for kind in kinds
        if kind != "stream"
        for hidden in MAP_HIDDENS[::every]
        for batch in MAP_BATCHES[::every]
    ]


def of_shapes(texts: Iterable[str], dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return one work for each shape, dtype and kind.

    Raises
    ------
    ArgumentError
        If a shape is not T,B,I,H.
    """
    texts, kinds = tuple(texts), tuple(kinds)
    return list(dict.fromkeys(Work.parse(text, dtype, kind) for dtype in dtypes for kind in kinds for text in texts))


GRIDS = {"small": small, "full": full}


def named(name: str, dtypes: Iterable[str], kinds: Iterable[str]) -> list[Work]:
    """Return the grid called `name`.

    Raises
    ------
    ArgumentError
        If there is none.
    """
    if name not in GRIDS:
        raise ArgumentError(f"there is no grid {name!r}; choose one of {', '.join(GRIDS)}")
    return GRIDS[name](dtypes, kinds)
