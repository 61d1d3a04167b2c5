"""Arithmetic on vectors, see ``vector.py``: operators, fused multiply-add, comparison and selection."""

from __future__ import annotations

import operator

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, type_callable

from fastlstm.kernels.cpu.jit import cgutils
from fastlstm.kernels.cpu.vector import Mask, Vector, lanes, llvm_vector, splat_scalar

__all__ = ["call_llvm", "copysign", "fma", "select"]


def _declare(operation, emit):
    """Give a Python operator a meaning on two vectors, or on a vector and a number."""

    @type_callable(operation)
    def type_operation(context):
        def typer(a, b):
            vector = a if isinstance(a, Vector) else b
            if isinstance(vector, Vector) and all(x == vector or isinstance(x, types.Number) for x in (a, b)):
                return emit.result(vector.dtype)
            return None

        return typer

    def implementation(context, builder, signature, args):
        dtype = next(t.dtype for t in signature.args if isinstance(t, Vector))
        operands = [
            value if isinstance(t, Vector) else splat_scalar(builder, context.cast(builder, value, t, dtype), dtype)
            for value, t in zip(args, signature.args, strict=True)
        ]
        return emit(builder, *operands)

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(operation, *kinds)(implementation)


class _Arithmetic:
    result = Vector

    def __init__(self, instruction):
        self.instruction = instruction

    def __call__(self, builder, a, b):
        return getattr(builder, self.instruction)(a, b)


class _Comparison:
    result = Mask

    def __init__(self, sign):
        self.sign = sign

    def __call__(self, builder, a, b):
        return builder.fcmp_ordered(self.sign, a, b)


for _operation, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _declare(_operation, _Arithmetic(_instruction))
_declare(operator.lt, _Comparison("<"))
_declare(operator.gt, _Comparison(">"))
_declare(operator.ge, _Comparison(">="))


def _unary(operation, llvm_name):
    """Give a function of one vector its LLVM intrinsic."""

    @type_callable(operation)
    def type_operation(context):
        def typer(a):
            return a if isinstance(a, Vector) else None

        return typer

    @lower_builtin(operation, Vector)
    def implementation(context, builder, signature, args):
        return call_llvm(builder, llvm_name, signature.args[0].dtype, args)


def call_llvm(builder, name, dtype, args):
    """Emit a call of an LLVM intrinsic that maps vectors to a vector."""
    vector = llvm_vector(dtype)
    function_type = ir.FunctionType(vector, [vector] * len(args))
    full_name = f"llvm.{name}.v{lanes(dtype)}f{dtype.bitwidth}"
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, full_name), args)


_unary(abs, "fabs")


@type_callable(operator.neg)
def _type_neg(context):
    def typer(a):
        return a if isinstance(a, Vector) else None

    return typer


@lower_builtin(operator.neg, Vector)
def _lower_neg(context, builder, signature, args):
    return builder.fneg(args[0])


@intrinsic
def fma(typingctx, a, b, c):
    """Return a * b + c, rounded once; `b` and `c` may be numbers."""
    vector = a if isinstance(a, Vector) else b

    def codegen(context, builder, signature, args):
        dtype = vector.dtype
        operands = [
            value if isinstance(t, Vector) else splat_scalar(builder, context.cast(builder, value, t, dtype), dtype)
            for value, t in zip(args, signature.args, strict=True)
        ]
        return call_llvm(builder, "fma", dtype, operands)

    return vector(a, b, c), codegen


@intrinsic
def copysign(typingctx, magnitude, sign):
    """Return `magnitude` with the signs of `sign`."""

    def codegen(context, builder, signature, args):
        return call_llvm(builder, "copysign", magnitude.dtype, args)

    return magnitude(magnitude, sign), codegen


@intrinsic
def select(typingctx, mask, a, b):
    """Return `a` where the mask is true, else `b`; either may be a number."""
    dtype = mask.dtype

    def codegen(context, builder, signature, args):
        operands = [
            value if isinstance(t, Vector) else splat_scalar(builder, context.cast(builder, value, t, dtype), dtype)
            for value, t in zip(args[1:], signature.args[1:], strict=True)
        ]
        return builder.select(args[0], *operands)

    return Vector(dtype)(mask, a, b), codegen
