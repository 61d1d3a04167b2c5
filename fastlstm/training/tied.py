"""Tied parameters: one array under two names. Its gradient is the sum of the gradients of both names."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from fastlstm.backends.base import Array
from fastlstm.errors import ArgumentError

__all__ = ["add", "first_names"]

# Of NumPy's exact search for a shared entry, which may take exponential time; this much is some milliseconds.
MAX_WORK: Any = 10**6  # NumPy's stub takes two integers only


def first_names(params: Mapping[str, Array]) -> dict[str, str]:
    """Map the name of each parameter to the first name of the same array.

    Two names are tied if they have the same memory, shape, strides and dtype.

    Raises
    ------
    ArgumentError
        If two arrays share a part of their memory, or entries of one array share memory: a change of one in place
        would change the other, too.
    """
    first: dict[tuple[Any, ...], str] = {}
    names, spans = {}, []
    for name, array in params.items():
        names[name] = name
        if not array.size:
            continue
        address = _address(array)
        layout = (type(array), address, array.shape, array.strides, array.dtype)
        names[name] = first.setdefault(layout, name)
        if names[name] == name:
            if _overlaps_itself(array):
                raise ArgumentError(f"entries of parameter {name} share memory: replace it with a copy")
            reach = [(size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True)]
            low, high = (sum(pick(0, step) for step in reach) for pick in (min, max))
            spans.append((address + low, address + high + array.dtype.itemsize, name))
    _refuse_overlaps(sorted(spans), params)
    return names


def _refuse_overlaps(spans: list[tuple[int, int, str]], params: Mapping[str, Array]) -> None:
    """Refuse arrays that share memory; `spans` are the first byte of each, the one after its last, and its name."""
    near: list[tuple[int, str]] = []
    for low, high, name in spans:
        near = [(end, other) for end, other in near if end > low]
        for _, other in near:
            if _share_memory(params[other], params[name]):
                raise ArgumentError(
                    f"parameters {other} and {name} share a part of their memory: tie them as the same array, of one"
                    " shape and strides, or replace one with a copy"
                )
        near.append((high, name))


def _address(array: Array) -> int:
    interface = getattr(array, "__array_interface__", None)  # CuPy's arrays have none
    return int(interface["data"][0] if interface else array.data.ptr)


def _overlaps_itself(array: Array) -> bool:
    """Whether two entries may lie in the same place: a stride is shorter than what the smaller ones reach."""
    reach = array.dtype.itemsize
    for stride, size in sorted((abs(stride), size) for stride, size in zip(array.strides, array.shape, strict=True)):
        if size > 1 and stride < reach:
            return True
        reach += stride * (size - 1)
    return False


def _share_memory(one: Array, other: Array) -> bool:
    """Whether two arrays, the spans of which overlap, have a byte in common; columns of one matrix have none."""
    try:
        return np.shares_memory(_stand_in(one), _stand_in(other), max_work=MAX_WORK)
    except np.exceptions.TooHardError:
        return True


def _stand_in(array: Array) -> np.ndarray[Any, Any]:
    """Make a NumPy array of the same place, not to be read: the address may be the GPU's.

    NumPy's search works on addresses alone. CuPy's own compares one address of each entry, and waits for the GPU.
    """
    interface = {
        "shape": array.shape,
        "strides": array.strides,
        "typestr": array.dtype.str,
        "data": (_address(array), True),
        "version": 3,
    }
    return np.asarray(SimpleNamespace(__array_interface__=interface))


def add(first: Mapping[str, str], grads: Mapping[str, Array]) -> dict[str, Array]:
    """Return one gradient for each array, under its first name: the sum of those of its names."""
    sums: dict[str, Array] = {}
    for name, grad in grads.items():
        leader = first[name]
        sums[leader] = sums[leader] + grad if leader in sums else grad
    return sums
