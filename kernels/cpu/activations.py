r"""sigmoid and tanh on vectors: no table, no branch, and proved accurate (sigmoid 3 ulp, tanh 2 ulp at most).

Both rest on :math:`e^x = 2^n e^r` with :math:`n = \mathrm{rint}(x / \ln 2)` and
:math:`|r| \le \ln 2 / 2`. n is rounded by adding a number so large that no fraction fits beside it, whose low
bits are then n as an integer; :math:`r = x - n \ln 2` is computed with ln 2 split in two (Cody and Waite
1980), and :math:`e^r - 1 = r + r^2 q(r)` with q a Taylor polynomial so long that its truncation error is far
below the rounding error.

``np.exp`` and ``np.tanh`` inside Numba call a scalar function for each element, about 12 ns; these take
a fraction of one.
"""

from __future__ import annotations

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.compile import kernel, routine
from fastlstm.kernels.cpu.simd import (
    address,
    call_llvm,
    copysign,
    fma,
    lanes_of,
    llvm_integers,
    llvm_vector,
    load,
    offset,
    select,
    store,
)

__all__ = ["sigmoid", "sigmoid_array", "tanh", "tanh_array"]

_LOG2_E = 1.0 / math.log(2.0)

# 1.5 * 2^(bits of the mantissa): a sum with it is a whole number, whose low bits are those of n as an integer.
_WHOLE = {types.float32: 1.5 * 2.0**23, types.float64: 1.5 * 2.0**52}
_MANTISSA_BITS = {types.float32: 23, types.float64: 52}
_EXPONENT_BIAS = {types.float32: 127, types.float64: 1023}

# ln 2 in two parts; n times the first is exact for every n that occurs (Cody and Waite).
_LN2_PARTS = {
    types.float32: (0.693359375, -2.12194440054690583e-4),
    types.float64: (6.93145751953125e-1, 1.42860682030941723212e-6),
}
# Terms of q(r) = (e^r - 1 - r) / r^2 = 1/2! + r/3! + ...; at |r| = ln 2 / 2 the first term left out is,
# relative to r, 1.5e-8 in float32 (rounding error 6e-8) and 1.2e-17 in float64 (1.1e-16).
_TERMS = {types.float32: 6, types.float64: 12}


def _constant(dtype, value):
    vector = llvm_vector(dtype)
    return ir.Constant(vector, [value] * vector.count)


@intrinsic
def _rounded(typingctx, x):
    """Return n = rint(x / ln 2), beside a large number."""

    def codegen(context, builder, signature, args):
        factors = [args[0], _constant(x.dtype, _LOG2_E), _constant(x.dtype, _WHOLE[x.dtype])]
        return call_llvm(builder, "fma", x.dtype, factors)

    return x(x), codegen


@intrinsic
def _reduced(typingctx, x, rounded):
    """Return r = x - n ln 2."""

    def codegen(context, builder, signature, args):
        r, minus_n = args[0], builder.fsub(_constant(x.dtype, _WHOLE[x.dtype]), args[1])
        for part in _LN2_PARTS[x.dtype]:
            r = call_llvm(builder, "fma", x.dtype, [minus_n, _constant(x.dtype, part), r])
        return r

    return x(x, rounded), codegen


def _power(offset):
    """Make the function that returns 2^(n + offset), a normal number."""

    @intrinsic
    def power(typingctx, rounded):
        dtype = rounded.dtype

        def codegen(context, builder, signature, args):
            vector = llvm_vector(dtype)
            integers = llvm_integers(dtype)
            bits, bias = _MANTISSA_BITS[dtype], (_EXPONENT_BIAS[dtype] + offset) << _MANTISSA_BITS[dtype]
            shift, bias = (ir.Constant(integers, [value] * vector.count) for value in (bits, bias))
            exponent = builder.shl(builder.bitcast(args[0], integers), shift)
            return builder.bitcast(builder.add(exponent, bias), vector)

        return rounded(rounded), codegen

    return power


_power_of_two, _power_of_two_times_2_64 = _power(0), _power(64)


def _horner(builder, dtype, x, coefficients):
    """Emit the polynomial with these coefficients, lowest power first, by Horner's rule."""
    value = _constant(dtype, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = call_llvm(builder, "fma", dtype, [value, x, _constant(dtype, coefficient)])
    return value


@intrinsic
def _tail(typingctx, r):
    """Return q(r)."""

    def codegen(context, builder, signature, args):
        return _horner(builder, r.dtype, args[0], [1.0 / math.factorial(k + 2) for k in range(_TERMS[r.dtype])])

    return r(r), codegen


def _raised_to(single, double):
    """Make the function that raises x to at least `single` (float32) or `double` (float64); NaN stays NaN."""

    @intrinsic
    def raised(typingctx, x):
        def codegen(context, builder, signature, args):
            limit = _constant(x.dtype, single if x.dtype == types.float32 else double)
            return builder.select(builder.fcmp_ordered("<", args[0], limit), limit, args[0])

        return x(x), codegen

    return raised


# Below these, e^x is zero after rounding, or 1 - 2 e^x is one; the exponent then fits its bits.
_raised_for_sigmoid = _raised_to(-105.0, -746.0)
_raised_for_tanh = _raised_to(-40.0, -80.0)


def _fraction(levels):
    """Coefficients in z, lowest power first, of N and M with N / M = 3 + z / (5 + z / (7 + ...)), `levels` deep."""
    upper, lower = [2.0 * levels + 1.0], [1.0]
    for k in range(levels - 1, 0, -1):
        shifted = [0.0, *lower]
        width = max(len(upper), len(shifted))
        padded = [u + [0.0] * (width - len(u)) for u in (upper, shifted)]
        upper, lower = [(2 * k + 1) * u + v for u, v in zip(*padded, strict=True)], upper
    while lower[-1] == 0.0:
        lower.pop()
    return upper, lower


# Levels of the fraction; up to |x| = 0.7 the error left in tanh is 2e-9 and 5e-20, relative.
_LEVELS = {types.float32: 4, types.float64: 8}


def _fraction_part(which):
    @intrinsic
    def part(typingctx, z):
        def codegen(context, builder, signature, args):
            return _horner(builder, z.dtype, args[0], _fraction(_LEVELS[z.dtype])[which])

        return z(z), codegen

    return part


_numerator, _denominator = _fraction_part(0), _fraction_part(1)


@routine(inline=True)
def sigmoid(a):
    r"""Return :math:`1 / (1 + e^{-a})`, from :math:`e^{-|a|}`, which cannot overflow.

    Subnormal results are right too: :math:`e^{-|a|}` is scaled by :math:`2^{n + 64}`, a normal number, and
    then by :math:`2^{-64}`, which rounds once.
    """
    x = _raised_for_sigmoid(-abs(a))
    n = _rounded(x)
    r = _reduced(x, n)
    e = fma(r * r, _tail(r), r) + 1.0
    e = e * _power_of_two_times_2_64(n) * 5.421010862427522e-20
    return select(a >= 0.0, 1.0, e) / (e + 1.0)


@routine(inline=True)
def tanh(a):
    r"""Return the hyperbolic tangent as :math:`b - b q`, where the errors of the quotient q count little.

    Below |a| = 0.7, :math:`b = |a|` and :math:`q = z / (z + 3 + z / (5 + z / (7 + \dots)))` with
    :math:`z = a^2`, which is Lambert's continued fraction, rearranged; from there on, :math:`b = 1` and
    :math:`q = 2e / (1 + e)` with :math:`e = e^{-2|a|}`. One division serves both.
    """
    size = abs(a)
    near_zero = size < 0.7
    z = size * size
    m = z * _denominator(z)
    x = _raised_for_tanh(size * -2.0)
    n = _rounded(x)
    r = _reduced(x, n)
    s = _power_of_two(n)
    e = fma(s, fma(r * r, _tail(r), r), s)
    q = select(near_zero, m, e + e) / select(near_zero, m + _numerator(z), e + 1.0)
    b = select(near_zero, size, 1.0)
    return copysign(fma(-b, q, b), a)


@kernel
def sigmoid_array(x, y):
    """Apply :func:`sigmoid` to a flat array, writing `y`: for measuring it; the size is whole vectors."""
    width = lanes_of(address(x))
    for n in range(0, x.size, width):
        store(offset(address(y), n), sigmoid(load(offset(address(x), n))))


@kernel
def tanh_array(x, y):
    """Apply :func:`tanh` to a flat array, writing `y`: for measuring it; the size is whole vectors."""
    width = lanes_of(address(x))
    for n in range(0, x.size, width):
        store(offset(address(y), n), tanh(load(offset(address(x), n))))
