"""Device functions that encode one row in Triton: the part that the encoding kernels share.

The integers are those of :func:`neurons.thresholds.encode_parameters` and
:meth:`neurons.SpikeEncoder.encode`, bit for bit: float32, IEEE division, no fused multiply-add. A
kernel that calls these functions is launched with ``enable_fp_fusion=False``.
"""

import triton
import triton.language as tl

__all__ = ["encode_row", "normalized", "spike_count", "spike_parameters", "wider"]


@triton.jit
def wider(lo, hi, lo_, hi_):  # type: ignore[no-untyped-def]
    """The union of two ranges; NaN stays NaN."""
    lo = tl.minimum(lo, lo_, propagate_nan=tl.PropagateNan.ALL)
    return lo, tl.maximum(hi, hi_, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def spike_parameters(lo, hi, capacity, clip):  # type: ignore[no-untyped-def]
    """``s`` and ``z`` (float32) of a range, as :func:`neurons.thresholds.threshold_of`."""
    lo, hi = lo * clip, hi * clip
    threshold = tl.maximum(tl.div_rn(hi - lo, capacity), 1e-5, propagate_nan=tl.PropagateNan.ALL)
    # Adding 3 * 2**22 rounds half to even; -lo / s is at most the capacity, up to rounding.
    zero = (tl.div_rn(-lo, threshold) + 12582912.0) - 12582912.0
    return threshold, tl.minimum(tl.maximum(zero, 0.0), capacity)


@triton.jit
def spike_count(x, threshold, bias, capacity):  # type: ignore[no-untyped-def]
    """``q = clip(floor(x / s + bias), 0, qmax)`` as int32."""
    # Clipped first, the floor is the truncation of the conversion: the same integer.
    charged = tl.div_rn(x, threshold) + bias
    return tl.minimum(tl.maximum(charged, 0.0), capacity).to(tl.int32)


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
    x = tl.load(x_ptr + channel, mask=inside, other=0.0)
    if SCALED:
        gain = x
        if HAS_GAIN:
            gain = tl.load(gain_ptr + channel, mask=inside, other=0.0)
        x = normalized(x, gain, scale, HAS_GAIN)
    x = x.to(tl.float32)
    if HAS_OFFSET:
        x -= tl.load(offset_ptr + channel, mask=inside, other=0.0)
    return x, inside


@triton.jit
def normalized(x, gain, scale, HAS_GAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """``gain * (x * scale)``, rounded to the dtype of x after each product, as LLaMA's RMSNorm."""
    y = (x.to(tl.float32) * scale).to(x.dtype)
    if HAS_GAIN:
        y = (y.to(tl.float32) * gain.to(tl.float32)).to(x.dtype)
    return y


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
        at = first + tl.arange(0, BLOCK)
        x, _ = _charge(
            x_ptr,
            gain_ptr,
            scale,
            order_ptr,
            offset_ptr,
            at,
            stop,
            channels,
            GATHER,
            HAS_OFFSET,
            SCALED,
            HAS_GAIN,
        )
        lo, hi = wider(lo, hi, x, x)
    return tl.reduce((lo, hi), 0, wider)


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
    SHARED: tl.constexpr,
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
    if SHARED:
        lo, hi = _range(
            x_ptr,
            gain_ptr,
            scale,
            order_ptr,
            offset_ptr,
            0,
            positions,
            channels,
            GATHER,
            HAS_OFFSET,
            SCALED,
            HAS_GAIN,
            BLOCK,
        )
    for group in range(groups):
        # The segments first..last-1 are those of the group.
        first = tl.sum((group_of < group).to(tl.int32), 0)
        last = tl.sum((group_of <= group).to(tl.int32), 0)
        if not SHARED:
            start = tl.load(segment_ptr + 3 * tl.minimum(first, segments - 1))
            stop = tl.load(segment_ptr + 3 * tl.maximum(last, 1) - 2)
            # Without segments the range is empty: lo = hi = 0.
            stop = tl.multiple_of(tl.where(last > first, stop, start), 64)
            start = tl.multiple_of(start, 64)
            lo, hi = _range(
                x_ptr,
                gain_ptr,
                scale,
                order_ptr,
                offset_ptr,
                start,
                stop,
                channels,
                GATHER,
                HAS_OFFSET,
                SCALED,
                HAS_GAIN,
                BLOCK,
            )
        capacity = tl.load(capacity_ptr + group)
        threshold, zero = spike_parameters(lo, hi, capacity, tl.load(clip_ptr + group))
        tl.store(threshold_ptr + group, threshold)
        tl.store(zero_ptr + group, zero.to(tl.int32))
        for segment in range(first, last):
            begin = tl.multiple_of(tl.load(segment_ptr + 3 * segment), 64)
            end = tl.multiple_of(tl.load(segment_ptr + 3 * segment + 1), 64)
            total = tl.zeros([BLOCK], tl.int32)
            for at_ in range(begin, end, BLOCK):
                at = at_ + tl.arange(0, BLOCK)
                x, inside = _charge(
                    x_ptr,
                    gain_ptr,
                    scale,
                    order_ptr,
                    offset_ptr,
                    at,
                    end,
                    channels,
                    GATHER,
                    HAS_OFFSET,
                    SCALED,
                    HAS_GAIN,
                )
                count = tl.where(inside, spike_count(x, threshold, zero + 0.5, capacity), 0)
                tl.store(count_ptr + at, count.to(tl.uint8), mask=at < end)
                total += count
            tl.store(sum_ptr + segment, tl.sum(total, 0))
