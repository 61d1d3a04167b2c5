"""One layer in one direction over a whole sequence, backward; ``ragged.py`` says how the rows are packed.

The gate gradients of a chunk of steps are computed back in time; then their products, over all rows of
the chunk at once, are added to the gradients of the weights and written to those of the input; then comes
the chunk before. So the gate gradients never take more memory than one chunk's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastlstm.kernels.cpu.cell_step import CELL, GATES, TAPE, backward, cell_at, cell_of, rebuild
from fastlstm.kernels.cpu.gate_gradients import GateGradients, long_product, long_row, strip
from fastlstm.kernels.cpu.gemm_microkernel import KC, MC, NR, ROW_BLOCKS, are_far
from fastlstm.kernels.cpu.gemv import Unpacked
from fastlstm.kernels.cpu.jit import kernel, routine, stay_outlined
from fastlstm.kernels.cpu.pre_activations import pre_activations
from fastlstm.kernels.cpu.ragged import clear_padding, rows_of, share_rows
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, share, summon, threads_of
from fastlstm.kernels.cpu.vector import (
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
from fastlstm.kernels.cpu.weight_gradients import (
    PANEL_ROWS,
    CellStates,
    Product,
    add_own,
    add_weights,
    cell_before,
    cell_state,
    finish_edge,
    inputs_back,
)
from fastlstm.kernels.cpu.weight_packing import pack_backward, pack_forward, packed_at
from fastlstm.kernels.cpu.worker import this_call

__all__ = ["PANEL_ROWS", "SETTINGS", "sequence_backward"]

# The numbers in a call's `settings`, one int64 array: B; the longest length; T; the first column of dy to read;
# whether to add to dx in place of setting it, and to set it past the lengths to zero; for how many steps gate gradients
# are kept at a time, and how many rows these have at most; whether units are divided among the threads, whether there
# are resets, and whether the gradient by the h of the step before is taken for zero. Then come the places in `scratch`
# of what the kernel works with, those in `again`, and the addresses of a variant's routines.
(BATCH, STEPS, TOTAL, COLUMN, ACCUMULATE, CLEAR, CHUNK, CHUNK_ROWS, DIVIDED, RESETS, TRUNCATED, DA, DH_ROWS, DC_ROWS,
 OF_X, OF_H, SUMS_IH, SUMS_HH, SUMS_BIAS, PANEL, GATE_ROWS, WEIGHTS, BIAS, ADDRESSES) = range(24)  # fmt: skip
SETTINGS = ADDRESSES + CELL


class _Layer(NamedTuple):
    """The arguments of the parts of the driver: sizes, and pointers to rows."""

    cell: Any  # of the first block
    hidden: Any  # H
    blocks: Any  # Hp/V
    width: Any  # V
    tape: Any  # CellStates
    gates: Any  # (rows, Hp/V, 5, V) the tape, or a chunk of it computed again
    is_rebuilt: Any
    c0: Any  # (B, H)
    dy: Any  # (T * B, dy_row), from the first column to read on
    dy_row: Any
    has_dy: Any
    da: Any  # GateGradients
    dh_rows: Any  # (B, Hp)
    dc_rows: Any  # (B, Hp)
    of_h: Any  # (panels of H, 4 * Hp, 4 * V) the packed recurrent weights
    panel: Any  # this thread's, (PANEL_ROWS, 4 * V)


@kernel
def sequence_backward(
    weight_ih,  # (4H, I), IN
    weight_hh,  # (4H, H), IN
    bias,  # (4H,), or (0,) for none, IN
    own,  # (E, H) the variant's own parameters, IN
    x,  # (N, I) packed, IN
    tape,  # (N, Hp/V, 5, V), or (N, Hp/V, 1, V) with c alone, IN
    h_rows,  # (N, Hp), IN
    c0,  # (B, H), IN
    index,  # order, lengths, offsets and places, IN: see ragged.py
    dy,  # (T * B, D * H), or (0, D * H) for zero, IN
    dh_n,  # (B, H), IN
    dc_n,  # (B, H), IN
    dx,  # (T * B, I), or (0, I) if it is not wanted, OUT
    dh0,  # (B, H), OUT
    dc0,  # (B, H), OUT
    dweight_ih,  # (4H, I), OUT
    dweight_hh,  # (4H, H), OUT
    dbias,  # (4H,), or (0,) for none, OUT
    down,  # (E, H), OUT
    scratch,  # one-dimensional
    again,  # one-dimensional scratch if the tape has c alone and the gates are computed again, else None
    settings,  # (SETTINGS,), IN
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Back-propagate through the recurrence."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    inputs, hidden, blocks, work = dx.shape[1], weight_hh.shape[1], tape.shape[1], address(scratch)
    rows = rows_of(index, settings[BATCH], settings[STEPS], settings[RESETS])
    layer = _layer(own, hidden, tape, c0, dy, scratch, settings, thread)
    of_x = offset(work, settings[OF_X])
    weights = Unpacked(address(weight_ih), address(weight_hh), address(bias), inputs, hidden, bias.size > 0)
    first, last = share(blocks, team, thread)
    forward = None
    if again is not None:  # Numba compiles a kernel without, and one with what belongs to it
        start = address(again)
        layer = _with_gates(layer, offset(start, settings[GATE_ROWS]))
        forward = packed_at(offset(start, settings[WEIGHTS]), offset(start, settings[BIAS]), inputs, hidden, blocks)
        pack_forward(weights, forward, first, last)
    if dx.size:
        pack_backward(weights.ih, hidden, inputs, of_x, blocks, first, last)
    if not settings[TRUNCATED]:
        pack_backward(weights.hh, hidden, hidden, layer.of_h, blocks, first, last)
    if settings[CLEAR] and dx.size:
        clear_padding(address(dx), inputs, inputs, rows, settings[TOTAL], thread, threads_of(team, thread))
    sums_bias, own_sums = offset(work, settings[SUMS_BIAS]), (address(down), down.size)
    _begin(layer, rows, dh_n, dc_n, sums_bias, own_sums, team, thread)
    sums_ih, sums_hh = offset(work, settings[SUMS_IH]), offset(work, settings[SUMS_HH])
    ih = Product(address(x), inputs, inputs, sums_ih, address(dweight_ih), hidden)
    hh = Product(address(h_rows), h_rows.shape[1], hidden, sums_hh, address(dweight_hh), hidden)
    barrier(team, thread)
    _run_chunks(layer, rows, ih, hh, forward, sums_bias, own_sums, of_x, dx, settings, first, last, team, thread)
    _finish_weights(layer, rows, ih, first, last, team, thread)
    _finish_weights(layer, rows, hh, first, last, team, thread)
    _finish(layer, rows, sums_bias, dbias, dh0, dc0, first, last, team, thread)
    if thread == 0:
        dismiss(team)


@routine(inline=True)
def _run_chunks(
    layer, rows, ih, hh, forward, sums_bias, own_sums, of_x, dx, settings, first, last, team, thread
):  # fmt: skip
    """Back-propagate chunk by chunk; `forward` has the packed weights if gates are computed again, and is None else."""
    of_own, own_size = own_sums
    chunk_last = rows.steps
    while chunk_last > 0:
        chunk_first = maximum(0, chunk_last - settings[CHUNK])
        if forward is not None:
            _rebuild(layer, rows, ih.operand, hh, forward, chunk_first, chunk_last, first, last)
            barrier(team, thread)
        _chunk_back(layer, rows, chunk_first, chunk_last, settings[DIVIDED], settings[TRUNCATED], team, thread)
        barrier(team, thread)
        add_weights(layer, rows, ih, hh, sums_bias, chunk_first, chunk_last, first, last)
        if own_size:
            add_own(layer.cell, layer.da, rows, layer.tape, layer.c0, chunk_first, chunk_last, of_own, first, last)
        low = rows.offsets[chunk_first]
        start, end = share(rows.offsets[chunk_last] - low, team, thread)
        if dx.size:
            inputs_back(
                layer.da, start, end, offset(rows.places, low), of_x, ih.columns, settings[ACCUMULATE], address(dx),
                layer.panel,
            )  # fmt: skip
        barrier(team, thread)
        chunk_last = chunk_first


@routine
def _finish_weights(layer, rows, product, first, last, team, thread):
    """Write what is left of the gradient by a weight; zeros, if there was no time step."""
    stay_outlined()
    if rows.steps == 0:
        _clear(product.gradient, GATES * layer.hidden * product.columns, team, thread)
    else:
        finish_edge(product, layer.da.depth, first, last)


@routine(inline=True)
def _layer(own, hidden, tape, c0, dy, scratch, settings, thread):
    """Gather what the parts of the driver work on."""
    work, blocks, width = address(scratch), tape.shape[1], tape.shape[3]
    panel = offset(work, settings[PANEL] + thread * PANEL_ROWS * NR * width)
    return _Layer(
        cell_of(settings, ADDRESSES, own, hidden), hidden, blocks, width,
        CellStates(address(tape), blocks, tape.shape[2], width), address(tape), False, address(c0),
        offset(address(dy), settings[COLUMN]), dy.shape[1], dy.size > 0,
        GateGradients(offset(work, settings[DA]), settings[CHUNK_ROWS], GATES * blocks * width),
        offset(work, settings[DH_ROWS]), offset(work, settings[DC_ROWS]), offset(work, settings[OF_H]), panel,
    )  # fmt: skip


@routine(inline=True)
def _with_gates(layer, gates):
    """Return the record with a chunk's gates that are computed again in place of the tape's."""
    return _Layer(
        layer.cell, layer.hidden, layer.blocks, layer.width, layer.tape, gates, True, layer.c0, layer.dy, layer.dy_row,
        layer.has_dy, layer.da, layer.dh_rows, layer.dc_rows, layer.of_h, layer.panel,
    )  # fmt: skip


@routine
def _begin(layer, rows, dh_n, dc_n, sums_bias, own_sums, team, thread):
    """Zero this thread's share of sums over rows, and put the final states' gradients in place."""
    stay_outlined()
    hidden, width = layer.hidden, layer.width
    _clear(sums_bias, layer.da.depth, team, thread)
    of_own, own_size = own_sums
    _clear(of_own, own_size, team, thread)
    first, last = share(rows.batch, team, thread)
    for row in range(first, last):
        for block in range(layer.blocks):
            units, source = minimum(width, hidden - block * width), rows.order[row] * hidden + block * width
            target = (row * layer.blocks + block) * width
            store(offset(layer.dh_rows, target), load_first(offset(address(dh_n), source), units))
            store(offset(layer.dc_rows, target), load_first(offset(address(dc_n), source), units))


@routine
def _clear(start, size, team, thread):
    """Set this thread's share of some numbers to zero."""
    stay_outlined()
    first, last = share(size, team, thread)
    for n in range(first, last, lanes_of(start)):
        store_first(offset(start, n), fill(start, 0.0), last - n)


@routine
def _finish(layer, rows, sums_bias, dbias, dh0, dc0, first, last, team, thread):
    """Write this thread's share of the gradients by the bias and the initial states."""
    stay_outlined()
    hidden, width = layer.hidden, layer.width
    if dbias.size:
        for block in range(first, last):
            for gate in range(GATES):
                total = load(offset(sums_bias, (block * GATES + gate) * width))
                place = gate * hidden + block * width
                store_first(offset(address(dbias), place), total, minimum(width, hidden - block * width))
    first, last = share(rows.batch, team, thread)
    for row in range(first, last):
        for block in range(layer.blocks):
            units, target = minimum(width, hidden - block * width), rows.order[row] * hidden + block * width
            source = (row * layer.blocks + block) * width
            store_first(offset(address(dh0), target), load(offset(layer.dh_rows, source)), units)
            store_first(offset(address(dc0), target), load(offset(layer.dc_rows, source)), units)


@routine
def _rebuild(layer, rows, x, hh, packed, chunk_first, chunk_last, first, last):
    """Compute the gates of a chunk's rows again, for all their steps at once, since the states are known.

    The sums are those of the forward pass, in the same order, so the gates are bit-identical.
    """
    stay_outlined()
    inputs, hidden, width = packed.inputs, layer.hidden, layer.width
    tile_row, low = GATES * width, rows.offsets[chunk_first]
    far = are_far(x, (last - first) * (inputs + hidden) * tile_row)
    for block in range(first, last):
        of_x, of_h = offset(packed.of_x, block * inputs * tile_row), offset(packed.of_h, block * hidden * tile_row)
        after, start = offset(of_x, inputs * tile_row), offset(packed.bias, block * tile_row)
        for row in range(low, rows.offsets[chunk_last], MC):
            count = minimum(MC, rows.offsets[chunk_last] - row)
            pre_activations(
                count, 1, offset(x, row * inputs), inputs, of_x, offset(hh.operand, row * hh.row_size), hidden,
                hh.row_size, of_h, start, 0, layer.panel, tile_row, far, after,
            )  # fmt: skip
            _activate(layer, rows, chunk_first, row, count, block)


@routine(inline=True)
def _activate(layer, rows, step, first_row, count, block):
    """Write the tape of some rows of a chunk, which begins with step number `step`, from their pre-activations."""
    hidden, width, low = layer.hidden, layer.width, rows.offsets[step]
    units, cell = minimum(width, hidden - block * width), cell_at(layer.cell, block * width)
    for n in range(count):
        row = first_row + n
        while row >= rows.offsets[step + 1]:
            step += 1
        c_prev = cell_before(layer.tape, layer.c0, layer.hidden, rows, step, row - rows.offsets[step], block, units)
        out = offset(layer.gates, ((row - low) * layer.blocks + block) * TAPE * width)
        rebuild(
            cell, offset(layer.panel, n * GATES * width), units, c_prev, load(cell_state(layer.tape, row, block)), out
        )


@routine(inline=True)
def _chunk_back(layer, rows, chunk_first, chunk_last, divided, truncated, team, thread):
    """Take the gradients back through the steps of a chunk."""
    low = rows.offsets[chunk_first]
    row_first, row_last, block_first, block_last = 0, rows.batch, 0, layer.blocks
    if divided:
        block_first, block_last = share(layer.blocks, team, thread)
    else:
        row_first, row_last = share_rows(rows, chunk_first, chunk_last, team, thread)
    for step in range(chunk_last - 1, chunk_first - 1, -1):
        active = minimum(rows.offsets[step + 1] - rows.offsets[step], row_last)
        _gates_back(layer, rows, step, low, row_first, active, block_first, block_last)
        if truncated:
            _cut(layer, rows, step, row_first, active, block_first, block_last, truncated)
            continue
        if divided:
            barrier(team, thread)
        # The tape of the step before, row after row, is prefetched while this step's product is computed.
        soon, size = layer.da.start, 0
        if step and not divided:
            before, kept = rows.offsets[step - 1] - (low if layer.is_rebuilt else 0), layer.blocks * TAPE * layer.width
            if before >= 0:
                soon, size = offset(layer.gates, (before + row_first) * kept), (active - row_first) * kept
        _state_back(layer, step, rows.offsets[step] - low, row_first, active, block_first, block_last, soon, size)
        if rows.has_resets:
            _cut(layer, rows, step, row_first, active, block_first, block_last, truncated)


@routine
def _cut(layer, rows, step, row_first, row_last, block_first, block_last, truncated):
    """Set gradients by the state before a step to zero: where it was reset, and that by h if it is truncated."""
    stay_outlined()
    low, zero = rows.offsets[step], fill(layer.dh_rows, 0.0)
    for row in range(row_first, row_last):
        is_reset = rows.has_resets and rows.resets[low + row]
        for block in range(block_first, block_last):
            state = (row * layer.blocks + block) * layer.width
            if is_reset or truncated:
                store(offset(layer.dh_rows, state), zero)
            if is_reset:
                store(offset(layer.dc_rows, state), zero)


@routine
def _gates_back(layer, rows, step, low, row_first, row_last, block_first, block_last):
    """Take one step's gradients through the cell step: dc in place, the gate gradients to da."""
    stay_outlined()
    width, here = layer.width, rows.offsets[step]
    gates_low = low if layer.is_rebuilt else 0
    end = rows.offsets[rows.steps] - 1
    for row in range(row_first, row_last):
        place = rows.places[here + row] * layer.dy_row
        # The rows of dy lie in another order where the sequences were sorted, which no processor could foresee.
        soon = rows.places[minimum(here + row + 2, end)] * layer.dy_row
        for block in range(block_first, block_last):
            units = minimum(width, layer.hidden - block * width)
            c_prev = cell_before(layer.tape, layer.c0, layer.hidden, rows, step, row, block, units)
            state = (row * layer.blocks + block) * width
            dh = load(offset(layer.dh_rows, state))
            if layer.has_dy:
                prefetch(offset(layer.dy, soon + block * width))
                dh = dh + load_first(offset(layer.dy, place + block * width), units)
            tape = offset(layer.gates, ((here - gates_low + row) * layer.blocks + block) * TAPE * width)
            part, part_row = strip(layer.da, block * GATES * width)
            dc = offset(layer.dc_rows, state)
            dc_prev = backward(
                cell_at(layer.cell, block * width), dh, load(dc), tape, units, c_prev,
                offset(part, (here - low + row) * part_row),
            )  # fmt: skip
            store(dc, dc_prev)


@routine
def _state_back(layer, step, first_row, row_first, row_last, block_first, block_last, soon, size):
    """Compute dh = da @ W_hh for this thread's rows and units.

    Meanwhile the weights are prefetched or, if they fit the second-level cache, the `size` elements at `soon`.
    """
    stay_outlined()
    width, depth, stride = layer.width, layer.da.depth, layer.blocks * layer.width
    columns = NR * width
    far = are_far(layer.of_h, (block_last - block_first) * depth * width)
    panel_first, panel_last = block_first // NR, (block_last + NR - 1) // NR
    # A single row has too few sums in one panel to fill the multipliers' pipelines; so it takes several whole ones.
    single = row_last - row_first == 1 and block_first % NR == 0 and block_last % NR == 0
    together = ROW_BLOCKS if single else 1
    for turn in range(0, panel_last - panel_first, together):
        panels = minimum(together, panel_last - panel_first - turn)
        # Serpentine order, as in the forward pass: the caches still hold what the step before used last.
        panel = panel_last - panels - turn if step & 1 else panel_first + turn
        block = maximum(block_first, panel * NR)
        vectors = minimum(block_last, (panel + 1) * NR) - block
        weights = offset(layer.of_h, ((block // NR) * depth * NR + block % NR) * width)
        for start in range(row_first, row_last, MC):
            rows = minimum(MC, row_last - start)
            out = offset(layer.dh_rows, start * stride + block * width)
            if single:
                long_row(panels, layer.da, first_row + start, weights, out)
            else:
                part = size * rows // ((panel_last - panel_first) * (row_last - row_first))
                ahead, ahead_k = soon, (part + depth - 1) // depth
                soon = offset(soon, part)
                if far:
                    ahead, ahead_k = offset(weights, KC * columns), columns
                long_product(
                    rows, vectors, layer.da, first_row + start, weights, out, stride, ahead, ahead_k, ahead_k * KC
                )
