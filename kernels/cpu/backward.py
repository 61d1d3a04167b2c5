"""One layer in one direction over a whole sequence, backward; ``forward.py`` describes the layout.

The gate gradients of a chunk of steps are computed back in time; then their products, over all rows of
the chunk at once, are added to the gradients of the weights and written to those of the input; then comes
the chunk before. So the gate gradients never take more memory than one chunk's.
"""

from __future__ import annotations

from fastlstm.kernels.cpu.forward import pre_activations
from fastlstm.kernels.cpu.gates import GATES, TAPE, gates_again, gates_backward
from fastlstm.kernels.cpu.jit import kernel, routine
from fastlstm.kernels.cpu.pack import clear_padding, pack_backward, pack_forward, pack_rows, packed_weights
from fastlstm.kernels.cpu.simd import (
    address,
    fill,
    lanes_of,
    load,
    load_first,
    maximum,
    minimum,
    offset,
    prefetch,
    store,
    store_first,
)
from fastlstm.kernels.cpu.team import barrier, dismiss, share, share_rows, summon, this_call
from fastlstm.kernels.cpu.tile import DEPTH as SLICE
from fastlstm.kernels.cpu.tile import GROUP, ROW_BLOCKS, VECTORS, are_far, gate_tile, tiles, zero_row

__all__ = ["PANEL_ROWS", "layer_backward"]

# Rows of a chunk that a tile of the weights' gradients takes at most: with 4 vectors each, those of x or h stay in the
# first-level cache while the tile goes over the gates of some units.
_DEPTH = 128
# The sums of a block of units stay near while so many such pieces are added to them. Fetched for each piece anew, they
# would be most of what these products read.
_PIECES = 4
# Rows of the gradient by x whose sums lie in the second-level cache while all weights pass by.
_INPUT_ROWS = 128
PANEL_ROWS = _PIECES * _DEPTH


@kernel
def layer_backward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    x,  # (N, I) packed, IN
    tape,  # (N, Hp/V, 5, V), or (N, Hp/V, 1, V) with c alone, IN
    h_rows,  # (N, Hp), IN
    c0,  # (B, H), IN
    order,  # (B,), IN
    lengths,  # (B,), IN
    offsets,  # (S + 1,), IN
    places,  # (N,), IN
    dy,  # (T * B, D * H), or (0, D * H) for zero, IN
    column,  # the first column of dy to read
    dh_n,  # (B, H), IN
    dc_n,  # (B, H), IN
    accumulate,  # whether to add to dx in place of setting it
    dx,  # (T * B, I), OUT
    clear,  # whether to set dx past the lengths to zero
    dh0,  # (B, H), OUT
    dc0,  # (B, H), OUT
    dweight_ih,  # (4H, I), OUT
    dweight_hh,  # (4H, H), OUT
    dbias,  # (4H,), or (0,) for none, OUT
    chunk,  # steps whose gate gradients are kept at a time
    gates,  # (rows of a chunk, Hp/V, 5, V) scratch if the tape has c alone, else None
    packed,  # (Hp/V * (I + H), 4, V) scratch likewise
    packed_bias,  # (2, Hp/V, 4, V) scratch likewise
    da,  # (rows of a chunk, 4 * Hp) scratch, in strips of columns: see _strip
    dh_rows,  # (B, Hp) scratch
    dc_rows,  # (B, Hp) scratch
    packed_ih,  # (panels of I, 4 * Hp, 4 * V) scratch
    packed_hh,  # (panels of H, 4 * Hp, 4 * V) scratch
    sums_ih,  # (panels of I, 4 * Hp, 4 * V) scratch
    sums_hh,  # (panels of H, 4 * Hp, 4 * V) scratch
    gradient_bias,  # (4 * Hp,) scratch
    right,  # (threads, PANEL_ROWS, 4 * V) scratch: a panel of x or h; also some rows of dx, or of a block's gates
    divided,  # whether units are divided among the threads
    team,  # (1 + threads, 8), IN and OUT: see team.py
    thread,
):
    """Back-propagate through the recurrence."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    first, last = share(tape.shape[1], team, thread)
    block_first, block_last = (first, last) if divided else (0, tape.shape[1])
    if gates is not None:  # Numba compiles a kernel without, and one with what belongs to it
        pack_forward(weight_ih, weight_hh, bias, packed, packed_bias, first, last)
    pack_backward(weight_ih, packed_ih, first, last)
    pack_backward(weight_hh, packed_hh, first, last)
    if clear:
        clear_padding(dx, 0, dx.shape[1], order, offsets, thread, team.shape[0] - 1)
    _begin(gradient_bias, order, dh_n, dc_n, dh_rows, dc_rows, team, thread)
    barrier(team, thread)

    panel = offset(address(right), thread * right.shape[1] * right.shape[2])
    chunk_last = offsets.size - 1
    while chunk_last > 0:
        chunk_first = maximum(0, chunk_last - chunk)
        low, high = offsets[chunk_first], offsets[chunk_last]
        if gates is not None:
            _rebuild(x, h_rows, tape, packed, packed_bias, gates, low, high, first, last, panel)
            barrier(team, thread)
        row_first, row_last = 0, order.size
        if not divided:
            row_first, row_last = share_rows(offsets, lengths, chunk_first, chunk_last, team, thread)
        for step in range(chunk_last - 1, chunk_first - 1, -1):
            active = minimum(offsets[step + 1] - offsets[step], row_last)
            before = offsets[step - 1] if step else -1
            if gates is not None:
                whole, first_row = gates, low
            else:
                whole, first_row = tape, 0
            _gates_back(
                offsets[step], before, low, order, places, whole, first_row, tape, c0, dy, column, da, dh_rows, dc_rows,
                row_first, active, block_first, block_last,
            )  # fmt: skip
            if divided:
                barrier(team, thread)
            # What the step before left on the tape, row after row, is fetched while this one's product is computed.
            soon, size = address(da), 0
            if before >= first_row and not divided:
                tape_row = tape.shape[1] * TAPE * tape.shape[3]
                soon = offset(address(whole), (before - first_row + row_first) * tape_row)
                size = (active - row_first) * tape_row
            _state_back(
                step, offsets[step] - low, da, packed_hh, dh_rows, row_first, active, block_first, block_last, soon,
                size,
            )  # fmt: skip
        barrier(team, thread)
        for start in range(low, high, PANEL_ROWS):
            rows = minimum(PANEL_ROWS, high - start)
            _add_rows(da, start - low, rows, gradient_bias, first, last)
            add, finish = high < tape.shape[0] or start > low, chunk_first == 0 and start + rows == high
            _weights_back(da, start - low, rows, x, start, panel, add, finish, sums_ih, dweight_ih, first, last)
            _weights_back(da, start - low, rows, h_rows, start, panel, add, finish, sums_hh, dweight_hh, first, last)
        start, end = share(high - low, team, thread)
        _inputs_back(da, start, end, low, packed_ih, places, accumulate, dx, panel)
        barrier(team, thread)
        chunk_last = chunk_first

    if tape.shape[0] == 0:
        _clear(dweight_ih, team, thread)
        _clear(dweight_hh, team, thread)
    else:
        _finish_edge(sums_ih, dweight_ih, first, last)
        _finish_edge(sums_hh, dweight_hh, first, last)
    _finish(gradient_bias, dbias, order, dh_rows, dc_rows, dh0, dc0, first, last, team, thread)
    if thread == 0:
        dismiss(team)


@routine
def _begin(gradient_bias, order, dh_n, dc_n, dh_rows, dc_rows, team, thread):
    """Zero this thread's share of the bias's gradient, and put the final states' gradients in place."""
    _clear(gradient_bias, team, thread)
    hidden, stride = dh_n.shape[1], dh_rows.shape[1]
    width = lanes_of(address(dh_rows))
    first, last = share(order.size, team, thread)
    for row in range(first, last):
        for unit in range(0, hidden, width):
            units, source, target = minimum(width, hidden - unit), order[row] * hidden + unit, row * stride + unit
            store(offset(address(dh_rows), target), load_first(offset(address(dh_n), source), units))
            store(offset(address(dc_rows), target), load_first(offset(address(dc_n), source), units))


@routine
def _clear(array, team, thread):
    """Set this thread's share of an array to zero."""
    start = address(array)
    first, last = share(array.size, team, thread)
    for n in range(first, last, lanes_of(start)):
        store_first(offset(start, n), fill(start, 0.0), last - n)


@routine
def _finish(gradient_bias, dbias, order, dh_rows, dc_rows, dh0, dc0, first, last, team, thread):
    """Write this thread's share of the gradients by the bias and the initial states."""
    hidden, stride = dh0.shape[1], dh_rows.shape[1]
    width = lanes_of(address(dh_rows))
    if dbias.size:
        for block in range(first, last):
            for gate in range(GATES):
                total = load(offset(address(gradient_bias), (block * GATES + gate) * width))
                place = gate * hidden + block * width
                store_first(offset(address(dbias), place), total, minimum(width, hidden - block * width))
    first, last = share(order.size, team, thread)
    for row in range(first, last):
        for unit in range(0, hidden, width):
            units, source, target = minimum(width, hidden - unit), row * stride + unit, order[row] * hidden + unit
            store_first(offset(address(dh0), target), load(offset(address(dh_rows), source)), units)
            store_first(offset(address(dc0), target), load(offset(address(dc_rows), source)), units)


@routine
def _rebuild(x, h_rows, tape, packed, packed_bias, gates, low, high, first, last, a):
    """Compute the gates of the rows low to high again, for all their steps at once, since the states are known.

    The sums are those of the forward pass, in the same order, so the gates are the same to the last bit.
    """
    inputs, hidden = x.shape[1], packed.shape[0] // tape.shape[1] - x.shape[1]
    blocks, width, stride = tape.shape[1], tape.shape[3], h_rows.shape[1]
    tile_row = GATES * width
    far = are_far(address(packed), (last - first) * (inputs + hidden) * tile_row)
    for block in range(first, last):
        of_x, of_h = packed_weights(packed, inputs, hidden, block)
        after, _ = packed_weights(packed, inputs, hidden, block + 1)
        start = offset(address(packed_bias), block * tile_row)
        for row in range(low, high, GROUP):
            end = minimum(row + GROUP, high)
            x_rows, h_prev = offset(address(x), row * inputs), offset(address(h_rows), row * stride)
            pre_activations(
                end - row, 1, x_rows, inputs, inputs, of_x, h_prev, hidden, stride, of_h, start, 0, a, tile_row, far,
                after,
            )  # fmt: skip
            for n in range(row, end):
                c = load(offset(address(tape), (n * blocks + block) * tape.shape[2] * width))
                out = offset(address(gates), ((n - low) * blocks + block) * TAPE * width)
                gates_again(offset(a, (n - row) * tile_row), width, minimum(width, hidden - block * width), c, out)


@routine
def _gates_back(
    here, before, chunk_row, order, places, gates, gates_row, tape, c0, dy, column, da, dh_rows, dc_rows,
    row_first, row_last, block_first, block_last,
):  # fmt: skip
    """Take one step's gradients through the gates: dc in place, the gate gradients to `da`."""
    hidden, features = c0.shape[1], dy.shape[1]
    blocks, width, stride = tape.shape[1], tape.shape[3], dh_rows.shape[1]
    for row in range(row_first, row_last):
        place = places[here + row] * features + column
        # The rows of dy lie in another order where the sequences were sorted, which no processor could foresee.
        soon = places[minimum(here + row + 2, places.size - 1)] * features + column
        for block in range(block_first, block_last):
            units = minimum(width, hidden - block * width)
            if before >= 0:
                source = ((before + row) * blocks + block) * tape.shape[2] + tape.shape[2] - 1
                c_prev = load(offset(address(tape), source * width))
            else:
                c_prev = load_first(offset(address(c0), order[row] * hidden + block * width), units)
            here_dc = offset(address(dc_rows), row * stride + block * width)
            dh = load(offset(address(dh_rows), row * stride + block * width))
            if dy.size:
                prefetch(offset(address(dy), soon + block * width))
                dh = dh + load_first(offset(address(dy), place + block * width), units)
            left = offset(address(gates), ((here - gates_row + row) * blocks + block) * TAPE * width)
            strip, strip_row = _strip(da, block * GATES * width)
            out = offset(strip, (here - chunk_row + row) * strip_row)
            da_i, da_f, da_g, da_o, dc = gates_backward(dh, load(here_dc), left, width, c_prev)
            store(out, da_i)
            store(offset(out, width), da_f)
            store(offset(out, 2 * width), da_g)
            store(offset(out, 3 * width), da_o)
            store(here_dc, dc)


@routine
def _state_back(
    step, first_row, da, packed_hh, dh_rows, row_first, row_last, block_first, block_last, soon, size
):  # fmt: skip
    """Compute dh = da @ W_hh for this thread's rows and units.

    Meanwhile the weights are fetched ahead or, if they are near, the `size` elements at `soon`.
    """
    depth, columns, stride = packed_hh.shape[1], packed_hh.shape[2], dh_rows.shape[1]
    width = columns // VECTORS
    far = are_far(address(packed_hh), (block_last - block_first) * depth * width)
    panel_first, panel_last = block_first // VECTORS, (block_last + VECTORS - 1) // VECTORS
    # A single row has too few sums in one panel to fill the multipliers' pipelines; so it takes several whole ones.
    single = row_last - row_first == 1 and block_first % VECTORS == 0 and block_last % VECTORS == 0
    together = ROW_BLOCKS if single else 1
    for turn in range(0, panel_last - panel_first, together):
        panels = minimum(together, panel_last - panel_first - turn)
        # To and fro, as in the forward pass: the caches still hold what the step before used last.
        panel = panel_last - panels - turn if step & 1 else panel_first + turn
        block = maximum(block_first, panel * VECTORS)
        vectors = minimum(block_last, (panel + 1) * VECTORS) - block
        weights = offset(address(packed_hh), ((block // VECTORS) * depth * VECTORS + block % VECTORS) * width)
        for start in range(row_first, row_last, GROUP):
            rows = minimum(GROUP, row_last - start)
            out = offset(address(dh_rows), start * stride + block * width)
            if single:
                _long_row(panels, da, first_row + start, weights, out)
            else:
                part = size * rows // ((panel_last - panel_first) * (row_last - row_first))
                ahead, ahead_k = soon, (part + depth - 1) // depth
                soon = offset(soon, part)
                if far:
                    ahead, ahead_k = offset(weights, SLICE * columns), columns
                _long_product(
                    rows, vectors, da, first_row + start, weights, out, stride, ahead, ahead_k, ahead_k * SLICE
                )  # fmt: skip


@routine(inline=True)
def _strip(da, k):
    """Find column k of the gates' gradients: a pointer to its first row, and the distance of the rows.

    SLICE columns, which a product takes at a time, lie together, row by row: one stream through memory, where rows of
    all columns would be as many as the tile has, a page apart. The last strip may be narrower.
    """
    rows, depth = da.shape
    first = k // SLICE * SLICE
    return offset(address(da), first * rows + k - first), minimum(SLICE, depth - first)


@routine
def _add_rows(da, first_row, rows, gradient_bias, first, last):
    """Add some rows of da to the bias's gradient, for this thread's blocks."""
    width = lanes_of(address(da))
    for block in range(first, last):
        strip, strip_row = _strip(da, block * GATES * width)
        place = offset(address(gradient_bias), block * GATES * width)
        i = f = g = o = fill(place, 0.0)
        for row in range(first_row, first_row + rows):
            here = offset(strip, row * strip_row)
            i, f = i + load(here), f + load(offset(here, width))
            g, o = g + load(offset(here, 2 * width)), o + load(offset(here, 3 * width))
        store(place, load(place) + i)
        store(offset(place, width), load(offset(place, width)) + f)
        store(offset(place, 2 * width), load(offset(place, 2 * width)) + g)
        store(offset(place, 3 * width), load(offset(place, 3 * width)) + o)


@routine
def _weights_back(da, first_row, rows, operand, operand_row, panel, add, finish, sums, gradient, first, last):
    """Add da^T @ operand to the sums, for at most PANEL_ROWS rows, panel by panel of the operand's columns.

    The first rows have nothing to be added to. The last ones bring the sums to the gradient, but for those of a last
    panel that ends with a part of a vector, which would reach into the gradient's next row. The rows are taken in
    pieces as equal as can be; where they are cut depends on their number alone, as the sums then do.
    """
    hidden, inputs = gradient.shape[0] // GATES, gradient.shape[1]
    depth, columns = sums.shape[1], sums.shape[2]
    width, pieces = columns // VECTORS, (rows + _DEPTH - 1) // _DEPTH
    far = are_far(address(da), da.size)
    of_strip = pieces - 1 if far or are_far(address(sums), sums.size) else pieces
    for number in range(sums.shape[0]):
        column = number * columns
        vectors = minimum(VECTORS, (inputs - column + width - 1) // width)
        finish_here = finish and column + vectors * width <= inputs
        pack_rows(address(operand), operand.shape[1], column, columns, panel, operand_row, operand_row + rows)
        for block in range(first, last):
            strip, strip_row = _strip(da, block * columns)
            left = offset(strip, first_row * strip_row)
            # While the blocks of one strip are computed, each fetches its share of the next one; but with its last
            # piece the next block's sums, which are far too where the strips are: all of these passed by since.
            k = block * columns % SLICE
            other = block * columns - k + SLICE
            other_strip, other_row = _strip(da, other if other < last * columns else first * columns)
            next_strip = offset(other_strip, first_row * other_row + k * rows)
            out = offset(address(sums), (number * depth + block * columns) * columns)
            next_row = (block + 1) * columns if block + 1 < last else depth + first * columns
            next_sums = offset(address(sums), (number * depth + next_row) * columns)
            for piece in range(pieces):
                start, end = rows * piece // pieces, rows * (piece + 1) // pieces
                a, b = offset(left, start * strip_row), offset(panel, start * columns)
                before, before_row = (out, columns) if add or piece else (zero_row(out), 0)
                soon, size = next_sums, columns  # the size is that of each column's share
                if piece < of_strip:
                    share = rows * piece // of_strip
                    soon, size = offset(next_strip, columns * share), rows * (piece + 1) // of_strip - share
                    size = size if far else 0
                if finish_here and piece + 1 == pieces:
                    for gate in range(GATES):
                        row = gate * width
                        target = (gate * hidden + block * width) * inputs + column
                        tiles(
                            minimum(width, hidden - block * width), vectors, end - start, offset(a, row), 1, strip_row,
                            b, columns, offset(before, row * before_row), before_row, offset(address(gradient), target),
                            inputs, offset(soon, row * size), width * size,
                        )  # fmt: skip
                else:
                    tiles(
                        columns, vectors, end - start, a, 1, strip_row, b, columns, before, before_row, out, columns,
                        soon, size * columns,
                    )  # fmt: skip


@routine
def _finish_edge(sums, gradient, first, last):
    """Bring the sums of a last panel that ends with a part of a vector to the gradient."""
    hidden, inputs = gradient.shape[0] // GATES, gradient.shape[1]
    depth, columns = sums.shape[1], sums.shape[2]
    width, number = columns // VECTORS, sums.shape[0] - 1
    column = number * columns
    if inputs % width == 0:
        return
    for block in range(first, last):
        for gate in range(GATES):
            for lane in range(minimum(width, hidden - block * width)):
                source = (number * depth + (block * GATES + gate) * width + lane) * columns
                target = (gate * hidden + block * width + lane) * inputs + column
                for v in range(0, inputs - column, width):
                    value = load(offset(address(sums), source + v))
                    store_first(offset(address(gradient), target + v), value, inputs - column - v)


@routine
def _inputs_back(da, first_row, last_row, chunk_row, packed_ih, places, accumulate, dx, block):
    """Compute dx = da @ W_ih for some rows of the chunk."""
    inputs, depth, columns = dx.shape[1], packed_ih.shape[1], packed_ih.shape[2]
    width = columns // VECTORS
    far, da_far = are_far(address(packed_ih), packed_ih.size), are_far(address(da), da.size)
    for panel in range(packed_ih.shape[0]):
        column = panel * columns
        vectors = minimum(VECTORS, (inputs - column + width - 1) // width)
        weights = offset(address(packed_ih), panel * depth * columns)
        for start in range(first_row, last_row, _INPUT_ROWS):
            rows = minimum(_INPUT_ROWS, last_row - start)
            # Of the factors, the one that lies farther away is fetched ahead.
            soon, soon_k, size = offset(weights, SLICE * columns), columns, SLICE * columns if far else 0
            if da_far and not far:
                soon, _ = _strip(da, minimum(SLICE, depth - 1))
                soon, soon_k, size = offset(soon, start * SLICE), da.shape[0], rows * SLICE
            _long_product(rows, vectors, da, start, weights, block, columns, soon, soon_k, size)
            for r in range(rows):
                target = places[chunk_row + start + r] * inputs + column
                for v in range(vectors):
                    units = minimum(width, inputs - column - v * width)
                    out = offset(address(dx), target + v * width)
                    value = load(offset(block, r * columns + v * width))
                    if accumulate:
                        value = value + load_first(out, units)
                    store_first(out, value, units)


@routine
def _long_product(rows, vectors, da, first_row, weights, out, out_row, soon, soon_k, size):
    """Compute da @ weights, for some rows of gate gradients and one panel of the weights.

    With the slice that begins at k, `size` elements at ``soon[k * soon_k]`` are fetched.
    """
    columns = VECTORS * lanes_of(out)
    start, start_row = zero_row(out), 0
    for k in range(0, da.shape[1], SLICE):
        strip, strip_row = _strip(da, k)
        gates, b = offset(strip, first_row * strip_row), offset(weights, k * columns)
        tiles(
            rows, vectors, strip_row, gates, strip_row, 1, b, columns, start, start_row, out, out_row,
            offset(soon, k * soon_k), size,
        )  # fmt: skip
        start, start_row = out, out_row


@routine
def _long_row(panels, da, row, weights, out):
    """Compute da @ weights for one row and several whole panels, with the sums of :func:`_long_product`."""
    depth, columns = da.shape[1], VECTORS * lanes_of(out)
    start = zero_row(out)
    for k in range(0, depth, SLICE):
        strip, strip_row = _strip(da, k)
        a, b = offset(strip, row * strip_row), offset(weights, k * columns)
        gate_tile(1, panels, strip_row, a, 0, b, depth * columns, 0, a, 0, b, 0, start, 0, out, 0, b, 0)
        start = out
