"""Rotary position embedding in Triton: the tables of cos and sin, and fused q/k/v projections.

Transformers makes the tables with nine kernels and rotates q and k with ten. Here one makes the tables, and
in one more a program takes some heads of a token from the fused projection and writes them, rotated, in the
layout that attention reads. Products and sums are rounded to the dtype one by one, so the bits are those of
``apply_rotary_pos_emb``.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import on
from neurons.backends.operator import operator
from neurons.backends.triton_encode_row import rounded

__all__ = ["check_projected", "rotary_tables", "rotate_and_store", "rotate_heads", "turned"]

_HEADS = 4


@operator("snnllm::rotary_tables")
def rotary_tables(
    positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Make the tables of `LlamaRotaryEmbedding`. Carries no gradient.

    Args:
        positions: int64 ``[B, S]``.
        frequencies: Inverse frequencies ``[D / 2]``, float32, bfloat16 or float16, contiguous; D even.
        scaling: Factor on both tables, in float32.
        dtype: Of the tables.

    Returns:
        cos and sin, ``[B, S, D]``: of the product of position and frequency in float32, the D / 2 of them twice.
        Transformers' products are those of TF32 where that is allowed; these are not.
    """
    positions, half = positions.contiguous(), len(frequencies)
    cos, sin = _tables(positions, half, dtype)
    if positions.numel():
        launch: Any = _rotary_tables[(positions.numel(),)]
        with on(positions.device):
            launch(
                *(positions, frequencies, cos, sin, scaling),
                HALF=half,
                BLOCK=triton.next_power_of_2(half),
                num_warps=1,
                enable_fp_fusion=False,
            )
    return cos, sin


def _tables(positions: Tensor, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    cos = positions.new_empty((*positions.shape, 2 * half), dtype=dtype)
    return cos, torch.empty_like(cos)


@rotary_tables.register_fake
def _(
    positions: Tensor, frequencies: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _tables(positions, len(frequencies), dtype)


def rotate_heads(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Rotate the queries and keys of fused projections. Carries no gradient.

    Args:
        projected: ``[B, S, (H + 2 H_kv) D]``: queries, keys and values of a token, contiguous.
        cos: ``[B or 1, S, D]`` in the dtype of the projections.
        sin: as cos.
        heads: H.
        kv_heads: H_kv.

    Returns:
        Queries ``[B, H, S, D]`` and keys ``[B, H_kv, S, D]``, contiguous.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit, or D is odd.
    """
    check_projected(projected, cos, sin, heads, kv_heads)
    query, key = _rotate_heads_op(
        projected.detach(), cos.contiguous(), sin.contiguous(), heads, kv_heads
    )
    return query, key


def rotate_and_store(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    position: Tensor,
) -> Tensor:
    """Rotate queries and keys, and write keys and values into a static cache.

    Args:
        projected: ``[B, S, (H + 2 H_kv) D]``, contiguous.
        cos: ``[B or 1, S, D]`` in the dtype of the projections.
        sin: as cos.
        heads: H.
        keys: ``[B, H_kv, L, D]``, contiguous; changed at the positions of the S tokens.
        values: as keys.
        length: tokens in the cache, int64, one element; becomes ``position + S``.
        position: of the first of the S tokens in the cache, int64, one element, another tensor. Tokens
            from position L on are not stored.

    Returns:
        Queries ``[B, H, S, D]``, contiguous.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape does not fit, or D is odd.
    """
    check_projected(projected, cos, sin, heads, keys.shape[1])
    batch, dim = len(projected), cos.shape[-1]
    for name, stored in {"keys": keys, "values": values}.items():
        if stored.dtype != projected.dtype:
            raise TypeError(
                f"{name} must be {projected.dtype} as projected is, got {stored.dtype}."
            )
        if (len(stored), *stored.shape[1::2]) != (batch, keys.shape[1], dim):
            raise ValueError(
                f"{name} must be [{batch}, {keys.shape[1]}, L, {dim}], got {tuple(stored.shape)}."
            )
        if stored.shape != keys.shape or not stored.is_contiguous():
            raise ValueError("keys and values must be contiguous and of one shape.")
    query: Tensor = _rotate_and_store_op(
        projected.detach(),
        cos.contiguous(),
        sin.contiguous(),
        heads,
        keys,
        values,
        length,
        position,
    )
    return query


def check_projected(projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> None:
    """Refuse what :func:`rotate_heads` refuses."""
    batch, tokens, width = projected.shape
    dim, rest = divmod(width, heads + 2 * kv_heads)
    if rest or dim % 2 or not projected.is_contiguous():
        raise ValueError(
            f"projected must be contiguous [B, S, (H + 2 H_kv) D] with D even, got "
            f"{tuple(projected.shape)} for {heads} and {kv_heads} heads."
        )
    for name, table in {"cos": cos, "sin": sin}.items():
        if table.dtype != projected.dtype:
            raise TypeError(f"{name} must be {projected.dtype} as projected is, got {table.dtype}.")
        if tuple(table.shape) not in ((batch, tokens, dim), (1, tokens, dim)):
            raise ValueError(f"{name} must be [B or 1, {tokens}, {dim}], got {tuple(table.shape)}.")


def _queries(projected: Tensor, heads: int, kv_heads: int) -> Tensor:
    batch, tokens, width = projected.shape
    return projected.new_empty((batch, heads, tokens, width // (heads + 2 * kv_heads)))


def _outputs(projected: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    query = _queries(projected, heads, kv_heads)
    return query, query.new_empty((len(query), kv_heads, *query.shape[2:]))


@operator("snnllm::rotate_heads")
def _rotate_heads_op(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Arguments of :func:`rotate_heads`."""
    query, key = _outputs(projected, heads, kv_heads)
    _launch(projected, cos, sin, query, key, key, None, None)
    return query, key


@_rotate_heads_op.register_fake
def _(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    return _outputs(projected, heads, kv_heads)


@operator("snnllm::rotate_and_store", mutates_args=("keys", "values", "length"))
def _rotate_and_store_op(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    position: Tensor,
) -> Tensor:
    """Arguments of :func:`rotate_and_store`."""
    query = _queries(projected, heads, keys.shape[1])
    _launch(projected, cos, sin, query, keys, values, length, position)
    return query


@_rotate_and_store_op.register_fake
def _(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    keys: Tensor,
    values: Tensor,
    length: Tensor,
    position: Tensor,
) -> Tensor:
    return _queries(projected, heads, keys.shape[1])


def _launch(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    length: Tensor | None,
    position: Tensor | None,
) -> None:
    """Write queries, keys and, with a position, values."""
    batch, tokens, _ = projected.shape
    if projected.numel() == 0:
        return
    (heads, dim), kv_heads = (query.shape[1], query.shape[3]), keys.shape[1]
    written = heads + kv_heads * (1 if position is None else 2)
    launch: Any = _rotate[(batch * tokens, triton.cdiv(written, _HEADS))]
    with on(projected.device):
        launch(
            *(projected, cos, sin, query, keys, values),
            *(cos if length is None else length, cos if position is None else position),
            *(tokens, keys.shape[2], 0 if cos.shape[0] == 1 else tokens, heads, kv_heads),
            STORE=position is not None,
            DIM=dim,
            HALF=triton.next_power_of_2(dim // 2),
            HEADS=_HEADS,
            num_warps=1,
            enable_fp_fusion=False,
        )


@triton.jit(do_not_specialize=["scaling"])
def _rotary_tables(  # type: ignore[no-untyped-def]
    positions_ptr,
    frequencies_ptr,
    cos_ptr,
    sin_ptr,
    scaling,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    frequency = tl.load(frequencies_ptr + i, mask=inside, other=0.0).to(tl.float32)
    angle = tl.load(positions_ptr + row).to(tl.float32) * frequency
    at = row * 2 * HALF + i
    cos = rounded(tl.cos(angle) * scaling, cos_ptr.dtype.element_ty)
    sin = rounded(tl.sin(angle) * scaling, sin_ptr.dtype.element_ty)
    tl.store(cos_ptr + at, cos, mask=inside)
    tl.store(cos_ptr + at + HALF, cos, mask=inside)
    tl.store(sin_ptr + at, sin, mask=inside)
    tl.store(sin_ptr + at + HALF, sin, mask=inside)


@triton.jit
def turned(x, cos, other, sin, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """``x cos + other sin`` of float32, rounded to dtype after each product and the sum."""
    total = rounded(x * cos, dtype).to(tl.float32) + rounded(other * sin, dtype).to(tl.float32)
    return rounded(total, dtype)


@triton.jit(do_not_specialize=["tokens", "capacity", "table_tokens"])
def _rotate(  # type: ignore[no-untyped-def]
    projected_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    length_ptr,
    position_ptr,
    tokens,
    capacity,
    table_tokens,
    heads,
    kv_heads,
    STORE: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, HALF)
    written = heads + kv_heads * (2 if STORE else 1)
    inside = ((head < written)[:, None]) & ((half < DIM // 2)[None, :])
    x_at = projected_ptr + row * (heads + 2 * kv_heads) * DIM + head[:, None] * DIM + half[None, :]
    a = tl.load(x_at, mask=inside, other=0.0)
    b = tl.load(x_at + DIM // 2, mask=inside, other=0.0)
    table = (batch * table_tokens + token) * DIM + half
    valid = half < DIM // 2
    cos_a = tl.load(cos_ptr + table, mask=valid, other=0.0)[None, :].to(tl.float32)
    cos_b = tl.load(cos_ptr + table + DIM // 2, mask=valid, other=0.0)[None, :].to(tl.float32)
    sin_a = tl.load(sin_ptr + table, mask=valid, other=0.0)[None, :].to(tl.float32)
    sin_b = tl.load(sin_ptr + table + DIM // 2, mask=valid, other=0.0)[None, :].to(tl.float32)
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    left = turned(a32, cos_a, -b32, sin_a, a.dtype)
    right = turned(b32, cos_b, a32, sin_b, a.dtype)
    is_query, is_value = head < heads, head >= heads + kv_heads
    left = tl.where(is_value[:, None], a, left)
    right = tl.where(is_value[:, None], b, right)
    slot = token
    if STORE:
        first = tl.load(position_ptr)
        slot += first
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(length_ptr, first + tokens)
    query_at = ((batch * heads + head) * tokens + token) * DIM
    kv_head = head - heads - tl.where(is_value, kv_heads, 0)
    kv_at = (((batch * kv_heads + kv_head) * capacity + slot) * DIM)[:, None] + half[None, :]
    q_at = query_ptr + query_at[:, None] + half[None, :]
    to_query = inside & is_query[:, None]
    tl.store(q_at, left, mask=to_query)
    tl.store(q_at + DIM // 2, right, mask=to_query)
    fits = slot + 0 * head < capacity
    to_key = inside & ((head >= heads) & (head < heads + kv_heads) & fits)[:, None]
    tl.store(key_ptr + kv_at, left, mask=to_key)
    tl.store(key_ptr + kv_at + DIM // 2, right, mask=to_key)
    if STORE:
        to_value = inside & (is_value & fits)[:, None]
        tl.store(value_ptr + kv_at, left, mask=to_value)
        tl.store(value_ptr + kv_at + DIM // 2, right, mask=to_value)
