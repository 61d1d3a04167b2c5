"""A Numba target for the kernels, which loads only what compiling them needs.

The standard target loads all of Numba's functions before it compiles the first one, compiles its runtime for arrays
with reference counts, and tries a dozen implementations for each ``a + b``. That takes most of a second; kernels, which
consist of integers, pointers and vectors, need a tenth of it. This uses Numba's mechanism for new hardware: a target
with a typing context for the types of functions, and a target context for their implementations.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from fastlstm.kernels.cpu.private_numba import (
    IMPLEMENTATIONS,
    PLAIN,
    CPUContext,
    CPUDispatcher,
    CPUHardware,
    CPUTarget,
    OverloadAttribute,
    OverloadFunction,
    RegistryLoader,
    TypingContext,
    dispatcher_registry,
    target_registry,
)

__all__ = ["Dispatcher"]

_NAME = "fastlstm"


def _is_overload(template: Any) -> bool:
    """Say whether a template stands for Python code that Numba would compile; kernels use none."""
    bases = template.__mro__  # issubclass would ask all subclasses of an abstract class
    return OverloadFunction in bases or OverloadAttribute in bases


class _Typing(TypingContext):
    """The types of the functions that Numba has built in, and of the kernels' own."""

    def install_registry(self, registry: Any) -> None:
        """Note the functions of a registry that are new since the last time, but for overloads."""
        try:
            loader = self._registries[registry]
        except KeyError:
            loader = self._registries[registry] = RegistryLoader(registry)
        for template in loader.new_registrations("functions"):
            if not _is_overload(template):
                self.insert_function(template(self))
        for template in loader.new_registrations("attributes"):
            if not _is_overload(template):
                self.insert_attributes(template(self))
        for value, kind in loader.new_registrations("globals"):
            if any(map(_is_overload, getattr(kind, "templates", ()))):
                continue
            known, merged = self._lookup_global(value), kind
            if known is not None:
                merged = known.augment(kind)
                self._remove_global(value)
            self._insert_global(value, merged)


class _Context(CPUContext):
    """The implementations of these functions."""

    def load_additional_registries(self) -> None:
        """Import the implementations, which enter themselves into the registry of those that are built in."""
        for module in IMPLEMENTATIONS:
            import_module(module)

    def insert_user_function(self, func: Any, fndesc: Any, libs: Any = ()) -> None:
        """Note how a routine is called: without looking for an exception, of which kernels raise none.

        A look takes twenty instructions and two blocks for each call, which are half of some routines.
        """

        def call(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            callee = context.declare_function(builder.module, fndesc)
            with builder.goto_entry_block():
                place = builder.alloca(callee.args[0].type.pointee)
            values = context.call_conv._get_arg_packer(fndesc.argtypes).as_arguments(builder, args)
            builder.call(callee, [place, builder.function.args[1], *values])  # both functions note exceptions there
            return context.get_returned_value(builder, sig.return_type, builder.load(place))

        call.signature, call.libs = fndesc.argtypes, tuple(libs)  # type: ignore[attr-defined]
        self.insert_func_defn([(call, func, call.signature)])  # type: ignore[attr-defined]

    def post_lowering(self, mod: Any, library: Any) -> None:
        """Link nothing to a module: reference counts alone would need Numba's runtime."""


class _Target(CPUTarget):
    """The two contexts, made once."""

    def __init__(self) -> None:
        super().__init__(_NAME)
        self._typing = _Typing()
        self._context = _Context(self._typing, _NAME)

    @property
    def typing_context(self) -> Any:
        """The types of functions."""
        return self._typing

    @property
    def target_context(self) -> Any:
        """The implementations of functions."""
        return self._context


class _Hardware(CPUHardware):
    """The key to this target in Numba's tables."""


class Dispatcher(CPUDispatcher):
    """A function compiled for this target."""

    def _compilation_chain_init_hook(self) -> None:
        """Look for no extensions of Numba that are installed."""


if not PLAIN:
    for _table, _key, _entry in ((target_registry, _NAME, _Hardware), (dispatcher_registry, _Hardware, Dispatcher)):
        _table.pop(_key, None)  # of an import that was broken off; a second entry would be refused
        _table[_key] = _entry
    Dispatcher.targetdescr = _Target()
