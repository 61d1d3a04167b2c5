"""Primitives for threads that Numba does not offer: atomic integers, waiting, and the floating-point mode.

A lock here is one of the interpreter's own (``PyThread_allocate_lock``): one thread sleeps until another releases it,
on every system, and neither needs the GIL.
"""

from __future__ import annotations

import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.jit import cgutils

__all__ = [
    "SLEEPY", "acquire_lock", "address_as_number", "compare_and_swap", "fetch_add", "float_mode", "load_atomic",
    "pointer_at", "release_lock", "set_float_mode", "store_atomic", "thread_id", "wait_a_little",
]  # fmt: skip

SPINS = 1000  # about 20 microseconds: longer than a phase's imbalance, far below a scheduler's quantum
SLEEPY = 50_000  # about 20 milliseconds: the loss of 0.1 milliseconds at the end of the wait is below a hundredth
_SLEEP = 50  # microseconds

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_TRIPLE = llvm.get_process_triple()


def _call(builder, name, result, *arguments):
    """Emit the call of a C function or of an intrinsic function of LLVM."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


# --- words that several threads read and write --------------------------------------------------------------


@intrinsic
def fetch_add(typingctx, pointer, value):
    """Add to an integer in memory, atomically; return its old value."""

    def codegen(context, builder, signature, args):
        value = context.cast(builder, args[1], signature.args[1], pointer.dtype)
        return builder.atomic_rmw("add", args[0], value, "seq_cst")

    return pointer.dtype(pointer, value), codegen


@intrinsic
def compare_and_swap(typingctx, pointer, old, new):
    """Write `new` to an integer in memory if it is `old`, atomically; return whether it was."""

    def codegen(context, builder, signature, args):
        old, new = (context.cast(builder, args[n], signature.args[n], pointer.dtype) for n in (1, 2))
        return builder.extract_value(builder.cmpxchg(args[0], old, new, "seq_cst", "seq_cst"), 1)

    return types.boolean(pointer, old, new), codegen


@intrinsic
def load_atomic(typingctx, pointer):
    """Read an integer that other threads write; what they wrote before it is seen after."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return pointer.dtype(pointer), codegen


@intrinsic
def store_atomic(typingctx, pointer, value):
    """Write an integer that other threads read; a thread that sees it sees what was written before it."""

    def codegen(context, builder, signature, args):
        value = context.cast(builder, args[1], signature.args[1], pointer.dtype)
        builder.store_atomic(value, args[0], "release", 8)
        return context.get_dummy_value()

    return types.void(pointer, value), codegen


@intrinsic
def pointer_at(typingctx, number):
    """Take an integer for the address of int64 numbers."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], _I64.as_pointer())

    return types.CPointer(types.int64)(types.int64), codegen


@intrinsic
def address_as_number(typingctx, pointer):
    """Return a pointer as an integer."""

    def codegen(context, builder, signature, args):
        return builder.ptrtoint(args[0], _I64)

    return types.int64(pointer), codegen


# --- waiting ------------------------------------------------------------------------------------------------


@intrinsic
def wait_a_little(typingctx, spins):
    """Wait for the `spins`-th time: spin at first; then let other threads run; from :data:`SLEEPY` on, sleep.

    The thread that is waited for may need this very core, and have a lower priority: it runs while this one sleeps.
    """

    def codegen(context, builder, signature, args):
        def fewer_than(count):
            return builder.if_else(builder.icmp_signed("<", args[0], ir.Constant(args[0].type, count)))

        windows = sys.platform == "win32"
        with fewer_than(SPINS) as (early, late):
            with early:
                if "x86_64" in _TRIPLE:
                    _call(builder, "llvm.x86.sse2.pause", ir.VoidType())
            with late, fewer_than(SLEEPY) as (soon, at_last):
                with soon:
                    _call(builder, "SwitchToThread" if windows else "sched_yield", _I32)
                with at_last:
                    if windows:
                        _call(builder, "Sleep", ir.VoidType(), ir.Constant(_I32, 1))
                    else:
                        _call(builder, "usleep", _I32, ir.Constant(_I32, _SLEEP))
        return context.get_dummy_value()

    return types.void(spins), codegen


@intrinsic
def acquire_lock(typingctx, lock):
    """Sleep until another thread has released a lock, given by its address."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I8.as_pointer())
        _call(builder, "PyThread_acquire_lock", _I32, pointer, ir.Constant(_I32, 1))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def release_lock(typingctx, lock):
    """Wake the thread that sleeps at a lock, or that is about to; only one such call for each :func:`acquire_lock`."""

    def codegen(context, builder, signature, args):
        _call(builder, "PyThread_release_lock", ir.VoidType(), builder.inttoptr(args[0], _I8.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def thread_id(typingctx):
    """Return the system's number of this thread, where threads are placed by it; else 0."""

    def codegen(context, builder, signature, args):
        if sys.platform == "linux":
            return _call(builder, "PyThread_get_thread_native_id", _I64)
        return ir.Constant(_I64, 0)

    return types.int64(), codegen


# --- the floating-point mode --------------------------------------------------------------------------------

_CONTROL = 0xFFC0  # bits of MXCSR: all but the flags of what has happened


@intrinsic
def float_mode(typingctx):
    """Return this thread's floating-point mode: whether it flushes denormals, and how it rounds; 0 if not known."""

    def codegen(context, builder, signature, args):
        if "x86_64" in _TRIPLE:
            place = cgutils.alloca_once(builder, _I32)
            _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), builder.bitcast(place, _I8.as_pointer()))
            return builder.and_(builder.zext(builder.load(place), _I64), ir.Constant(_I64, _CONTROL))
        if "aarch64" in _TRIPLE or "arm64" in _TRIPLE:
            return _call(builder, "llvm.aarch64.get.fpcr", _I64)
        return ir.Constant(_I64, 0)

    return types.int64(), codegen


@intrinsic
def set_float_mode(typingctx, mode):
    """Give this thread another's floating-point mode, where it is known."""

    def codegen(context, builder, signature, args):
        if "x86_64" in _TRIPLE:
            place = cgutils.alloca_once(builder, _I32)
            builder.store(builder.trunc(args[0], _I32), place)
            _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), builder.bitcast(place, _I8.as_pointer()))
        elif "aarch64" in _TRIPLE or "arm64" in _TRIPLE:
            _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), args[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen
