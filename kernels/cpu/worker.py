"""Workers: the threads that kernels call, and how a worker is handed a call.

A worker is an operating-system thread that runs :func:`serve` all the time. It holds no lock of the interpreter and
runs no Python, so a patched ``threading``, an interpreter that shuts down, or a signal handler cannot keep it from
answering. Handing over a call involves no Python either: a kernel claims workers when it begins, and before it returns
they have finished and are free again (``thread_team.py``). So no worker is reserved between two bytecodes of Python,
and no exception, wherever it is raised, loses a worker or leaves one running on memory that has been freed.

Mailboxes
---------
Each worker has a mailbox, int64 words in two cache lines that are never freed. The transitions of its ``STATE``:

=============  ================================  ===========================================================
``STATE``      meaning                           next state
=============  ================================  ===========================================================
``UNSTARTED``  no thread has come yet            ``IDLE``, by the thread; of two threads the second one ends
``IDLE``       awake, looks for work             ``CLAIMED``, by a caller; ``ASLEEP``, by the worker;
                                                 ``ENDING``, when the interpreter exits
``ASLEEP``     sleeps at its lock, or is about   ``CALLED``, by a caller, which then releases the lock once
               to
``CALLED``     is to wake; a caller waits        ``CLAIMED``, by the worker; ``ABSENT``, by this caller,
                                                 after it has waited long enough
``ABSENT``     not there: wakes too late, has    ``IDLE``, by the worker
               ended, or is the parent's
``CLAIMED``    awake, belongs to a caller        ``RUNNING``, by this caller
``RUNNING``    calls the kernel                  ``IDLE``, by the worker
``ENDING``     is to end                         ``ABSENT``, by the worker
=============  ================================  ===========================================================

The first five of these states may be left by more than one thread, so they are left by compare-and-swap; the others are
left by a store of the one thread that may. The words ``CALL`` to ``MODE`` belong to the caller that has claimed the
worker, until it stores ``RUNNING``, which releases them to the worker. The lock is released once each time that the
worker has gone to sleep, by the thread that ends ``ASLEEP``.

A worker takes the floating-point mode of its caller with each call, so that results do not depend on the number of
threads where denormals are flushed. That is so on x86-64 and ARM64; elsewhere, a worker keeps the system's default.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.atomics import (
    SLEEPY,
    acquire_lock,
    compare_and_swap,
    fetch_add,
    float_mode,
    load_atomic,
    pointer_at,
    set_float_mode,
    store_atomic,
    thread_id,
    wait_a_little,
)
from fastlstm.kernels.cpu.jit import CALL_TYPE, emit_call_of_thread, kernel, routine
from fastlstm.kernels.cpu.vector import offset

__all__ = ["MAILBOX_WORDS", "MOST_ARGUMENTS", "hand_over", "look_while", "run", "serve", "size_of_call", "this_call"]

STATE, CALL, ARGUMENTS, THREAD, DONE, MODE, PATIENCE, LOCK, THREAD_ID, SERVED = range(10)  # words of a mailbox
MAILBOX_WORDS = 16
UNSTARTED, IDLE, ASLEEP, CALLED, ABSENT, CLAIMED, RUNNING, ENDING = range(8)  # states
WORK, FIND, AWAIT, END = range(4)  # what `serve` is to do

_EAGER_LOOKS = 10_000  # at a mailbox, which take some milliseconds; further ones take 0.1 milliseconds each, asleep
_LOOKS_AT_START = 20_000  # for a new thread, a second in all

# --- handing a call to another thread -----------------------------------------------------------------------

MOST_ARGUMENTS = 3000  # bytes of a kernel's arguments


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
        call, place = emit_call_of_thread(builder)
        i64 = ir.IntType(64)
        return context.make_tuple(
            builder, signature.return_type, [builder.ptrtoint(call, i64), builder.ptrtoint(place, i64)]
        )

    return types.UniTuple(types.int64, 2)(), codegen


@intrinsic
def run(typingctx, call, arguments, thread):
    """Make the call for a thread."""

    def codegen(context, builder, signature, args):
        builder.call(
            builder.inttoptr(args[0], CALL_TYPE.as_pointer()), [builder.inttoptr(args[1], CALL_TYPE.args[0]), args[2]]
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def size_of_call(typingctx):
    """Return the number of bytes of the arguments that :func:`this_call` leaves."""

    def codegen(context, builder, signature, args):
        size = context.get_abi_sizeof(ir.LiteralStructType([arg.type for arg in builder.function.args]))
        if size > MOST_ARGUMENTS:
            raise AssertionError(f"{size} bytes of arguments have no room in a record")
        return ir.Constant(ir.IntType(64), size)

    return types.int64(), codegen


@routine
def hand_over(mailbox, call, arguments, thread, done):
    """Have a worker that this caller has claimed make a call, for a thread, and then add 1 at an address."""
    mailbox[CALL], mailbox[ARGUMENTS], mailbox[THREAD] = call, arguments, thread
    mailbox[DONE], mailbox[MODE] = done, float_mode()
    store_atomic(offset(mailbox, STATE), RUNNING)


@routine
def look_while(state, value, most):
    """Wait while a mailbox is in a state, for so many looks at most."""
    looks = 0
    while load_atomic(state) == value and looks < most:
        wait_a_little(looks if looks < _EAGER_LOOKS else SLEEPY)
        looks += 1
    return looks


# --- the life of a worker -----------------------------------------------------------------------------------


@intrinsic
def _entry(typingctx):
    """Return the address of a C function of a mailbox, which calls the kernel in which this stands, to WORK."""

    def codegen(context, builder, signature, args):
        function, i64 = builder.function, ir.IntType(64)
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        entry = ir.Function(builder.module, kind, f"{function.name}.entry")
        entry.linkage = "internal"
        inner = ir.IRBuilder(entry.append_basic_block())
        given = {"arg.mailbox": inner.ptrtoint(entry.args[0], i64), "arg.role": ir.Constant(i64, WORK)}
        # Numba's functions first take the places of their result and of an exception.
        places = [inner.alloca(arg.type.pointee) for arg in function.args[:2]]
        inner.call(function, [*places, *(given[arg.name] for arg in function.args[2:])])
        inner.ret_void()
        return builder.ptrtoint(entry, i64)

    return types.int64(), codegen


@kernel
def serve(mailbox, role):
    """Run a worker, or an operation that starts or ends one.

    Parameters
    ----------
    mailbox : int
        Address of the worker's mailbox.
    role : int
        FIND the C function that a new thread is to call with the mailbox; AWAIT that the thread has come, for a second
        at most; WORK, being this thread, until the interpreter exits; END the worker if it is awake, and wait for that.

    Returns
    -------
    int
        To FIND, the function's address. To AWAIT, whether the thread has come.
    """
    if role == FIND:
        return _entry()
    words = pointer_at(mailbox)
    state = offset(words, STATE)
    if role == AWAIT:
        look_while(state, UNSTARTED, _LOOKS_AT_START)
        look_while(state, CLAIMED, _LOOKS_AT_START)  # about to be idle
        return 1 if load_atomic(state) != UNSTARTED else 0
    if role == END:
        if compare_and_swap(state, IDLE, ENDING):
            look_while(state, ENDING, _LOOKS_AT_START)
        return 0
    if not compare_and_swap(state, UNSTARTED, CLAIMED):
        return 0
    words[THREAD_ID] = thread_id()
    store_atomic(state, IDLE)
    spins = 0
    while True:
        found = load_atomic(state)
        if found == RUNNING:
            done = words[DONE]  # the next caller may have claimed this worker when it is added to
            set_float_mode(words[MODE])
            run(words[CALL], words[ARGUMENTS], words[THREAD])
            words[SERVED] += 1
            store_atomic(state, IDLE)
            fetch_add(pointer_at(done), 1)
            spins = 0
        elif found == ENDING:
            store_atomic(state, ABSENT)
            return 0
        elif spins <= words[PATIENCE] or not compare_and_swap(state, IDLE, ASLEEP):
            wait_a_little(spins)
            spins += 1
        else:
            acquire_lock(words[LOCK])
            if not compare_and_swap(state, CALLED, CLAIMED):
                compare_and_swap(state, ABSENT, IDLE)
            spins = 0
