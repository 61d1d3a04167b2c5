"""The index of a batch's rows, made in compiled code, is that of the packing in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from harness import BackendUnderTest
from hypothesis import example, given
from hypothesis import strategies as st

from fastlstm.backends.ragged import Packing

pytestmark = pytest.mark.skipif(bool(BackendUnderTest("cpu").missing), reason=str(BackendUnderTest("cpu").missing))


def index_of(packing, reverse):
    """Order, lengths, offsets and places, one after the other."""
    return np.concatenate([packing.order, packing.lengths, packing.offsets, packing.places(reverse)])


def made(lengths, steps, batch):
    from fastlstm.backends.cpu.rows import Rows

    return Rows(lengths, steps, batch)


@st.composite
def lengths_of_a_batch(draw):
    steps = draw(st.integers(0, 12))
    # Often none, often all steps, and often as many as another has: where sorting and counting could go wrong.
    some = st.sampled_from([0, steps, steps // 2]) | st.integers(0, steps)
    return np.array(draw(st.lists(some, min_size=1, max_size=9)), np.int64), steps


@given(drawn=lengths_of_a_batch())
@example(drawn=(np.zeros(4, np.int64), 5))
@example(drawn=(np.zeros(1, np.int64), 0))
@example(drawn=(np.array([5, 5, 5]), 5))
@example(drawn=(np.array([4, 4, 4]), 5))
@example(drawn=(np.array([0, 5, 0, 1, 5, 4]), 5))
def test_the_index_is_that_of_the_packing(drawn):
    lengths, steps = drawn
    before = lengths.copy()
    rows, packing = made(lengths, steps, lengths.size), Packing.of(lengths, steps, lengths.size)
    assert (rows.steps, rows.batch) == (steps, lengths.size)
    assert (rows.longest, rows.count, rows.ragged) == (packing.offsets.size - 1, packing.rows, packing.ragged)
    x = np.arange(steps * lengths.size * 2, dtype=np.float64).reshape(steps, lengths.size, 2)
    for reverse in (False, True, False):
        index = rows.index(reverse)
        assert index.dtype == np.int64 and index.flags.carray
        np.testing.assert_array_equal(index, index_of(packing, reverse))
        np.testing.assert_array_equal(rows.pack(x, reverse), packing.pack(x, reverse)[0])
    np.testing.assert_array_equal(lengths, before)


@pytest.mark.parametrize("seed", range(20))
def test_the_index_of_large_batches_is_that_of_the_packing(seed):
    rng = np.random.default_rng(seed)
    batch, steps = int(rng.integers(1, 400)), int(rng.integers(1, 300))
    lengths = rng.integers(0, steps + 1, batch)
    rows, packing = made(lengths, steps, batch), Packing.of(lengths, steps, batch)
    for reverse in (False, True):
        np.testing.assert_array_equal(rows.index(reverse), index_of(packing, reverse))


@pytest.mark.parametrize("given_as", [None, "lengths"])
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (1, 7), (9, 1), (6, 5), (0, 3), (3, 0), (600, 40)])
def test_a_batch_of_equal_lengths_has_the_rows_in_the_order_of_time(steps, batch, given_as):
    lengths = np.full(batch, steps) if given_as and batch else None
    rows, packing = made(lengths, steps, batch), Packing.of(None, steps, batch)
    assert not rows.ragged and (rows.longest, rows.count) == (steps, steps * batch)
    for reverse in (False, True):
        np.testing.assert_array_equal(rows.index(reverse), index_of(packing, reverse))


def test_a_small_index_is_kept_and_a_ragged_one_is_not():
    assert made(None, 6, 5).index(True) is made(None, 6, 5).index(True)
    ragged = made(np.array([3, 1]), 4, 2)
    assert ragged.index(True) is ragged.index(True)
    assert made(np.array([3, 1]), 4, 2).index(True) is not ragged.index(True)
    large = made(None, 600, 40)
    assert not large.is_kept and made(None, 600, 40).index(False) is not large.index(False)


def test_the_lengths_and_their_sum_are_measured():
    from fastlstm.kernels.cpu.ragged import measure

    for lengths in ([], [0], [7], [3, 9, 0, 4], [5, 5]):
        expected = (min(lengths), max(lengths), sum(lengths)) if lengths else (0, 0, 0)
        assert measure(np.array(lengths, np.int64)) == expected
