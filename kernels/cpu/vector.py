"""SIMD vectors for Numba: a small set of operations, each of one or a few LLVM instructions.

A kernel is written like the algorithm on one number, and runs on a whole register:

>>> # h = o * tanh(c), for LANES hidden units at once
>>> # store(h, load(o) * tanh(load(c)))

===========================  ==============================================================================
``address(array)``           pointer to the first element; ``p + n`` would be ``offset(p, n)``
``offset(p, n)``             pointer n elements further
``lanes_of(p)``              number of lanes of the vectors at a pointer, a constant
``load(p)``, ``store(p,v)``  a whole vector from or to memory, no alignment needed
``load_first(p, n)``         the first n lanes (the others zero); no other memory is touched
``store_first(p, v, n)``     the first n lanes; no other memory is touched
``peek(p)``, ``poke(p, s)``  one element
``prefetch(p)``              a hint: the cache line at p will be needed soon
``splat(p)``                 one element from memory into all lanes
``fill(p, s)``               a scalar into all lanes; `p` gives the element type
``v + w``, ``- * /``         lane by lane, without reassociation; one side may be a number
``-v``, ``abs(v)``           lane by lane
``fma(a, b, c)``             a * b + c, rounded once
``v < w``, ``v >= w``        a mask, false where a lane is NaN
``select(m, v, w)``          v where the mask is true, else w
``minimum(m, n)``            the smaller of two integers, ``maximum`` the larger; Numba takes longer to compile its own
===========================  ==============================================================================

The arithmetic is in ``vector_arithmetic.py``.

Vectors have :data:`VECTOR_BYTES` bytes: the widest the host has, or ``FASTLSTM_VECTOR_BYTES`` (16, 32 or
64) for tests of the others.
"""

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.extending import (
    NativeValue,
    box,
    intrinsic,
    models,
    register_model,
    unbox,
)

from fastlstm.kernels.cpu.jit import VECTOR_BYTES, cgutils

__all__ = [
    "CACHE_LINE",
    "REGISTERS",
    "VECTOR_BYTES",
    "Vector",
    "address",
    "fill",
    "is_aligned",
    "lanes",
    "lanes_of",
    "load",
    "load_first",
    "maximum",
    "minimum",
    "offset",
    "peek",
    "poke",
    "prefetch",
    "splat",
    "store",
    "store_first",
]


# AVX2 and SSE have 16 vector registers; AVX-512 and NEON have 32.
REGISTERS = 32 if VECTOR_BYTES == 64 or "aarch64" in llvm.get_process_triple() else 16
CACHE_LINE = 64  # bytes


def lanes(dtype: object) -> int:
    """Number of elements of a vector of `dtype`, a NumPy dtype or a Numba type."""
    itemsize = dtype.bitwidth // 8 if isinstance(dtype, types.Float) else dtype.itemsize  # type: ignore[attr-defined]
    return VECTOR_BYTES // itemsize


class Vector(types.Type):
    """Numba's type of a vector register of float32 or float64."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Vector({dtype}, {lanes(dtype)})")


class Mask(types.Type):
    """Numba's type of a vector of truth values, one for each lane of a :class:`Vector`."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Mask({dtype}, {lanes(dtype)})")


def _llvm_scalar(dtype: types.Float) -> ir.Type:
    return ir.FloatType() if dtype == types.float32 else ir.DoubleType()


def llvm_vector(dtype: types.Float) -> ir.VectorType:
    """LLVM's type of a :class:`Vector` of `dtype`."""
    return ir.VectorType(_llvm_scalar(dtype), lanes(dtype))


def llvm_integers(dtype: types.Float) -> ir.VectorType:
    return ir.VectorType(ir.IntType(dtype.bitwidth), lanes(dtype))


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, llvm_vector(fe_type.dtype))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(ir.IntType(1), lanes(fe_type.dtype)))


@unbox(Vector)
@unbox(types.CPointer)
def _unbox_nothing(typ, value, c):
    """Refuse a vector or a pointer from Python; Numba asks for this conversion for functions called by address."""
    c.pyapi.err_set_string("PyExc_TypeError", "this function is called by its address only")
    return NativeValue(ir.Constant(c.context.get_value_type(typ), ir.Undefined), is_error=cgutils.true_bit)


@box(Vector)
def _box_nothing(typ, value, c):
    """Return None in place of a vector."""
    return c.pyapi.make_none()


# --- memory -----------------------------------------------------------------------------------------------


def vector_pointer(builder, pointer, dtype):
    """Cast a pointer to elements into one to vectors."""
    return builder.bitcast(pointer, llvm_vector(dtype).as_pointer())


def load_vector(builder, pointer, dtype):
    """Emit an unaligned load: alignment of one element, because rows start anywhere."""
    return builder.load(vector_pointer(builder, pointer, dtype), align=dtype.bitwidth // 8)


def splat_scalar(builder, scalar, dtype):
    """Emit a broadcast of an LLVM scalar to all lanes."""
    vector = llvm_vector(dtype)
    return splat_first(builder, scalar, vector)


def splat_first(builder, scalar, vector):
    """Emit a broadcast to a vector type; zeros in place of undefined lanes are one word of LLVM's text, not 16."""
    integer = ir.IntType(32)
    nothing = ir.Constant(vector, None)
    first = builder.insert_element(nothing, scalar, ir.Constant(integer, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(integer, vector.count), None))


@intrinsic
def address(typingctx, array):
    """Return a pointer to the first element of a C-contiguous array; a pointer is returned as it is."""
    if isinstance(array, types.CPointer):
        return array(array), lambda context, builder, signature, args: args[0]

    def codegen(context, builder, signature, args):
        return cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data

    return types.CPointer(array.dtype)(array), codegen


@intrinsic
def is_aligned(typingctx, array):
    """Say whether the elements of an array are aligned to their size, which its Numba type does not contain."""

    def codegen(context, builder, signature, args):
        data = cgutils.create_struct_proxy(signature.args[0])(context, builder, args[0]).data
        integer, size = ir.IntType(64), signature.args[0].dtype.bitwidth // 8
        rest = builder.and_(builder.ptrtoint(data, integer), ir.Constant(integer, size - 1))
        return builder.icmp_unsigned("==", rest, ir.Constant(integer, 0))

    return types.boolean(array), codegen


@intrinsic
def offset(typingctx, pointer, n):
    """Return the pointer `n` elements further; 64-bit arithmetic whatever the integer."""

    def codegen(context, builder, signature, args):
        n = context.cast(builder, args[1], signature.args[1], types.intp)
        return builder.gep(args[0], [n])

    return pointer(pointer, n), codegen


@intrinsic
def lanes_of(typingctx, pointer):
    """Return the number of lanes of the vectors at `pointer`, a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, lanes(pointer.dtype))

    return types.intp(pointer), codegen


@intrinsic
def load(typingctx, pointer):
    """Load a vector."""

    def codegen(context, builder, signature, args):
        return load_vector(builder, args[0], pointer.dtype)

    return Vector(pointer.dtype)(pointer), codegen


@intrinsic
def store(typingctx, pointer, vector):
    """Store a vector."""

    def codegen(context, builder, signature, args):
        builder.store(args[1], vector_pointer(builder, args[0], pointer.dtype), align=pointer.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(pointer, vector), codegen


def first_lanes(builder, n, dtype):
    """Emit the mask of the first `n` lanes, `n` being an LLVM int32."""
    count, integer = lanes(dtype), ir.IntType(32)
    vector = ir.VectorType(integer, count)
    return builder.icmp_signed("<", ir.Constant(vector, list(range(count))), splat_first(builder, n, vector))


def _masked(builder, operation, dtype, arguments, result):
    suffix = f"v{lanes(dtype)}f{dtype.bitwidth}.p0"
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.masked.{operation}.{suffix}")
    return builder.call(function, arguments)


def load_masked(builder, pointer, mask, dtype):
    """Emit a load of the lanes in the mask; the others are zero, and their memory is not touched."""
    vector = llvm_vector(dtype)
    align = ir.Constant(ir.IntType(32), dtype.bitwidth // 8)
    arguments = [vector_pointer(builder, pointer, dtype), align, mask, ir.Constant(vector, None)]
    return _masked(builder, "load", dtype, arguments, vector)


@intrinsic
def load_first(typingctx, pointer, n):
    """Load the first `n` lanes; the others are zero, and their memory is not touched."""

    def codegen(context, builder, signature, args):
        n = context.cast(builder, args[1], signature.args[1], types.int32)
        return load_masked(builder, args[0], first_lanes(builder, n, pointer.dtype), pointer.dtype)

    return Vector(pointer.dtype)(pointer, n), codegen


@intrinsic
def store_first(typingctx, pointer, vector, n):
    """Store the first `n` lanes; the memory of the others is not touched."""

    def codegen(context, builder, signature, args):
        dtype = pointer.dtype
        n = context.cast(builder, args[2], signature.args[2], types.int32)
        target = vector_pointer(builder, args[0], dtype)
        align = dtype.bitwidth // 8
        # A masked store takes a dozen cycles on some processors, so a whole vector is stored without a mask.
        with builder.if_else(builder.icmp_signed("<", n, ir.Constant(n.type, lanes(dtype)))) as (part, whole):
            with part:
                mask = first_lanes(builder, n, dtype)
                _masked(builder, "store", dtype, [args[1], target, ir.Constant(n.type, align), mask], ir.VoidType())
            with whole:
                builder.store(args[1], target, align=align)
        return context.get_dummy_value()

    return types.void(pointer, vector, n), codegen


def unseen(builder, number):
    """Emit nothing, and hide the value of an integer from LLVM: a loop that counts with it is not unrolled.

    Unrolled eight times, each load in a loop over the rows of a matrix takes every eighth row. A hardware prefetcher
    that looks for patterns per load instruction then reads from L2 at about half the speed.
    """
    function = ir.FunctionType(number.type, [number.type])
    return builder.asm(function, "", "=r,0", [number], side_effect=False)


def emit_prefetch(builder, pointer):
    """Emit a hint that the cache line at a pointer will be read soon."""
    byte = builder.bitcast(pointer, ir.IntType(8).as_pointer())
    integer = ir.IntType(32)
    hints = [ir.Constant(integer, value) for value in (0, 3, 1)]  # a read, as near as can be, of data
    function_type = ir.FunctionType(ir.VoidType(), [byte.type, *(hint.type for hint in hints)])
    builder.call(cgutils.get_or_insert_function(builder.module, function_type, "llvm.prefetch.p0"), [byte, *hints])


@intrinsic
def prefetch(typingctx, pointer):
    """Prefetch the cache line at a pointer; any address is allowed."""

    def codegen(context, builder, signature, args):
        emit_prefetch(builder, args[0])
        return context.get_dummy_value()

    return types.void(pointer), codegen


@intrinsic
def peek(typingctx, pointer):
    """Load one element."""

    def codegen(context, builder, signature, args):
        return builder.load(args[0])

    return pointer.dtype(pointer), codegen


@intrinsic
def poke(typingctx, pointer, value):
    """Store one element."""

    def codegen(context, builder, signature, args):
        builder.store(context.cast(builder, args[1], signature.args[1], pointer.dtype), args[0])
        return context.get_dummy_value()

    return types.void(pointer, value), codegen


@intrinsic
def splat(typingctx, pointer):
    """Load one element into all lanes."""

    def codegen(context, builder, signature, args):
        return splat_scalar(builder, builder.load(args[0]), pointer.dtype)

    return Vector(pointer.dtype)(pointer), codegen


@intrinsic
def fill(typingctx, pointer, value):
    """Put a scalar into all lanes; the pointer gives the element type only."""

    def codegen(context, builder, signature, args):
        return splat_scalar(builder, context.cast(builder, args[1], signature.args[1], pointer.dtype), pointer.dtype)

    return Vector(pointer.dtype)(pointer, value), codegen


# --- integers ---------------------------------------------------------------------------------------------


@intrinsic
def minimum(typingctx, m, n):
    """Return the smaller of two integers."""
    return _chosen("<", m, n)


@intrinsic
def maximum(typingctx, m, n):
    """Return the larger of two integers."""
    return _chosen(">", m, n)


def _chosen(comparison, m, n):
    def codegen(context, builder, signature, args):
        m, n = (context.cast(builder, value, t, types.intp) for value, t in zip(args, signature.args, strict=True))
        return builder.select(builder.icmp_signed(comparison, m, n), m, n)

    return types.intp(m, n), codegen


@intrinsic
def is_zero(typingctx, vector):
    """Say whether every lane is zero, of either sign."""

    def codegen(context, builder, signature, args):
        zero = ir.Constant(llvm_vector(vector.dtype), None)
        different = builder.fcmp_unordered("!=", args[0], zero)  # which NaN is, too
        lanes_together = ir.IntType(lanes(vector.dtype))
        return builder.icmp_unsigned("==", builder.bitcast(different, lanes_together), ir.Constant(lanes_together, 0))

    return types.boolean(vector), codegen
