"""A barrier for the threads that run one kernel together."""

from __future__ import annotations

import sys

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from fastlstm.kernels.cpu.compile import routine
from fastlstm.kernels.cpu.simd import address, offset

__all__ = ["barrier", "share"]

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
    """Read an integer that other threads write."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(args[0], "acquire", 8)

    return pointer.dtype(pointer), codegen


@intrinsic
def _relax(typingctx):
    """Tell the core that this is a spin loop."""

    def codegen(context, builder, signature, args):
        if "x86_64" in llvm.get_process_triple():
            function_type = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _yield_processor(typingctx):
    """Let another thread run: the thread that is waited for may need this core."""

    def codegen(context, builder, signature, args):
        name = "SwitchToThread" if sys.platform == "win32" else "sched_yield"
        function_type = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), [])
        return context.get_dummy_value()

    return types.void(), codegen


@routine
def barrier(counters, thread, threads):
    """Wait until every thread of the team is here; what they wrote before is visible after.

    Parameters
    ----------
    counters : (1 + threads, 8) int64 array, zeroed before the kernel starts
        Element (0, 0) counts arrivals, and (0, 1) is set to give up waiting, for good: the kernel then runs to
        its end, and its results are worthless. Element (1 + t, 0) holds how many barriers thread t has passed.
        A row is a cache line, so that waiting on one does not disturb the others.
    thread, threads : int
        This thread's number and the team's size.
    """
    if threads == 1:
        return
    passed = counters[1 + thread, 0] + 1
    counters[1 + thread, 0] = passed
    arrivals = address(counters)
    _fetch_add(arrivals, 1)
    spins = 0
    while _load_atomic(arrivals) < passed * threads and _load_atomic(offset(arrivals, 1)) == 0:
        spins += 1
        if spins < _SPINS:
            _relax()
        else:
            _yield_processor()


@routine
def share(count, thread, threads):
    """Divide `count` items evenly; return the first item of this thread and the first of the next."""
    return count * thread // threads, count * (thread + 1) // threads
