"""Rows of the encoded KV cache in Triton: heads to payloads, and payloads to operands of matrix products.

The layout of a row is described in `snnllm.cache`. The integers are those of `neurons.SpikeEncoder.encode`,
bit for bit: float32, IEEE division, no fused multiply-add (kernels are launched with
`enable_fp_fusion=False`).

Names of all kernels: D channels of a head, HALF lanes for one half of them, G channel groups (1 or 2),
PLANES high bits of a salient count, SLOTS lanes for the salient channels of a head. The table `member
[H, SLOTS]` has the salient channels of a head (-1: none), its inverse `slot [H, D]` the place of a channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import (
    clipped,
    range_bits,
    rounded,
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
    capacity_ptr,
    clip_ptr,
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
        s, z = spike_parameters(-least, most, tl.load(capacity_ptr + g), tl.load(clip_ptr + g))
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
    j = tl.arange(0, HALF)[None, :]
    there = inside & (j < D // 2)
    if len(MIXED) > 0:
        order_at = order_ptr + (head // share * (D // 4))[:, None]
        low, high = rotated_halves(x_at, order_at, inside, MIXED, BLOCKS, D, D, R)
    else:
        low = tl.load(x_at + j, mask=there, other=0.0).to(tl.float32)
        high = tl.load(x_at + j + D // 2, mask=there, other=0.0).to(tl.float32)
    if OFFSET:
        offset_at = offset_ptr + (head * D)[:, None] + j
        low -= tl.load(offset_at, mask=there, other=0.0)
        high -= tl.load(offset_at + D // 2, mask=there, other=0.0)
    slot_low = tl.full([R, HALF], -1, tl.int32)
    slot_high = slot_low
    if G == 2:
        slot_at = slot_ptr + (head * slot_stride)[:, None] + j
        slot_low = tl.load(slot_at, mask=there, other=-1)
        slot_high = tl.load(slot_at + D // 2, mask=there, other=-1)
    salient_low, salient_high = slot_low >= 0, slot_high >= 0
    s0, z0, s1, z1 = encode_halves(
        low, high, salient_low, salient_high, capacity_ptr, clip_ptr, SHARED, G
    )
    top0, top1 = tl.load(capacity_ptr), tl.load(capacity_ptr + G - 1)
    low = counts_of(
        *(low, spread(s0, s1, salient_low, G), spread(z0, z1, salient_low, G)),
        spread(top0, top1, salient_low, G),
    )
    high = counts_of(
        *(high, spread(s0, s1, salient_high, G), spread(z0, z1, salient_high, G)),
        spread(top0, top1, salient_high, G),
    )
    out_at = out_ptr + row.to(tl.int64)[:, None] * width
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


@triton.jit
def _is_hidden(kind_ptr, blocks, tiles, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether no tile of queries sees this block of keys; kinds `[tiles, blocks]` of a batch entry."""
    seen = tl.zeros([BLOCKS], tl.int32)
    for first in range(0, tiles, BLOCKS):
        tile = first + tl.arange(0, BLOCKS)
        seen += tl.load(kind_ptr + tile * blocks, mask=tile < tiles, other=0).to(tl.int32)
    return tl.sum(seen, 0) == 0


@triton.jit
def _rows(  # type: ignore[no-untyped-def]
    row_ptr, pair, heads, tokens, batch_stride, head_stride, token_stride, T: tl.constexpr
):
    """T tokens of a batch entry and head: which, whether they are there, where their payloads lie."""
    token = tl.program_id(0) * T + tl.arange(0, T)
    row_at = row_ptr + (pair // heads).to(tl.int64) * batch_stride + pair % heads * head_stride
    return token, (token < tokens)[:, None], row_at + token.to(tl.int64)[:, None] * token_stride


@triton.jit
def _slots(row_at, width_slots, plane_bytes, inside, ZERO_END: tl.constexpr, PLANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """High bits of the salient channels `[T, SLOTS]`, as int32 without their factor 16."""
    i = width_slots[None, :]
    total = tl.zeros_like(i)
    for p in tl.static_range(PLANES):
        at = row_at + ZERO_END + p * plane_bytes + i // 8
        byte = tl.load(at, mask=inside & (i // 8 < plane_bytes), other=0).to(tl.int32)
        total = total + (((byte >> (i & 7)) & 1) << p)
    return total


@triton.jit(do_not_specialize=["plane_bytes", "tokens", "blocks", "tiles"])
def unpack_codes(  # type: ignore[no-untyped-def]
    row_ptr,
    slot_ptr,
    member_ptr,
    kind_ptr,
    out_ptr,
    threshold_ptr,
    batch_stride,
    head_stride,
    token_stride,
    slot_stride,
    plane_bytes,
    heads,
    share,
    tokens,
    padded,
    blocks,
    tiles,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    G: tl.constexpr,
    KEY_GROUPS: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    T: tl.constexpr,
):
    """Centred counts of payloads, as an int8 product needs them.

    Channels that are not salient stay in place and the others are zeros there; the salient ones follow at
    WIDTH, in their order. Q is taken apart by the tables of K, `share` heads for one of K.

    Operands:
        row_ptr: payloads `[B, H, tokens, bytes]`.
        kind_ptr: int8 `[B, tiles, blocks]`; blocks of keys that all tiles hide are left out.
        out_ptr: int8 `[B, H, padded, WIDTH + SLOTS]`, written; zeros behind the last token.
        threshold_ptr: float32 `[B, H, G, padded]`, written.
    """
    pair = tl.program_id(1)
    head = pair % heads
    if HAS_KINDS:
        kinds = kind_ptr + (pair // heads).to(tl.int64) * tiles * blocks + tl.program_id(0)
        if _is_hidden(kinds, blocks, tiles, 64):
            return
    token, inside, row_at = _rows(
        row_ptr, pair, heads, tokens, batch_stride, head_stride, token_stride, T
    )
    THRESHOLD: tl.constexpr = (D // 2 + 3) // 4 * 4
    ZERO: tl.constexpr = THRESHOLD + 4 * G
    out_row = pair.to(tl.int64) * padded + token
    out_at = out_ptr + out_row[:, None] * (WIDTH + SLOTS)
    j = tl.arange(0, HALF)[None, :]
    code = tl.load(row_at + j, mask=inside & (j < D // 2), other=0).to(tl.int32)
    zero = tl.load(row_at + ZERO, mask=inside, other=0).to(tl.int32)
    low, high = (code & 15) - zero, (code >> 4) - zero
    if KEY_GROUPS == 2:
        slot_at = slot_ptr + head // share * slot_stride + j
        low = tl.where(tl.load(slot_at, mask=j < D // 2, other=0) < 0, low, 0)
        high = tl.where(tl.load(slot_at + D // 2, mask=j < D // 2, other=0) < 0, high, 0)
    tl.store(out_at + j, low.to(tl.int8), mask=j < D // 2)
    tl.store(out_at + j + D // 2, high.to(tl.int8), mask=j < D // 2)
    if WIDTH > D:
        k = D + tl.arange(0, WIDTH)[None, :]
        tl.store(out_at + k, tl.zeros([T, WIDTH], tl.int8), mask=k < WIDTH)
    if KEY_GROUPS == 2:
        i = tl.arange(0, SLOTS)
        channel = tl.load(member_ptr + head // share * SLOTS + i)[None, :]
        used = inside & (channel >= 0)
        own = tl.load(row_at + channel % (D // 2), mask=used, other=0).to(tl.int32)
        own = (own >> (channel // (D // 2) * 4)) & 15
        own += 16 * _slots(row_at, i, plane_bytes, used, ZERO + G, PLANES)
        own -= tl.load(row_at + ZERO + G - 1, mask=inside, other=0).to(tl.int32)
        tl.store(out_at + WIDTH + i[None, :], tl.where(used, own, 0).to(tl.int8))
    for g in tl.static_range(G):
        at = (row_at + THRESHOLD + 4 * g).to(tl.pointer_type(tl.float32))
        s = tl.load(at, mask=inside, other=0.0)
        to = threshold_ptr + (pair.to(tl.int64) * G + g) * padded + token
        tl.store(to[:, None], s)


@triton.jit(do_not_specialize=["plane_bytes", "tokens", "blocks", "tiles"])
def unpack_values(  # type: ignore[no-untyped-def]
    row_ptr,
    slot_ptr,
    kind_ptr,
    out_ptr,
    batch_stride,
    head_stride,
    token_stride,
    slot_stride,
    plane_bytes,
    heads,
    tokens,
    padded,
    blocks,
    tiles,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HALF: tl.constexpr,
    G: tl.constexpr,
    PLANES: tl.constexpr,
    HAS_KINDS: tl.constexpr,
    T: tl.constexpr,
):
    """Decoded values `s (q - z)` of payloads, `[B, H, padded, WIDTH]`; else as `unpack_codes`."""
    pair = tl.program_id(1)
    head = pair % heads
    if HAS_KINDS:
        kinds = kind_ptr + (pair // heads).to(tl.int64) * tiles * blocks + tl.program_id(0)
        if _is_hidden(kinds, blocks, tiles, 64):
            return
    token, inside, row_at = _rows(
        row_ptr, pair, heads, tokens, batch_stride, head_stride, token_stride, T
    )
    THRESHOLD: tl.constexpr = (D // 2 + 3) // 4 * 4
    ZERO: tl.constexpr = THRESHOLD + 4 * G
    out_at = out_ptr + (pair.to(tl.int64) * padded + token)[:, None] * WIDTH
    j = tl.arange(0, HALF)[None, :]
    code = tl.load(row_at + j, mask=inside & (j < D // 2), other=0).to(tl.int32)
    scale_at = (row_at + THRESHOLD).to(tl.pointer_type(tl.float32))
    s0 = tl.load(scale_at, mask=inside, other=0.0)
    s1 = tl.load(scale_at + G - 1, mask=inside, other=0.0)
    z0 = tl.load(row_at + ZERO, mask=inside, other=0).to(tl.int32)
    z1 = tl.load(row_at + ZERO + G - 1, mask=inside, other=0).to(tl.int32)
    for half in tl.static_range(2):
        count = (code >> (4 * half)) & 15
        s, z = s0, z0
        if G == 2:
            slot = tl.load(
                slot_ptr + head * slot_stride + j + half * (D // 2), mask=j < D // 2, other=-1
            )
            salient = slot >= 0
            for p in tl.static_range(PLANES):
                at = row_at + ZERO + G + p * plane_bytes + slot // 8
                byte = tl.load(at, mask=inside & salient, other=0).to(tl.int32)
                count += ((byte >> (slot & 7)) & 1) << (4 + p)
            s, z = tl.where(salient, s1, s0), tl.where(salient, z1, z0)
        value = s * (count - z).to(tl.float32)
        value = rounded(value, out_ptr.dtype.element_ty)
        tl.store(out_at + j + half * (D // 2), value, mask=j < D // 2)
    if WIDTH > D:
        k = D + tl.arange(0, WIDTH)[None, :]
        tl.store(out_at + k, tl.zeros([T, WIDTH], out_ptr.dtype.element_ty), mask=k < WIDTH)
