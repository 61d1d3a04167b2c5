"""How a kernel is compiled and cached.

Numba's on-disk cache looks at the file of the function that it caches, and does not notice a change in
another file that this one calls. The kernels call each other across files, so the stamp that decides
whether a cached kernel is fresh is taken over all of them.

A routine is a part of the kernels that call it, and nothing else ever does. Numba would optimise each for itself
and make machine code of it, then of the routines that call it, at last of the kernel: every level again. Here a
routine stops at LLVM's intermediate form, and only the whole kernel is optimised, which spares much of the first
call's time. Numba's own way to extend its compiler serves for that: a pipeline with one pass exchanged.

Nor are references counted: a kernel makes no arrays, and its caller keeps those that it is given. Numba would make an
object for each of them at every call, a sixth of a short one's time, and count users even in innermost loops.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llvmlite.binding import ffi
from numba import _dynfunc, njit, types
from numba.core import sigutils
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_lock import global_compiler_lock
from numba.core.compiler_machinery import register_pass
from numba.core.registry import CPUDispatcher
from numba.core.typed_passes import NativeLowering

from fastlstm.errors import BackendError
from fastlstm.kernels.cpu.simd import VECTOR_BYTES

__all__ = ["cache_folder", "compile_once", "kernel", "refuse_others", "routine"]


def _stamp() -> str:
    digest = hashlib.sha256(str(VECTOR_BYTES).encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


_STAMP = _stamp()


class _Code(JITCodeLibrary):
    """A module of LLVM's, optimised when all parts of the kernel are together and not function by function before."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout


class _Part(_Code):
    """One to be linked into others: not optimised on its own at all, never loaded."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerKernel(NativeLowering):
    _name = "lower_kernel"

    def run_pass(self, state: Any) -> bool:
        state.library = _Code(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()
        return bool(super().run_pass(state))


@register_pass(mutates_CFG=True, analysis_only=False)
class _LowerPart(NativeLowering):
    _name = "lower_part"

    def run_pass(self, state: Any) -> bool:
        state.library = _Part(state.targetctx.codegen(), state.func_id.func_qualname)
        state.flags = state.flags.copy()
        state.flags.no_compile = True  # no address is asked for
        super().run_pass(state)
        lowered = state.cr
        # Callers find the routine by this object, which has no code to run (0).
        handle = _dynfunc.make_function(
            lowered.fndesc.lookup_module(), state.func_id.func_name, "", 0, lowered.env, (state.library,)
        )
        state.targetctx.insert_user_function(handle, lowered.fndesc, [state.library])
        state.cr = lowered._replace(cfunc=handle)
        return True


# Closures, array expressions, loops to unroll by types, `with`: looking for them takes a tenth of the time.
_NOT_IN_KERNELS = {
    "annotate_types", "dump_parfor_diagnostics", "find_literally", "inline_closure_likes", "inline_inlinables",
    "inline_overloads", "literal_unroll", "LiteralPropagation", "make_function_op_code_to_jit_function",
    "nopython_rewrites", "with_lifting",
}  # fmt: skip


class _Compiler(CompilerBase):
    """Numba's for functions without Python objects, with a lowering of our own and without what kernels never need."""

    lowering: type[NativeLowering]

    def define_pipelines(self) -> list[Any]:
        pipeline = DefaultPassBuilder.define_nopython_pipeline(self.state)
        pipeline.passes = [
            (self.lowering if step is NativeLowering else step, why)
            for step, why in pipeline.passes
            if step.name() not in _NOT_IN_KERNELS
        ]
        pipeline.finalize()
        return [pipeline]


class _KernelCompiler(_Compiler):
    lowering = _LowerKernel


class _PartCompiler(_Compiler):
    lowering = _LowerPart


def kernel(function: Callable[..., None]) -> Any:
    """Compile a kernel at its first call, without the GIL, and keep it on disk for the next process.

    Where no folder can be written, it is compiled in every process.
    """
    dispatcher = njit(
        nogil=True, _nrt=False, no_cfunc_wrapper=True, error_model="numpy", pipeline_class=_KernelCompiler
    )(function)
    dispatcher.__class__, dispatcher._tickets = _Kernel, {}
    with contextlib.suppress(RuntimeError):  # Numba found no folder that it may write
        dispatcher._cache = _Cache(function)
    return dispatcher


class _Kernel(CPUDispatcher):
    """Numba's dispatcher, whose table of what can be called holds each compiled kernel once, whatever is interrupted.

    One that Numba enters twice, because an interrupt came before it had noted that it did, makes each call ambiguous.
    """

    def add_overload(self, cres: Any) -> None:
        arguments = tuple(cres.signature.args)
        enter = functools.partial(self._insert, [a._code for a in arguments], cres.entry_point, cres.objectmode)
        self._tickets.setdefault(arguments, [enter])
        self.overloads.setdefault(arguments, cres)

    def compile(self, sig: Any) -> Any:
        arguments = tuple(sigutils.normalize_signature(sig)[0])
        if arguments not in self.overloads and global_compiler_lock.is_locked():  # by this thread
            # Numba cannot compile in the middle of a compilation, and a wait for its end would be one for ourselves.
            raise BackendError(
                "a signal handler or a finaliser needs a kernel that is not ready, while the call that it interrupts"
                " compiles one; make a call before, so that they are compiled"
            )
        entry_point = super().compile(sig)
        # To take the ticket and to use it is one operation of the interpreter: it is used once, and not lost if this is
        # broken off.
        with contextlib.suppress(IndexError):
            next(map(operator.call, iter(self._tickets[arguments].pop, None)))
        return entry_point


class _Refusing(_Kernel):
    """One that is compiled on purpose only, see :func:`refuse_others`."""

    _can_compile = True


class _Cache(FunctionCache):
    """Numba's on-disk cache, for kernels."""

    def __init__(self, function: Callable[..., None]) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = _STAMP

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load a kernel, but nothing that only compiling one needs: Numba would load all functions it knows first."""
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def routine(function: Callable[..., Any] | None = None, *, inline: bool = False) -> Any:
    """Compile a function that only kernels call, once for each dtype; with `inline`, into each of its callers.

    Left to itself, Numba compiles a function anew for every constant that it is called with.
    """
    if function is None:
        return functools.partial(routine, inline=inline)
    dispatcher = njit(
        pipeline_class=_PartCompiler, _nrt=False, forceinline=inline, no_cpython_wrapper=True, no_cfunc_wrapper=True,
        error_model="numpy",
    )(function)  # fmt: skip
    resolve = dispatcher.get_call_template

    def resolve_plain(args: Any, kws: Any) -> Any:
        return resolve(tuple(map(types.unliteral, args)), {name: types.unliteral(t) for name, t in dict(kws).items()})

    dispatcher.get_call_template = resolve_plain
    return dispatcher


def refuse_others(dispatcher: Any) -> None:
    """Have a kernel raise TypeError for arguments that :func:`compile_once` was not given the types of.

    So it may be tried on arguments that nobody has looked at: it is not compiled for whatever they are.
    """
    dispatcher._can_compile = False  # Numba's own way to say so wants a kernel that has been compiled already
    # That is what a call looks at, in C. What compiles it on purpose looks in Python, and finds the class's attribute.
    # To allow it for a while would allow it to other threads' calls, too; for good, after an interrupt in between.
    dispatcher.__class__ = _Refusing


def compile_once(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compile or load a kernel that refuses others for arguments of some types."""
    dispatcher.compile(signature)


def cache_folder(dispatcher: Any) -> str | None:
    """Return the folder in which a kernel is cached, None if it is not."""
    return getattr(dispatcher._cache, "cache_path", None)


# --- fork ---------------------------------------------------------------------------------------------------

# A child could never compile, nor load a kernel, if another thread of its parent did so at the time of the fork: it
# would wait for that thread. So a fork waits until no thread does, for some seconds at most.
_SECONDS_FOR_COMPILATION = 20.0
_forking: dict[int, list[Any]] = {}  # by thread: the locks that it holds


def _before_fork() -> None:
    held = _forking[threading.get_ident()] = []
    for lock in (global_compiler_lock._lock, ffi.lib._lock._lock):
        if lock.acquire(timeout=_SECONDS_FOR_COMPILATION):
            held.append(lock)


def _after_fork_in_parent() -> None:
    for lock in _forking.pop(threading.get_ident(), ()):
        lock.release()


def _after_fork_in_child() -> None:
    held = _forking.pop(threading.get_ident(), ())
    _forking.clear()
    for owner in (global_compiler_lock, ffi.lib._lock):
        if owner._lock in held:
            owner._lock.release()
        else:
            owner._lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
