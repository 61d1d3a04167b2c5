"""One time step of all layers, for closed loops, whose next input depends on this output.

Weights are packed once, before the first step, so that each step reads them in the order of the kernels, and results
are bit-identical to those of a frozen model. In training, every step writes to one tape, which is allocated before the
loop; ``unrolled_back.py`` takes the gradients back through it.

A step has no shapes to check, allocates nothing and needs no lock. All sizes and addresses are in two records, int64
arrays: `kit` (:data:`KIT` numbers) says where the packed weights are, and `tape` (:data:`TAPED` numbers) where the
memory of a run is. Each function is compiled for arrays, which Python passes, or for pointers: then other compiled code
calls it by its address.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import from_dtype, types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.cell_step import CELL, GATES, TAPE, cell_at, cell_of, output, update
from fastlstm.kernels.cpu.gemm_microkernel import ROW_BLOCKS, are_far
from fastlstm.kernels.cpu.jit import by_address, routine
from fastlstm.kernels.cpu.pre_activations import pre_activations
from fastlstm.kernels.cpu.room import MOST_ROWS, make_room
from fastlstm.kernels.cpu.thread_team import barrier, dismiss, share, summon
from fastlstm.kernels.cpu.vector import address, lanes_of, load_first, maximum, minimum, offset, store_first
from fastlstm.kernels.cpu.weight_packing import packed_at
from fastlstm.kernels.cpu.worker import this_call

__all__ = ["KIT", "TAPED", "at", "signatures", "steps_of_cells", "unrolled_step", "unrolled_step_taped"]

# The numbers of a kit: I, H, L, rows of a variant's own parameters E, whether there is a bias, Hp/V; addresses of the
# packed weights of all layers, their packed biases, and a variant's own parameters (L * E, H); of the weights that are
# packed for the backward pass; whether the gradient is truncated; and the addresses of the cell's routines.
(INPUTS, HIDDEN, LAYERS, OWN, BIASED, BLOCKS, WEIGHTS, BIAS, OWN_PARAMETERS, BACK_WEIGHTS, TRUNCATED,
 ADDRESSES) = range(12)  # fmt: skip
KIT = ADDRESSES + CELL

# The numbers of a tape: T, B; steps taken, and those not yet taken back (-1 before the first of these); and addresses:
# x (T, B, I); h and c (L, T + 1, B, H), the states before each step and after the last; the cells' values
# (L, T', Hp/V, B, 5, V), where T' are the steps in whole chunks, and a chunk more; steps of a chunk; gradients by the
# states, (L, B, H) each; the gradient that is handed from a layer to the one below (B, H); masks of dropout, and what
# they leave of h, (L - 1, T, B, H) each, 0 for none; what `unrolled_finish` works with; and for compiled code, whether
# the masks have to be drawn before the next run.
#
# On the way back, the gradients by the pre-activations of a chunk of steps, in strips, take the place of the cells'
# values of the chunk after it, which are not needed any more: a tape has 7 numbers a unit and step, and not 11.
(STEPS, BATCH, TAKEN, LEFT, X, H, C, CELLS, CHUNK, DH, DC, BETWEEN, MASKS, DROPPED, SUMS_IH, SUMS_HH, SUMS_BIAS,
 PANELS, UNDRAWN) = range(19)  # fmt: skip
TAPED = UNDRAWN + 1


_ROWS_OF_A_HALF = 8  # below, the rows of half a block do not fill the microkernel


class _Step(NamedTuple):
    """The arguments of the layers of a step; a layer's states lie `stride` elements after those of the one below."""

    batch: Any  # B
    x: Any  # (B, I)
    h: Any  # (B, H) for each layer, the states before
    c: Any
    h_next: Any  # and after
    c_next: Any
    stride: Any
    y: Any  # (B, H)
    cells: Any  # (Hp/V, B, 5, V) for each layer
    cells_stride: Any
    kept: Any  # vectors a block of units leaves there, 0 for none
    masks: Any  # (B, H) for each layer but the last
    dropped: Any  # likewise
    masks_stride: Any  # 0 for no dropout
    a: Any  # room for pre-activations


@intrinsic
def at(typingctx, number, like):
    """Take an integer for an address of such elements as another pointer's."""

    def codegen(context, builder, signature, args):
        number = context.cast(builder, args[0], signature.args[0], types.int64)
        return builder.inttoptr(number, ir.PointerType(args[1].type.pointee))

    return like(number, like), codegen


@routine(inline=True)
def steps_of_cells(tape):
    """Return for how many steps there is room for the cells' values."""
    return ((tape[STEPS] + tape[CHUNK] - 1) // tape[CHUNK] + 1) * tape[CHUNK]


@by_address
def unrolled_step(
    kit,  # (KIT,), IN
    batch,  # B
    x,  # (B, I), IN
    h,  # (L, B, H), IN
    c,  # (L, B, H), IN
    y,  # (B, H), OUT
    h_next,  # (L, B, H), OUT, must not overlap h
    c_next,  # (L, B, H), OUT
):
    """Run one step of all layers."""
    start = address(y)
    stride = batch * kit[HIDDEN]
    step = _Step(
        batch, address(x), address(h), address(c), address(h_next), address(c_next), stride, start, start, 0, 0, start,
        start, 0, make_room(start),
    )  # fmt: skip
    _run(kit, step, None, 0)


@by_address
def unrolled_step_taped(
    kit,  # (KIT,), IN
    tape,  # (TAPED,), IN and OUT
    x,  # (B, I), IN
    y,  # (B, H), OUT
    team,  # (1 + rows, 8), IN and OUT: see thread_team.py
    thread,
):
    """Run the next step of all layers, and keep what the backward pass needs."""
    if thread == 0:
        call, arguments = this_call()
        summon(team, call, arguments)
    start, steps, batch, t = address(y), tape[STEPS], tape[BATCH], tape[TAKEN]
    hidden, inputs, layers = kit[HIDDEN], kit[INPUTS], kit[LAYERS]
    states, masks = t * batch * hidden, tape[MASKS]
    cells, cells_row = at(tape[CELLS], start), kit[BLOCKS] * TAPE * lanes_of(start)
    h, c = offset(at(tape[H], start), states), offset(at(tape[C], start), states)
    if thread == 0:
        _copy(batch * inputs, address(x), offset(at(tape[X], start), t * batch * inputs))
    step = _Step(
        batch, address(x), h, c, offset(h, batch * hidden), offset(c, batch * hidden), (steps + 1) * batch * hidden,
        start, offset(cells, t * batch * cells_row), steps_of_cells(tape) * batch * cells_row, TAPE,
        offset(at(masks, start), states), offset(at(tape[DROPPED], start), states),
        steps * batch * hidden if masks and layers > 1 else 0, make_room(start),
    )  # fmt: skip
    _run(kit, step, team, thread)
    if thread == 0:
        dismiss(team)
        tape[TAKEN] = t + 1


@routine(inline=True)
def _copy(size, source, target):
    """Copy so many elements."""
    for n in range(0, size, lanes_of(target)):
        store_first(offset(target, n), load_first(offset(source, n), size - n), size - n)


@routine(inline=True)
def _run(kit, step, team, thread):
    """Run one layer after the other; each reads the new h of the one below. Without a team, `team` is None."""
    inputs, hidden, layers, blocks = kit[INPUTS], kit[HIDDEN], kit[LAYERS], kit[BLOCKS]
    weights, bias, own = at(kit[WEIGHTS], step.y), at(kit[BIAS], step.y), at(kit[OWN_PARAMETERS], step.y)
    tile_row, x = GATES * lanes_of(step.y), step.x
    first, last = 0, 2 * blocks  # halves of blocks
    if team is not None:  # Numba leaves out what belongs to a None
        first, last = _share_of_units(blocks, step.batch, team, thread)
    for number in range(layers):
        packed = packed_at(weights, bias, inputs, hidden, blocks)
        cell = cell_of(kit, ADDRESSES, offset(own, number * kit[OWN] * hidden), hidden)
        _layer(cell, packed, step, number, x, number + 1 == layers, first, last)
        if team is not None and number + 1 < layers:
            barrier(team, thread)  # the next layer reads the h of all units
        x = offset(step.h_next, number * step.stride)
        if step.masks_stride and number + 1 < layers:
            below, x = x, offset(step.dropped, number * step.masks_stride)
            if thread == 0:
                multiply(step.batch * hidden, below, offset(step.masks, number * step.masks_stride), x)
            if team is not None:
                barrier(team, thread)
        weights = offset(weights, blocks * (inputs + hidden) * tile_row)
        bias = offset(bias, 2 * blocks * tile_row)
        inputs = hidden


@routine(inline=True)
def multiply(size, a, b, target):
    """Compute the product of two arrays, element by element; `target` may be one of them."""
    for n in range(0, size, lanes_of(target)):
        left = size - n
        store_first(offset(target, n), load_first(offset(a, n), left) * load_first(offset(b, n), left), left)


@routine(inline=True)
def _share_of_units(blocks, batch, team, thread):
    """Return this thread's share of the blocks of units, counted in halves.

    With enough rows, a block is divided where that makes the shares equal: of 7 blocks (H=100), two threads would have
    4 and 3, and one would wait for an eighth of the step.
    """
    if batch >= 2 * _ROWS_OF_A_HALF:
        return share(2 * blocks, team, thread)
    first, last = share(blocks, team, thread)
    return 2 * first, 2 * last


@routine
def _layer(cell, packed, step, number, x, is_last, first, last):
    """Run some blocks of units of a layer, counted in halves, as many rows at a time as there is room for.

    Of a block, half of the rows is one half and the others are the second.
    """
    inputs, hidden, tile_row = packed.inputs, packed.hidden, GATES * lanes_of(step.a)
    h = offset(step.h, number * step.stride)
    far = are_far(step.a, (last - first) * (inputs + hidden) * tile_row // 2)
    together = ROW_BLOCKS if step.batch == 1 else 1
    half = step.batch // 2
    for begin in range(0, step.batch, MOST_ROWS):
        end = minimum(begin + MOST_ROWS, step.batch)
        for block in range(first // 2, (last + 1) // 2, together):
            blocks = minimum(together, (last + 1) // 2 - block)
            low = maximum(begin, half) if 2 * block < first else begin
            count = (minimum(end, half) if 2 * block + 1 == last else end) - low
            if count <= 0:
                continue
            of_x = offset(packed.of_x, block * inputs * tile_row)
            after = offset(of_x, blocks * inputs * tile_row)
            if step.kept and not far:
                after = _tape_at(step, number, low, block)
            pre_activations(
                count, blocks, offset(x, low * inputs), inputs, of_x, offset(h, low * hidden), hidden, hidden,
                offset(packed.of_h, block * hidden * tile_row), offset(packed.bias, block * tile_row), 0, step.a,
                tile_row, far or step.kept > 0, after,
            )  # fmt: skip
            for further in range(blocks):  # one, if there are several rows
                _cells(cell, packed, step, number, low, count, block + further, further, is_last)


@routine(inline=True)
def _tape_at(step, number, low, block):
    """Return a pointer to where a layer's step keeps the values of some rows and a block."""
    place = (block * step.batch + low) * step.kept * lanes_of(step.a)
    return offset(step.cells, number * step.cells_stride + place)


@routine(inline=True)
def _cells(cell, packed, step, number, low, count, block, further, is_last):
    """Run the cell step for some rows of a block.

    While one row's gates are computed, so is h of the row before: see ``sequence_forward.py``.
    """
    width, hidden = lanes_of(step.a), packed.hidden
    unit = block * width
    here, units = cell_at(cell, unit), minimum(width, hidden - unit)
    first = number * step.stride + low * hidden + unit
    tape = _tape_at(step, number, low, block)
    a = offset(step.a, further * GATES * width)
    held, c = update(here, a, units, load_first(offset(step.c, first), units), tape, step.kept)
    for n in range(1, count):
        state = first + n * hidden
        c_prev = load_first(offset(step.c, state), units)
        held_next, c_next = update(
            here, offset(a, n * GATES * width), units, c_prev, offset(tape, n * step.kept * width), step.kept
        )
        _hand_on(step, state - hidden, (low + n - 1) * hidden + unit, units, output(here, held, c), c, is_last)
        held, c = held_next, c_next
    row = low + count - 1
    _hand_on(step, first + (count - 1) * hidden, row * hidden + unit, units, output(here, held, c), c, is_last)


@routine(inline=True)
def _hand_on(step, state, place, units, h, c, is_last):
    """Write the new states of a row of a block, and the output, if this is the last layer."""
    store_first(offset(step.c_next, state), c, units)
    store_first(offset(step.h_next, state), h, units)
    if is_last:
        store_first(offset(step.y, place), h, units)


def signatures(dtype: Any, by_pointers: bool) -> dict[Any, tuple[Any, ...]]:
    """Return the types of the arguments of each function of this file, as arrays of a dtype or as pointers."""
    number = from_dtype(dtype)
    if by_pointers:
        matrix = states = types.CPointer(number)
        record = types.CPointer(types.int64)
    else:
        matrix, states, record = (
            types.Array(number, 2, "C"),
            types.Array(number, 3, "C"),
            types.Array(types.int64, 1, "C"),
        )
    return {
        unrolled_step: (record, types.intp, matrix, states, states, matrix, states, states),
        unrolled_step_taped: (record, record, matrix, matrix, types.Array(types.int64, 2, "C"), types.intp),
    }
