"""Which recurrences run as one persistent kernel, and how: a table, and the arithmetic of kernels/cuda/persistent.cu.

The numbers are estimates: no GPU has timed the kernels. Measured ones are to replace them; results do not depend on
them, but for the order of summation of the two paths.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastlstm.errors import BackendError

__all__ = ["OLDEST", "SIZES", "Choice", "Limits", "Plan", "choose", "describe", "describe_products"]

# "persistent" or "step" force a path, for tests; read once, at import. What cannot run as a persistent kernel takes the
# step path even so.
FORCED = os.environ.get("FASTLSTM_CUDA_RECURRENCE") or None

SIZES = (64, 128, 192, 256, 384, 512, 768, 1024)  # of SIZE in persistent.cu
_WARPS, _HELD, _GATES = 8, 8, 4  # as there
_BYTES = {"tf32": 4, "bf16": 2}  # of an element of the vectors
# (sequence, unit) pairs of a block: more than two a thread would not leave it registers for 128 weights.
_MOST_PAIRS = 512

# The table: with at least so many hidden units and so many sequences, float32 products by cuBLAS, one a step, are
# estimated to be faster. Each row of the batch costs a group its share of the product, and one step has cuBLAS at its
# best: at H = 1024 and B = 64 a step of either takes some 20 µs.
CUBLAS_FROM = {
    "float32": ((768, 32), (384, 256)),
    "tf32": ((768, 128), (384, 512)),  # tensor cores take the share of the product, and leave that of fetching h
    "bf16": ((768, 256), (384, 1024)),  # of half the size
}
FEWEST_STEPS = 3  # T: below, loading the weights into registers does not pay
OLDEST = 80  # compute capability: before, a multiprocessor has too little shared memory, and no TF32 and bfloat16
_FORMATS = {"tf32": "TF32", "bf16": "bfloat16"}
CLUSTERS_FROM, MOST_OF_A_CLUSTER = 90, 8  # compute capability, and blocks that every such GPU can hold


class Limits(NamedTuple):
    """The capabilities of a device."""

    architecture: int  # compute capability, 90 for 9.0
    multiprocessors: int
    shared: int  # bytes of shared memory that a block can have


class Plan(NamedTuple):
    """How a direction of one layer, or both, run as a persistent kernel."""

    size: int  # H rounded up to one of SIZES
    rows: int  # sequences of a group
    blocks: int  # of a group
    groups: int  # of each direction, side by side, at most
    cluster: bool  # whether a group is a thread-block cluster
    directions: int = 1  # in one launch
    precision: str = "float32"  # of the products

    @property
    def split(self) -> int:
        """Lanes that share a row of the weights, forward."""
        return _split(self.size)

    def shared(self, backward: bool) -> int:
        """Bytes of shared memory of a block."""
        return _shared(self.size, self.rows, self.cluster, backward, self.precision)

    @property
    def cooperative(self) -> bool:
        """Whether all blocks have to be resident at once: others than those of a cluster wait for each other."""
        return self.blocks > 1 and not self.cluster

    @property
    def macros(self) -> tuple[str, ...]:
        """The compiler's options that make the kernel of this plan."""
        names = {"SIZE": self.size, "ROWS": self.rows, "BLOCKS": self.blocks,
                 "SHARED_FORWARD": self.shared(False), "SHARED_BACKWARD": self.shared(True)}  # fmt: skip
        flags = {"CLUSTER": self.cluster, f"PRODUCTS_{self.precision.upper()}": self.precision != "float32"}
        return (*(f"{name}={value}" for name, value in names.items()), *(name for name, on in flags.items() if on))


class Choice(NamedTuple):
    """A plan, or None and why a kernel a step runs."""

    plan: Plan | None
    reason: str


def choose(
    limits: Limits,
    dtype: np.dtype[Any],
    hidden: int,
    steps: int,
    batch: int,
    directions: int = 1,
    precision: str = "float32",
    variant: tuple[str, ...] = (),
) -> Choice:
    """Decide how the directions of a layer run; `steps` is T, whatever the lengths of the sequences are.

    `variant` are the macros of the cell, which decide how many registers a thread needs.

    Two directions run at once if the device holds the groups of both at once, for the whole batch.
    """
    if limits.architecture < OLDEST:
        precision = "float32"  # such a GPU has no units that multiply rounded factors
    short = steps < FEWEST_STEPS
    return _choose(limits, dtype.name, hidden, short, batch, FORCED, directions, precision, variant)


def describe_products(limits: Limits, precision: str) -> str:
    """Say in words what products round, to follow the description of a choice."""
    if precision == "float32":
        return ""
    if limits.architecture < OLDEST:
        needed = f"{OLDEST // 10}.{OLDEST % 10}"
        return f"; products in float32: {_FORMATS[precision]} needs compute capability {needed}"
    return f"; products in {_FORMATS[precision]}"


def describe(choice: Choice, directions: int = 1) -> str:
    """Say in words how the directions of a layer run and why."""
    if choice.plan is None:
        return f"a product and a kernel each step: {choice.reason}"
    plan = choice.plan
    group = f"groups of {plan.blocks} blocks" if plan.blocks > 1 else "groups of one block"
    how = "a cluster each" if plan.cluster else f"{plan.groups * plan.directions} at once at most"
    both = ", both directions at once" if plan.directions > 1 else ", one direction after the other"
    return (
        f"one launch a sequence: {group}, {how}, weights in registers (H = {plan.size}), {plan.rows} sequences a group"
        + (both if directions > 1 else "")
    )


@lru_cache(maxsize=1024)
def _choose(
    limits: Limits,
    dtype: str,
    hidden: int,
    short: bool,
    batch: int,
    force: str | None,
    directions: int = 1,
    precision: str = "float32",
    variant: tuple[str, ...] = (),
) -> Choice:
    if force not in (None, "persistent", "step"):
        raise BackendError(f"FASTLSTM_CUDA_RECURRENCE must be persistent or step, got {force!r}")
    spilling = {"tf32": (768,)}.get(precision, ())  # sizes at which NVRTC spills registers: the next one is taken
    size = next((size for size in SIZES if size >= hidden and size not in spilling), None)
    reason = ""
    if force == "step":
        reason = "FASTLSTM_CUDA_RECURRENCE asks for it"
    elif dtype != "float32":
        reason = f"persistent kernels are for float32, not {dtype}"
    elif size is None:
        reason = f"persistent kernels are for at most {SIZES[-1]} hidden units"
    elif force is None and limits.architecture < OLDEST:
        reason = f"persistent kernels need compute capability {OLDEST // 10}.{OLDEST % 10}"
    elif force is None and short:
        reason = f"fewer than {FEWEST_STEPS} steps a sequence"
    elif force is None and any(hidden >= units and batch >= rows for units, rows in CUBLAS_FROM[precision]):
        reason = "cuBLAS is estimated to be faster for so large a batch"
    if reason or size is None:
        return Choice(None, reason)
    blocks = size * _split(size) // (32 * _HELD // _GATES)
    groups = limits.multiprocessors // blocks
    if not groups:
        return Choice(None, f"a group takes {blocks} multiprocessors, the GPU has {limits.multiprocessors}")
    cluster = limits.architecture >= CLUSTERS_FROM and 1 < blocks <= MOST_OF_A_CLUSTER
    share = groups // directions
    most = _most_pairs(limits.architecture, size, precision, variant)
    rows = _rows(size, batch, share, cluster, limits.shared, precision, most)
    if directions > 1 and (not share or rows * share < batch):  # one after the other, each with all groups
        return _choose(limits, dtype, hidden, short, batch, force, 1, precision, variant)
    if not _fits(size, rows, cluster, limits.shared, precision, most):
        return Choice(None, f"a block takes {_shared(size, rows, cluster, True, precision)} bytes of shared memory")
    return Choice(Plan(size, rows, blocks, share, cluster, directions, precision), "")


def _rows(size: int, batch: int, groups: int, cluster: bool, limit: int, precision: str, most: int) -> int:
    """Sequences of a group: as few as let the groups take the batch at once, or as many as fit."""
    rows = 2
    while rows * groups < batch and _fits(size, rows * 2, cluster, limit, precision, most):
        rows *= 2
    return rows


def _most_pairs(architecture: int, size: int, precision: str, variant: tuple[str, ...]) -> int:
    """(sequence, unit) pairs of a block that leave its threads the registers they need.

    Fewer than the most where NVRTC 13 would spill up to 52 bytes a thread; for compute capability 9.0 it does not.
    """
    large, peephole = size >= 768, "PEEPHOLE" in variant
    if architecture == 90 or precision == "float32":
        return _MOST_PAIRS
    if precision == "tf32":
        if large:
            return 128 if peephole else 256
        return 256 if size == 128 and variant and architecture > 90 else _MOST_PAIRS
    return 256 if large and (peephole or (size == 768 and architecture < 90)) else _MOST_PAIRS


def _split(size: int) -> int:
    return next(split for most, split in ((128, 1), (256, 2), (512, 4), (1024, 8)) if size <= most)


def _fits(size: int, rows: int, cluster: bool, limit: int, precision: str = "float32", most: int = _MOST_PAIRS) -> bool:
    units = 32 // _split(size) * _HELD // _GATES
    shared = max(_shared(size, rows, cluster, backward, precision) for backward in (False, True))
    return rows * units <= most and shared <= limit


def _shared(size: int, rows: int, cluster: bool, backward: bool, precision: str) -> int:
    lanes, inner = (4 * _split(size), 4 * size) if backward else (_split(size), size)
    stride = 32 // lanes * _HELD
    tile = 2 if rows == 2 or inner > 1024 else 4
    staged, element = 2 * tile * inner, 4
    if precision != "float32":  # rows of sums are padded, and nothing is staged
        stride, staged, element = stride + 4, 0, _BYTES[precision]
    stage = 2 * rows * inner * element // 4 if cluster else staged
    return 4 * (stage + _WARPS * rows * stride)
