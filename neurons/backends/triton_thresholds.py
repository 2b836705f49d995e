"""Device functions for thresholds and bias charges in Triton: :mod:`neurons.thresholds`, bit for bit.

float32, IEEE division, no fused multiply-add: a kernel that calls them is launched with
``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from neurons.backends.triton_arithmetic import clipped_float

__all__ = ["group_parameters", "spike_parameters", "value_of"]

# As in neurons.thresholds: what a byte holds, multiples tried, the most they cost, a unit of 19 bits, rounded up.
_LARGEST_CHARGE = tl.constexpr(255.0)
_CANDIDATES = tl.constexpr(4)
_MOST_COST = tl.constexpr(1e30)
_ROUND_UP = tl.constexpr(1 + 2.0**-18)
_UNIT_BITS = tl.constexpr(~31)


@triton.jit
def spike_parameters(lo, hi, capacity, clip):  # type: ignore[no-untyped-def]
    """``s`` and ``z`` (float32) of a range, as :func:`neurons.thresholds.threshold_of`."""
    lo, hi = lo * clip, hi * clip
    threshold = tl.maximum(tl.div_rn(hi - lo, capacity), 1e-5, propagate_nan=tl.PropagateNan.ALL)
    return threshold, _bias_charge(lo, threshold, capacity)


@triton.jit
def _bias_charge(lo, threshold, capacity):  # type: ignore[no-untyped-def]
    """``clip(round(-lo / s), 0, qmax)``, float32."""
    # Adding 3 * 2**22 rounds half to even; -lo / s is at most the capacity, up to rounding.
    zero = (tl.div_rn(-lo, threshold) + 12582912.0) - 12582912.0
    return clipped_float(zero, capacity)


@triton.jit
def value_of(values, number, group):  # type: ignore[no-untyped-def]
    """One of the values; NaN in another does not reach it."""
    return tl.sum(tl.where(number == group, values, 0.0), 0)


@triton.jit
def _largest(values, own):  # type: ignore[no-untyped-def]
    """The largest of those values, none negative, that are its own; NaN if one is NaN, 0 if none is."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF  # as in `range_bits`
    return tl.max(tl.where(own, bits, 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _commensurate(thresholds, capacities, number, groups):  # type: ignore[no-untyped-def]
    """Unit, a scalar, and multiples of the thresholds of all groups, as :func:`neurons.thresholds.commensurate`."""
    zeros = tl.zeros_like(thresholds)
    most = tl.floor(tl.div_rn(zeros + _LARGEST_CHARGE, capacities))
    others = _largest(tl.div_rn(thresholds, most), number < groups - 1)
    last, steps = value_of(thresholds, number, groups - 1), value_of(most, number, groups - 1)
    for candidate in tl.static_range(_CANDIDATES):
        # A candidate that does not exist repeats the one before, which costs as much.
        coarse = tl.div_rn(last, tl.maximum(steps - candidate, 1.0))
        coarse = tl.maximum(others, coarse, propagate_nan=tl.PropagateNan.ALL) * _ROUND_UP
        coarse = coarse.to(tl.int32, bitcast=True) & _UNIT_BITS
        coarse = coarse.to(tl.float32, bitcast=True)
        # 0 beside a unit without end: NaN, as the threshold is then.
        tried = clipped_float(tl.ceil(tl.div_rn(thresholds, zeros + coarse)), most)
        cost = _largest(tl.div_rn(tried * coarse, thresholds), number < groups)
        cost = tl.minimum(cost, _MOST_COST, propagate_nan=tl.PropagateNan.ALL)
        if candidate == 0:
            unit, multiples, least = coarse, tried, cost
        else:
            better = cost < least  # not if it is NaN
            unit = tl.where(better, coarse, unit)
            multiples = tl.where(better, tried, multiples)
            least = tl.where(better, cost, least)
    return unit, multiples


@triton.jit
def group_parameters(  # type: ignore[no-untyped-def]
    lo, hi, capacities, clips, number, groups, RANGE_MODE: tl.constexpr
):
    """What encodes a row, float32, all its groups at once, of which those below ``groups`` exist.

    Returns the thresholds that decode the charges, the thresholds of the counts, their ``z`` and the
    multiples, of which ``m q`` and ``m z`` are charges. With RANGE_MODE 2 the first are the unit of
    the row, else thresholds are one and the same and multiples are 1.
    """
    thresholds, zeros = spike_parameters(lo, hi, capacities, clips)
    units, multiples = thresholds, tl.full(thresholds.shape, 1.0, tl.float32)
    if RANGE_MODE == 2:
        unit, multiples = _commensurate(thresholds, capacities, number, groups)
        units = tl.zeros_like(thresholds) + unit
        thresholds = units * multiples
        zeros = _bias_charge(lo * clips, thresholds, capacities)
    return units, thresholds, zeros, multiples
