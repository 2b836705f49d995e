"""Arithmetic that Triton's interpreter does in its own way: here it is that of a GPU in all versions.

For a GPU these are the instructions they stand for. The interpreter of some versions (3.7.1, but not
3.9) rounds a product before it adds to it, and its minima and maxima pass on NaN.
"""

import triton
import triton.language as tl

from neurons.backends.device import interpreted

__all__ = ["clipped_float", "fused"]

_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def fused(x, y, z):  # type: ignore[no-untyped-def]
    """``x * y + z`` of float32, rounded once: a fused multiply-add."""
    if _INTERPRETED:
        # In float64, where the product is exact. The sum is rounded to odd (Boldo and Melquiond 2008),
        # so that its rounding to float32 is that of the exact sum, also among subnormals.
        product = x.to(tl.float64) * y.to(tl.float64)
        addend = z.to(tl.float64)
        total = product + addend
        # What the sum has lost, exactly (Knuth's TwoSum); NaN, which moves nothing, beside infinity.
        part = total - product
        lost = (product - (total - part)) + (addend - part)
        bits = total.to(tl.int64, bitcast=True)
        outward = tl.where((lost > 0.0) == (total > 0.0), 1, -1)
        to_odd = ((lost > 0.0) | (lost < 0.0)) & ((bits & 1) == 0)
        bits = tl.where(to_odd, bits + outward, bits)
        result = bits.to(tl.float64, bitcast=True).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def clipped_float(x, most):  # type: ignore[no-untyped-def]
    """``clip(x, 0, most)``; 0 for NaN."""
    if _INTERPRETED:
        x = tl.where(x == x, x, 0.0)
    return tl.minimum(tl.maximum(x, 0.0), most)
