"""How Numba compiles calls of the functions of ``fastlstm/compiled.py``: checks, and a kernel called by its address.

Written out for Numba, in place of ``numba.extending.overload``, because a function that is given the arrays themselves
counts their references: for the dozen arrays of a step, that takes as long as a small step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import TypingError, extending, njit
from numba import types as numba_types

from fastlstm.backends.cpu.kit import KIT, TAPE
from fastlstm.kernels.cpu.jit import cgutils

# Numba's types are incomplete: its own extensions do not pass.
types: Any = numba_types
lower_builtin: Any = extending.lower_builtin
type_callable: Any = extending.type_callable

__all__ = ["in_python", "tell"]

_RECORD = types.Array(types.int64, 1, "C")


def _check_types(name: str, kit: Any, tape: Any, arrays: dict[str, tuple[Any, int, bool]]) -> None:
    """Refuse arguments that are no kit or tape of this version, or arrays of another layout or dtype."""
    for what, value, known in (("a kit, from lstm.compiled()", kit, KIT), ("a tape, from kit.tape()", tape, TAPE)):
        if value is not None and getattr(value, "instance_class", None) is not known:
            raise TypingError(f"fastlstm.compiled.{name} takes {what}, got {value}")
    dtype = kit.types[kit.fields.index("weights")].dtype
    if tape is not None and (of_tape := tape.types[tape.fields.index("h")].dtype) != dtype:
        raise TypingError(f"fastlstm.compiled.{name}: the tape is of {of_tape}, the kit of {dtype}")
    for array, (kind, ndim, is_output) in arrays.items():
        fits = (
            isinstance(kind, types.Array) and kind.ndim == ndim and kind.dtype == dtype and kind.layout == "C"
            and kind.aligned and (kind.mutable or not is_output)
        )  # fmt: skip
        if not fits:
            wanted = f"a C-contiguous, aligned{', writeable' if is_output else ''} array of {dtype}, {ndim}-dimensional"
            raise TypingError(f"fastlstm.compiled.{name}: {array} must be {wanted}, got {kind}")


def in_python(function: Callable[..., Any]) -> Any:
    """Compile a caller of a function, at its first call from Python."""
    parameters = ", ".join(function.__code__.co_varnames[: function.__code__.co_argcount])
    namespace = {"function": function}
    exec(f"def call({parameters}): function({parameters})", namespace)  # Numba wants to see the names
    return njit(nogil=True)(namespace["call"])


def _array_numbers(context: Any, builder: Any, kind: Any, value: Any) -> tuple[Any, Any]:
    """Return a pointer to an array's elements, its shape, and its size in bytes, as a tuple; with its type."""
    array = context.make_array(kind)(context, builder, value)
    shape = cgutils.unpack_tuple(builder, array.shape, kind.ndim)
    kinds = types.Tuple((types.CPointer(kind.dtype), *[types.intp] * (kind.ndim + 1)))
    size = builder.mul(array.nitems, array.itemsize)
    return kinds, context.make_tuple(builder, kinds, [array.data, *shape, size])


def _field(builder: Any, kind: Any, value: Any, name: str) -> tuple[Any, Any]:
    """Return the type and the value of a field of a named tuple."""
    place = kind.fields.index(name)
    return kind.types[place], builder.extract_value(value, place)


def _kit_numbers(context: Any, builder: Any, kind: Any, value: Any) -> tuple[Any, Any]:
    """Return a kit's record, I, H, L and number of parameters."""
    record = context.make_array(_RECORD)(context, builder, _field(builder, kind, value, "record")[1]).data
    numbers = [_field(builder, kind, value, name)[1] for name in ("inputs", "hidden", "layers", "parameters")]
    kinds = types.Tuple((types.CPointer(types.int64), *[types.intp] * 4))
    return kinds, context.make_tuple(builder, kinds, [record, *numbers])


def _tape_numbers(context: Any, builder: Any, kind: Any, value: Any) -> tuple[Any, Any]:
    """Return a tape's record, I, T, B, L, H, the number of a state's elements, pointers to dh and dc, and its team."""
    record = context.make_array(_RECORD)(context, builder, _field(builder, kind, value, "record")[1]).data
    numbers = [_field(builder, kind, value, name)[1] for name in ("inputs", "steps", "batch")]
    dh, dc = (
        context.make_array(array)(context, builder, found)
        for array, found in (_field(builder, kind, value, name) for name in ("dh", "dc"))
    )
    layers, _, hidden = cgutils.unpack_tuple(builder, dh.shape, 3)
    pointer = types.CPointer(_field(builder, kind, value, "dh")[0].dtype)
    team = _field(builder, kind, value, "team")
    kinds = types.Tuple((types.CPointer(types.int64), *[types.intp] * 6, pointer, pointer, team[0]))
    found = [record, *numbers, layers, hidden, dh.nitems, dh.data, dc.data, team[1]]
    return kinds, context.make_tuple(builder, kinds, found)


def tell(function: Callable[..., Any], on_numbers: Callable[..., Any], **arrays: tuple[int, bool]) -> None:
    """Have Numba compile calls of a function: checks and the call of a kernel, on pointers and sizes alone.

    `arrays` has the number of axes of each argument that is an array, and whether it is written.
    """
    names = function.__code__.co_varnames[: function.__code__.co_argcount]

    def typer(*given: Any) -> Any:
        named = dict(zip(names, given, strict=True))
        if "t" in named and not isinstance(named["t"], types.Integer):
            raise TypingError(f"fastlstm.compiled.{function.__name__}: t must be an integer, got {named['t']}")
        checked = {name: (named[name], *facts) for name, facts in arrays.items()}
        _check_types(function.__name__, named["kit"], named.get("tape"), checked)
        return types.none

    # Numba reads the names of the arguments off the function that decides on types.
    namespace = {"typer": typer}
    exec(f"def typer_of({', '.join(names)}): return typer({', '.join(names)})", namespace)
    type_callable(function)(lambda context: namespace["typer_of"])

    @lower_builtin(function, *[types.Any] * len(names))  # type: ignore[untyped-decorator]
    def lower(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds, numbers = [], []
        for name, kind, value in zip(names, signature.args, values, strict=True):
            if name == "t":
                kinds.append(types.intp)
                numbers.append(context.cast(builder, value, kind, types.intp))
                continue
            convert = {"kit": _kit_numbers, "tape": _tape_numbers}.get(name, _array_numbers)
            found = convert(context, builder, kind, value)
            kinds.append(found[0])
            numbers.append(found[1])
        context.compile_internal(builder, on_numbers, types.none(*kinds), numbers)
        return context.get_dummy_value()
