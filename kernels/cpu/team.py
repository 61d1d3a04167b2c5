"""The threads that run one kernel together: how they are called, and the barrier at which they meet.

Nothing of a hand-over is Python's. The caller's thread enters a kernel, and there it has every other thread call the
same kernel with the same arguments, but for the number of the thread (:func:`this_call`, :func:`summon`). The others
have been waiting inside compiled code (:func:`serve`) since they finished the call before, without the interpreter's
lock; so a call that soon follows another finds them awake.

What they meet in is the `team`, a (1 + threads, 8) int64 array, a cache line for each row, so that waiting on one
does not disturb the others:

=====================  ==========================================================================================
``team[0, ARRIVALS]``  how often threads have arrived at barriers
``team[0, FINISHED]``  how many threads, of those that were summoned, have finished the call
``team[1 + t, 0]``     how many barriers thread t has passed
``team[1 + t, 1]``     address of the mailbox of thread t's worker
``team[1 + t, 2..3]``  how many of thread t's items were taken, in even rounds and in odd ones
=====================  ==========================================================================================

A mailbox is an (8,) int64 array of its worker: a command, then what belongs to it.
"""

from __future__ import annotations

import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.jit import CALL_TYPE, cgutils, emit_call_of_thread, kernel, routine
from fastlstm.kernels.cpu.simd import CACHE_LINE, VECTOR_BYTES, address, lanes_of, minimum, offset, prefetch

__all__ = [
    "COMMAND", "LEAVE", "MAILBOX", "barrier", "dismiss", "fetch", "serve", "share", "share_rows", "summon", "take",
    "this_call",
]  # fmt: skip

ARRIVALS, FINISHED = 0, 1
MAILBOX, TAKEN = 1, 2  # in a thread's row of the team
_HELPED = 2  # how many other threads one looks to for work: each look costs as much as waiting for another core
COMMAND, CALL, ARGUMENTS, THREAD, DONE = range(5)  # of a mailbox
NOTHING, RUN, LEAVE = range(3)  # commands

_SPINS = 1000  # about 20 microseconds: longer than a phase's imbalance, far below a scheduler's quantum


@intrinsic
def _fetch_add(typingctx, pointer, value):
    """Add to an integer in memory, atomically; return what it was."""

    def codegen(context, builder, signature, args):
        value = context.cast(builder, args[1], signature.args[1], pointer.dtype)
        return builder.atomic_rmw("add", args[0], value, "seq_cst")

    return pointer.dtype(pointer, value), codegen


@intrinsic
def _load_atomic(typingctx, pointer):
    """Read an integer that other threads write; what they wrote before it is seen after."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return pointer.dtype(pointer), codegen


@intrinsic
def _store_atomic(typingctx, pointer, value):
    """Write an integer that other threads read; who sees it sees what was written before it."""

    def codegen(context, builder, signature, args):
        value = context.cast(builder, args[1], signature.args[1], pointer.dtype)
        builder.store_atomic(value, args[0], "release", 8)
        return context.get_dummy_value()

    return types.void(pointer, value), codegen


@intrinsic
def _pointer_at(typingctx, number):
    """Take an integer for the address of int64 numbers."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.IntType(64).as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def _address_as_number(typingctx, pointer):
    """Return a pointer as an integer."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], ir.IntType(64))

    return types.int64(pointer), codegen


@intrinsic
def _wait_a_little(typingctx, spins):
    """Wait, who has done so `spins` times: at first in a spin loop; later, the one waited for may need this core."""

    def codegen(context, builder, signature, args):
        def call(name, result):
            builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, []), name), [])

        with builder.if_else(builder.icmp_signed("<", args[0], ir.Constant(args[0].type, _SPINS))) as (early, late):
            with early:
                if "x86_64" in llvm.get_process_triple():
                    call("llvm.x86.sse2.pause", ir.VoidType())
            with late:
                call("SwitchToThread" if sys.platform == "win32" else "sched_yield", ir.IntType(32))
        return context.get_dummy_value()

    return types.void(spins), codegen


# --- calling a kernel together ------------------------------------------------------------------------------


@intrinsic
def this_call(typingctx):
    """Give what another thread needs to call the kernel in which this stands, with the same arguments.

    The kernel has an argument called `thread`, which alone will be another. To be used by the kernel itself: in a
    routine it would mean that routine.

    Returns
    -------
    call : int
        Address of a function of the arguments and a thread's number.
    arguments : int
        Address of the arguments, which are there until this call ends.
    """

    def codegen(context, builder, signature, args):
        i64 = ir.IntType(64)
        call, place = emit_call_of_thread(builder)
        return context.make_tuple(
            builder, signature.return_type, [builder.ptrtoint(call, i64), builder.ptrtoint(place, i64)]
        )

    return types.UniTuple(types.int64, 2)(), codegen


@intrinsic
def _run(typingctx, call, arguments, thread):
    """Make the call for a thread."""

    def codegen(context, builder, signature, args):
        there = builder.inttoptr(args[1], CALL_TYPE.args[0])
        builder.call(builder.inttoptr(args[0], CALL_TYPE.as_pointer()), [there, args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@routine
def summon(team, call, arguments):
    """Have the team's other threads make a call, too."""
    for thread in range(1, team.shape[0] - 1):
        mailbox = _pointer_at(team[1 + thread, MAILBOX])
        mailbox[CALL], mailbox[ARGUMENTS], mailbox[THREAD] = call, arguments, thread
        mailbox[DONE] = _address_as_number(offset(address(team), FINISHED))
        _store_atomic(offset(mailbox, COMMAND), RUN)


@routine
def dismiss(team):
    """Wait until the team's other threads have finished the call; then the team is as it was before."""
    others, spins = team.shape[0] - 2, 0
    while _load_atomic(offset(address(team), FINISHED)) < others:
        _wait_a_little(spins)
        spins += 1
    if others:
        team[0, ARRIVALS] = team[0, FINISHED] = 0
        for row in range(1, team.shape[0]):
            team[row, 0] = team[row, TAKEN] = team[row, TAKEN + 1] = 0


@kernel
def serve(mailbox, patience):
    """Do what the mailbox says, as long as there is something to do.

    Parameters
    ----------
    mailbox : (8,) int64 array
    patience : int
        How often to look for another command; those after the first thousand or so let other threads run first.

    Returns
    -------
    bool
        Whether the command was to leave; else there was nothing to do any more.
    """
    command = address(mailbox)
    spins = 0
    while spins <= patience:
        found = _load_atomic(command)
        if found == NOTHING:
            _wait_a_little(spins)
            spins += 1
            continue
        # The next one may be given as soon as this one is done.
        mailbox[COMMAND] = NOTHING
        if found == LEAVE:
            return True
        _run(mailbox[CALL], mailbox[ARGUMENTS], mailbox[THREAD])
        _fetch_add(_pointer_at(mailbox[DONE]), 1)
        spins = 0
    return False


# --- within a call ------------------------------------------------------------------------------------------


@routine
def barrier(team, thread):
    """Wait until every thread of the team is here; what they wrote before is visible after."""
    threads = team.shape[0] - 1
    if threads == 1:
        return
    passed = team[1 + thread, 0] + 1
    team[1 + thread, 0] = passed
    arrivals = address(team)
    _fetch_add(arrivals, 1)
    spins = 0
    while _load_atomic(arrivals) < passed * threads:
        _wait_a_little(spins)
        spins += 1


@routine
def fetch(pointer, count):
    """Prefetch so many elements that other threads wrote; one after the other, they would be long in coming."""
    for n in range(0, count, CACHE_LINE * lanes_of(pointer) // VECTOR_BYTES):
        prefetch(offset(pointer, n))


@routine
def share(count, team, thread):
    """Divide `count` items evenly; return the first item of this thread and the first of the next."""
    threads = team.shape[0] - 1
    return count * thread // threads, count * (thread + 1) // threads


@routine
def share_rows(offsets, lengths, first_step, last_step, team, thread):
    """Divide the rows of some steps, so that each thread has about as many in all; rows and steps as in ``forward.py``.

    A thread's rows stand side by side: dealt out in turn, each thread would have the processor fetch the others' rows.

    Returns
    -------
    first, last : int
        This thread's first row and the next one's. The last of them may end before `last_step`.
    """
    total, threads = offsets[last_step] - offsets[first_step], team.shape[0] - 1
    if total == 0:
        return 0, 0
    first = _row_after(offsets, lengths, first_step, last_step, total * thread // threads)
    return first, _row_after(offsets, lengths, first_step, last_step, total * (thread + 1) // threads)


@routine
def _row_after(offsets, lengths, first_step, last_step, count):
    """Return before which row the rows have, in some steps and all together, `count` as nearly as can be."""
    steps = last_step - first_step
    whole = offsets[last_step] - offsets[last_step - 1]  # rows that have all these steps
    row = minimum(whole, (count + steps // 2) // steps)
    before = row * steps
    while whole <= row < lengths.size and lengths[row] > first_step:
        here = lengths[row] - first_step
        if before + here - count > count - before:
            break
        before += here
        row += 1
    return row


@routine
def take(count, team, thread, turn):
    """Take an item of this round's: of this thread's own, or when none is left, of a thread that is behind.

    A core may be slower than others for a while, where something else runs there or beside it; who meets at a barrier
    would have to wait for it. What is taken from others is what they did not begin.

    Parameters
    ----------
    count : int
        All threads' items, each thread's own being its :func:`share`.
    team : array, IN and OUT
    thread : int
    turn : int
        Number of the round. Between two rounds there is a barrier; odd rounds take the items backwards.

    Returns
    -------
    int
        The item; -1 if none is left.
    """
    threads = team.shape[0] - 1
    for n in range(minimum(threads, 1 + _HELPED)):
        other = (thread + n) % threads
        first, last = share(count, team, other)
        taken = offset(address(team), (1 + other) * team.shape[1] + TAKEN + (turn & 1))
        if _load_atomic(taken) < last - first:
            item = _fetch_add(taken, 1)
            if item < last - first:
                return last - 1 - item if turn & 1 else first + item
    # Nobody looks at the next round's before the barrier, or at the last one's any more.
    team[1 + thread, TAKEN + 1 - (turn & 1)] = 0
    return -1
