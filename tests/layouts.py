"""Arrays with the memory layouts of users' arrays: strided, reversed, broadcast, read-only, foreign, unaligned, mapped.

Each layout comes with a predicate that says whether an array really has it, because a generator that
silently hands out clean arrays tests nothing.
"""

from __future__ import annotations

import tempfile

import numpy as np


def fortran(a: np.ndarray) -> np.ndarray:
    return np.asfortranarray(a)


def negative(a: np.ndarray) -> np.ndarray:
    flip = (slice(None, None, -1),) * a.ndim
    return a[flip].copy()[flip]


def every_other(a: np.ndarray) -> np.ndarray:
    wide = np.full([2 * n + 1 for n in a.shape], 99, a.dtype)
    view = wide[tuple(slice(1, None, 2) for _ in a.shape)]
    view[...] = a
    return view


def transposed(a: np.ndarray) -> np.ndarray:
    order = np.roll(range(a.ndim), 1)
    return np.ascontiguousarray(a.transpose(order)).transpose(np.argsort(order))


def broadcast(a: np.ndarray) -> np.ndarray:
    return np.broadcast_to(a[:1], a.shape)


def overlapping(a: np.ndarray) -> np.ndarray:
    """Make windows over one series, each a step further on: what ``sliding_window_view`` gives."""
    series = np.resize(a, sum(a.shape))
    return np.lib.stride_tricks.as_strided(series, a.shape, series.strides * a.ndim, writeable=False)


def read_only(a: np.ndarray) -> np.ndarray:
    a = a.copy()
    a.flags.writeable = False
    return a


def foreign(a: np.ndarray) -> np.ndarray:
    """Swap the byte order."""
    return a.astype(a.dtype.newbyteorder())


def unaligned(a: np.ndarray) -> np.ndarray:
    buffer = np.zeros(a.nbytes + 1, np.uint8)
    view = buffer[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def field(a: np.ndarray) -> np.ndarray:
    """Take a column of a packed record array: odd strides and no alignment."""
    records = np.zeros(a.shape, [("flag", np.int8), ("value", a.dtype)])
    records["value"] = a
    return records["value"]


def mapped(a: np.ndarray) -> np.ndarray:
    """Map a file; it is unlinked at once, which the mapping survives."""
    with tempfile.NamedTemporaryFile() as file:
        view = np.memmap(file, a.dtype, "w+", shape=a.shape)
    view[...] = a
    return view


def clean(a: np.ndarray) -> np.ndarray:
    return a


def _overlaps(a: np.ndarray) -> bool:
    return len(set(a.strides)) == 1 and a.strides[0] == a.itemsize and (a.ndim == 1 or not a.flags.c_contiguous)


# name: (maker, predicate for arrays whose sizes are all above 1); 1-D arrays are always in Fortran order
LAYOUTS = {
    "clean": (clean, lambda a: a.flags.carray),
    "fortran": (fortran, lambda a: a.flags.f_contiguous and (a.ndim == 1 or not a.flags.c_contiguous)),
    "negative": (negative, lambda a: all(stride < 0 for stride in a.strides)),
    "every_other": (every_other, lambda a: a.strides[-1] == 2 * a.itemsize and not a.flags.forc),
    "transposed": (transposed, lambda a: a.ndim == 1 or (a.strides[-1] > a.itemsize and not a.flags.c_contiguous)),
    "broadcast": (broadcast, lambda a: a.strides[0] == 0 and not a.flags.writeable),
    "overlapping": (overlapping, _overlaps),
    "read_only": (read_only, lambda a: not a.flags.writeable),
    "foreign": (foreign, lambda a: not a.dtype.isnative),
    "unaligned": (unaligned, lambda a: not a.flags.aligned),
    "field": (field, lambda a: not a.flags.aligned and a.strides[-1] == a.itemsize + 1),
    "mapped": (mapped, lambda a: isinstance(a, np.memmap)),
}


def lay_out(name: str, a: np.ndarray) -> np.ndarray:
    """Return an array like `a` that has the layout; its values may differ, see ``cleaned``."""
    make, has_it = LAYOUTS[name]
    made = make(a)
    assert made.shape == a.shape and made.dtype.newbyteorder("=") == a.dtype
    if min(a.shape, default=0) > 1:
        assert has_it(made), f"{name} was not made of an array {a.shape} {a.dtype}"
    return made


def cleaned(a: np.ndarray) -> np.ndarray:
    """Copy an array into new, contiguous, aligned, native memory."""
    return np.array(a, dtype=a.dtype.newbyteorder("="), order="C", copy=True, subok=False)


def snapshot(a: np.ndarray) -> bytes:
    """All bytes of the memory that an array is a view of, the gaps too."""
    while isinstance(a.base, np.ndarray):
        a = a.base
    return a.tobytes()
