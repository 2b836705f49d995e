"""Rows of the encoded KV cache in Triton: heads to payloads.

The layout of a row is described in `snnllm.cache`. The integers are those of `neurons.SpikeEncoder.encode`,
bit for bit: float32, IEEE division, no fused multiply-add (kernels are launched with
`enable_fp_fusion=False`).

Names of all kernels, those of `unpack`, too: D channels of a head, HALF lanes for one half of them, G
channel groups (1 or 2), PLANES high bits of a salient count, SLOTS lanes for the salient channels of a
head. The table `member [H, SLOTS]` has the salient channels of a head (-1: none), its inverse `slot [H, D]`
the place of a channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import (
    clipped,
    range_bits,
    spike_parameters,
    wider,
)
from snnllm.kernels.attention.rotation import place_of, rotated_halves


@triton.jit
def spread(group0, group1, salient, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of rows `[R, 1]` by the group of each channel."""
    return tl.where(salient, group1, group0) if G == 2 else group0


@triton.jit
def encode_halves(  # type: ignore[no-untyped-def]
    low,
    high,
    salient_low,
    salient_high,
    top0,
    top1,
    clip0,
    clip1,
    SHARED: tl.constexpr,
    G: tl.constexpr,
):
    """Thresholds and zero points (float32) of rows `[R, HALF]` + `[R, HALF]`, `[R, 1]` for two groups."""
    for g in tl.static_range(G):
        if g == 0 or not SHARED:
            a, b = low, high
            if G == 2 and not SHARED:
                # The range includes zero, so zeros may stand for the other group.
                a = tl.where(salient_low == (g == 1), a, 0.0)
                b = tl.where(salient_high == (g == 1), b, 0.0)
            lo, hi = wider(tl.zeros_like(a), tl.zeros_like(a), a, a)
            lo, hi = wider(lo, hi, b, b)
            least, most = tl.split(tl.max(range_bits(lo, hi), 1).to(tl.float32, bitcast=True))
        top, clip = (top0, clip0) if g == 0 else (top1, clip1)
        s, z = spike_parameters(-least, most, top, clip)
        if g == 0:
            s0, z0 = s[:, None], z[:, None]
            s1, z1 = s0, z0
        else:
            s1, z1 = s[:, None], z[:, None]
    return s0, z0, s1, z1


@triton.jit
def counts_of(x, s, z, capacity):  # type: ignore[no-untyped-def]
    """`clip(floor(x / s + (z + 1/2)), 0, qmax)` as int32."""
    return clipped(tl.div_rn(x, s + tl.zeros_like(x)) + (z + 0.5), capacity)


@triton.jit
def group_values(ptr, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the first and the last of G groups have in a table."""
    return tl.load(ptr), tl.load(ptr + G - 1)


@triton.jit
def slots_of(  # type: ignore[no-untyped-def]
    slot_at, there, D: tl.constexpr, HALF: tl.constexpr, G: tl.constexpr, R: tl.constexpr
):
    """Places of the channels of rows among the salient ones, int32 `[R, HALF]` twice; -1 for others."""
    low = tl.full([R, HALF], -1, tl.int32)
    high = low
    if G == 2:
        at = slot_at + tl.arange(0, HALF)[None, :]
        low = tl.load(at, mask=there, other=-1)
        high = tl.load(at + D // 2, mask=there, other=-1)
    return low, high


@triton.jit
def halves_of(at, there, D: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of the lower and the upper channels of rows, float32 `[R, HALF]` twice."""
    at += tl.arange(0, HALF)[None, :]
    low = tl.load(at, mask=there, other=0.0).to(tl.float32)
    return low, tl.load(at + D // 2, mask=there, other=0.0).to(tl.float32)


@triton.jit
def store_rows(  # type: ignore[no-untyped-def]
    low,
    high,
    slot_low,
    slot_high,
    top0,
    top1,
    clip0,
    clip1,
    out_at,
    inside,
    width,
    plane_bytes,
    D: tl.constexpr,
    HALF: tl.constexpr,
    G: tl.constexpr,
    SHARED: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
):
    """Encode R rows, float32 `[R, HALF]` + `[R, HALF]`, and store their payloads where `inside [R, 1]`."""
    j = tl.arange(0, HALF)[None, :]
    salient_low, salient_high = slot_low >= 0, slot_high >= 0
    s0, z0, s1, z1 = encode_halves(
        low, high, salient_low, salient_high, top0, top1, clip0, clip1, SHARED, G
    )
    low = counts_of(
        *(low, spread(s0, s1, salient_low, G), spread(z0, z1, salient_low, G)),
        spread(top0, top1, salient_low, G),
    )
    high = counts_of(
        *(high, spread(s0, s1, salient_high, G), spread(z0, z1, salient_high, G)),
        spread(top0, top1, salient_high, G),
    )
    THRESHOLD: tl.constexpr = (D // 2 + 3) // 4 * 4
    ZERO: tl.constexpr = THRESHOLD + 4 * G
    code = tl.where(j < D // 2, (low & 15) | (high & 15) << 4, 0)
    tl.store(out_at + j, code.to(tl.uint8), mask=inside & (j < THRESHOLD))
    for g in tl.static_range(G):
        s, z = (s0, z0) if g == 0 else (s1, z1)
        at = (out_at + THRESHOLD + 4 * g).to(tl.pointer_type(tl.float32))
        tl.store(at, s, mask=inside)
        tl.store(out_at + ZERO + g, z.to(tl.uint8), mask=inside)
    used = ZERO + G + PLANES * plane_bytes
    for p in tl.static_range(PLANES):
        own_low = ((low >> (4 + p)) & 1) << (slot_low & 7)
        own_high = ((high >> (4 + p)) & 1) << (slot_high & 7)
        for byte in tl.static_range(SLOTS // 8):
            bits = tl.where(salient_low & (slot_low // 8 == byte), own_low, 0)
            bits += tl.where(salient_high & (slot_high // 8 == byte), own_high, 0)
            bits = tl.sum(bits, 1, keep_dims=True).to(tl.uint8)
            number = tl.full([1, 1], byte, tl.int32)
            at = out_at + ZERO + G + p * plane_bytes + number
            tl.store(at, bits, mask=inside & (number < plane_bytes))
    rest = used + tl.arange(0, 16)[None, :]
    tl.store(out_at + rest, tl.zeros([R, 16], tl.uint8), mask=inside & (rest < width))


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    offset_ptr,
    slot_ptr,
    capacity_ptr,
    clip_ptr,
    out_ptr,
    batch_stride,
    head_stride,
    token_stride,
    slot_stride,
    width,
    plane_bytes,
    rows,
    heads,
    share,
    tokens,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    G: tl.constexpr,
    SHARED: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
):
    """Payloads of R rows; x `[B, H, S, D]` with stride 1 along D, out uint8 `[B, H, S, width]`.

    Rows are rotated first unless MIXED is empty (`rotated_halves`; D is a power of two then), and the
    offset of the head is taken off, float32 `[H, D]`.
    """
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = (row < rows)[:, None]
    head, x_at = place_of(row, heads, tokens, batch_stride, head_stride, token_stride)
    x_at = x_ptr + x_at[:, None]
    there = inside & (tl.arange(0, HALF)[None, :] < D // 2)
    if len(MIXED) > 0:
        order_at = order_ptr + (head // share * (D // 4))[:, None]
        low, high = rotated_halves(x_at, order_at, inside, MIXED, BLOCKS, D, D, R)
    else:
        low, high = halves_of(x_at, there, D, HALF)
    if OFFSET:
        low_offset, high_offset = halves_of(offset_ptr + (head * D)[:, None], there, D, HALF)
        low, high = low - low_offset, high - high_offset
    slot_low, slot_high = slots_of(slot_ptr + (head * slot_stride)[:, None], there, D, HALF, G, R)
    top0, top1 = group_values(capacity_ptr, G)
    clip0, clip1 = group_values(clip_ptr, G)
    out_at = out_ptr + row.to(tl.int64)[:, None] * width
    store_rows(
        *(low, high, slot_low, slot_high, top0, top1, clip0, clip1, out_at, inside),
        *(width, plane_bytes, D, HALF, G, SHARED, PLANES, SLOTS, R),
    )


@triton.jit(do_not_specialize=["plane_bytes", "plane_bytes_", "rows", "tokens"])
def encode_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    offset_ptr,
    slot_ptr,
    capacity_ptr,
    clip_ptr,
    out_ptr,
    batch_stride,
    head_stride,
    token_stride,
    slot_stride,
    width,
    plane_bytes,
    x_ptr_,
    order_ptr_,
    offset_ptr_,
    slot_ptr_,
    capacity_ptr_,
    clip_ptr_,
    out_ptr_,
    batch_stride_,
    head_stride_,
    token_stride_,
    slot_stride_,
    width_,
    plane_bytes_,
    rows,
    heads,
    share,
    tokens,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    G: tl.constexpr,
    SHARED: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
):
    """Payloads of one operand, or (`program_id(1)` 0 and 1) of two in one launch: K, rotated, and V."""
    if tl.program_id(1) == 0:
        _encode(
            *(x_ptr, order_ptr, offset_ptr, slot_ptr, capacity_ptr, clip_ptr, out_ptr),
            *(batch_stride, head_stride, token_stride, slot_stride, width, plane_bytes),
            *(rows, heads, share, tokens, MIXED, BLOCKS, OFFSET),
            *(D, HALF, G, SHARED, PLANES, SLOTS, R),
        )
    else:
        _encode(
            *(x_ptr_, order_ptr_, offset_ptr_, slot_ptr_, capacity_ptr_, clip_ptr_, out_ptr_),
            *(batch_stride_, head_stride_, token_stride_, slot_stride_, width_, plane_bytes_),
            *(rows, heads, share, tokens, (), (), False),
            *(D, HALF, G, SHARED, PLANES, SLOTS, R),
        )
