"""Device functions that encode one row in Triton: the part that the encoding kernels share.

The integers are those of :func:`neurons.thresholds.encode_parameters` and
:meth:`neurons.SpikeEncoder.encode`, bit for bit: float32, IEEE division, no fused multiply-add. A
kernel that calls these functions is launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

from neurons.backends.device import interpreted
from neurons.backends.triton_arithmetic import clipped_float, fused
from neurons.backends.triton_thresholds import group_parameters, spike_parameters, value_of

__all__ = [
    "charge_of",
    "clipped",
    "encode_row",
    "gated",
    "normalized",
    "quotient",
    "quotient_of",
    "range_bits",
    "read",
    "rounded",
    "spike_parameters",
    "wider",
]

# Triton's interpreter truncates to bfloat16 where the device rounds to nearest, and knows no assembly.
_INTERPRETED = tl.constexpr(interpreted())
_LOG2_E = tl.constexpr(1.4426950408889634)
_MOST_GROUPS = tl.constexpr(64)


@triton.jit
def rounded(x, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """A float32 rounded to dtype, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def wider(lo, hi, lo_, hi_):  # type: ignore[no-untyped-def]
    """The union of two ranges; NaN stays NaN."""
    lo = tl.minimum(lo, lo_, propagate_nan=tl.PropagateNan.ALL)
    return lo, tl.maximum(hi, hi_, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clipped(charged, capacity):  # type: ignore[no-untyped-def]
    """``clip(floor(charged), 0, capacity)`` as int32."""
    # Clipped first, the floor is the truncation of the conversion: the same integer.
    return clipped_float(charged, capacity).to(tl.int32)


@triton.jit
def quotient(x, divisor, inverse):  # type: ignore[no-untyped-def]
    """``x / divisor``, correctly rounded, with the rounded inverse at hand: half of a division.

    For a divisor in 2**-100 .. 2**100 and a quotient below 2**100: two Newton steps on the exact
    remainder (Markstein 1990: a faithful quotient and a correctly rounded inverse give a correctly
    rounded quotient). Where the remainder would be subnormal, ``|x| < 2**-100``, it may be off.
    """
    return quotient_of(x, -divisor, inverse)


@triton.jit
def quotient_of(x, minus, inverse):  # type: ignore[no-untyped-def]
    """:func:`quotient` for minus the divisor: Triton negates by subtracting from zero."""
    first = x * inverse
    second = fused(fused(first, minus, x), inverse, first)
    return fused(fused(second, minus, x), inverse, second)


@triton.jit
def range_bits(lo, hi):  # type: ignore[no-untyped-def]
    """``-lo`` and ``hi``, not negative, as integers in a last axis of two, of which a maximum is taken.

    The bits of floats from zero on are in their order, NaN beyond infinity; a warp takes the maximum
    of integers in one instruction.
    """
    # Without the sign, which a NaN may have.
    return tl.join(-lo, hi).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _count_by_inverse(x, threshold, inverse, bias, capacity):  # type: ignore[no-untyped-def]
    """``clip(floor(x / s + bias), 0, qmax)`` as int32, s a scalar and the inverse ``1 / s``, rounded."""
    # Thresholds start at 1e-5, and where x is so small that its quotient may be off, the bias of at
    # least 1/2 absorbs it. Ranges near the end of float32 take the plain division.
    if threshold < 1e30:
        zeros = tl.zeros_like(x)
        charged = quotient(x, zeros + threshold, zeros + inverse) + bias
    else:
        charged = tl.div_rn(x, threshold) + bias
    return clipped(charged, capacity)


@triton.jit
def _positions(first, GATHER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The encoded positions of a block."""
    at = first + tl.arange(0, BLOCK)
    if GATHER:
        # A hint for the layout: with pairs in a thread a gather of 16-bit channels, nearly in their
        # order, is one cache line for a warp; with eight neighbours it would be four.
        at = tl.max_contiguous(at, 2)
    return at


@triton.jit
def read(ptr, at, inside, MASKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Load where inside, 0 elsewhere; everywhere unless MASKED."""
    return tl.load(ptr + at, mask=inside, other=0) if MASKED else tl.load(ptr + at)


@triton.jit
def charge_of(  # type: ignore[no-untyped-def]
    x_ptr,
    gain_ptr,
    scale,
    offset_ptr,
    channel,
    inside,
    MASKED: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    GATED: tl.constexpr,
):
    """Activations of channels, float32; normalised with SCALED, less the offset with HAS_OFFSET.

    With GATED the gains are up of ``gated``, and x is gate.
    """
    x = read(x_ptr, channel, inside, MASKED)
    if GATED:
        x = gated(x, read(gain_ptr, channel, inside, MASKED))
    if SCALED:
        gain = x
        if HAS_GAIN:
            gain = read(gain_ptr, channel, inside, MASKED)
        x = normalized(x, gain, scale, HAS_GAIN)
    x = x.to(tl.float32)
    if HAS_OFFSET:
        x -= read(offset_ptr, channel, inside, MASKED)
    return x


@triton.jit
def _charge(  # type: ignore[no-untyped-def]
    x_ptr,
    gain_ptr,
    scale,
    order_ptr,
    offset_ptr,
    at,
    stop,
    channels,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
):
    """Activations at encoded positions, float32, 0 at padding; and where there is a channel."""
    channel, inside = at, at < stop
    if GATHER:
        channel = tl.load(order_ptr + at, mask=inside, other=-1)
        inside = channel >= 0
    else:
        inside = inside & (at < channels)
    x = charge_of(
        *(x_ptr, gain_ptr, scale, offset_ptr, channel, inside),
        *(True, HAS_OFFSET, SCALED, HAS_GAIN, False),
    )
    return x, inside


@triton.jit
def normalized(x, gain, scale, HAS_GAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``gain * (x * scale)``, rounded to the dtype of x after each product, as LLaMA's RMSNorm."""
    y = rounded(x.to(tl.float32) * scale, x.dtype)
    if HAS_GAIN:
        y = rounded(y.to(tl.float32) * gain.to(tl.float32), x.dtype)
    return y


@triton.jit
def gated(gate, up):  # type: ignore[no-untyped-def]
    """``silu(gate) * up`` in their dtype, rounded after SiLU and after the product, as LLaMA's MLP."""
    g = gate.to(tl.float32)
    if _INTERPRETED:
        sigmoid = tl.div_rn(tl.full([], 1.0, tl.float32), 1.0 + tl.exp(-g))
    else:
        # exp(-g) from 0 to infinity; subnormals do not matter beside 1, nor does a sigmoid below 2**-126.
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [g * -_LOG2_E], tl.float32, True, 1
        )
        sigmoid = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + power], tl.float32, True, 1
        )
    silu = rounded(g * sigmoid, gate.dtype)
    return rounded(silu.to(tl.float32) * up.to(tl.float32), gate.dtype)


@triton.jit
def _range(  # type: ignore[no-untyped-def]
    x_ptr,
    gain_ptr,
    scale,
    order_ptr,
    offset_ptr,
    start,
    stop,
    channels,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``min(0, min x)`` and ``max(0, max x)`` over encoded positions; NaN if one is NaN."""
    lo = tl.zeros([BLOCK], tl.float32)
    hi = tl.zeros([BLOCK], tl.float32)
    for first in range(start, stop, BLOCK):
        at = _positions(first, GATHER, BLOCK)
        x, _ = _charge(
            *(x_ptr, gain_ptr, scale, order_ptr, offset_ptr, at, stop, channels),
            *(GATHER, HAS_OFFSET, SCALED, HAS_GAIN),
        )
        lo, hi = wider(lo, hi, x, x)
    return tl.reduce((lo, hi), 0, wider)


@triton.jit
def _span(segment_ptr, group_of, group, segments):  # type: ignore[no-untyped-def]
    """The segments ``first..last-1`` of a group, and where its positions start and stop."""
    first = tl.sum((group_of < group).to(tl.int32), 0)
    last = tl.sum((group_of <= group).to(tl.int32), 0)
    start = tl.load(segment_ptr + 3 * tl.minimum(first, segments - 1))
    stop = tl.load(segment_ptr + 3 * tl.maximum(last, 1) - 2)
    # Without segments the range is empty: lo = hi = 0.
    stop = tl.multiple_of(tl.where(last > first, stop, start), 64)
    return first, last, tl.multiple_of(start, 64), stop


@triton.jit
def encode_row(  # type: ignore[no-untyped-def]
    x_ptr,
    gain_ptr,
    scale,
    order_ptr,
    segment_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    sum_ptr,
    channels,
    positions,
    segments,
    groups,
    RANGE_MODE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encode one row; pointers to inputs and outputs are those of the row.

    With SCALED the row is ``normalized`` by the scale (float32) and, with HAS_GAIN, the gains first.
    """
    place = tl.arange(0, SEGMENTS)
    group_of = tl.load(segment_ptr + 3 * place + 2, mask=place < segments, other=groups)
    if RANGE_MODE == 1:
        lo, hi = _range(
            *(x_ptr, gain_ptr, scale, order_ptr, offset_ptr, 0, positions, channels),
            *(GATHER, HAS_OFFSET, SCALED, HAS_GAIN, BLOCK),
        )
    if RANGE_MODE == 2:
        # The thresholds of all groups, before one of them is encoded.
        number = tl.arange(0, _MOST_GROUPS)
        lows = tl.zeros([_MOST_GROUPS], tl.float32)
        highs = tl.zeros([_MOST_GROUPS], tl.float32)
        for group in range(groups):
            _, _, start, stop = _span(segment_ptr, group_of, group, segments)
            lo, hi = _range(
                *(x_ptr, gain_ptr, scale, order_ptr, offset_ptr, start, stop, channels),
                *(GATHER, HAS_OFFSET, SCALED, HAS_GAIN, BLOCK),
            )
            lows, highs = tl.where(number == group, lo, lows), tl.where(number == group, hi, highs)
        capacities = tl.load(capacity_ptr + number, mask=number < groups, other=1.0)
        clips = tl.load(clip_ptr + number, mask=number < groups, other=1.0)
        units, thresholds, zeros, multiples = group_parameters(
            lows, highs, capacities, clips, number, groups, RANGE_MODE
        )
        tl.store(threshold_ptr + number, units, mask=number < groups)
        tl.store(zero_ptr + number, (zeros * multiples).to(tl.int32), mask=number < groups)
    for group in range(groups):
        first, last, start, stop = _span(segment_ptr, group_of, group, segments)
        if RANGE_MODE == 0:
            lo, hi = _range(
                *(x_ptr, gain_ptr, scale, order_ptr, offset_ptr, start, stop, channels),
                *(GATHER, HAS_OFFSET, SCALED, HAS_GAIN, BLOCK),
            )
        capacity = tl.load(capacity_ptr + group)
        if RANGE_MODE == 2:
            threshold, zero = value_of(thresholds, number, group), value_of(zeros, number, group)
            multiple = value_of(multiples, number, group).to(tl.int32)
        else:
            threshold, zero = spike_parameters(lo, hi, capacity, tl.load(clip_ptr + group))
            tl.store(threshold_ptr + group, threshold)
            tl.store(zero_ptr + group, zero.to(tl.int32))
        inverse = tl.div_rn(tl.full([], 1.0, tl.float32), threshold)
        for segment in range(first, last):
            begin = tl.multiple_of(tl.load(segment_ptr + 3 * segment), 64)
            end = tl.multiple_of(tl.load(segment_ptr + 3 * segment + 1), 64)
            total = tl.zeros([BLOCK], tl.int32)
            for at_ in range(begin, end, BLOCK):
                at = _positions(at_, GATHER, BLOCK)
                x, inside = _charge(
                    *(x_ptr, gain_ptr, scale, order_ptr, offset_ptr, at, end, channels),
                    *(GATHER, HAS_OFFSET, SCALED, HAS_GAIN),
                )
                count = _count_by_inverse(x, threshold, inverse, zero + 0.5, capacity)
                if RANGE_MODE == 2:
                    count *= multiple
                count = tl.where(inside, count, 0)
                tl.store(count_ptr + at, count.to(tl.uint8), mask=at < end)
                total += count
            tl.store(sum_ptr + segment, tl.sum(total, 0))
