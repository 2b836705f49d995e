"""Attention of many query tokens over unpacked K and V in Triton: integer scores, online softmax.

    P = softmax(scaling * sum_g s_qg s_kg A_g + mask),   out = P V

The products A_g are exact integers on tensor cores; scores are combined in the order of
`snnllm.attention_products.spiking_scores`. P and V enter their product in the dtype of V (float32: as three
products of TF32 numbers).
"""

from __future__ import annotations

import triton
import triton.language as tl

from neurons.backends.triton_encode_row import rounded
from snnllm.kernels.attention.mask import HIDDEN, WHOLE, float_product, masked_scores

LOG2E = tl.constexpr(1.4426950408889634)
SUM_WIDTH = tl.constexpr(16)  # columns of the product that sums the weights of a query


@triton.jit
def _blocks(  # type: ignore[no-untyped-def]
    state,
    first,
    last,
    query,
    salient_query,
    scale0,
    scale1,
    code_ptr,
    threshold_ptr,
    value_ptr,
    mask_at,
    inside_query,
    mask_key_stride,
    keys,
    padded,
    scaling,
    lowest,
    plane,
    steps,
    G: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    STEPPED: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BOOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
):
    """Take in the blocks of keys first..last-1; state is the output, maximum and sum of each query."""
    out, most, total = state
    d = tl.arange(0, WIDTH)
    ones = tl.full([BN, SUM_WIDTH], 1.0, value_ptr.dtype.element_ty)
    for block in range(first, last):
        n = block * BN + tl.arange(0, BN)
        code_at = code_ptr + (n.to(tl.int64) * (WIDTH + SLOTS))[None, :]
        product = tl.dot(query, tl.load(code_at + d[:, None]), out_dtype=tl.int32)
        if STEPPED:
            step_at = code_at
            for _ in range(1, steps):
                step_at += plane
                product += tl.dot(query, tl.load(step_at + d[:, None]), out_dtype=tl.int32)
        key_scale = tl.load(threshold_ptr + n)
        score = (product.to(tl.float32) * scale0) * key_scale[None, :]
        if G == 2:
            i = WIDTH + tl.arange(0, SLOTS)
            product = tl.dot(salient_query, tl.load(code_at + i[:, None]), out_dtype=tl.int32)
            if STEPPED:
                step_at = code_at
                for _ in range(1, steps):
                    step_at += plane
                    part = tl.dot(salient_query, tl.load(step_at + i[:, None]), out_dtype=tl.int32)
                    product += part
            key_scale = tl.load(threshold_ptr + padded + n)
            score += (product.to(tl.float32) * scale1) * key_scale[None, :]
        score *= scaling
        if MASKED:
            inside = inside_query & (n < keys)[None, :]
            if HAS_MASK:
                at = mask_at + (n * mask_key_stride)[None, :]
                score = masked_scores(score, at, inside, lowest, BOOL)
            else:
                score = tl.where(inside, score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, 1))
        # A query that has seen no key yet: any finite number instead of minus infinity.
        base = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        p = tl.exp2((score - base[:, None]) * LOG2E)
        decay = tl.exp2((most - base) * LOG2E)
        most = higher
        value = tl.load(value_ptr + (n.to(tl.int64) * WIDTH)[:, None] + d[None, :])
        p = rounded(p, value.dtype)
        # A product adds in the device's order; tl.sum in that of a layout, which the compiler chooses by the
        # code around it, and the views have to round alike.
        total = float_product(p, ones, total * decay[:, None], PRECISION)
        out = float_product(p, value, out * decay[:, None], PRECISION)
    return out, most, total


@triton.jit(do_not_specialize=["tokens", "blocks", "steps"])
def prefill(  # type: ignore[no-untyped-def]
    query_ptr,
    query_threshold_ptr,
    code_ptr,
    threshold_ptr,
    value_ptr,
    mask_ptr,
    kind_ptr,
    out_ptr,
    mask_batch_stride,
    mask_query_stride,
    mask_key_stride,
    heads,
    share,
    tokens,
    query_padded,
    keys,
    padded,
    blocks,
    scaling,
    lowest,
    plane,
    steps,
    G: tl.constexpr,
    QUERY_GROUPS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    SLOTS: tl.constexpr,
    STEPPED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BOOL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of BM queries of one head.

    Operands:
        query_ptr: int8 `[B, H, query_padded, WIDTH + SLOTS]` (`unpack.unpack_codes`).
        query_threshold_ptr: float32 `[B, H, G_q, query_padded]`.
        code_ptr: int8 `[B, H_kv, padded, WIDTH + SLOTS]`; or, STEPPED, one such for every step, `plane`
            elements apart: the integers are summed over the steps.
        threshold_ptr: float32 `[B, H_kv, G, padded]`.
        value_ptr: `[B, H_kv, padded, WIDTH]`.
        mask_ptr: bool or float `[B, 1, tokens, keys]` by its strides, or None.
        kind_ptr: int8 `[B, tiles, blocks]` of the mask, or None.
        out_ptr: `[B, tokens, H, D]`, written.
    """
    # The last tiles see the most keys, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    pair = tl.program_id(1)
    batch, head = pair // heads, pair % heads
    key_pair = (batch * (heads // share) + head // share).to(tl.int64)
    m = tile * BM + tl.arange(0, BM)
    inside_query = (m < tokens)[:, None]
    query_at = query_ptr + (pair.to(tl.int64) * query_padded + m)[:, None] * (WIDTH + SLOTS)
    query = tl.load(query_at + tl.arange(0, WIDTH)[None, :])
    scale_at = query_threshold_ptr + pair.to(tl.int64) * QUERY_GROUPS * query_padded + m
    scale0 = tl.load(scale_at)[:, None]
    salient_query, scale1 = query, scale0
    if G == 2:
        salient_query = tl.load(query_at + WIDTH + tl.arange(0, SLOTS)[None, :])
        scale1 = tl.load(scale_at + (QUERY_GROUPS - 1) * query_padded)[:, None]
    code_ptr += key_pair * padded * (WIDTH + SLOTS)
    threshold_ptr += key_pair * G * padded
    value_ptr += key_pair * padded * WIDTH
    state = (
        tl.zeros([BM, WIDTH], tl.float32),
        tl.full([BM], float("-inf"), tl.float32),
        tl.zeros([BM, SUM_WIDTH], tl.float32),
    )
    HAS_MASK: tl.constexpr = mask_ptr is not None
    if not HAS_MASK:
        mask_at = m[:, None]  # not read
        start, whole, partial, stop = 0, 0, keys // BN, blocks
    else:
        mask_at = mask_ptr + batch.to(tl.int64) * mask_batch_stride
        mask_at = mask_at + (m.to(tl.int64) * mask_query_stride)[:, None]
        block = tl.arange(0, BLOCKS)
        at = kind_ptr + (batch * tl.num_programs(0) + tile).to(tl.int64) * blocks + block
        kind = tl.load(at, mask=block < blocks, other=HIDDEN)
        start = tl.min(tl.where(kind != HIDDEN, block, blocks), 0)
        stop = tl.max(tl.where(kind != HIDDEN, block + 1, 0), 0)
        whole = tl.min(tl.where(kind == WHOLE, block, stop), 0)
        partial = tl.min(tl.where((kind != WHOLE) & (block >= whole), block, stop), 0)
    # Blocks on the edges of a mask, blocks that it shows whole, and again the edges.
    bounds = (start, whole, partial, stop)
    for part in tl.static_range(0 if HAS_MASK else 1, 3):
        state = _blocks(
            *(
                state,
                bounds[part],
                bounds[part + 1],
                query,
                salient_query,
                scale0,
                scale1,
                code_ptr,
            ),
            *(
                threshold_ptr,
                value_ptr,
                mask_at,
                inside_query,
                mask_key_stride,
                keys,
                padded,
                scaling,
            ),
            *(
                lowest,
                plane,
                steps,
                G,
                WIDTH,
                SLOTS,
                STEPPED,
                part != 1,
                HAS_MASK,
                BOOL,
                PRECISION,
                BN,
            ),
        )
    out, _, total = state
    total = tl.max(total, 1)  # its columns are equal
    # Queries that see no key: zeros.
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    d = tl.arange(0, WIDTH)
    row = (batch * tokens + m).to(tl.int64) * heads + head
    at = out_ptr + row[:, None] * D + d[None, :]
    out = rounded(out, out_ptr.dtype.element_ty)
    tl.store(at, out, mask=inside_query & (d < D)[None, :])
