"""Random masks of the states: recurrent dropout and zoneout, drawn where they are needed, and kept nowhere.

Element number k of a mask is decided by output number k of SplitMix64, as in
:func:`fastlstm.backends.layers.chosen`, whose draws these are bit for bit: ``u_k < p``, with u_k = 2^-53 times the
upper 53 bits of the output. The upper bits are compared with ``ceil(p * 2^53)``, which decides the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastlstm.kernels.cpu.jit import routine
from fastlstm.kernels.cpu.vector import Mask, fill, lanes, offset, splat, splat_first
from fastlstm.kernels.cpu.vector_arithmetic import fma, select

__all__ = [
    "DRAWN", "EXPECTED", "NONE", "NUMBERS", "RATES", "SHARES", "Masks", "recurrent_mask", "through",
    "zoned",
]  # fmt: skip

NONE, EXPECTED, DRAWN = range(3)  # what is done with the states: nothing; the expectation (inference); a random choice
# The numbers of a call, from some place of its settings on: what is done with c, with h, and with h before the
# recurrent weights (NONE or DRAWN); for each the state of the generator, and the threshold of the draws.
ZONE_C, ZONE_H, RECURRENT, START_C, START_H, START_R, THRESHOLD_C, THRESHOLD_H, THRESHOLD_R, NUMBERS = range(10)

# Where the gates' shares in a normalised row (``layer_norm.py``) stand among the rates; and the number of all rates.
SHARES, RATES = 3, 8

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


class Masks(NamedTuple):
    """How the masks of one direction of a layer are drawn: a record to be held, see ``held.py``."""

    numbers: Any  # pointer: the numbers above, of a call
    rates: Any  # pointer: the probabilities of zoneout of c and of h; what recurrent dropout multiplies by; and SHARES


@intrinsic
def _chosen(typingctx, like, start, position, threshold):
    """Return the mask of the elements from `position` on that are chosen; `like` is a pointer that gives the dtype."""
    dtype = like.dtype

    def codegen(context, builder, signature, args):
        count, integer = lanes(dtype), ir.IntType(64)
        vector = ir.VectorType(integer, count)
        start, position, threshold = (
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(args[1:], signature.args[1:], strict=True)
        )

        def everywhere(value):
            return splat_first(builder, value, vector)

        def constant(value):
            return ir.Constant(vector, [value] * count)

        def mixed(bits, shift):
            return builder.xor(bits, builder.lshr(bits, constant(shift)))

        # The products of the lanes' numbers and the golden ratio are constants: one multiplication for all lanes.
        first = builder.add(builder.mul(position, ir.Constant(integer, _GOLDEN)), start)
        steps = ir.Constant(vector, [(lane + 1) * _GOLDEN % 2**64 for lane in range(count)])
        bits = builder.add(everywhere(first), steps)
        bits = builder.mul(mixed(bits, 30), constant(_FIRST))
        bits = builder.mul(mixed(bits, 27), constant(_SECOND))
        upper = builder.lshr(mixed(bits, 31), constant(11))
        return builder.icmp_signed("<", upper, everywhere(threshold))

    return Mask(dtype)(like, start, position, threshold), codegen


@routine(inline=True)
def zoned(kind, start, position, threshold, rate, old, new):
    """Return the state after zoneout: `old` where it is kept, else `new`; or their expectation.

    `rate` is a pointer to the probability, `position` that of the first lane in the mask (T, B, features).
    """
    if kind == DRAWN:
        return select(_chosen(rate, start, position, threshold), old, new)
    share = splat(rate)
    return fma(share, old, (1.0 - share) * new)


@routine(inline=True)
def through(kind, start, position, threshold, rate, d):
    """Divide the gradient by a state after zoneout into those by the old and by the new state."""
    if kind == DRAWN:
        kept, zero = _chosen(rate, start, position, threshold), fill(rate, 0.0)
        return select(kept, d, zero), select(kept, zero, d)
    share = splat(rate)
    return share * d, (1.0 - share) * d


@routine(inline=True)
def recurrent_mask(masks, position):
    """Return the factors of recurrent dropout from a position of the mask (B, features) on."""
    return select(_chosen(masks.rates, masks.start_r, position, masks.threshold_r), 0.0, splat(offset(masks.rates, 2)))
