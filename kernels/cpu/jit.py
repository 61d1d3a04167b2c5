"""Compiling and caching of kernels.

A kernel is called from Python; a routine is a part of the kernels that call it. ``compiler.py`` describes which passes
of Numba's compiler are left out, and ``target.py`` what is not loaded.

If Numba's private parts (``private_numba.py``) are not as expected, kernels and routines are compiled by plain
``numba.njit``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import llvmlite
import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastlstm.errors import BackendError
from fastlstm.kernels.cpu import kernel_cache
from fastlstm.kernels.cpu.compiler import HOT, KernelCompiler, PartCompiler
from fastlstm.kernels.cpu.dispatcher import Kernel, RefusingKernel, Routine
from fastlstm.kernels.cpu.plain_njit import PlainKernel
from fastlstm.kernels.cpu.private_numba import (
    PLAIN,
    CompileResult,
    NullCache,
    cgutils,
    dumps,
)

__all__ = [
    "KERNELS", "PLAIN", "VECTOR_BYTES", "address_of", "by_address", "caller", "cgutils", "compile_for", "compile_once",
    "emit_call_of_thread", "kernel", "refuse_others", "routine", "stay_outlined", "unkept_kernel",
    "unroll_loops",
]  # fmt: skip

if numba.config.DISABLE_JIT:
    raise BackendError("NUMBA_DISABLE_JIT is set, and the CPU kernels run only compiled; unset it")


def _host_vector_bytes() -> int:
    features = llvm.get_host_cpu_features()
    if features.get("avx512f") and features.get("avx512vl"):
        return 64
    return 32 if features.get("avx2") and features.get("fma") else 16


def _vector_bytes() -> int:
    given = os.environ.get("FASTLSTM_VECTOR_BYTES") or str(_host_vector_bytes())
    if given not in {"16", "32", "64"}:
        raise BackendError(f"FASTLSTM_VECTOR_BYTES must be 16, 32 or 64, got {given!r}")
    return int(given)


VECTOR_BYTES = _vector_bytes()

# --- compiling ----------------------------------------------------------------------------------------------

_OPTIONS = {"nopython": True, "_nrt": False, "no_cfunc_wrapper": True, "error_model": "numpy"}
KERNELS: list[Any] = []  # all that have been declared, in this order


def kernel(function: Callable[..., Any], constants: tuple[Any, ...] | None = None) -> Any:
    """Compile a kernel at its first call, to run without the GIL, and write it to disk for the next process.

    If no folder is writeable, it is compiled in every process. `constants` tell it apart from others that are made by
    the same function; where they are None, what it refers to does.
    """
    made = unkept_kernel(function)
    if not PLAIN:
        made._cache = _Cache(function, constants)
    KERNELS.append(made)
    return made


def unkept_kernel(function: Callable[..., Any]) -> Any:
    """Compile a kernel at its first call, in every process: for measurements of the kernels' parts."""
    if PLAIN:
        return PlainKernel(function)
    return Kernel(function, targetoptions={**_OPTIONS, "nogil": True}, pipeline_class=KernelCompiler)


def routine(function: Callable[..., Any] | None = None, *, inline: bool = False) -> Any:
    """Compile a function that only kernels call, once for each dtype; with `inline`, into each of its callers.

    By default, Numba compiles a function again for every constant argument.
    """
    if function is None:
        return functools.partial(routine, inline=inline)
    if PLAIN:
        return njit(error_model="numpy")(function)
    options = {**_OPTIONS, "forceinline": inline, "no_cpython_wrapper": True}
    return Routine(function, targetoptions=options, pipeline_class=PartCompiler)


@intrinsic
def stay_outlined(typingctx):  # type: ignore[no-untyped-def]
    """Keep LLVM from inlining the routine that calls this.

    For a routine that is called once per chunk or call, inlining gains nothing, and doubles the code to compile.
    """

    def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), codegen


def unroll_loops(builder: Any) -> None:
    """Unroll the loops of the function that is being built: the innermost loops of products."""
    HOT.add(builder.function.name)


def compile_for(dispatcher: Any, arguments: Iterable[Any]) -> None:
    """Compile or load a kernel for the types of these arguments, without calling it, unless that has been done."""
    if PLAIN:
        dispatcher.compile(tuple(map(numba.typeof, arguments)), unless_refused=True)
    elif type(dispatcher) is not RefusingKernel:
        dispatcher.compile(tuple(map(dispatcher.typeof_pyval, arguments)))


def refuse_others(dispatcher: Any) -> None:
    """Make a kernel raise TypeError for argument types that :func:`compile_once` was not called with.

    So it can be called with unchecked arguments without being compiled for their types.
    """
    if PLAIN:
        dispatcher.refuses = True
    else:
        dispatcher._can_compile = False  # Numba's own method for this needs a kernel that has been compiled
        # That is what a call looks at, in C. What is compiled on purpose looks in Python, and finds this. To allow it
        # for a while would allow it to other threads' calls, too, and for good if an interrupt came meanwhile.
        dispatcher.__class__ = RefusingKernel


def compile_once(dispatcher: Any, signature: tuple[Any, ...]) -> None:
    """Compile or load a kernel with :func:`refuse_others` for the types of these arguments."""
    dispatcher.compile(signature)


# --- kernels on disk ----------------------------------------------------------------------------------------


class _Cache(NullCache):
    """The cache of a dispatcher: asked for compiled code, and given new code."""

    def __init__(self, function: Callable[..., Any], constants: tuple[Any, ...] | None = None) -> None:
        module = function.__module__
        qualname = function.__qualname__.replace("<", "").replace(">", "")
        self._name = f"{module.rpartition('.')[2]}.{qualname}-{sys.implementation.cache_tag}"
        sources = kernel_cache.SOURCES
        if sources and not module.startswith(f"{__package__}."):  # SOURCES says nothing about this one
            try:
                sources += Path(inspect.getfile(function)).read_bytes()
            except (OSError, TypeError):
                sources = None
        versions = sys.implementation.cache_tag, getattr(sys, "abiflags", ""), numba.__version__, llvmlite.__version__
        if constants is None:
            constants = tuple(cell.cell_contents for cell in function.__closure__ or ())
        self._identity = sources and (sources, versions, module, qualname, tuple(map(repr, constants)))

    @property
    def cache_path(self) -> str | None:
        """The first folder that may hold the kernel, None if it is not cached."""
        return str(kernel_cache.folders[0]) if self._identity and kernel_cache.folders else None

    def _place(self, sig: Any, codegen: Any) -> tuple[str, bytes]:
        """Return the name of the kernel's file and its key; a file with another key is stale."""
        constants = self._identity and self._identity[-1]
        target = repr((tuple(map(str, sig)), codegen.magic_tuple(), VECTOR_BYTES, constants))
        key = hashlib.sha256(repr((self._identity, target)).encode()).digest()
        return f"{self._name}-{hashlib.sha256(target.encode()).hexdigest()[:16]}.nbc", key

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Load a kernel without what only compiling needs: Numba would first load all functions it knows."""
        found = None
        if self._identity:
            content = kernel_cache.read(*self._place(sig, target_context.codegen()))
            if content is not None:
                found = self._rebuild(content, target_context)
        if found is None:
            kernel_cache.announce()
        return found

    @staticmethod
    def _rebuild(content: bytes, target_context: Any) -> Any:
        try:
            return CompileResult._rebuild(target_context, *pickle.loads(content))
        except Exception:  # it is what was written, but does not fit: whatever it is, a kernel can be compiled anew
            return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Write a kernel to disk. If that fails, a warning is issued, and the next process compiles it again."""
        if not self._identity or kernel_cache.problem or cres.lifted or cres.library.has_dynamic_globals:
            return
        kernel_cache.write(*self._place(sig, cres.target_context.codegen()), dumps(cres._reduce()))


# --- calling a kernel from another thread -------------------------------------------------------------------

CALL_TYPE = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), ir.IntType(64)])


def emit_call_of_thread(builder: Any) -> tuple[Any, Any]:
    """Emit a function that calls the function that is being built with its arguments, except for `thread`.

    Returns
    -------
    call : LLVM value
        A function of type `CALL_TYPE`: of the arguments' place, and a thread's number.
    place : LLVM value
        Where the arguments are, until the function that is being built returns.
    """
    function, module = builder.function, builder.module
    numbers = [n for n, arg in enumerate(function.args) if arg.name == "arg.thread"]
    # Numba's functions first take the places of their result and of an exception.
    if len(numbers) != 1 or numbers[0] < 2 or not all(isinstance(a.type, ir.PointerType) for a in function.args[:2]):
        raise BackendError(f"numba {numba.__version__} passes arguments in another way; install another release of it")
    kept = ir.LiteralStructType([arg.type for arg in function.args])
    with builder.goto_entry_block():
        place = builder.alloca(kept)  # Numba's own method would set it to zero first
    for n, arg in enumerate(function.args):
        builder.store(arg, cgutils.gep_inbounds(builder, place, 0, n))

    call = ir.Function(module, CALL_TYPE, f"{function.name}.of_thread")
    call.linkage = "internal"
    inner = ir.IRBuilder(call.append_basic_block())
    there = inner.bitcast(call.args[0], kept.as_pointer())
    values = [inner.load(cgutils.gep_inbounds(inner, there, 0, n)) for n in range(len(function.args))]
    for n in range(2):  # each thread has its own
        values[n] = inner.alloca(function.args[n].type.pointee)
    values[numbers[0]] = call.args[1]
    inner.call(function, values)
    inner.ret_void()
    return call, place


# --- functions that are called by their address --------------------------------------------------------------


def by_address(function: Callable[..., Any], *constants: Any) -> Any:
    """Compile a function that kernels call by its address, at :func:`address_of`; cached as a kernel is.

    The `constants` are those that it was made for.
    """
    dispatcher = kernel(function, constants)
    refuse_others(dispatcher)
    return dispatcher


def address_of(dispatcher: Any, signature: tuple[Any, ...]) -> int:
    """Compile or load a function for arguments of some types; return where its code starts."""
    compile_once(dispatcher, signature)
    compiled = dispatcher.overloads[signature]
    address: int = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return address


def caller(result_of: Callable[..., Any]) -> Any:
    """Make the routine that calls a function at an address, with a tuple of arguments.

    `result_of` returns the type of the result for the types of the arguments.
    """

    @intrinsic
    def call(typingctx, address, arguments):  # type: ignore[no-untyped-def]
        kinds = tuple(map(types.unliteral, arguments.types))
        result = result_of(*kinds)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            function_type = context.call_conv.get_function_type(result, kinds)
            function = builder.inttoptr(args[0], function_type.as_pointer())
            values = cgutils.unpack_tuple(builder, args[1], len(kinds))
            _, value = context.call_conv.call_function(builder, function, result, kinds, values)
            return value

        return result(types.intp, types.Tuple(kinds)), codegen

    return call
