"""Kernels that use no private part of Numba, for releases that ``private_numba.py`` does not know."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from numba import njit

from fastlstm.kernels.cpu.kernel_cache import announce

__all__ = ["PlainKernel"]


class PlainKernel:
    """A kernel that uses no private part of Numba: slower to compile, and compiled in every process."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.dispatcher, self.refuses = njit(nogil=True, error_model="numpy")(function), False
        functools.update_wrapper(self, function)

    def __call__(self, *arguments: Any) -> Any:
        """Call the kernel; compile it if necessary."""
        if not self.dispatcher.signatures:
            if self.refuses:
                raise TypeError(f"{self.dispatcher.__name__} has not been compiled for these arguments")
            announce(kept=False)
        return self.dispatcher(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.dispatcher, name)

    def compile(self, signature: tuple[Any, ...], unless_refused: bool = False) -> None:
        """Compile for arguments of some types; afterwards, others are refused if they are to be."""
        if self.refuses and unless_refused:
            return
        announce(kept=False)
        if self.refuses and self.dispatcher.signatures:
            self.dispatcher.disable_compile(False)
        self.dispatcher.compile(signature)
        if self.refuses:
            self.dispatcher.disable_compile()
