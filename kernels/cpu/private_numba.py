"""The private parts of Numba that the kernels use: each is checked when this module is imported.

If one is missing or has other arguments, or FASTLSTM_PLAIN_NJIT=1 is set, :data:`PLAIN` says so, and ``jit.py``
compiles kernels and routines by plain ``numba.njit``: bit-identical, but with a slower first call in each process,
since a plain kernel is not cached.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numba

__all__ = [
    "IMPLEMENTATIONS", "PLAIN", "AttributeTemplate", "CPUContext", "CPUDispatcher", "CPUHardware", "CPUTarget",
    "CodeLibrary", "CompileResult", "CompilerBase", "DefaultPassBuilder", "JITCodeLibrary", "Lower",
    "NativeLowering", "NullCache", "OverloadAttribute", "OverloadFunction", "RegistryLoader", "TypingContext",
    "cgutils", "dispatcher_registry", "dumps", "global_compiler_lock", "make_function", "normalize_signature",
    "register_pass", "target_registry",
]  # fmt: skip

_problems: list[str] = []


class _Missing:
    """Replaces a missing private part, so that code that uses it can be defined, though not run."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, decorated: Any) -> Any:
        return decorated


def _private(module: str, name: str, *attributes: str) -> Any:
    """Return a private part of Numba; record in `_problems` if it or one of its attributes is missing.

    An attribute that is written with parameters, ``"run_pass(self, state)"``, has to be a function with these.
    """
    try:
        part = getattr(import_module(module), name)
    except (ImportError, AttributeError):
        _problems.append(f"{module}.{name} is missing")
        return _Missing
    for attribute in attributes:
        method, _, parameters = attribute.rstrip(")").partition("(")
        if not hasattr(part, method):
            _problems.append(f"{module}.{name}.{method} is missing")
        elif parameters and list(inspect.signature(getattr(part, method)).parameters) != parameters.split(", "):
            _problems.append(f"{module}.{name}.{method} takes other arguments than ({parameters})")
    return part


make_function = _private("numba._dynfunc", "make_function")
NullCache = _private(
    "numba.core.caching", "NullCache", "load_overload(self, sig, target_context)", "save_overload(self, sig, cres)",
    "cache_path",
)  # fmt: skip
CodeLibrary = _private(
    "numba.core.codegen", "CodeLibrary", "_ensure_finalized(self)", "add_linking_library(self, library)",
    "add_ir_module(self, ir_module)", "finalize(self)", "get_function(self, name)", "get_llvm_str(self)",
    "get_asm_str(self)",
)  # fmt: skip
JITCodeLibrary = _private(
    "numba.core.codegen", "JITCodeLibrary", "_optimize_functions(self, ll_module)", "_optimize_final_module(self)",
    "finalize(self)", "enable_object_caching(self)", "has_dynamic_globals",
)  # fmt: skip
JITCPUCodegen = _private("numba.core.codegen", "JITCPUCodegen", "magic_tuple(self)")
CompilerBase = _private("numba.core.compiler", "CompilerBase", "define_pipelines(self)")
CompileResult = _private("numba.core.compiler", "CompileResult", "_reduce(self)", "_rebuild", "lifted", "library")
DefaultPassBuilder = _private("numba.core.compiler", "DefaultPassBuilder", "define_nopython_pipeline(state, name)")
Flags = _private("numba.core.compiler", "Flags", "copy(self)", "no_compile", "nrt", "forceinline")
_LowerResult = _private("numba.core.compiler", "_LowerResult", "fndesc", "cfunc", "env", "_replace")
register_pass = _private("numba.core.compiler_machinery", "register_pass")
CPUContext = _private(
    "numba.core.cpu", "CPUContext", "codegen(self)", "insert_user_function(self, func, fndesc, libs)",
    "load_additional_registries(self)", "post_lowering(self, mod, library)", "insert_func_defn(self, defns)",
    "declare_function(self, module, fndesc)", "get_returned_value(self, builder, ty, val)", "call_conv",
)  # fmt: skip
CPUCallConv = _private("numba.core.callconv", "CPUCallConv", "_get_arg_packer(self, argtypes)")
CPUTargetOptions = _private(
    "numba.core.cpu", "CPUTargetOptions", "_nrt", "nogil", "error_model", "forceinline", "no_cpython_wrapper",
    "no_cfunc_wrapper",
)  # fmt: skip
Lower = _private(
    "numba.core.lowering", "Lower", "lower_block(self, block)", "storevar(self, value, name, argidx)",
    "alloca_lltype(self, name, lltype, datamodel)", "delvar(self, name)", "lower_binop(self, resty, expr, op)",
    "_alloca_var(self, name, fetype)", "pre_block(self, block)", "post_block(self, block)", "lower_inst(self, inst)",
    "lower_expr(self, resty, expr)", "loadvar(self, name)", "typeof(self, varname)",
)  # fmt: skip
CPUDispatcher = _private(
    "numba.core.registry", "CPUDispatcher", "_can_compile", "get_call_template(self, args, kws)",
    "typeof_pyval(self, val)", "compile(self, sig)", "_compilation_chain_init_hook(self)", "targetdescr",
)  # fmt: skip
CPUTarget = _private("numba.core.registry", "CPUTarget", "options", "target_context", "typing_context")
CPUHardware = _private("numba.core.target_extension", "CPU")
dispatcher_registry = _private("numba.core.target_extension", "dispatcher_registry")
target_registry = _private("numba.core.target_extension", "target_registry")
TypingContext = _private(
    "numba.core.typing.context", "BaseContext", "install_registry(self, registry)", "insert_function(self, ft)",
    "insert_attributes(self, at)", "_lookup_global(self, gv)", "_insert_global(self, gv, gty)",
    "_remove_global(self, gv)",
)  # fmt: skip
RegistryLoader = _private("numba.core.typing.templates", "RegistryLoader", "new_registrations(self, name)")
OverloadFunction = _private("numba.core.typing.templates", "_OverloadFunctionTemplate")
OverloadAttribute = _private("numba.core.typing.templates", "_OverloadAttributeTemplate")
dumps = _private("numba.core.serialize", "dumps")
global_compiler_lock = _private("numba.core.compiler_lock", "global_compiler_lock", "is_locked", "_lock")
normalize_signature = _private("numba.core.sigutils", "normalize_signature")
NativeLowering = _private("numba.core.typed_passes", "NativeLowering", "run_pass(self, state)", "lowering_class")

# Modules with implementations that kernels use: of integers, ranges, tuples, and arrays' shapes and elements.
IMPLEMENTATIONS = (
    "numba.core.boxing", "numba.core.optional", "numba.cpython.builtins", "numba.cpython.iterators",
    "numba.cpython.numbers", "numba.cpython.rangeobj", "numba.cpython.slicing", "numba.cpython.tupleobj",
    "numba.np.arrayobj",
)  # fmt: skip
_problems.extend(f"{module} is missing" for module in IMPLEMENTATIONS if find_spec(module) is None)

# Documented for extensions, so nothing stands in for them: without them there are no vectors and no records.
from numba.core import cgutils  # noqa: E402  # after the checks, which import what they need
from numba.core.typing.templates import AttributeTemplate  # noqa: E402


def _check_pipeline() -> None:
    """Note it if the standard pipeline does not lower by the pass that is exchanged here."""
    with contextlib.suppress(AttributeError):
        state = type("State", (), {"flags": Flags(), "func_ir": None})()
        if [step for step, _ in DefaultPassBuilder.define_nopython_pipeline(state).passes].count(NativeLowering) == 1:
            return
    _problems.append("numba's pipeline for nopython mode has not exactly one pass NativeLowering")


if not _problems:
    _check_pipeline()

# Why kernels are compiled by plain njit; None if they are not.
PLAIN: str | None = None
if os.environ.get("FASTLSTM_PLAIN_NJIT", "0") not in {"", "0"}:
    PLAIN = "FASTLSTM_PLAIN_NJIT is set"
elif _problems:
    PLAIN = f"numba {numba.__version__} is not as this release of fastlstm knows it ({'; '.join(_problems)})"
    warnings.warn(
        f"{PLAIN}: kernels are compiled without private parts of it, which takes longer, in every process. Upgrade"
        " fastlstm, or install an older numba.",
        RuntimeWarning,
        stacklevel=2,
    )
