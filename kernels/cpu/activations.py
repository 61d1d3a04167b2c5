r"""sigmoid and tanh on vectors, without tables and branches, within 3 ulp (sigmoid) and 2 ulp (tanh).

Both use :math:`e^{-u} = 2^n e^{-r} = 2^n (1 - p)`, with :math:`n = \mathrm{rint}(-u / \ln 2)`,
:math:`r = u + n \ln 2`, so that :math:`|r| \le \ln 2 / 2`, and :math:`p = 1 - e^{-r} = r - r^2 q(r)`. n is rounded
by adding a number so large that no fraction fits beside it, whose low bits are then n as an integer; shifted to where
the exponent stands, they are :math:`2^n`. q is approximated by a polynomial whose error is spread evenly over the range
of r, so that few terms make it far smaller than rounding errors. With these,

.. math:: \sigma(u) = \frac{1}{(1 + 2^n) - 2^n p}, \qquad
          \tanh \frac{u}{2} = s^2 + \frac{2^n (2^n s + (1 + s^2) p)}{(1 + 2^n) - 2^n p}, \quad s = 1 - 2^n,

where what depends on n alone is exact in the range that matters, and p is added to it with one rounding. :math:`s^2`
is close to the result, so the roundings of the quotient count little; and near zero, where no digit may be lost, n is
0, and with it s: the numerator is p.

The time of a cell step depends on the number of these operations and on the length of their dependency chains.

``np.exp`` and ``np.tanh`` inside Numba call a scalar function for each element, about 12 ns; these take
a fraction of one.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.jit import kernel, routine
from fastlstm.kernels.cpu.vector import address, lanes_of, llvm_integers, llvm_vector, load, offset, store
from fastlstm.kernels.cpu.vector_arithmetic import call_llvm, copysign, select

__all__ = ["number", "sigmoid", "sigmoid_array", "tanh", "tanh_array"]

_LOG2_E = 1.0 / math.log(2.0)

# 1.5 * 2^(bits of the mantissa): a sum with it is a whole number, whose low bits are those of n as an integer.
_WHOLE = {types.float32: 1.5 * 2.0**23, types.float64: 1.5 * 2.0**52}
_MANTISSA_BITS = {types.float32: 23, types.float64: 52}

# ln 2 rounded to the dtype, and the remainder: a multiply-add has n times the first part exactly.
_LN2_PARTS = {
    types.float32: (0.693147182464599609375, -1.904654299957767e-9),
    types.float64: (math.log(2.0), 2.319046813846299558e-17),
}

# From here on, tanh and sigmoid are one after rounding; and before this the sigmoid is zero.
_ONE = {types.float32: 20.0, types.float64: 40.0}
_ZERO = {types.float32: -105.0, types.float64: -746.0}
# Numerator and denominator of the sigmoid are multiplied by 2 to this power, so that neither is subnormal or infinite.
_SCALE = {types.float32: -64, types.float64: -512}
_EXPONENT_BIAS = {types.float32: 127, types.float64: 1023}
# Terms of q: more would not improve the results. The sum 1 + 2^n hides their error in the sigmoid, not in tanh near
# zero.
_SIGMOID_TERMS = {types.float32: 5, types.float64: 10}
_TANH_TERMS = {types.float32: 6, types.float64: 11}


def _constant(dtype, value):
    vector = llvm_vector(dtype)
    return ir.Constant(vector, [value] * vector.count)


def number(values):
    """Make the function that returns, in all lanes, the number that belongs to its argument's dtype."""

    @intrinsic
    def number_like(typingctx, x):
        def codegen(context, builder, signature, args):
            return _constant(x.dtype, values[x.dtype])

        return x(x), codegen

    return number_like


_one, _zero = number(_ONE), number(_ZERO)


@functools.cache
def _coefficients(terms):
    """Return the coefficients of a polynomial close to q(r) = (e^-r - 1 + r) / r^2 for |r| <= ln 2 / 2.

    It is q's series, of which one term after the other is taken away with as much of Chebyshev's polynomial as leaves
    no larger error anywhere (Lanczos 1938). In fractions: numbers would lose digits that float64 needs.
    """
    from numpy.polynomial.chebyshev import cheb2poly  # only where something is compiled

    bound, more = Fraction(math.log(2.0) / 2.0), 8
    series = [Fraction((-1) ** k, math.factorial(k + 2)) for k in range(terms + more)]
    while len(series) > terms:
        degree = len(series) - 1
        chebyshev = [Fraction(c) for c in cheb2poly([0] * degree + [1])]
        share = series.pop() / chebyshev.pop()
        for k, c in enumerate(chebyshev):
            series[k] -= share * c * bound ** (degree - k)
    return [float(c) for c in series]


def _emit_q(builder, dtype, r, square, terms):
    """Emit q(r), its terms in pairs: a chain of operations half as long as Horner's."""
    values = [_constant(dtype, c) for c in _coefficients(terms)]
    pairs = [
        call_llvm(builder, "fma", dtype, [odd, r, even]) for even, odd in zip(values[::2], values[1::2], strict=False)
    ]
    total, *rest = reversed(pairs + values[2 * len(pairs) :])
    for pair in rest:
        total = call_llvm(builder, "fma", dtype, [total, square, pair])
    return total


def _emit_exponential(builder, dtype, u, times, scale, parts, terms):
    """Emit 2^(n + scale) and p of e^(-times u) = 2^n (1 - p), with so many parts of ln 2 and terms of q.

    `times` is 1 or 2.
    """
    whole = _constant(dtype, _WHOLE[dtype] + _EXPONENT_BIAS[dtype] + scale)
    n = call_llvm(builder, "fma", dtype, [u, _constant(dtype, -times * _LOG2_E), whole])
    r, only_n = u if times == 1 else builder.fadd(u, u), builder.fsub(n, whole)
    for part in _LN2_PARTS[dtype][:parts]:
        r = call_llvm(builder, "fma", dtype, [only_n, _constant(dtype, part), r])
    square = builder.fmul(r, r)
    p = call_llvm(builder, "fma", dtype, [builder.fneg(square), _emit_q(builder, dtype, r, square, terms[dtype]), r])
    integers, vector = llvm_integers(dtype), llvm_vector(dtype)
    shift = ir.Constant(integers, [_MANTISSA_BITS[dtype]] * vector.count)
    return builder.bitcast(builder.shl(builder.bitcast(n, integers), shift), vector), p


@intrinsic
def _sigmoid(typingctx, u):
    def codegen(context, builder, signature, args):
        scaled_one = _constant(u.dtype, 2.0 ** _SCALE[u.dtype])
        power, p = _emit_exponential(builder, u.dtype, *args, 1, _SCALE[u.dtype], 2, _SIGMOID_TERMS)
        below = call_llvm(builder, "fma", u.dtype, [builder.fneg(power), p, builder.fadd(scaled_one, power)])
        return builder.fdiv(scaled_one, below)

    return u(u), codegen


@intrinsic
def _tanh(typingctx, u):
    def codegen(context, builder, signature, args):
        one = _constant(u.dtype, 1.0)
        # Large n, which would need both parts of ln 2, count little beside the one.
        power, p = _emit_exponential(builder, u.dtype, *args, 2, 0, 1, _TANH_TERMS)
        s, below_n = builder.fsub(one, power), builder.fadd(one, power)
        near = builder.fmul(s, s)
        above = call_llvm(builder, "fma", u.dtype, [p, builder.fadd(one, near), builder.fmul(power, s)])
        below = call_llvm(builder, "fma", u.dtype, [builder.fneg(power), p, below_n])
        return builder.fadd(near, builder.fdiv(builder.fmul(above, power), below))

    return u(u), codegen


@routine(inline=True)
def sigmoid(a):
    r"""Return :math:`1 / (1 + e^{-a})`.

    Results that are subnormal are right too: above and below the line all is scaled, so that only the division rounds
    them.
    """
    a = select(a < _zero(a), _zero(a), a)  # NaN stays NaN
    return _sigmoid(select(_one(a) < a, _one(a), a))


@routine(inline=True)
def tanh(a):
    """Return the hyperbolic tangent."""
    size = abs(a)
    return copysign(_tanh(select(_one(size) < size, _one(size), size)), a)  # NaN stays NaN


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
