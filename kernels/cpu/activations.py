r"""sigmoid and tanh on vectors: no table, no branch, and proved accurate (sigmoid 3 ulp, tanh 2 ulp at most).

Both rest on :math:`e^x = 2^n e^r` with :math:`n = \mathrm{rint}(x / \ln 2)` and
:math:`|r| \le \ln 2 / 2`. n is rounded by adding a number so large that no fraction fits beside it, whose low
bits are then n as an integer; :math:`r = x - n \ln 2` is computed with ln 2 split in two (Cody and Waite
1980), and :math:`e^r = 1 + r (1 + r q(r))`. The polynomials interpolate at Chebyshev's points, so that few terms
make their truncation error far smaller than the rounding error.

A gate step is bound by the length of these chains of operations more than by their number: there is nothing in them
that the result does not need.

``np.exp`` and ``np.tanh`` inside Numba call a scalar function for each element, about 12 ns; these take
a fraction of one.
"""

from __future__ import annotations

import functools
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

# From here on, tanh is one after rounding; and e^-x is zero.
_ONE = {types.float32: 20.0, types.float64: 20.0}
_ZERO = {types.float32: 105.0, types.float64: 746.0}
# Numerator and denominator of the sigmoid are scaled by 2 to this power, so that neither is subnormal.
_SCALE = {types.float32: 64, types.float64: 512}

# Up to here tanh is computed by a polynomial; beyond, the errors of the other formula count little.
_NEAR = 0.7


def _constant(dtype, value):
    vector = llvm_vector(dtype)
    return ir.Constant(vector, [value] * vector.count)


def _number(values):
    """Make the function that returns, in all lanes, the number that belongs to its argument's dtype."""

    @intrinsic
    def number(typingctx, x):
        def codegen(context, builder, signature, args):
            return _constant(x.dtype, values[x.dtype])

        return x(x), codegen

    return number


_one, _zero = _number(_ONE), _number(_ZERO)
_scale = _number({dtype: 2.0**power for dtype, power in _SCALE.items()})


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


def _power(offsets):
    """Make the function that returns 2^(n + offset), a normal number."""

    @intrinsic
    def power(typingctx, rounded):
        dtype = rounded.dtype

        def codegen(context, builder, signature, args):
            vector = llvm_vector(dtype)
            integers = llvm_integers(dtype)
            bits, bias = _MANTISSA_BITS[dtype], (_EXPONENT_BIAS[dtype] + offsets[dtype]) << _MANTISSA_BITS[dtype]
            shift, bias = (ir.Constant(integers, [value] * vector.count) for value in (bits, bias))
            exponent = builder.shl(builder.bitcast(args[0], integers), shift)
            return builder.bitcast(builder.add(exponent, bias), vector)

        return rounded(rounded), codegen

    return power


_power_of_two, _scaled_power_of_two = _power(dict.fromkeys(_SCALE, 0)), _power(_SCALE)


def _paired(builder, dtype, values, power):
    """Emit even + odd * power for each two values; a last one without partner stays."""
    pairs = zip(values[::2], values[1::2], strict=False)
    paired = [call_llvm(builder, "fma", dtype, [odd, power, even]) for even, odd in pairs]
    return paired + values[2 * len(paired) :]


def _interpolated(function, low, high, terms):
    """Make the function that evaluates the polynomial that meets a function at Chebyshev's points.

    `terms` are those of the polynomial, for each dtype. They are added in pairs, and these in pairs (Estrin 1960):
    a chain of operations half as long as Horner's.
    """

    @functools.cache
    def coefficients(count):
        from numpy.polynomial import Chebyshev, Polynomial  # only where something is compiled

        return Chebyshev.interpolate(function, count - 1, [low, high]).convert(kind=Polynomial).coef.tolist()

    @intrinsic
    def polynomial(typingctx, x):
        def codegen(context, builder, signature, args):
            values, power = [_constant(x.dtype, c) for c in coefficients(terms[x.dtype])], args[0]
            while len(values) > 2:
                values = _paired(builder, x.dtype, values, power)
                power = builder.fmul(power, power)
            return _paired(builder, x.dtype, values, power)[0]

        return x(x), codegen

    return polynomial


def _exponential_rest(r):
    """(e^r - 1 - r) / r^2, by its series, which does not lose the digits that the quotient loses at zero."""
    return sum(r**k / math.factorial(k + 2) for k in range(20))


def _tanh_rest(z):
    """(tanh(a) / a - 1) / a^2 for z = a^2, by Lambert's continued fraction for tanh, for the same reason."""
    fraction = 31.0
    for k in range(29, 1, -2):
        fraction = k + z / fraction
    return -1.0 / (fraction + z)


# The error of the polynomial is, relative to the result, at most 8e-9 in float32 (rounding error 6e-8) and
# 2e-17 in float64 (1.1e-16).
_q = _interpolated(_exponential_rest, -math.log(2.0) / 2.0, math.log(2.0) / 2.0, {types.float32: 5, types.float64: 10})
_p = _interpolated(_tanh_rest, 0.0, _NEAR**2, {types.float32: 6, types.float64: 13})


@routine(inline=True)
def _mantissa(r):
    """Return e^r."""
    return fma(fma(_q(r), r, 1.0), r, 1.0)


@routine(inline=True)
def sigmoid(a):
    r"""Return :math:`1 / (1 + e)` or, for negative a, :math:`e / (1 + e)`; :math:`e = e^{-|a|}` cannot overflow.

    Results that are subnormal are right too: above and below the line all is scaled, so that only the division rounds
    them.
    """
    x = -abs(a)
    x = select(x < -_zero(x), -_zero(x), x)  # NaN stays NaN
    n = _rounded(x)
    mantissa, power = _mantissa(_reduced(x, n)), _scaled_power_of_two(n)
    return select(a < 0.0, mantissa * power, _scale(x)) / fma(mantissa, power, _scale(x))


@routine(inline=True)
def tanh(a):
    r"""Return the hyperbolic tangent, from two formulas that each lose little where they are used.

    For small a that is :math:`a + a^3 p(a^2)`; beyond, :math:`1 - 2 / (1 + e^{2|a|})` with the sign of a.
    """
    size = abs(a)
    x = select(_one(size) < size, _one(size), size)  # NaN stays NaN
    x = x + x
    n = _rounded(x)
    far = 1.0 - 2.0 / fma(_mantissa(_reduced(x, n)), _power_of_two(n), 1.0)
    z = a * a
    near = fma(size * z, _p(z), size)
    return copysign(select(size < _NEAR, near, far), a)


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
