"""Spiking attention in Triton as operators of torch, with shapes for the compiler."""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

import torch
from torch import Tensor

from neurons.backends.operator import operator
from snnllm.kernels.attention.launch import encode, rows_of, run_decode, run_prefill
from snnllm.kernels.attention.rotation import rotate_operand

DECODE_ROWS = 8
"""Queries of a KV head (its heads times tokens) up to which the kernel for few of them runs."""


def few_queries(heads: int, kv_heads: int, tokens: int) -> bool:
    """Whether the kernel for few queries runs."""
    return heads // kv_heads * tokens <= DECODE_ROWS


@operator("snnllm::encode_key_value")
def encode_key_value(
    key: Tensor,
    value: Tensor,
    key_slot: Tensor,
    value_slot: Tensor,
    capacity: Tensor,
    key_clip: Tensor,
    value_clip: Tensor,
    shared: bool,
    planes: int,
    slots: int,
    key_row: list[int],
    value_row: list[int],
    order: Tensor | None = None,
    blocks: list[int] | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Payloads of K and V (`snnllm.cache`), in one launch.

    Nothing is checked on the device: a token with NaN or infinity has a threshold that is not finite.

    Args:
        key: float `[B, H_kv, S, D]`, stride 1 along D.
        value: Likewise.
        key_slot: Place of every channel among the salient ones of its head, int32 `[H_kv, D]`, or -1.
        value_slot: Likewise.
        capacity: float32 `[G]`.
        key_clip: float32 `[G]`.
        value_clip: float32 `[G]`.
        shared: One range for both groups.
        planes: High bits of a salient count.
        slots: Lanes for the salient channels of a head, a multiple of 8; 0 for one group.
        key_row: Bytes of a row and of one high bit of it.
        value_row: Likewise.
        order: With `blocks`, the rotation of K (`rotate_operand`), uint8 `[H_kv, D]`; None: none.
        blocks: Sizes of the Hadamard blocks.
        offset: Taken off K behind the rotation, float32 `[H_kv, D]`, contiguous; None: nothing.

    Returns:
        uint8 `[B, H_kv, S, bytes]` of K and of V.
    """
    operands = ((key, key_slot, key_clip, key_row), (value, value_slot, value_clip, value_row))
    key_payload, value_payload = encode(
        operands, capacity, shared, planes, slots, order, blocks or (), offset
    )
    return key_payload, value_payload


@encode_key_value.register_fake
def _(
    key: Tensor,
    value: Tensor,
    key_slot: Tensor,
    value_slot: Tensor,
    capacity: Tensor,
    key_clip: Tensor,
    value_clip: Tensor,
    shared: bool,
    planes: int,
    slots: int,
    key_row: list[int],
    value_row: list[int],
    order: Tensor | None = None,
    blocks: list[int] | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return rows_of(key, key_row[0]), rows_of(value, value_row[0])


@operator("snnllm::attend")
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_slot: Tensor,
    key_slot: Tensor,
    value_slot: Tensor,
    member: Tensor,
    query_capacity: Tensor,
    query_clip: Tensor,
    groups: int,
    shared: bool,
    planes: int,
    query_row: list[int],
    key_plane: int,
    value_plane: int,
    scaling: float,
    dtype: torch.dtype,
    order: Tensor | None = None,
    blocks: list[int] | None = None,
) -> Tensor:
    """Attention over the encoded cache: `softmax(scaling * sum_g s_qg s_kg A_g + mask) (s_v (q_v - z_v))`.

    A query that sees no key gives zeros.

    Args:
        query: float `[B, H, S_q, D]` after RoPE, stride 1 along D.
        key: payloads uint8 `[B, H_kv, S_k, bytes]`.
        value: Likewise.
        mask: bool (True: seen) or float to add `[B or 1, 1, S_q, S_k]`; or None.
        query_slot: As `key_slot` of `encode_key_value`, `[H or 1, D]`; used if Q has two groups.
        key_slot: See `encode_key_value`.
        value_slot: Likewise.
        member: Salient channels of K, int32 `[H_kv, slots]`, -1 for none.
        query_capacity: float32 `[G_q]`.
        query_clip: float32 `[G_q]`.
        groups: G, channel groups of K and V, 1 or 2.
        shared: One range for all groups of Q.
        planes: High bits of a salient count of K and V.
        query_row: Bytes of an encoded row of Q, bytes of one high bit, and high bits of a salient count.
        key_plane: Bytes of one high bit of a row of K.
        value_plane: Likewise of V.
        scaling: Factor of the scores, rounded to float32.
        dtype: Of the result.
        order: With `blocks`, the rotation of Q and K; None: none.
        blocks: Sizes of the Hadamard blocks.

    Returns:
        `[B, S_q, H, D]`.
    """
    batch, heads, tokens, channels = query.shape
    out = query.new_empty((batch, tokens, heads, channels), dtype=dtype)
    if out.numel() == 0:
        return out
    if key.shape[2] == 0:
        return out.zero_()
    sizes = (groups, shared, planes, key_plane, value_plane, scaling)
    tables = (key_slot, value_slot, member, query_capacity, query_clip)
    if few_queries(heads, key.shape[1], tokens):
        if order is not None:  # each of many programs encodes the queries: they are rotated before
            query = rotate_operand(query, order, blocks or ())
        run_decode(query, key, value, mask, tables, sizes, out)
    else:
        rotation = (order, blocks or ())
        run_prefill(query, key, value, mask, query_slot, tables, sizes, query_row, rotation, out)
    return out


@attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_slot: Tensor,
    key_slot: Tensor,
    value_slot: Tensor,
    member: Tensor,
    query_capacity: Tensor,
    query_clip: Tensor,
    groups: int,
    shared: bool,
    planes: int,
    query_row: list[int],
    key_plane: int,
    value_plane: int,
    scaling: float,
    dtype: torch.dtype,
    order: Tensor | None = None,
    blocks: list[int] | None = None,
) -> Tensor:
    batch, heads, tokens, channels = query.shape
    return query.new_empty((batch, tokens, heads, channels), dtype=dtype)
