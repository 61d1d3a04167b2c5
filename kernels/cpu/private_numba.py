"""The private parts of Numba that the kernels stand on: each is checked when this is imported.

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
from typing import Any

import numba

__all__ = [
    "PLAIN", "CPUDispatcher", "CompileResult", "CompilerBase", "DefaultPassBuilder", "JITCodeLibrary", "NativeLowering",
    "NullCache", "cgutils", "dumps", "global_compiler_lock", "make_function", "normalize_signature", "register_pass",
]  # fmt: skip

_problems: list[str] = []


class _Missing:
    """Stands for a private part that is not there, so that what is built of it can be defined, though not used."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, decorated: Any) -> Any:
        return decorated


def _private(module: str, name: str, *attributes: str) -> Any:
    """Return a private part of Numba; note in `_problems` if it or an attribute of it is missing.

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
JITCodeLibrary = _private(
    "numba.core.codegen", "JITCodeLibrary", "_optimize_functions(self, ll_module)", "_optimize_final_module(self)",
    "_finalize_final_module(self)", "enable_object_caching(self)", "has_dynamic_globals",
)  # fmt: skip
JITCPUCodegen = _private("numba.core.codegen", "JITCPUCodegen", "magic_tuple(self)")
CompilerBase = _private("numba.core.compiler", "CompilerBase", "define_pipelines(self)")
CompileResult = _private("numba.core.compiler", "CompileResult", "_reduce(self)", "_rebuild", "lifted", "library")
DefaultPassBuilder = _private("numba.core.compiler", "DefaultPassBuilder", "define_nopython_pipeline(state, name)")
Flags = _private("numba.core.compiler", "Flags", "copy(self)", "no_compile", "nrt", "forceinline")
_LowerResult = _private("numba.core.compiler", "_LowerResult", "fndesc", "cfunc", "env", "_replace")
register_pass = _private("numba.core.compiler_machinery", "register_pass")
CPUContext = _private(
    "numba.core.cpu", "CPUContext", "refresh(self)", "codegen(self)", "insert_user_function(self, func, fndesc, libs)"
)
CPUTargetOptions = _private(
    "numba.core.cpu", "CPUTargetOptions", "_nrt", "nogil", "error_model", "forceinline", "no_cpython_wrapper",
    "no_cfunc_wrapper",
)  # fmt: skip
CPUDispatcher = _private(
    "numba.core.registry", "CPUDispatcher", "_can_compile", "get_call_template(self, args, kws)",
    "typeof_pyval(self, val)", "compile(self, sig)",
)  # fmt: skip
dumps = _private("numba.core.serialize", "dumps")
global_compiler_lock = _private("numba.core.compiler_lock", "global_compiler_lock", "is_locked", "_lock")
normalize_signature = _private("numba.core.sigutils", "normalize_signature")
NativeLowering = _private("numba.core.typed_passes", "NativeLowering", "run_pass(self, state)")

# Documented for extensions, so nothing stands in for it: without it there are no vectors.
from numba.core import cgutils  # noqa: E402  # after the checks, which import what it needs


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
