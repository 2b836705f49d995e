"""Rows of the encoded KV cache in Triton: payloads to operands of matrix products; names as in `rows`."""

from __future__ import annotations

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import rounded


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
def salient_bits(  # type: ignore[no-untyped-def]
    row_at, slot, plane_bytes, inside, ZERO_END: tl.constexpr, PLANES: tl.constexpr
):
    """High bits of the salient channels `[T, SLOTS]`, as int32 without their factor 16."""
    i = slot[None, :]
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
        own += 16 * salient_bits(row_at, i, plane_bytes, used, ZERO + G, PLANES)
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
            # A hole between visible blocks is read, with probability 0: it must hold numbers.
            token = tl.program_id(0) * T + tl.arange(0, T)
            at = out_ptr + (pair.to(tl.int64) * padded + token)[:, None] * WIDTH
            zero = tl.zeros([T, WIDTH], out_ptr.dtype.element_ty)
            tl.store(at + tl.arange(0, WIDTH)[None, :], zero)
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
