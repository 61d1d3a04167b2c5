"""Numba's dispatcher, made safe for interrupts while a kernel is compiled, for nested calls, and for forks."""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import os
import threading
from typing import Any

from llvmlite.binding import ffi
from numba import types

from fastlstm.errors import BackendError
from fastlstm.kernels.cpu.private_numba import PLAIN, global_compiler_lock, normalize_signature
from fastlstm.kernels.cpu.target import Dispatcher

__all__ = ["Kernel", "RefusingKernel", "Routine"]


class Kernel(Dispatcher):
    """A dispatcher whose table of compiled kernels has each kernel once, also after an interrupt.

    If an interrupt comes before Numba has recorded an entry, Numba enters the kernel twice, and each call is ambiguous.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._tickets: dict[Any, list[Any]] = {}  # by the types of arguments
        super().__init__(*arguments, **options)

    def add_overload(self, cres: Any) -> None:
        """Record a compiled kernel, with the ticket to enter it into the table."""
        arguments = tuple(cres.signature.args)
        enter = functools.partial(self._insert, [a._code for a in arguments], cres.entry_point, cres.objectmode)
        self._tickets.setdefault(arguments, [enter])
        self.overloads.setdefault(arguments, cres)

    def compile(self, sig: Any) -> Any:
        """Compile or load the kernel for a signature."""
        arguments = tuple(normalize_signature(sig)[0])
        if arguments not in self.overloads and global_compiler_lock.is_locked():  # by this thread
            # Numba cannot compile during a compilation, and this thread cannot wait for its own compilation to end.
            raise BackendError(
                "a signal handler or a finaliser needs a kernel that is not ready, while the call that it interrupts"
                " compiles one; make a call before, so that they are compiled"
            )
        with global_compiler_lock:  # a fork waits for it, and so finds the collector as it was
            collecting = gc.isenabled()
            try:
                gc.disable()  # compiling makes much and drops little: to look through it takes a tenth of the time
                entry_point = super().compile(sig)
            finally:
                if collecting:
                    gc.enable()
        # To take the ticket and to use it is one operation of the interpreter: it is used once, and not lost if this is
        # broken off.
        with contextlib.suppress(IndexError):
            next(map(operator.call, iter(self._tickets[arguments].pop, None)))
        return entry_point


class RefusingKernel(Kernel):
    """A dispatcher that compiles only on purpose, see ``jit.refuse_others``."""

    _can_compile = True


class Routine(Dispatcher):
    """The dispatcher of a routine: compiled once for each dtype; Numba would compile it for every constant."""

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Find or compile the routine for arguments of some types."""
        plain = tuple(map(types.unliteral, args)), {name: types.unliteral(kind) for name, kind in dict(kws).items()}
        return super().get_call_template(*plain)


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


if hasattr(os, "register_at_fork") and not PLAIN:
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
