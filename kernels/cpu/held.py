"""Records that are held in memory, so that a routine takes one pointer in place of all fields.

Numba passes a named tuple field by field: with some forty, the calls of routines are most of a driver's code, and half
of the time to compile it. A record that is held has the same attributes, each loaded where it is read. Nothing
changes it afterwards.

Python hands a kernel its arrays one by one, and its numbers and addresses in one array of integers: Numba takes 1.2 us
to unpack 24 arrays, 2.7 us if they are in a named tuple, and a whole step of a small model takes 2.4.

A record with a field ``numbers``, a pointer to integers such as a call's settings, has each of these as an attribute,
too: what the module of the record has a constant for, in capitals, which says its place.
"""

from __future__ import annotations

import hashlib
import sys

from llvmlite import ir
from numba import types
from numba.extending import infer_getattr, intrinsic, lower_getattr_generic, models, register_model

from fastlstm.kernels.cpu.jit import cgutils
from fastlstm.kernels.cpu.private_numba import AttributeTemplate

__all__ = ["hold"]


class Held(types.Type):
    """Numba's type of a pointer to a named tuple."""

    def __init__(self, record):
        self.record = record
        # A type's name is a part of that of a function, of which there may be but one in a process, whichever process
        # has compiled it; the types of all fields would be most of the text of a kernel.
        digest = hashlib.sha256(f"{record.instance_class.__module__} {record}".encode()).hexdigest()[:16]
        super().__init__(name=f"Held({record.instance_class.__name__} {digest})")


@register_model(Held)
class _HeldModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, dmm.lookup(fe_type.record).get_value_type().as_pointer())


def _place_of(record, name):
    """Return the place of an attribute among the numbers; None if it has none."""
    place = getattr(sys.modules[record.instance_class.__module__], name.upper(), None)
    return place if isinstance(place, int) and "numbers" in record.fields else None


@infer_getattr
class _Fields(AttributeTemplate):
    key = Held

    def generic_resolve(self, held, name):
        record = held.record
        if name in record.fields:
            return record.types[record.fields.index(name)]
        return types.int64 if _place_of(record, name) is not None else None


@lower_getattr_generic(Held)
def _read(context, builder, held, pointer, name):
    """Emit the load of a field, which LLVM may do once for all of a routine: it knows that nothing changes it."""
    fields = held.record.fields
    if name in fields:
        return _load(builder, cgutils.gep_inbounds(builder, pointer, 0, fields.index(name)))
    numbers = _load(builder, cgutils.gep_inbounds(builder, pointer, 0, fields.index("numbers")))
    return _load(builder, builder.gep(numbers, [ir.Constant(ir.IntType(64), _place_of(held.record, name))]))


def _load(builder, place):
    """Emit the load of a field; of a record in it, field by field."""
    kind = place.type.pointee
    if isinstance(kind, ir.LiteralStructType):
        value = ir.Constant(kind, ir.Undefined)
        for n in range(len(kind.elements)):
            value = builder.insert_value(value, _load(builder, cgutils.gep_inbounds(builder, place, 0, n)), n)
        return value
    value = builder.load(place)
    value.set_metadata("invariant.load", builder.module.add_metadata([]))
    return value


def _store(builder, value, place):
    """Emit the stores of all fields, each by itself: LLVM would first take a store of all apart."""
    if isinstance(value.type, ir.LiteralStructType):
        for n in range(len(value.type.elements)):
            _store(builder, builder.extract_value(value, n), cgutils.gep_inbounds(builder, place, 0, n))
    else:
        builder.store(value, place)


@intrinsic
def hold(typingctx, record):
    """Hold a record until the function ends in which this stands.

    It is called in the kernel itself: what an inlined routine holds is gone where it returns.
    """

    def codegen(context, builder, signature, args):
        place = cgutils.alloca_once(builder, args[0].type)
        _store(builder, args[0], place)
        return place

    return Held(record)(record), codegen
