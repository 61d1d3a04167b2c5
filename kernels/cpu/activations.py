r"""sigmoid and tanh on vectors: no table, no branch, and proved accurate (sigmoid 3 ulp, tanh 2 ulp at most).

Both rest on :math:`e^{su} = 2^n e^{sr}`, s being -1 or 2, with :math:`n = \mathrm{rint}(su / \ln 2)` and
:math:`|sr| \le \ln 2 / 2`. n is rounded by adding a number so large that no fraction fits beside it, whose low
bits are then n as an integer, which is added to the exponent of :math:`e^{sr}`; :math:`r = u - n \ln 2 / s` is
computed with ln 2 split in two (Cody and Waite 1980), and :math:`e^{sr} = 1 + r (s + r q(r))`. The polynomials
interpolate at Chebyshev's points, so that few terms make their truncation error far smaller than the rounding error.

A gate step is bound by the number of multiplications in them and by the length of their chains: there is nothing in
them that the result does not need, and s is a part of the constants.

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

# ln 2 in two parts; n times the first is exact for every n that occurs (Cody and Waite).
_LN2_PARTS = {
    types.float32: (0.693359375, -2.12194440054690583e-4),
    types.float64: (6.93145751953125e-1, 1.42860682030941723212e-6),
}

# From here on, tanh and sigmoid are one after rounding; and before this the sigmoid is zero.
_ONE = {types.float32: 20.0, types.float64: 40.0}
_ZERO = {types.float32: -105.0, types.float64: -746.0}
# Numerator and denominator of the sigmoid are multiplied by 2 to this power, so that neither is subnormal or infinite.
_SCALE = {types.float32: -64, types.float64: -512}
_UNSCALED = dict.fromkeys(_SCALE, 0)

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


def _interpolated(function, low, high, terms):
    """Make the function that emits the polynomial that meets a function at Chebyshev's points.

    `terms` are those of the polynomial, for each dtype. They are added in pairs, and these one after the other: a chain
    of operations half as long as Horner's for one multiplication more.
    """

    @functools.cache
    def coefficients(count):
        from numpy.polynomial import Chebyshev, Polynomial  # only where something is compiled

        return Chebyshev.interpolate(function, count - 1, [low, high]).convert(kind=Polynomial).coef.tolist()

    def emit(builder, dtype, x):
        values, square = [_constant(dtype, c) for c in coefficients(terms[dtype])], builder.fmul(x, x)
        pairs = [
            call_llvm(builder, "fma", dtype, [odd, x, even])
            for even, odd in zip(values[::2], values[1::2], strict=False)
        ]
        total, *rest = reversed(pairs + values[2 * len(pairs) :])
        for pair in rest:
            total = call_llvm(builder, "fma", dtype, [total, square, pair])
        return total

    return emit


def _exponential_rest(r):
    """(e^r - 1 - r) / r^2, by its series, which does not lose the digits that the quotient loses at zero."""
    return sum(r**k / math.factorial(k + 2) for k in range(20))


def _tanh_rest(z):
    """(tanh(a) / a - 1) / a^2 for z = a^2, by Lambert's continued fraction for tanh, for the same reason."""
    fraction = 31.0
    for k in range(29, 1, -2):
        fraction = k + z / fraction
    return -1.0 / (fraction + z)


def _exponential(sign, terms, scale):
    """Make the function that returns 2^scale e^(sign u), a normal number; `terms` are those of q."""
    unit = math.log(2.0) / abs(sign)
    q = _interpolated(lambda r: sign**2 * _exponential_rest(sign * r), -unit / 2.0, unit / 2.0, terms)

    @intrinsic
    def exponential(typingctx, u):
        dtype = u.dtype

        def codegen(context, builder, signature, args):
            def fma_with(x, y, constant):
                return call_llvm(builder, "fma", dtype, [x, y, _constant(dtype, constant)])

            whole = _WHOLE[dtype] + scale[dtype]  # the scale comes with n
            n = fma_with(args[0], _constant(dtype, sign * _LOG2_E), whole)
            minus_n, r = builder.fsub(_constant(dtype, whole), n), args[0]
            for part in _LN2_PARTS[dtype]:
                r = call_llvm(builder, "fma", dtype, [minus_n, _constant(dtype, part / sign), r])
            power = fma_with(fma_with(q(builder, dtype, r), r, sign), r, 1.0)
            # n is added to the exponent.
            integers, vector = llvm_integers(dtype), llvm_vector(dtype)
            shift = ir.Constant(integers, [_MANTISSA_BITS[dtype]] * vector.count)
            power, n = (builder.bitcast(value, integers) for value in (power, n))
            return builder.bitcast(builder.add(power, builder.shl(n, shift)), vector)

        return u(u), codegen

    return exponential


# The error of the polynomials is, relative to the result, at most 8e-9 in float32 (rounding error 6e-8) and
# 2e-17 in float64 (1.1e-16).
_EXPONENTIAL_TERMS = {types.float32: 5, types.float64: 10}
_scaled_exp_of_minus = _exponential(-1.0, _EXPONENTIAL_TERMS, _SCALE)
_exp_of_twice = _exponential(2.0, _EXPONENTIAL_TERMS, _UNSCALED)
_emit_p = _interpolated(_tanh_rest, 0.0, _NEAR**2, {types.float32: 6, types.float64: 13})


@intrinsic
def _p(typingctx, z):
    def codegen(context, builder, signature, args):
        return _emit_p(builder, z.dtype, args[0])

    return z(z), codegen


@routine(inline=True)
def sigmoid(a):
    r"""Return :math:`1 / (1 + e^{-a})`.

    Results that are subnormal are right too: above and below the line all is scaled, so that only the division rounds
    them.
    """
    a = select(a < _zero(a), _zero(a), a)  # NaN stays NaN
    a = select(_one(a) < a, _one(a), a)
    return _scale(a) / (_scale(a) + _scaled_exp_of_minus(a))


@routine(inline=True)
def tanh(a):
    r"""Return the hyperbolic tangent, from two formulas that each lose little where they are used.

    For small a that is :math:`a + a^3 p(a^2)`; beyond, :math:`1 - 2 / (1 + e^{2|a|})` with the sign of a.
    """
    size = abs(a)
    u = select(_one(size) < size, _one(size), size)  # NaN stays NaN
    far = 1.0 - 2.0 / (1.0 + _exp_of_twice(u))
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
