"""From fused q/k/v projections into a static cache in one Triton kernel: what a decoding step writes.

Rotary embedding of Q and K, their rotation, the encoding of K and V, and the write of the payloads to
their slots: the bits of `rotate_heads`, `encode_key_value`, and transformers' `StaticLayer.update`, one
after the other. A rotated row gathers its channels by their order, and each with its partner of the
rotary embedding.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, interpreted, on
from neurons.backends.operator import operator
from snnllm.kernels.attention.rotation import mixed_halves, mixing_of
from snnllm.kernels.attention.rows import group_values, halves_of, slots_of, store_rows
from snnllm.kernels.triton.rotary import check_projected, turned

__all__ = ["check_cache", "store_heads"]

_MANY_ROWS = 1024


def check_cache(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    keys: Tensor,
    values: Tensor,
    key_bytes: int,
    value_bytes: int,
) -> None:
    """Refuse operands that :func:`store_heads` does not take.

    Args:
        projected: As there, and so on.
        cos: Likewise.
        sin: Likewise.
        heads: H.
        keys: Likewise.
        values: Likewise.
        key_bytes: Of a payload of K.
        value_bytes: Likewise of V.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit, or the tokens are more than the slots.
    """
    (batch, tokens, _), kv_heads = projected.shape, keys.shape[1]
    check_projected(projected, cos, sin, heads, kv_heads)
    for name, stored, width in (("keys", keys, key_bytes), ("values", values, value_bytes)):
        if stored.dtype != torch.uint8:
            raise TypeError(f"{name} must be payloads, torch.uint8, got {stored.dtype}.")
        if tuple(stored.shape) != (batch, kv_heads, keys.shape[2], width):
            raise ValueError(
                f"{name} must be [{batch}, {kv_heads}, {keys.shape[2]}, {width}], got "
                f"{tuple(stored.shape)}."
            )
        if not stored.is_contiguous():
            raise ValueError(f"{name} must be contiguous.")
    if tokens > keys.shape[2]:
        raise ValueError(
            f"{tokens} tokens do not fit a static cache of {keys.shape[2]}; give it a larger "
            "max_cache_len."
        )


def _queries(
    projected: Tensor, cos: Tensor, heads: int, rotate_queries: bool, order: Tensor | None
) -> Tensor:
    """Room for the queries, ``[B, H, S, D]``."""
    (batch, tokens, _), turned_too = projected.shape, rotate_queries and order is not None
    dtype = torch.float32 if turned_too else projected.dtype
    return projected.new_empty((batch, heads, tokens, cos.shape[-1]), dtype=dtype)


@operator("snnllm::store_heads", mutates_args=("keys", "values", "length"))
def store_heads(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rotate_queries: bool,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    position: Tensor | None,
    key_slot: Tensor,
    value_slot: Tensor,
    capacity: Tensor,
    key_clip: Tensor,
    value_clip: Tensor,
    shared: bool,
    planes: int,
    slots: int,
    key_plane: int,
    value_plane: int,
    order: Tensor | None = None,
    blocks: list[int] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    """Embed Q and K, rotate and encode K, encode V, and write their payloads into a static cache.

    :func:`check_cache` refuses what this does not take. Carries no gradient.

    Args:
        projected: float ``[B, S, (H + 2 H_kv) D]``, contiguous: queries, keys and values of a token.
        cos: ``[B or 1, S, D]`` in the dtype of the projections, contiguous.
        sin: As cos.
        heads: H.
        rotate_queries: Rotate the queries, too.
        keys: payloads uint8 ``[B, H_kv, L, bytes]``, contiguous; changed at the slots of the S tokens.
        values: Likewise.
        length: Tokens in the cache, int64, one element; becomes ``position + S``.
        position: Of the first of the S tokens in the cache, int64, one element, another tensor. Tokens
            from position L on are not stored. None: behind the tokens in the cache; if they do not fit,
            the kernel fails.
        key_slot: See `operators.encode_key_value`, as the rest.
        value_slot: Likewise.
        capacity: Likewise.
        key_clip: Likewise.
        value_clip: Likewise.
        shared: Likewise.
        planes: Likewise.
        slots: Likewise.
        key_plane: Bytes of one high bit of a row of K.
        value_plane: Likewise of V.
        order: With ``blocks``, which are those of a power of two of channels (`rotation.fuses`).
        blocks: Likewise.
        offset: Likewise.

    Returns:
        Queries ``[B, H, S, D]``, contiguous: rotated ones in float32, others in the dtype of the projections.
    """
    query = _queries(projected, cos, heads, rotate_queries, order)
    (batch, tokens, _), (_, kv_heads, limit, _) = projected.shape, keys.shape
    if projected.numel() == 0:
        return query
    rows, channels = batch * tokens, cos.shape[-1]
    words: Tensor | None = None
    mixed: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    if order is not None:
        words, (mixed, starts) = order.view(torch.int32), mixing_of(tuple(blocks or ()))
    many = rows * kv_heads >= _MANY_ROWS and not interpreted()
    per_program = 8 if many else 2 if interpreted() else 1
    key_blocks = triton.cdiv(rows * kv_heads, per_program)
    early = rows <= EARLY_ROWS and early_launch(projected.device)
    launch: Any = _store[(2 * key_blocks + triton.cdiv(rows * heads, per_program),)]
    with on(projected.device):
        launch(
            *(projected, cos, sin, query, keys, values),
            *(length, length.clone() if position is None else position, words, offset),
            *(key_slot, value_slot, capacity, key_clip, value_clip),
            *(keys.shape[3], values.shape[3], key_plane, value_plane, rows, tokens),
            *(limit, 0 if cos.shape[0] == 1 else tokens, heads, kv_heads, key_blocks),
            MIXED=mixed,
            BLOCKS=starts,
            ROTATED=rotate_queries and order is not None,
            OFFSET=offset is not None,
            EARLY=early,
            CHECKED=position is None,
            D=channels,
            HALF=max(4, triton.next_power_of_2(channels // 2)),
            G=capacity.shape[0],
            SHARED=shared,
            PLANES=planes,
            SLOTS=slots,
            R=per_program,
            num_warps=max(1, per_program // 4),
            enable_fp_fusion=False,
            **({"debug": True, "sanitize_overflow": False} if position is None else {}),
            **({"launch_pdl": True} if early else {}),
        )
    return query


@store_heads.register_fake
def _(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    rotate_queries: bool,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    position: Tensor | None,
    key_slot: Tensor,
    value_slot: Tensor,
    capacity: Tensor,
    key_clip: Tensor,
    value_clip: Tensor,
    shared: bool,
    planes: int,
    slots: int,
    key_plane: int,
    value_plane: int,
    order: Tensor | None = None,
    blocks: list[int] | None = None,
    offset: Tensor | None = None,
) -> Tensor:
    return _queries(projected, cos, heads, rotate_queries, order)


@triton.jit
def _embedded_halves(x_at, cos_at, sin_at, there, D: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows behind the rotary embedding, in their dtype: `[R, HALF]` twice."""
    j = tl.arange(0, HALF)[None, :]
    a = tl.load(x_at + j, mask=there, other=0.0)
    b = tl.load(x_at + j + D // 2, mask=there, other=0.0)
    cos_a = tl.load(cos_at + j, mask=there, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_at + j + D // 2, mask=there, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_at + j, mask=there, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_at + j + D // 2, mask=there, other=0.0).to(tl.float32)
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    return turned(a32, cos_a, -b32, sin_a, a.dtype), turned(b32, cos_b, a32, sin_b, a.dtype)


@triton.jit
def _embedded_quarter(  # type: ignore[no-untyped-def]
    x_at, cos_at, sin_at, order, NUMBER: tl.constexpr, inside, D: tl.constexpr
):
    """The channels in one byte of each word of the order, behind the rotary embedding, float32."""
    channel = (order >> (8 * NUMBER)) & 255
    x = tl.load(x_at + channel, mask=inside, other=0.0)
    partner = tl.load(x_at + (channel ^ (D // 2)), mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_at + channel, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_at + channel, mask=inside, other=0.0).to(tl.float32)
    partner = tl.where(channel < D // 2, -partner, partner)
    return turned(x.to(tl.float32), cos, partner, sin, x.dtype).to(tl.float32)


@triton.jit
def _order_of(order_ptr, head, inside, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """The words of the orders of rows, `[R, D / 4]`."""
    i = tl.arange(0, D // 4)[None, :]
    return tl.load(order_ptr + (head * (D // 4))[:, None] + i, mask=inside, other=0)


@triton.jit
def _rotated_halves(  # type: ignore[no-untyped-def]
    x_at,
    cos_at,
    sin_at,
    order,
    inside,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
):
    """Rows behind rotary embedding and rotation, float32: `[R, D / 2]` twice."""
    a = _embedded_quarter(x_at, cos_at, sin_at, order, 0, inside, D)
    b = _embedded_quarter(x_at, cos_at, sin_at, order, 1, inside, D)
    c = _embedded_quarter(x_at, cos_at, sin_at, order, 2, inside, D)
    d = _embedded_quarter(x_at, cos_at, sin_at, order, 3, inside, D)
    return mixed_halves(a, b, c, d, MIXED, BLOCKS, D, R)


@triton.jit(
    do_not_specialize=["key_plane", "value_plane", "rows", "tokens", "limit", "table_tokens"]
)
def _store(  # type: ignore[no-untyped-def]
    projected_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    length_ptr,
    position_ptr,
    order_ptr,
    offset_ptr,
    key_slot_ptr,
    value_slot_ptr,
    capacity_ptr,
    key_clip_ptr,
    value_clip_ptr,
    key_width,
    value_width,
    key_plane,
    value_plane,
    rows,
    tokens,
    limit,
    table_tokens,
    heads,
    kv_heads,
    key_blocks,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROTATED: tl.constexpr,
    OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    CHECKED: tl.constexpr,
    D: tl.constexpr,
    HALF: tl.constexpr,
    G: tl.constexpr,
    SHARED: tl.constexpr,
    PLANES: tl.constexpr,
    SLOTS: tl.constexpr,
    R: tl.constexpr,
):
    """R heads of K, of V, or of Q; `rows` tokens. Tables are read before the projections are there."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    is_key, is_query = block < key_blocks, block >= 2 * key_blocks
    block -= tl.where(is_key, 0, tl.where(is_query, 2 * key_blocks, key_blocks))
    own = tl.where(is_query, heads, kv_heads)
    number = block * R + tl.arange(0, R)
    row, head = number // own, number % own
    batch, token = (row // tokens).to(tl.int64), row % tokens
    inside = (row < rows)[:, None]
    j = tl.arange(0, HALF)[None, :]
    there = inside & (j < D // 2)
    first_head = tl.where(is_key, heads, tl.where(is_query, 0, heads + kv_heads))
    x_at = row.to(tl.int64) * (heads + 2 * kv_heads) + first_head + head
    x_at = projected_ptr + (x_at * D)[:, None]
    table_at = ((batch * table_tokens + token) * D)[:, None]
    cos_at, sin_at = cos_ptr + table_at, sin_ptr + table_at
    if is_query:
        at = query_ptr + (((batch * heads + head) * tokens + token) * D)[:, None] + j
        if ROTATED:
            order = _order_of(order_ptr, head // (heads // kv_heads), inside, D)
            if EARLY:
                tl.extra.cuda.gdc_wait()
            q_low, q_high = _rotated_halves(
                x_at, cos_at, sin_at, order, inside, MIXED, BLOCKS, D, R
            )
        else:
            if EARLY:
                tl.extra.cuda.gdc_wait()
            q_low, q_high = _embedded_halves(x_at, cos_at, sin_at, there, D, HALF)
        tl.store(at, q_low, mask=there)
        tl.store(at + D // 2, q_high, mask=there)
    else:
        kv_row = batch * kv_heads + head
        top0, top1 = group_values(capacity_ptr, G)
        if is_key:
            clip0, clip1 = group_values(key_clip_ptr, G)
            slot_low, slot_high = slots_of(key_slot_ptr + (head * D)[:, None], there, D, HALF, G, R)
            if OFFSET:
                offset_at = offset_ptr + (head * D)[:, None]
                low_offset, high_offset = halves_of(offset_at, there, D, HALF)
            if len(MIXED) > 0:
                order = _order_of(order_ptr, head, inside, D)
            if EARLY:
                tl.extra.cuda.gdc_wait()
            first = tl.load(position_ptr)
            if len(MIXED) > 0:
                low, high = _rotated_halves(
                    x_at, cos_at, sin_at, order, inside, MIXED, BLOCKS, D, R
                )
            else:
                low, high = _embedded_halves(x_at, cos_at, sin_at, there, D, HALF)
                low, high = low.to(tl.float32), high.to(tl.float32)
            if OFFSET:
                low, high = low - low_offset, high - high_offset
            slot = token + first
            out_at = key_ptr + ((kv_row * limit + slot) * key_width)[:, None]
            store_rows(
                *(low, high, slot_low, slot_high, top0, top1, clip0, clip1, out_at),
                *(inside & (slot < limit)[:, None], key_width, key_plane),
                *(D, HALF, G, SHARED, PLANES, SLOTS, R),
            )
            if CHECKED:
                tl.device_assert(first + tokens <= limit, "the static cache is full")
            if tl.program_id(0) == 0:
                tl.store(length_ptr, first + tokens)
        else:
            clip0, clip1 = group_values(value_clip_ptr, G)
            slot_low, slot_high = slots_of(
                value_slot_ptr + (head * D)[:, None], there, D, HALF, G, R
            )
            if EARLY:
                tl.extra.cuda.gdc_wait()
            slot = token + tl.load(position_ptr)
            low, high = halves_of(x_at, there, D, HALF)
            out_at = value_ptr + ((kv_row * limit + slot) * value_width)[:, None]
            store_rows(
                *(low, high, slot_low, slot_high, top0, top1, clip0, clip1, out_at),
                *(inside & (slot < limit)[:, None], value_width, value_plane),
                *(D, HALF, G, SHARED, PLANES, SLOTS, R),
            )
