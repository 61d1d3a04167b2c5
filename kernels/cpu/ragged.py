"""Sequences of different lengths without padding: how their rows are packed, divided among threads, and cleared.

The sequences of a batch stand sorted by length, the longest first, and their steps are packed: the rows of step s are
``offsets[s]`` to ``offsets[s + 1]``, one for each sequence that is long enough. So padding is never computed, read or
stored, and the rows of all steps together are one matrix of N = sum of lengths rows. Row n belongs at ``places[n]`` of
the caller's (T * B). A batch of equal lengths is the special case ``offsets[s] = s * B``, without a copy.

All of this is one int64 array, the `index` of a call: order (B,), lengths (B,), offsets (S + 1,) and places (N,),
with S the longest length; and, of a call with resets, (N,) numbers that say before which rows' steps the state is zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.jit import kernel, routine, stay_outlined
from fastlstm.kernels.cpu.thread_team import threads_of
from fastlstm.kernels.cpu.vector import address, fill, lanes_of, maximum, minimum, offset, store_first

__all__ = ["Rows", "clear_padding", "fill_index", "measure", "rows_of", "share_rows"]


class Rows(NamedTuple):
    """The packed rows of a batch; all but the first two are pointers to int64."""

    batch: Any  # B
    steps: Any  # S, the longest length
    order: Any  # (B,) which sequence of the batch stands at each row
    lengths: Any  # (B,) sorted as `order`, descending
    offsets: Any  # (S + 1,) first row of each step
    places: Any  # (N,) where each row belongs in (T * B)
    has_resets: Any
    resets: Any  # (N,) 1 where the state is zero before the step, if there are resets


@routine(inline=True)
def rows_of(index, batch, steps, has_resets):
    """Read the record off an index."""
    start = address(index)
    offsets = offset(start, 2 * batch)
    places = offset(offsets, steps + 1)
    return Rows(batch, steps, start, offset(start, batch), offsets, places, has_resets, offset(places, offsets[steps]))


@routine
def clear_padding(target, row_size, columns, rows, total, first_step, step):
    """Set some columns of the padding past the lengths to zero, at every `step`-th time step from the first on.

    Parameters
    ----------
    target : pointer, OUT
        To the first of the columns, in row 0 of (T * B) rows of `row_size` elements.
    columns : int
        How many.
    rows : Rows
    total : int
        T.
    first_step, step : int
        The time steps: each thread takes its own.
    """
    stay_outlined()
    for t in range(first_step, total, step):
        inside = rows.offsets[t + 1] - rows.offsets[t] if t < rows.steps else 0
        for row in range(inside, rows.batch):
            start = offset(target, (t * rows.batch + rows.order[row]) * row_size)
            for n in range(0, columns, lanes_of(target)):
                store_first(offset(start, n), fill(start, 0.0), columns - n)


@routine
def share_rows(rows, first_step, last_step, team, thread):
    """Divide the rows of some steps, so that each thread has about as many in all.

    A thread's rows are contiguous: if rows were dealt out in turn, each core would prefetch rows of other threads.

    Returns
    -------
    first, last : int
        This thread's first row and the next one's. The last of them may end before `last_step`.
    """
    stay_outlined()
    total, threads = rows.offsets[last_step] - rows.offsets[first_step], threads_of(team, thread)
    if total == 0:
        return 0, 0
    first = _row_after(rows, first_step, last_step, total * thread // threads)
    return first, _row_after(rows, first_step, last_step, total * (thread + 1) // threads)


@routine
def _row_after(rows, first_step, last_step, count):
    """Return the row before which the rows of some steps add up to `count`, as nearly as possible."""
    steps = last_step - first_step
    whole = rows.offsets[last_step] - rows.offsets[last_step - 1]  # rows that have all these steps
    row = minimum(whole, (count + steps // 2) // steps)
    before = row * steps
    while whole <= row < rows.batch and rows.lengths[row] > first_step:
        here = rows.lengths[row] - first_step
        if before + here - count > count - before:
            break
        before += here
        row += 1
    return row


@kernel
def measure(lengths):
    """Return the shortest and the longest of some lengths, and their sum; zeros for none."""
    shortest = longest = total = 0
    for n in range(lengths.size):
        length = lengths[n]
        shortest = length if n == 0 else minimum(shortest, length)
        longest = maximum(longest, length)
        total += length
    return shortest, longest, total


@kernel
def fill_index(
    lengths,  # (B,) in any order, IN
    longest,  # S
    reverse,  # whether the steps of each sequence are taken from its end
    index,  # OUT
):
    """Sort sequences by length, the longest first and equal ones in their order, and pack their steps."""
    batch = lengths.size
    sorted_lengths, offsets = batch, 2 * batch  # where these start
    places = offsets + longest + 1
    for length in range(longest + 1):
        index[offsets + length] = 0
    for sequence in range(batch):
        index[offsets + lengths[sequence]] += 1
    before = 0  # of each length, how many sequences are longer
    for n in range(longest + 1):
        count = index[offsets + longest - n]
        index[offsets + longest - n] = before
        before += count
    for sequence in range(batch):
        row = index[offsets + lengths[sequence]]
        index[offsets + lengths[sequence]] = row + 1
        index[row], index[sorted_lengths + row] = sequence, lengths[sequence]
    # Now each length's number says how many sequences are as long or longer: the rows of the step before it.
    index[offsets] = 0
    for step in range(longest):
        low, active = index[offsets + step], index[offsets + step + 1]
        index[offsets + step + 1] = low + active
        for row in range(active):
            time = index[sorted_lengths + row] - 1 - step if reverse else step
            index[places + low + row] = time * batch + index[row]
