"""Blocks of memory: the pool that keeps them, the scratch of calls, and the arrays in them."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness import BackendUnderTest

from fastlstm import LSTM, use_backend
from fastlstm.backends.cpu.workspace import Pool, Scratch, Workspace, is_to_be_cleared, new_array, one_block
from fastlstm.kernels.cpu.vector import CACHE_LINE


def test_the_arrays_of_a_block_are_apart_and_each_starts_a_cache_line(dtype):
    shapes = [(3, 5), (0, 7), (16,), (1, 1, 1), (2, 16)]
    for _ in range(8):  # blocks lie at different places
        arrays = one_block(dtype, *shapes)
        assert [(a.shape, a.dtype) for a in arrays] == [(shape, dtype) for shape in shapes]
        assert all(a.flags.carray and a.ctypes.data % CACHE_LINE == 0 for a in arrays)
        for number, array in enumerate(arrays):
            array[...] = number
        assert all((array == number).all() for number, array in enumerate(arrays))


@pytest.fixture
def pool(monkeypatch):
    """An empty pool in the place of the library's."""
    pool = Pool()
    monkeypatch.setattr(sys.modules["fastlstm.backends.cpu.workspace"], "POOL", pool)
    return pool


def large(elements=Pool.LEAST):
    (array,) = one_block(np.dtype("float64"), (elements,))
    return array


def test_a_block_is_kept_when_its_last_array_is_gone_and_used_again(pool):
    one, other = one_block(np.dtype("float64"), (Pool.LEAST,), (3,))
    address = one.ctypes.data
    view = one.reshape(2, -1)[1:, ::2]
    del one
    assert pool.size == 0
    del view
    assert pool.size == 0, "of its two arrays one is in use"
    del other
    assert pool.size >= Pool.LEAST * 8
    much_smaller = large(Pool.LEAST // 3)
    assert much_smaller.ctypes.data != address, "most of the block would lie idle"
    smaller = large(Pool.LEAST * 2 // 3)
    assert smaller.ctypes.data == address
    assert pool.size == 0


def test_the_smallest_block_that_fits_is_taken(pool):
    """Else calls that need several sizes would have to make a new one each time."""
    sizes = [2, 1, 3, 1]
    blocks = [large(size * Pool.LEAST) for size in sizes]
    addresses = {block.ctypes.data for block in blocks}
    for order in (sizes, sizes[::-1], sorted(sizes)):
        del blocks
        blocks = [large(size * Pool.LEAST) for size in order]
        assert {block.ctypes.data for block in blocks} == addresses


def test_the_pool_keeps_no_more_than_it_may_and_nothing_that_is_too_small(pool, monkeypatch):
    monkeypatch.setattr(Pool, "MOST", 5 * 8 * Pool.LEAST)
    several = [large(factor * Pool.LEAST) for factor in (1, 2, 1, 2)]
    while several:
        several.pop()
    assert 0 < pool.size <= Pool.MOST
    larger = large(3 * Pool.LEAST)
    assert pool.size == 0, "kept blocks are freed before a new block is allocated"
    del larger
    too_large = large(6 * Pool.LEAST)
    del too_large
    assert pool.size == 0
    small = one_block(np.dtype("float32"), (8,))
    del small
    assert pool.size == 0


@pytest.mark.parametrize("elements", [5, Pool.LEAST, 2 * Pool.LEAST])
def test_padding_that_no_kernel_clears_is_zero(pool, dtype, elements, monkeypatch):
    monkeypatch.setattr(Pool, "MOST", 8 * Pool.LEAST)
    monkeypatch.setattr(np, "empty", lambda shape, dtype=float: np.full(shape, 7, dtype))  # memory used before
    array = new_array((elements, 5), dtype, padded=True)
    assert is_to_be_cleared(array) == (array.nbytes <= Pool.MOST)
    assert is_to_be_cleared(array) or not array.any()


@pytest.mark.parametrize("elements", [5, Pool.LEAST])
def test_an_array_for_the_caller_is_his_until_he_drops_it(pool, dtype, elements):
    addresses = set()
    for _ in range(3):
        array = new_array((elements, 2), dtype)
        assert (array.shape, array.dtype) == ((elements, 2), dtype) and array.flags.carray
        array[...] = 1.0
        part = array[1:2]
        addresses.add(array.ctypes.data)
        del array
        other = new_array((elements, 2), dtype)
        other[...] = 0.0
        assert (part == 1.0).all(), "a view keeps the memory"
        addresses.add(other.ctypes.data)
        del other, part
    assert elements < Pool.LEAST or len(addresses) == 2


def test_scratch_is_lent_to_one_call_at_a_time_and_kept_for_a_few_kinds_of_calls_only(dtype):
    scratch, workspace = Scratch(), Workspace(dtype, (3, 4), (5,))
    one, other = scratch.borrow(workspace), scratch.borrow(workspace)
    assert one.shape == (workspace.size,) and one.dtype == dtype and one.flags.carray
    assert not np.shares_memory(one, other)
    scratch.give_back(workspace, one)
    assert scratch.borrow(workspace) is one
    scratch.give_back(workspace, one)
    for size in range(Scratch.KINDS):
        another = Workspace(dtype, (size,))
        scratch.give_back(another, scratch.borrow(another))
    assert scratch.borrow(workspace) is not one, "too many kinds: all were forgotten"
    large = Workspace(dtype, (Pool.LEAST,))
    lent = scratch.borrow(large)
    scratch.give_back(large, lent)
    assert scratch.borrow(large) is not lent, "the pool keeps large ones"


def test_the_arrays_of_a_workspace_are_apart_and_each_starts_a_cache_line(dtype):
    shapes = [(3, 5), (0, 7), (16,), (1, 1, 1), (2, 16)]
    workspace = Workspace(dtype, *shapes)
    memory = Scratch().borrow(workspace)
    assert memory.ctypes.data % CACHE_LINE == 0
    ends = [start + int(np.prod(shape)) for start, shape in zip(workspace.starts, shapes, strict=True)]
    assert all(end <= start for end, start in zip(ends, (*workspace.starts[1:], workspace.size), strict=True))
    assert all(start * dtype.itemsize % CACHE_LINE == 0 for start in workspace.starts)


def test_no_block_is_in_two_hands(pool):
    """Not even if garbage collection returns one while another is taken, in some threads at once."""

    def work(number):
        rng, held = np.random.default_rng(number), []
        for turn in range(150):
            array = large(int(rng.integers(1, 4)) * Pool.LEAST // 4)
            mark = 1000.0 * number + turn
            array[:: 1 << 12] = mark
            cycle = [array]
            cycle.append(cycle)  # only the collector frees it
            held.append((array, mark))
            if len(held) > 3:
                kept, expected = held.pop(int(rng.integers(len(held))))
                assert (kept[:: 1 << 12] == expected).all()
        return True

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(4)))


def test_a_tape_keeps_its_values_while_other_calls_come_and_go(pool, dtype):
    if BackendUnderTest("cpu").missing:
        pytest.skip(BackendUnderTest("cpu").missing)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 16, 8)).astype(dtype)
    dy = rng.normal(size=(64, 16, 96)).astype(dtype)
    with use_backend("cpu"):
        lstm = LSTM(8, 96, dtype=dtype, seed=0)
        expected = lstm.backward(lstm.forward(x)[2], dy)
        tapes = [lstm.forward(x)[2] for _ in range(3)]
        assert tapes[0].record.layers[0].directions[0].gates.nbytes > Pool.LEAST
        lstm(-x)
        lstm.backward(lstm.forward(-x)[2], dy)
        for tape in tapes:
            np.testing.assert_array_equal(lstm.backward(tape, dy).x, expected.x)
