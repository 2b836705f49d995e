"""Rotary position embedding of fused q/k/v projections in one Triton kernel.

Transformers rotates q and k with ten elementwise kernels. Here a program takes some heads of a token
from the fused projection and writes them, rotated, in the layout that attention reads. Products and
sums are rounded to the dtype one by one, so the bits are those of ``apply_rotary_pos_emb``.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import on
from neurons.backends.triton_encode_row import rounded

__all__ = ["rotate_heads"]

_HEADS = 4


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
    query, key = torch.ops.snnllm.rotate_heads(
        projected.detach(), cos.contiguous(), sin.contiguous(), heads, kv_heads
    )
    return query, key


def _outputs(projected: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor]:
    batch, tokens, width = projected.shape
    dim = width // (heads + 2 * kv_heads)
    return (
        projected.new_empty((batch, heads, tokens, dim)),
        projected.new_empty((batch, kv_heads, tokens, dim)),
    )


@torch.library.custom_op("snnllm::rotate_heads", mutates_args=())
def _rotate_heads_op(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    """Arguments of :func:`rotate_heads`."""
    query, key = _outputs(projected, heads, kv_heads)
    batch, tokens, width = projected.shape
    if projected.numel() == 0:
        return query, key
    dim = width // (heads + 2 * kv_heads)
    launch: Any = _rotate[(batch * tokens, triton.cdiv(heads + kv_heads, _HEADS))]
    with on(projected.device):
        launch(
            *(projected, cos, sin, query, key, tokens, 0 if cos.shape[0] == 1 else tokens),
            *(heads, kv_heads),
            DIM=dim,
            HALF=triton.next_power_of_2(dim // 2),
            HEADS=_HEADS,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return query, key


@_rotate_heads_op.register_fake
def _(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor]:
    return _outputs(projected, heads, kv_heads)


@triton.jit(do_not_specialize=["tokens", "table_tokens"])
def _rotate(  # type: ignore[no-untyped-def]
    projected_ptr,
    cos_ptr,
    sin_ptr,
    query_ptr,
    key_ptr,
    tokens,
    table_tokens,
    heads,
    kv_heads,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = tl.arange(0, HALF)
    inside = ((head < heads + kv_heads)[:, None]) & ((half < DIM // 2)[None, :])
    x_at = projected_ptr + row * (heads + 2 * kv_heads) * DIM + head[:, None] * DIM + half[None, :]
    a = tl.load(x_at, mask=inside, other=0.0)
    b = tl.load(x_at + DIM // 2, mask=inside, other=0.0)
    table = (batch * table_tokens + token) * DIM + half
    valid = half < DIM // 2
    cos_a = tl.load(cos_ptr + table, mask=valid, other=0.0)[None, :].to(tl.float32)
    cos_b = tl.load(cos_ptr + table + DIM // 2, mask=valid, other=0.0)[None, :].to(tl.float32)
    sin_a = tl.load(sin_ptr + table, mask=valid, other=0.0)[None, :].to(tl.float32)
    sin_b = tl.load(sin_ptr + table + DIM // 2, mask=valid, other=0.0)[None, :].to(tl.float32)
    dtype = a.dtype
    a32, b32 = a.to(tl.float32), b.to(tl.float32)
    left = rounded(a32 * cos_a, dtype).to(tl.float32) + rounded(-b32 * sin_a, dtype).to(tl.float32)
    right = rounded(b32 * cos_b, dtype).to(tl.float32) + rounded(a32 * sin_b, dtype).to(tl.float32)
    is_query = head < heads
    key_head = head - heads
    query_at = ((batch * heads + head) * tokens + token) * DIM
    key_at = ((batch * kv_heads + key_head) * tokens + token) * DIM
    q_at = query_ptr + query_at[:, None] + half[None, :]
    k_at = key_ptr + key_at[:, None] + half[None, :]
    to_query, to_key = inside & is_query[:, None], inside & (key_head >= 0)[:, None]
    left, right = rounded(left, dtype), rounded(right, dtype)
    tl.store(q_at, left, mask=to_query)
    tl.store(q_at + DIM // 2, right, mask=to_query)
    tl.store(k_at, left, mask=to_key)
    tl.store(k_at + DIM // 2, right, mask=to_key)
