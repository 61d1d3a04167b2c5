"""One layer in one direction over a whole sequence, forward.

The sequences of a batch stand sorted by length, the longest first, and their steps are packed: the rows of
step s are ``offsets[s]`` to ``offsets[s + 1]``, one for each sequence that is long enough. So padding is
never computed, read or stored, and the rows of all steps together are one matrix of N = sum of lengths
rows. Row n belongs at ``places[n]`` of the caller's (T * B). A batch of equal lengths is the special case
``offsets[s] = s * B``, without a copy.

A kernel is run by a team of threads, each calling it with its own number: the first, which Python called, has
the others do so (``team.py``). Each computes some sequences (rows) or some blocks of hidden units. Where every thread
has its own rows and all units, the steps need no synchronisation; where units are divided, the team meets after each
step, and who is ready before takes blocks of those who are behind.

Arrays are C-contiguous; V is the number of lanes of a vector, Hp is H padded to whole vectors.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.activations import tanh
from fastlstm.kernels.cpu.dots import gate_dots
from fastlstm.kernels.cpu.gates import GATES, TAPE, gates_forward
from fastlstm.kernels.cpu.jit import kernel, routine
from fastlstm.kernels.cpu.pack import clear_padding, is_at_rest, pack_forward, packed_weights
from fastlstm.kernels.cpu.simd import (
    address,
    lanes_of,
    load,
    load_first,
    maximum,
    minimum,
    offset,
    store,
    store_first,
)
from fastlstm.kernels.cpu.team import barrier, dismiss, fetch, share, share_rows, summon, take, this_call
from fastlstm.kernels.cpu.tile import DEPTH, GROUP, ROW_BLOCKS, are_far, gate_tiles

__all__ = ["layer_forward", "pre_activations"]


@kernel
def layer_forward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    x,  # (N, I) packed, IN
    h0,  # (B, H), IN
    c0,  # (B, H), IN
    order,  # (B,) which sequence of the batch stands at each row, IN
    lengths,  # (B,) sorted as `order`, descending, IN
    offsets,  # (S + 1,) first row of each step, IN
    places,  # (N,) where each row belongs in (T * B), IN
    y,  # (T * B, D * H), OUT
    column,  # the first column of y to write
    clear,  # whether to set these columns past the lengths to zero
    h_n,  # (B, H), OUT
    c_n,  # (B, H), OUT
    training,  # whether to write the tape
    tape,  # (N, Hp/V, 5, V) for training, or (N, Hp/V, 1, V) to keep c alone, OUT
    h_rows,  # (N, Hp) the state before each row for training, else (2 * B, Hp), OUT
    c_rows,  # (B, Hp) scratch
    a,  # (rows of `ahead` steps, Hp/V, 4, V), or (threads * GROUP, 1, 4, V) scratch: pre-activations
    packed,  # (Hp/V * (I + H), 4, V) scratch, or IN; or (0, 4, V) to use the weights as they lie
    packed_bias,  # (2, Hp/V, 4, V) scratch, or IN
    pack,  # whether to pack the weights: else they are used as they lie, or packed already
    ahead,  # steps whose input products are computed together, 0 for none
    divided,  # whether units are divided among the threads
    team,  # (1 + threads, 8), IN and OUT: see team.py
    thread,
):
    """Run the recurrence; see the module's docstring for the layout."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    width, stride = packed.shape[2], h_rows.shape[1]
    batch, tile_row = order.size, GATES * width
    steps, blocks, as_they_lie = offsets.size - 1, packed_bias.shape[1], packed.shape[0] == 0
    if pack:
        first, last = share(blocks, team, thread)
        pack_forward(weight_ih, weight_hh, bias, packed, packed_bias, first, last)
    first, last = share(batch, team, thread)
    _begin(h0, c0, order, lengths, training, h_rows, c_rows, h_n, c_n, first, last)
    if clear:
        clear_padding(y, column, hidden, order, offsets, thread, team.shape[0] - 1)
    barrier(team, thread)

    row_first, row_last, block_first, block_last = 0, batch, 0, blocks
    if divided:
        block_first, block_last = share(blocks, team, thread)
    else:
        row_first, row_last = share_rows(offsets, lengths, 0, steps, team, thread)
    at_rest = not as_they_lie and is_at_rest(h0, packed_bias)
    together = block_last - block_first if ahead else 1
    helped = divided and not ahead  # a step of few rows is over before one could help
    x_first, bias_first = address(x), address(packed_bias)
    of_x, of_h = packed_weights(packed, inputs, hidden, 0)
    a_row = a.shape[1] * tile_row
    a_block = tile_row if ahead else 0
    far = are_far(address(packed), (block_last - block_first) * (inputs + hidden) * tile_row)
    for step in range(steps):
        low = offsets[step]
        active = minimum(offsets[step + 1] - low, row_last)
        depth = 0 if step == 0 and at_rest else hidden  # of the products with h
        # Training keeps the state before each row; inference alternates between two.
        here = low if training else (step & 1) * batch
        following = offsets[step + 1] if training else (1 - (step & 1)) * batch
        if divided:
            fetch(offset(address(h_rows), here * stride), active * stride)
        if ahead and step % ahead == 0:  # full tiles even where each step has few rows
            ahead_low = low
            rows, x_rows = offsets[minimum(step + ahead, steps)] - low, offset(x_first, low * inputs)
            _products(
                rows, x_rows, inputs, inputs, of_x, x_rows, 0, 0, of_h, bias_first, 0, address(a), a_row, tile_row,
                block_first, block_last, 0, far,
            )  # fmt: skip
        left = block_last - block_first
        while True:
            if helped:
                first = take(blocks, team, thread, step)
                if first < 0:
                    break
            elif not left:
                break
            else:
                left -= together
                # To and fro: what the caches still hold of the weights is what the step before used last.
                first = block_first + left if step & 1 else block_last - together - left
            last = first + together
            for start in range(row_first, active, GROUP):
                rows = minimum(GROUP, active - start)
                h_prev = offset(address(h_rows), (here + start) * stride)
                if ahead:  # every row is this thread's
                    a_rows = offset(address(a), (low - ahead_low + start) * a_row)
                    _products(
                        rows, h_prev, 0, 0, of_x, h_prev, depth, stride, of_h, a_rows, a_row, a_rows, a_row, tile_row,
                        first, last, step & 1, far,
                    )  # fmt: skip
                else:
                    a_rows = offset(address(a), thread * GROUP * a_row)
                    x_rows = offset(x_first, (low + start) * inputs)
                    if as_they_lie:
                        gate_dots(
                            rows, first, weight_ih, weight_hh, bias, x_rows, inputs, h_prev, stride, a_rows, a_row, far
                        )
                    else:
                        _products(
                            rows, x_rows, inputs, inputs, of_x, h_prev, depth, stride, of_h, bias_first, 0, a_rows,
                            a_row, 0, first, last, step & 1, far,
                        )  # fmt: skip
                for block in range(first, last):
                    a_units = offset(a_rows, block * a_block)
                    _gate_step(
                        a_units, a_row, c_rows, tape, training, step, lengths, order, places, y, column, h_rows,
                        following, h_n, c_n, low, start, rows, block, hidden,
                    )  # fmt: skip
        if divided:
            barrier(team, thread)
    if thread == 0:
        dismiss(team)


@routine(inline=True)
def _gate_step(
    a, a_row, c_rows, tape, training, step, lengths, order, places, y, column, h_rows, following, h_n, c_n, low, start,
    rows, block, hidden,
):  # fmt: skip
    """Take some rows of a block through the gates.

    While one row's gates are computed, so is h of the row before: tanh(c) has to wait for all gates of its cell, and
    the processor does not look so far ahead that it would find work in the next one by itself.
    """
    o, c = _update_cell(a, c_rows, tape, training, low, start, block, hidden)
    for n in range(1, rows):
        o_next, c_next = _update_cell(offset(a, n * a_row), c_rows, tape, training, low, start + n, block, hidden)
        _hand_on(
            o, c, step, lengths, order, places, y, column, h_rows, following, h_n, c_n, low, start + n - 1, block,
            hidden,
        )  # fmt: skip
        o, c = o_next, c_next
    _hand_on(
        o, c, step, lengths, order, places, y, column, h_rows, following, h_n, c_n, low, start + rows - 1, block, hidden
    )


@routine(inline=True)
def _update_cell(a, c_rows, tape, training, low, row, block, hidden):
    """Take a row of a block through the gates: c in place, all on the tape; return o and c."""
    width, stride = lanes_of(a), c_rows.shape[1]
    units = minimum(width, hidden - block * width)
    here_c = offset(address(c_rows), row * stride + block * width)
    # Lanes beyond the units become harmless constants even if NaN arrives there.
    i, f, g, o, c = gates_forward(
        load_first(a, units),
        load_first(offset(a, width), units),
        load_first(offset(a, 2 * width), units),
        load_first(offset(a, 3 * width), units),
        load(here_c),
    )
    store(here_c, c)
    if training:
        kept = tape.shape[2]
        left = offset(address(tape), ((low + row) * tape.shape[1] + block) * kept * width)
        if kept == TAPE:
            store(left, i)
            store(offset(left, width), f)
            store(offset(left, 2 * width), g)
            store(offset(left, 3 * width), o)
        store(offset(left, (kept - 1) * width), c)
    return o, c


@routine(inline=True)
def _hand_on(
    o, c, step, lengths, order, places, y, column, h_rows, following, h_n, c_n, low, row, block, hidden
):  # fmt: skip
    """Compute h of a row of a block, for y and for the next step or, where the sequence ends, for the final states."""
    width, stride = lanes_of(address(h_rows)), h_rows.shape[1]
    units = minimum(width, hidden - block * width)
    h = o * tanh(c)
    store_first(offset(address(y), places[low + row] * y.shape[1] + column + block * width), h, units)
    if step + 1 < lengths[row]:
        store(offset(address(h_rows), (following + row) * stride + block * width), h)
    else:
        final = order[row] * hidden + block * width
        store_first(offset(address(h_n), final), h, units)
        store_first(offset(address(c_n), final), c, units)


@routine
def _begin(h0, c0, order, lengths, training, h_rows, c_rows, h_n, c_n, first, last):
    """Put the initial states of some rows in place; a sequence of length 0 ends with them."""
    hidden, stride = h0.shape[1], h_rows.shape[1]
    width = lanes_of(address(h_rows))
    for row in range(first, last):
        source = order[row] * hidden
        for unit in range(0, hidden, width):
            units = minimum(width, hidden - unit)
            h, c = (
                load_first(offset(address(h0), source + unit), units),
                load_first(offset(address(c0), source + unit), units),
            )
            store(offset(address(c_rows), row * stride + unit), c)
            if lengths[row] > 0 or not training:
                store(offset(address(h_rows), row * stride + unit), h)
            if lengths[row] == 0:
                store_first(offset(address(h_n), source + unit), h, units)
                store_first(offset(address(c_n), source + unit), c, units)


@routine
def _products(
    rows, x, inputs, x_row, of_x, h, depth, h_row, of_h, start, start_row, a, a_row, a_block, first, last, backwards,
    far,
):  # fmt: skip
    """Compute a = (x @ W_ih.T + start) + h @ W_hh.T for some rows and the blocks of units from first to last.

    Either product may be left out: `inputs` or `depth`, the numbers of x and h, is 0 then. Where x's share is in
    `start` already, this has a row for each row. Otherwise it is the bias, with one for all (`start_row` 0).
    """
    tile_row = GATES * lanes_of(a)
    start_block = a_block if start_row else tile_row
    together = ROW_BLOCKS if rows == 1 else 1
    for turn in range(first, last, together):
        blocks = minimum(together, last - turn)
        block = first + last - blocks - turn if backwards else turn
        other = block - together if backwards else block + together
        other = other if first <= other < last else block  # where the next step begins
        after = offset(of_x, other * inputs * tile_row) if inputs else offset(of_h, other * depth * tile_row)
        pre_activations(
            rows, blocks, x, inputs, x_row, offset(of_x, block * inputs * tile_row), h, depth, h_row,
            offset(of_h, block * depth * tile_row), offset(start, block * start_block), start_row,
            offset(a, block * a_block), a_row, far, after,
        )  # fmt: skip


@routine(inline=True)
def pre_activations(
    rows, blocks, x, inputs, x_row, of_x, h, depth, h_row, of_h, start, start_row, a, a_row, far, after
):  # fmt: skip
    """Compute a = (x @ W_ih.T + start) + h @ W_hh.T for some rows and one block of units, or for one row and several.

    The weights are taken DEPTH rows at a time, which stay in the nearest caches while the rows pass. Where
    they are cut depends on I and H alone, so that results do not depend on the plan. Where they are far, each part
    fetches the next one, and the last what is wanted `after` them.
    """
    tile_row = GATES * lanes_of(a)
    x_block, h_block = inputs * tile_row, depth * tile_row
    # At least one input is left, if there are any, to start the products of h.
    whole = maximum(0, inputs - 1) // DEPTH * DEPTH
    k = 0
    while k < inputs + depth:
        k1, k2, a1, a1_row, b1, b1_block = DEPTH, 0, offset(x, k), x_row, offset(of_x, k * tile_row), x_block
        if k == whole:
            k1, k2 = inputs - whole, minimum(DEPTH, depth)
        elif k > whole:
            a1, a1_row, b1, b1_block = offset(h, k - inputs), h_row, offset(of_h, (k - inputs) * tile_row), h_block
            k1 = minimum(DEPTH, inputs + depth - k)
        following = offset(of_h, k2 * tile_row) if k2 else offset(b1, k1 * tile_row)
        following = after if k + k1 + k2 == inputs + depth else following
        gate_tiles(
            rows, blocks, k1, a1, a1_row, b1, b1_block, k2, h, h_row, of_h, h_block, start, start_row, a, a_row, far,
            following,
        )  # fmt: skip
        start, start_row = a, a_row
        k += k1 + k2
