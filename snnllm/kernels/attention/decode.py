"""Attention of few query tokens over the encoded cache in Triton: reads payloads, split over the keys.

    P = softmax(scaling * sum_g s_qg s_kg A_g + mask),   out = P (s_v (q_v - z_v))

All queries that share a KV head are one program's, so a payload is read once. Q is encoded here. The
products A_g are exact integers; scores are combined in the order of `snnllm.attention_products.spiking_scores`. In
the product with V, P times the threshold is a sum of two bfloat16 numbers (16 bits) and V are the counts,
whose high bits and zero points are taken in separately:

    sum_n P_n s_n (16 high_n + low_n - z_n) = 16 P' high + P' low - sum_n P'_n z_n
"""

from __future__ import annotations

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import rounded
from snnllm.kernels.attention.mask import float_product, masked_scores, shows
from snnllm.kernels.attention.rows import counts_of, encode_halves, group_values, spread
from snnllm.kernels.attention.unpack import salient_bits

LOG2E = tl.constexpr(1.4426950408889634)


# Four bytes in a register: Triton would unpack int8 tensors one by one. With 0x43 in front a code is the
# bits of 128 + code in bfloat16, exactly.
_TO_NUMBERS = """prmt.b32 a, t, 0x43434343, 0x4140; prmt.b32 b, t, 0x43434343, 0x4342;
    mov.b32 one, 0x3F803F80; mov.b32 minus, 0xC300C300;
    fma.rn.bf16x2 $0, a, one, minus; fma.rn.bf16x2 $1, b, one, minus; }"""
_LOW_CODES = tl.constexpr("and.b32 $0, $1, 0x0F0F0F0F;")
_HIGH_CODES = tl.constexpr("{ .reg .b32 t; shr.b32 t, $1, 4; and.b32 $0, t, 0x0F0F0F0F; }")
_LOW_NUMBERS = tl.constexpr(
    "{ .reg .b32 t, a, b, one, minus; and.b32 t, $2, 0x0F0F0F0F; " + _TO_NUMBERS
)
_HIGH_NUMBERS = tl.constexpr(
    "{ .reg .b32 t, a, b, one, minus; shr.b32 t, $2, 4; and.b32 t, t, 0x0F0F0F0F; " + _TO_NUMBERS
)


@triton.jit
def _codes(packed, SHIFT: tl.constexpr, ASM: tl.constexpr, UNPACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low or high halves of bytes, int8."""
    if UNPACK:
        return tl.inline_asm_elementwise(ASM, "=r,r", [packed], tl.int8, True, 4)
    return ((packed >> SHIFT) & 15).to(tl.int8)


@triton.jit
def _numbers(packed, SHIFT: tl.constexpr, ASM: tl.constexpr, UNPACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low or high halves of bytes, bfloat16."""
    if UNPACK:
        return tl.inline_asm_elementwise(ASM, "=r,=r,r", [packed], tl.bfloat16, True, 4)
    return ((packed >> SHIFT) & 15).to(tl.float32).to(tl.bfloat16)


@triton.jit
def _centred(  # type: ignore[no-untyped-def]
    x, salient, s0, z0, s1, z1, top0, top1, group, G: tl.constexpr, QUERY_GROUPS: tl.constexpr
):
    """Centred counts, int8, of the channels in the group of each row; 0 in the others."""
    zero = spread(z0, z1, salient, QUERY_GROUPS)
    scale = spread(s0, s1, salient, QUERY_GROUPS)
    top = spread(top0, top1, salient, QUERY_GROUPS)
    code = counts_of(x, scale, zero, top) - zero.to(tl.int32)
    if G == 2:
        code = tl.where(salient == (group == 1), code, 0)
    return code.to(tl.int8)


@triton.jit
def _queries(  # type: ignore[no-untyped-def]
    query_at,
    there,
    slot_at,
    member,
    capacity_ptr,
    clip_ptr,
    group,
    G: tl.constexpr,
    QUERY_GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Encode queries `[M, D]`: centred counts of the group of each row (0 in others), and thresholds.

    Returns:
        int8 `[M, HALF]` twice, int8 `[M, SLOTS]` of the salient channels, thresholds `[M, 1]`.
    """
    j = tl.arange(0, HALF)[None, :]
    inside = there & (j < D // 2)
    low = tl.load(query_at + j, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(query_at + j + D // 2, mask=inside, other=0.0).to(tl.float32)
    salient_low, salient_high = j < 0, j < 0
    if G == 2:
        salient_low = tl.load(slot_at + j, mask=j < D // 2, other=-1) >= 0
        salient_high = tl.load(slot_at + j + D // 2, mask=j < D // 2, other=-1) >= 0
    top0, top1 = group_values(capacity_ptr, QUERY_GROUPS)
    clip0, clip1 = group_values(clip_ptr, QUERY_GROUPS)
    s0, z0, s1, z1 = encode_halves(
        low, high, salient_low, salient_high, top0, top1, clip0, clip1, SHARED, QUERY_GROUPS
    )
    low = _centred(low, salient_low, s0, z0, s1, z1, top0, top1, group, G, QUERY_GROUPS)
    high = _centred(high, salient_high, s0, z0, s1, z1, top0, top1, group, G, QUERY_GROUPS)
    own = low  # not used for one group
    if G == 2:
        x = tl.load(query_at + member, mask=there & (member >= 0), other=0.0).to(tl.float32)
        own = counts_of(x, s1, z1, top1) - z1.to(tl.int32)
        own = tl.where((member >= 0) & (group == 1), own, 0).to(tl.int8)
    return low, high, own, tl.where(group == 1, s1, s0)


@triton.jit
def _visible(  # type: ignore[no-untyped-def]
    mask_at, there, key_stride, first, last, lowest, BOOL: tl.constexpr, LOOK: tl.constexpr
):
    """First key and last key + 1 of `first..last-1` that a query sees; none: two equal numbers."""
    n = first + tl.arange(0, LOOK)[None, :]
    start = tl.zeros_like(there.to(tl.int32) + n) + last
    stop = tl.zeros_like(start)
    for _ in range(0, tl.cdiv(last - first, LOOK)):
        seen, _ = shows(mask_at + n * key_stride, there & (n < last), lowest, BOOL)
        start = tl.where(seen, tl.minimum(start, n), start)
        stop = tl.where(seen, n + 1, stop)
        n += LOOK
    start = tl.min(tl.min(start, 1), 0)
    return start, tl.maximum(tl.max(tl.max(stop, 1), 0), start)


@triton.jit(do_not_specialize=["tokens", "keys", "chunk", "key_plane", "value_plane"])
def decode(  # type: ignore[no-untyped-def]
    query_ptr,
    key_ptr,
    value_ptr,
    key_slot_ptr,
    member_ptr,
    value_slot_ptr,
    capacity_ptr,
    clip_ptr,
    mask_ptr,
    part_ptr,
    state_ptr,
    query_batch_stride,
    query_head_stride,
    query_token_stride,
    key_batch_stride,
    key_head_stride,
    key_token_stride,
    value_batch_stride,
    value_head_stride,
    value_token_stride,
    mask_batch_stride,
    mask_query_stride,
    mask_key_stride,
    key_plane,
    value_plane,
    kv_heads,
    share,
    tokens,
    keys,
    chunk,
    scaling,
    lowest,
    G: tl.constexpr,
    QUERY_GROUPS: tl.constexpr,
    SHARED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    KEY_PLANES: tl.constexpr,
    VALUE_PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    BOOL: tl.constexpr,
    ONE_TOKEN: tl.constexpr,
    UNPACK: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    LOOK: tl.constexpr,
):
    """Attention of the queries of one KV head to one chunk of keys.

    A row of the products is a query (ROWS of them), a channel group (G) and a term of its weight (2).

    Operands:
        query_ptr: float `[B, H, tokens, D]` by its strides, 1 along D.
        key_ptr: payloads `[B, H_kv, keys, bytes]` by their strides.
        value_ptr: likewise.
        mask_ptr: bool or float `[B, 1, tokens, keys]` by its strides, or None.
        part_ptr: float32 `[B, H_kv, splits, ROWS, D + SLOTS]`, written: sums with V; then those with the
            high bits of V, times 16.
        state_ptr: float32 `[B, H_kv, splits, 2, ROWS]`, written: maximum of the scores and sum of P.
    """
    M: tl.constexpr = 2 * G * ROWS
    split, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    row = tl.arange(0, M)
    query, term, group = row % ROWS, (row // ROWS % 2)[:, None], (row // (2 * ROWS))[:, None]
    there = (query < share * tokens)[:, None]
    first = split * chunk
    last = tl.minimum(first + chunk, keys)
    start, stop = first, last
    if mask_ptr is not None:
        mask_at = mask_ptr + batch.to(tl.int64) * mask_batch_stride
        some = there
        if ONE_TOKEN:
            some = tl.full([1, 1], True, tl.int1)
        else:
            mask_at = mask_at + (query % tokens * mask_query_stride)[:, None]
        start, stop = _visible(mask_at, some, mask_key_stride, first, last, lowest, BOOL, LOOK)
    j = tl.arange(0, HALF)
    # Lanes beyond the channels repeat the last ones: Q is zero there, and nothing is stored.
    lane = tl.minimum(j, D // 2 - 1) if HALF > D // 2 else j
    i = tl.arange(0, SLOTS)
    query_at = query_ptr + batch.to(tl.int64) * query_batch_stride
    query_at += (head * share + query // tokens) * query_head_stride
    query_at = (query_at + query % tokens * query_token_stride)[:, None]
    member = tl.load(member_ptr + head * SLOTS + i)[None, :] if G == 2 else i[None, :]
    low_query, high_query, own_query, query_scale = _queries(
        *(query_at, there, key_slot_ptr + head * D, member, capacity_ptr, clip_ptr),
        *(group, G, QUERY_GROUPS, SHARED, D, HALF, SLOTS),
    )
    query_sum = tl.sum(low_query.to(tl.int32), 1) + tl.sum(high_query.to(tl.int32), 1)
    key_ptr += batch.to(tl.int64) * key_batch_stride + head * key_head_stride
    value_ptr += batch.to(tl.int64) * value_batch_stride + head * value_head_stride
    THRESHOLD: tl.constexpr = (D // 2 + 3) // 4 * 4
    ZERO: tl.constexpr = THRESHOLD + 4 * G
    low_out = tl.zeros([M, HALF], tl.float32)
    high_out = tl.zeros([M, HALF], tl.float32)
    own_out = tl.zeros([M, SLOTS], tl.float32)
    most = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    offset = tl.zeros([M], tl.float32)
    for left in range(start, stop, BN):
        n = left + tl.arange(0, BN)
        inside = n < stop
        token = tl.minimum(n, keys - 1).to(tl.int64)
        key_at = key_ptr + token * key_token_stride
        value_at = value_ptr + token * value_token_stride
        packed = tl.load(key_at[None, :] + lane[:, None])
        product = tl.dot(low_query, _codes(packed, 0, _LOW_CODES, UNPACK), out_dtype=tl.int32)
        product = tl.dot(
            high_query, _codes(packed, 4, _HIGH_CODES, UNPACK), product, out_dtype=tl.int32
        )
        if KEY_PLANES > 0:
            bits = salient_bits(
                key_at[:, None], i, key_plane, inside[:, None], ZERO + G, KEY_PLANES
            )
            own = tl.dot(own_query, tl.trans(bits.to(tl.int8)), out_dtype=tl.int32)
            product += 16 * own
        zero = tl.load(key_at[None, :] + ZERO + group * (G - 1)).to(tl.int32)
        scale_at = (key_at + THRESHOLD).to(tl.pointer_type(tl.float32))
        scale = tl.load(scale_at[None, :] + group * (G - 1))
        score = (product - query_sum[:, None] * zero).to(tl.float32)
        score = (score * query_scale) * scale
        if G == 2:
            # The groups of a query are 2 ROWS apart: add them, for all of its rows.
            both = tl.sum(tl.reshape(score, [2, 2 * ROWS, BN]), 0)[None, :, :]
            score = tl.reshape(tl.broadcast_to(both, [2, 2 * ROWS, BN]), [M, BN])
        score *= scaling
        if mask_ptr is None:
            score = tl.where(inside[None, :], score, float("-inf"))
        else:
            at = mask_at + (n * mask_key_stride)[None, :]
            score = masked_scores(score, at, some & inside[None, :], lowest, BOOL)
        higher = tl.maximum(most, tl.max(score, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2((score - base[:, None]) * LOG2E)
        decay = tl.exp2((most - base) * LOG2E)
        most = higher
        total = total * decay + tl.sum(p, 1)
        scale_at = (value_at + THRESHOLD).to(tl.pointer_type(tl.float32))
        weight = p * tl.load(scale_at[None, :] + group * (G - 1))
        zero = tl.load(value_at[None, :] + ZERO + group * (G - 1)).to(tl.float32)
        offset = offset * decay + tl.sum(weight * zero, 1)
        main = weight.to(tl.bfloat16)
        weight = tl.where(term == 0, main, (weight - main.to(tl.float32)).to(tl.bfloat16))
        packed = tl.load(value_at[:, None] + lane[None, :])
        numbers = _numbers(packed, 0, _LOW_NUMBERS, UNPACK)
        low_out = float_product(weight, numbers, low_out * decay[:, None], "tf32")
        numbers = _numbers(packed, 4, _HIGH_NUMBERS, UNPACK)
        high_out = float_product(weight, numbers, high_out * decay[:, None], "tf32")
        if VALUE_PLANES > 0:
            bits = salient_bits(
                value_at[:, None], i, value_plane, inside[:, None], ZERO + G, VALUE_PLANES
            )
            bits = bits.to(tl.float32).to(tl.bfloat16)
            own_out = float_product(weight, bits, own_out * decay[:, None], "tf32")
    # One term has the zero points; then the groups are told apart by their channels.
    offset = tl.where(term == 0, offset[:, None], 0.0)
    place = (pair * tl.num_programs(0) + split).to(tl.int64)
    r = tl.arange(0, ROWS)
    part_at = part_ptr + (place * ROWS + r)[:, None] * (D + SLOTS)
    store = (r < share * tokens)[:, None]
    for half in tl.static_range(2):
        out = (low_out if half == 0 else high_out) - offset
        if G == 2:
            slot_at = value_slot_ptr + head * D + j + half * (D // 2)
            salient = tl.load(slot_at, mask=j < D // 2, other=-1) >= 0
            out = tl.where(salient[None, :] == (group == 1), out, 0.0)
        out = tl.sum(tl.reshape(out, [2 * G, ROWS, HALF]), 0)
        tl.store(part_at + j[None, :] + half * (D // 2), out, mask=store & (j < D // 2)[None, :])
    if VALUE_PLANES > 0:
        own_out = tl.where(group == 1, own_out, 0.0)
        own_out = 16.0 * tl.sum(tl.reshape(own_out, [2 * G, ROWS, SLOTS]), 0)
        tl.store(part_at + D + i[None, :], own_out, mask=store)
    state_at = state_ptr + place * 2 * ROWS + query
    tl.store(state_at, most, mask=row < ROWS)
    tl.store(state_at + ROWS, total, mask=row < ROWS)


@triton.jit(do_not_specialize=["tokens", "splits"])
def combine(  # type: ignore[no-untyped-def]
    part_ptr,
    state_ptr,
    slot_ptr,
    out_ptr,
    kv_heads,
    share,
    tokens,
    splits,
    D: tl.constexpr,
    LANES: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put the chunks of `decode` together for one query of one KV head; out `[B, tokens, H, D]`."""
    query, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // kv_heads, pair % kv_heads
    state_ptr += pair.to(tl.int64) * splits * 2 * ROWS + query
    part_ptr += (pair.to(tl.int64) * splits * ROWS + query) * (D + SLOTS)
    split = tl.arange(0, SPLITS)
    state_at = state_ptr + split * 2 * ROWS
    most = tl.load(state_at, mask=split < splits, other=float("-inf"))
    total = tl.load(state_at + ROWS, mask=split < splits, other=0.0)
    top = tl.max(most, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(total * tl.exp2((most - base) * LOG2E), 0)
    c = tl.arange(0, LANES)
    inside = c < D
    slot = tl.full([LANES], -1, tl.int32)
    if PLANES > 0:
        slot = tl.load(slot_ptr + head * D + c, mask=inside, other=-1)
    out = tl.zeros([BLOCK, LANES], tl.float32)
    for first in range(0, splits, BLOCK):
        chunk = first + tl.arange(0, BLOCK)
        highest = tl.load(state_ptr + chunk * 2 * ROWS, mask=chunk < splits, other=float("-inf"))
        # Chunks without a visible key hold nothing.
        there = (highest > float("-inf"))[:, None]
        part_at = part_ptr + (chunk * ROWS * (D + SLOTS))[:, None]
        part = tl.load(part_at + c[None, :], mask=there & inside[None, :], other=0.0)
        if PLANES > 0:
            part += tl.load(
                part_at + D + slot[None, :], mask=there & (slot >= 0)[None, :], other=0.0
            )
        out += part * tl.exp2((highest - base) * LOG2E)[:, None]
    row = tl.sum(out, 0) / tl.where(total == 0.0, 1.0, total)
    # Queries that see no key: zeros.
    row_number = ((batch * tokens + query % tokens) * kv_heads + head).to(
        tl.int64
    ) * share + query // tokens
    tl.store(out_ptr + row_number * D + c, rounded(row, out_ptr.dtype.element_ty), mask=inside)
