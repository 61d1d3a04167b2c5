"""One layer in one direction over a whole sequence, forward and backward.

The sequences of a batch stand sorted by length, the longest first, and their steps are packed: the rows of
step s are ``offsets[s]`` to ``offsets[s + 1]``, one for each sequence that is long enough. So padding is
never computed, read or stored, and the rows of all steps together are one matrix of N = sum of lengths
rows. A batch of equal lengths is the special case ``offsets[s] = s * B``, without a copy.

A kernel is run by a team of threads, each calling it with its own number. Every thread carries its own
sequences through all steps, so that the steps need no synchronisation.

Arrays are C-contiguous; V is the number of lanes of a vector, Hp is H padded to whole vectors, and
"padded" rows have zeros, or finite values that meet zeros, beyond the end.
"""

from __future__ import annotations

from numba import njit

from fastlstm.kernels.cpu.compile import kernel
from fastlstm.kernels.cpu.gates import GATES, TAPE, gates_backward, gates_forward
from fastlstm.kernels.cpu.pack import pack_backward, pack_forward, unpack_gradient
from fastlstm.kernels.cpu.simd import address, fill, load, load_first, offset, store, store_first
from fastlstm.kernels.cpu.team import barrier, share
from fastlstm.kernels.cpu.tile import ROWS, VECTORS, tile

__all__ = ["layer_backward", "layer_forward"]


@njit
def _time(step, length, reverse):
    """Where a sequence's step number `step` lies in time."""
    return length - 1 - step if reverse else step


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
    reverse,  # whether step 0 is a sequence's last time
    y,  # (T, B, D, H), OUT at `direction`; past the lengths untouched
    direction,
    h_n,  # (B, H), OUT
    c_n,  # (B, H), OUT
    training,  # whether to write the tape
    tape,  # (N, Hp/V, 5, V) for training, or (0, ...), OUT
    h_rows,  # (N, Hp) the state before each row for training, or (2 * B, Hp), OUT
    c_rows,  # (B, Hp) scratch
    packed,  # (Hp/V, I + H, 4, V) scratch
    packed_bias,  # (Hp/V, 4, V) scratch
    scratch,  # (threads, ROWS, 4, V) scratch
    bounds,  # (threads + 1,) the rows of each thread, IN
    counters,  # (1 + threads, 8) zeros, for the barrier
    thread,
    threads,
):
    """Run the recurrence; see the module's docstring for the layout."""
    inputs, hidden = weight_ih.shape[1], weight_hh.shape[1]
    blocks, width = packed.shape[0], packed.shape[3]
    stride = blocks * width
    batch = order.size

    first, last = share(blocks, thread, threads)
    pack_forward(weight_ih, weight_hh, bias, packed, packed_bias, first, last)

    row_first, row_last = bounds[thread], bounds[thread + 1]
    for row in range(row_first, row_last):
        for unit in range(stride):
            inside = unit < hidden
            c_rows[row, unit] = c0[order[row], unit] if inside else 0.0
            if lengths[row] > 0 or not training:
                h_rows[row, unit] = h0[order[row], unit] if inside else 0.0
        if lengths[row] == 0:
            h_n[order[row]] = h0[order[row]]
            c_n[order[row]] = c0[order[row]]
    barrier(counters, thread, threads)

    a = offset(address(scratch), thread * ROWS * GATES * width)
    for step in range(offsets.size - 1):
        active = min(offsets[step + 1] - offsets[step], row_last)
        # Training keeps the state before each row; inference alternates between two.
        here = offsets[step] if training else (step & 1) * batch
        following = offsets[step + 1] if training else (1 - (step & 1)) * batch
        for block in range(blocks):
            units = min(width, hidden - block * width)
            weights = offset(address(packed), block * (inputs + hidden) * GATES * width)
            for start in range(row_first, active, ROWS):
                rows = min(ROWS, active - start)
                for r in range(rows):
                    for gate in range(GATES):
                        source = offset(address(packed_bias), (block * GATES + gate) * width)
                        store(offset(a, (r * GATES + gate) * width), load(source))
                x_rows = offset(address(x), (offsets[step] + start) * inputs)
                tile(rows, GATES, inputs, x_rows, inputs, 1, weights, GATES * width, a, GATES * width)
                state = offset(address(h_rows), (here + start) * stride)
                recurrent = offset(weights, inputs * GATES * width)
                tile(rows, GATES, hidden, state, stride, 1, recurrent, GATES * width, a, GATES * width)
                for r in range(rows):
                    row = start + r
                    c_here = offset(address(c_rows), row * stride + block * width)
                    i, f, g, o, c, h = gates_forward(offset(a, r * GATES * width), width, units, load(c_here))
                    store(c_here, c)
                    sequence, length = order[row], lengths[row]
                    out = ((_time(step, length, reverse) * batch + sequence) * y.shape[2] + direction) * hidden
                    store_first(offset(address(y), out + block * width), h, units)
                    if training:
                        left = offset(address(tape), ((offsets[step] + row) * blocks + block) * TAPE * width)
                        store(left, i)
                        store(offset(left, width), f)
                        store(offset(left, 2 * width), g)
                        store(offset(left, 3 * width), o)
                        store(offset(left, 4 * width), c)
                    if step + 1 < length:
                        store(offset(address(h_rows), (following + row) * stride + block * width), h)
                    else:
                        final = sequence * hidden + block * width
                        store_first(offset(address(h_n), final), h, units)
                        store_first(offset(address(c_n), final), c, units)


@kernel
def layer_backward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    x,  # (N, Ip) packed, I padded to whole vectors, IN
    tape,  # (N, Hp/V, 5, V), IN
    h_rows,  # (N, Hp), IN
    c0,  # (B, H), IN
    order,  # (B,), IN
    lengths,  # (B,), IN
    offsets,  # (S + 1,), IN
    reverse,
    dy,  # (T, B, D, H), or empty for zero, IN
    direction,
    dh_n,  # (B, H), IN
    dc_n,  # (B, H), IN
    accumulate,  # whether to add to dx in place of setting it
    dx,  # (T, B, I), OUT; past the lengths untouched
    dh0,  # (B, H), OUT
    dc0,  # (B, H), OUT
    dweight_ih,  # (4H, I), OUT
    dweight_hh,  # (4H, H), OUT
    dbias,  # (4H,), or (0,) for none, OUT
    chunk,  # steps whose gate gradients are kept at a time
    da,  # (rows of a chunk, 4 * Hp) scratch
    dh_rows,  # (B, Hp) scratch
    dc_rows,  # (B, Hp) scratch
    packed_ih,  # (Hp/V, 4, V, Ip) scratch
    packed_hh,  # (Hp/V, 4, V, Hp) scratch
    dpacked_ih,  # (Hp/V, 4, V, Ip) scratch
    dpacked_hh,  # (Hp/V, 4, V, Hp) scratch
    dpacked_bias,  # (Hp/V, 4, V) scratch
    scratch,  # (threads, ROWS, 4, V) scratch
    bounds,  # (threads + 1,), IN
    counters,  # (1 + threads, 8) zeros
    thread,
    threads,
):
    """Back-propagate; the gate gradients of a chunk of steps, then their products, then the chunk before."""
    hidden = weight_hh.shape[1]
    blocks, width = tape.shape[1], tape.shape[3]
    stride = blocks * width
    first, last = share(blocks, thread, threads)
    pack_backward(weight_ih, packed_ih, first, last)
    pack_backward(weight_hh, packed_hh, first, last)
    dpacked_ih[first:last] = 0.0
    dpacked_hh[first:last] = 0.0
    dpacked_bias[first:last] = 0.0
    for row in range(bounds[thread], bounds[thread + 1]):
        for unit in range(stride):
            dh_rows[row, unit] = dh_n[order[row], unit] if unit < hidden else 0.0
            dc_rows[row, unit] = dc_n[order[row], unit] if unit < hidden else 0.0
    barrier(counters, thread, threads)

    chunk_last = offsets.size - 1
    while chunk_last > 0:
        chunk_first = max(0, chunk_last - chunk)
        for step in range(chunk_last - 1, chunk_first - 1, -1):
            _step_back(
                step, tape, c0, order, lengths, offsets, reverse, dy, direction,
                offsets[chunk_first], da, dh_rows, dc_rows, packed_hh, bounds[thread], bounds[thread + 1],
            )  # fmt: skip
        barrier(counters, thread, threads)
        low, high = offsets[chunk_first], offsets[chunk_last]
        _add_weight_gradient(da, x, low, high, dpacked_ih, first, last)
        _add_weight_gradient(da, h_rows, low, high, dpacked_hh, first, last)
        _add_bias_gradient(da, high - low, dpacked_bias, first, last)
        for step in range(chunk_first, chunk_last):
            _input_gradient(
                step, order, lengths, offsets, reverse, low, da, packed_ih, accumulate, dx,
                scratch, thread, bounds[thread], bounds[thread + 1],
            )  # fmt: skip
        barrier(counters, thread, threads)
        chunk_last = chunk_first

    unpack_gradient(dpacked_ih, dweight_ih, first, last)
    unpack_gradient(dpacked_hh, dweight_hh, first, last)
    if dbias.size:
        for block in range(first, last):
            for gate in range(GATES):
                for lane in range(min(width, hidden - block * width)):
                    dbias[gate * hidden + block * width + lane] = dpacked_bias[block, gate, lane]
    for row in range(bounds[thread], bounds[thread + 1]):
        for unit in range(hidden):
            dh0[order[row], unit] = dh_rows[row, unit]
            dc0[order[row], unit] = dc_rows[row, unit]


@njit
def _step_back(
    step, tape, c0, order, lengths, offsets, reverse, dy, direction,
    chunk_row, da, dh_rows, dc_rows, packed_hh, row_first, row_last,
):  # fmt: skip
    """Take one step's state gradients back: dh and dc in place, the gate gradients to `da`."""
    hidden = c0.shape[1]
    batch, blocks, width = order.size, tape.shape[1], tape.shape[3]
    stride = blocks * width
    active = min(offsets[step + 1] - offsets[step], row_last)
    for row in range(row_first, active):
        here = offsets[step] + row
        sequence = order[row]
        time = _time(step, lengths[row], reverse)
        for block in range(blocks):
            units = min(width, hidden - block * width)
            column = block * width
            if step:
                before = (offsets[step - 1] + row) * blocks + block
                c_prev = load(offset(address(tape), (before * TAPE + TAPE - 1) * width))
            else:
                c_prev = load_first(offset(address(c0), sequence * hidden + column), units)
            dh = load(offset(address(dh_rows), row * stride + column))
            if dy.size:
                source = ((time * batch + sequence) * dy.shape[2] + direction) * hidden + column
                dh = dh + load_first(offset(address(dy), source), units)
            dc = offset(address(dc_rows), row * stride + column)
            left = offset(address(tape), (here * blocks + block) * TAPE * width)
            out = offset(address(da), ((here - chunk_row) * stride + column) * GATES)
            store(dc, gates_backward(dh, load(dc), left, width, c_prev, out))
        for unit in range(stride):
            dh_rows[row, unit] = 0.0
    for column in range(0, blocks, VECTORS):
        vectors = min(VECTORS, blocks - column)
        weights = offset(address(packed_hh), column * width)
        for start in range(row_first, active, ROWS):
            gates = offset(address(da), (offsets[step] - chunk_row + start) * GATES * stride)
            out = offset(address(dh_rows), start * stride + column * width)
            tile(
                min(ROWS, active - start),
                vectors,
                GATES * stride,
                gates,
                GATES * stride,
                1,
                weights,
                stride,
                out,
                stride,
            )


@njit
def _add_weight_gradient(da, operand, low, high, gradient, first, last):
    """Add the sum over the rows low to high of da^T operand, for some blocks of units."""
    width = gradient.shape[2]
    rows, stride = da.shape[1], operand.shape[1]
    for column in range(0, stride, VECTORS * width):
        vectors = min(VECTORS, (stride - column) // width)
        source = offset(address(operand), low * stride + column)
        row = first * GATES * width
        while row < last * GATES * width:
            count = min(ROWS, last * GATES * width - row)
            out = offset(address(gradient), row * stride + column)
            tile(count, vectors, high - low, offset(address(da), row), 1, rows, source, stride, out, stride)
            row += count


@njit
def _add_bias_gradient(da, rows, gradient, first, last):
    """Add the sum over the rows of da, for some blocks of units."""
    width, columns = gradient.shape[2], da.shape[1]
    for part in range(first * GATES, last * GATES):
        total = load(offset(address(gradient), part * width))
        for row in range(rows):
            total = total + load(offset(address(da), row * columns + part * width))
        store(offset(address(gradient), part * width), total)


@njit
def _input_gradient(
    step, order, lengths, offsets, reverse, chunk_row, da, packed_ih, accumulate, dx,
    scratch, thread, row_first, row_last,
):  # fmt: skip
    """Compute one step's gradient by the input."""
    batch, inputs = dx.shape[1], dx.shape[2]
    width, stride = packed_ih.shape[2], packed_ih.shape[3]
    columns = da.shape[1]
    active = min(offsets[step + 1] - offsets[step], row_last)
    block = offset(address(scratch), thread * ROWS * VECTORS * width)
    for column in range(0, stride, VECTORS * width):
        vectors = min(VECTORS, (stride - column) // width)
        weights = offset(address(packed_ih), column)
        for start in range(row_first, active, ROWS):
            rows = min(ROWS, active - start)
            for r in range(rows):
                for v in range(vectors):
                    place = offset(block, (r * VECTORS + v) * width)
                    store(place, fill(place, 0.0))
            gates = offset(address(da), (offsets[step] - chunk_row + start) * columns)
            tile(rows, vectors, columns, gates, columns, 1, weights, stride, block, VECTORS * width)
            for r in range(rows):
                row = start + r
                target = (_time(step, lengths[row], reverse) * batch + order[row]) * inputs + column
                for v in range(vectors):
                    units = min(width, inputs - column - v * width)
                    out = offset(address(dx), target + v * width)
                    value = load(offset(block, (r * VECTORS + v) * width))
                    if accumulate:
                        value = value + load_first(out, units)
                    store_first(out, value, units)
