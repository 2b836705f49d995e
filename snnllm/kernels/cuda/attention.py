"""Attention of one query token over the encoded cache in CUDA C++ on Hopper: where it serves, its launch.

The integers are those of `snnllm.kernels.attention.decode`, which runs wherever this cannot; the float sums
differ by their order.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from snnllm.kernels.cuda import attention_source
from snnllm.kernels.cuda.attention_token_source import packed_mixing
from snnllm.kernels.cuda.driver import Launch, without
from snnllm.kernels.cuda.primitives import OUTPUTS

_CHANNELS = (32, 64, 128)
_MOST_ROWS = 8
_MOST_PLANE_BYTES = 4
_MOST_CLUSTER = 8
_KEYS_AT_ONCE = 32 * attention_source.THREADS // 32
_NO_MASK, _BOOL_MASK = -1, 4
_INT_MAX = 2**31 - 1


class NewToken(NamedTuple):
    """What turns projections into a row of the cache, where the queries are projections, too.

    Rows of earlier tokens, and the mask, are read before the kernel in front has ended: between a launch that
    writes a row and the next one for the same cache there is a kernel that does not start early, as there is in
    every step of a model.

    Attributes:
        cos: `[B or 1, 1, D]` in the dtype of the projections, contiguous.
        sin: Likewise.
        order: Of the rotation of Q and K, uint8 `[H_kv, D]`; None: there is none.
        offset: Taken off K, float32 `[H_kv, D]`, or None.
        capacity: Of K and V, float32 `[G]`.
        key_clip: float32 `[G]`.
        value_clip: Likewise.
        position: Of the token in the cache, int64, one element.
        length: Tokens in the cache, int64, one element; becomes `position + 1`.
        mixed: Of the blocks of the rotation, as `rotation.mixing_of` says first.
    """

    cos: Tensor
    sin: Tensor
    order: Tensor | None
    offset: Tensor | None
    capacity: Tensor
    key_clip: Tensor
    value_clip: Tensor
    position: Tensor
    length: Tensor
    mixed: tuple[int, ...]


def unsuitable(query: Tensor, key: Tensor, value: Tensor, planes: tuple[int, int]) -> str | None:
    """Return None where the kernel serves, else the reason why not.

    Args:
        query: `[B, H, S_q, D]`.
        key: Payloads `[B, H_kv, S_k, bytes]`.
        value: Likewise.
        planes: Bytes of one high bit of a row of K and of V.
    """
    (_, heads, tokens, channels), kv_heads = query.shape, key.shape[1]
    if tokens != 1 or heads // kv_heads > _MOST_ROWS or channels not in _CHANNELS:
        return "one query token, up to 8 heads for a KV head and 32, 64 or 128 channels only"
    if max(planes) > _MOST_PLANE_BYTES:
        return "up to 32 salient channels with high bits a head only"
    for rows in (key, value):
        if rows.data_ptr() % 16 or any(stride % 16 for stride in rows.stride()[:3]):
            return "rows at multiples of 16 bytes only"
    if any(max(x.stride()) > _INT_MAX for x in (query, key, value)):
        return "strides below 2**31 only"
    return without(query.device)


def arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: tuple[Tensor | None, int, int],
    tables: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    out: Tensor,
    multiprocessors: int,
    new: NewToken | None = None,
) -> Launch:
    """The launch for operands of which `unsuitable` says nothing.

    Args:
        query: As in `unsuitable`, stride 1 along D. With `new` the queries among the projections, contiguous
            `[B, H + 2 H_kv, D]`, which end with keys and values.
        key: Likewise; changed with `new`.
        value: Likewise.
        mask: Bytes of a bool one or floats, `[B, 1, 1, S_k]`, or None; its strides of a batch entry and a key.
        tables: Slots of K and V, int32 `[H_kv, D]`, capacities and clip factors of Q, float32 `[G_q]`.
        sizes: Groups, one range for Q, planes, bytes of a plane of K and of V, scaling.
        out: `[B, 1, H, D]`, contiguous.
        multiprocessors: Of the device.
        new: The token of the queries is not in the cache yet.
    """
    (batch, heads, _, channels), (_, kv_heads, keys, width) = query.shape, key.shape
    groups, one_range, planes, key_plane, value_plane, scaling = sizes
    share, pairs = heads // kv_heads, batch * kv_heads
    cluster = 1
    while cluster < _MOST_CLUSTER and cluster * _KEYS_AT_ONCE < keys:
        if 2 * cluster * pairs > 4 * multiprocessors:
            break
        cluster *= 2
    hides, batch_stride, key_stride = mask
    kind, lowest = _NO_MASK, 0.0
    if hides is not None and hides.dtype in OUTPUTS:
        kind, lowest = OUTPUTS[hides.dtype], torch.finfo(hides.dtype).min
    elif hides is not None:
        kind = _BOOL_MASK
    macros = {
        "D": channels,
        "G": groups,
        "QUERY_GROUPS": len(tables[2]),
        "ONE_RANGE": int(one_range),
        "ROWS": share,
        "KEY_BYTES": width,
        "VALUE_BYTES": value.shape[3],
        "PLANES": planes,
        "KEY_PLANE": key_plane,
        "VALUE_PLANE": value_plane,
        "CLUSTER": cluster,
        "QUERY": OUTPUTS[query.dtype],
        "MASK": kind,
        "OUT": OUTPUTS[out.dtype],
        "STORED": int(new is not None),
        # In registers, of which the linears beside it need some: where its blocks have multiprocessors of their own.
        "HELD": int(new is not None and share == 1 and cluster * pairs <= multiprocessors),
        "ROTATED": int(new is not None and new.order is not None),
        "OFFSET": int(new is not None and new.offset is not None),
        "MIXED": 0 if new is None else packed_mixing(new.mixed),
    }
    rows: tuple[Tensor | None, ...] = (None,) * 9
    table_stride = 0
    if new is not None:
        rows = new[:-1]
        table_stride = 0 if len(new.cos) == 1 else channels
    strides = (*query.stride()[:2], *key.stride()[:3], *value.stride()[:3])
    return Launch(
        *(attention_source.SOURCE, "attend_one", macros, cluster * pairs, attention_source.THREADS),
        attention_source.shared_bytes(
            share, channels, groups, 0 if new is None else width + value.shape[3]
        ),
        (
            *(query, key, value, *tables, hides, out, *rows),
            *(*strides, batch_stride, key_stride, table_stride),
            *(kv_heads, keys, float(scaling), lowest),
        ),
    )
