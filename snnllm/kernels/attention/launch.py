"""Launches of the attention kernels in Triton: sizes of tiles, buffers, how keys are split."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from neurons.backends.device import interpreted, on
from snnllm.kernels.attention.decode import combine, decode
from snnllm.kernels.attention.mask import classify
from snnllm.kernels.attention.prefill import prefill
from snnllm.kernels.attention.rotation import fuses, mixing_of, rotate_operand
from snnllm.kernels.attention.rows import encode_rows
from snnllm.kernels.attention.unpack import unpack_codes, unpack_values
from snnllm.kernels.cuda import attention as cuda_attention
from snnllm.kernels.cuda.driver import processors

_PROGRAMS_PER_UNIT = 3  # of `decode` that a multiprocessor has registers for
_MOST_SPLITS = 128
_LARGE_SHARED_MEMORY = 160 << 10


def _power(least: int, number: int) -> int:
    return max(least, int(triton.next_power_of_2(number)))


def rows_of(x: Tensor, width: int) -> Tensor:
    """Room for rows of `width` bytes, one for each of `x [.., D]`."""
    return x.new_empty((*x.shape[:-1], width), dtype=torch.uint8)


def encode(
    operands: Any,
    capacity: Tensor,
    shared: bool,
    planes: int,
    slots: int,
    order: Tensor | None = None,
    blocks: Sequence[int] = (),
    offset: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Payloads of one or two operands (x, slots, clip, row) of the same shape.

    With an order and blocks (`rotate_operand`), the first is rotated in front of its encoder: in the same
    kernel where D is a power of two. Then its offset is taken off, float32 `[H, D]`, contiguous.
    """
    if order is not None and not fuses(blocks):
        (x, *first), *rest = operands
        operands, order = ((rotate_operand(x, order, blocks), *first), *rest), None
    outputs = tuple(rows_of(x, row[0]) for x, _, _, row in operands)
    _, heads, tokens, channels = operands[0][0].shape
    rows = outputs[0][..., 0].numel()
    if rows == 0:
        return outputs
    words: Tensor | None = None
    mixed: tuple[int, ...] = ()
    starts: tuple[int, ...] = ()
    if order is not None:
        words, (mixed, starts) = order.view(torch.int32), mixing_of(tuple(blocks))
    arguments = []
    for (x, slot, clip, row), out in zip(operands, outputs, strict=True):
        stride = channels if slot.shape[0] > 1 else 0
        tables = (words, offset, slot, capacity, clip)
        arguments.append((x, *tables, out, *x.stride()[:3], stride, *row))
    per_program = 2 if interpreted() else 8 if rows >= 1024 else 2
    launch: Any = encode_rows[(triton.cdiv(rows, per_program), len(operands))]
    with on(capacity.device):
        launch(
            *(*arguments[0], *arguments[-1], rows, heads),
            *(1 if order is None else heads // len(order), tokens),
            MIXED=mixed,
            BLOCKS=starts,
            OFFSET=offset is not None,
            D=channels,
            HALF=_power(4, channels // 2),
            G=capacity.shape[0],
            SHARED=shared,
            PLANES=planes,
            SLOTS=slots,
            R=per_program,
            num_warps=max(1, per_program // 4),
            enable_fp_fusion=False,
        )
    return outputs


def _mask_arguments(
    mask: Tensor | None, batch: int, tokens: int, keys: int
) -> tuple[Any, tuple[int, ...], float, bool]:
    """Mask for a kernel, its strides (batch, query, key), what hides, and whether it is bool."""
    if mask is None:
        return None, (0, 0, 0), 0.0, False
    mask = mask[..., :keys].expand(batch, 1, tokens, keys)
    strides = (mask.stride(0), mask.stride(2), mask.stride(3))
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8), strides, 0.0, True
    return mask, strides, torch.finfo(mask.dtype).min, False


def _units(device: torch.device) -> int:
    """Multiprocessors."""
    return 4 if interpreted() else processors(device)


@lru_cache(maxsize=16)
def _prefill_config(device: torch.device, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps, stages: as shared memory and registers allow."""
    if interpreted():
        return 32, 16, 1, 1
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if dtype == torch.float32 or shared < _LARGE_SHARED_MEMORY:
        return 64, 32, 4, 2
    return 128, 64, 8, 3


def run_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tables: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    out: Tensor,
) -> None:
    """Launch the kernels for few queries; arguments as `operators.attend` describes them."""
    (batch, heads, tokens, channels), (_, kv_heads, keys, _) = query.shape, key.shape
    groups, shared, planes, key_plane, value_plane, scaling = sizes
    key_slot, value_slot, member, capacity, clip = tables
    if cuda_attention.unsuitable(query, key, value, (key_plane, value_plane)) is None:
        run_one(query, key, value, mask, (key_slot, value_slot, capacity, clip), sizes, out)
        return
    share = heads // kv_heads
    rows = max(_power(1, share * tokens), 8 // groups)
    block = 16 if interpreted() else 32
    pairs = batch * kv_heads
    wanted = max(1, _PROGRAMS_PER_UNIT * _units(query.device) // pairs)
    most = min(_MOST_SPLITS, triton.cdiv(keys, block), wanted)
    chunk = triton.cdiv(triton.cdiv(keys, most), block) * block
    splits = triton.cdiv(keys, chunk)
    slots = member.shape[1] if groups == 2 else 16
    part = query.new_empty((pairs, splits, rows, channels + slots), dtype=torch.float32)
    state = query.new_empty((pairs, splits, 2, rows), dtype=torch.float32)
    mask, mask_strides, lowest, is_bool = _mask_arguments(mask, batch, tokens, keys)
    with on(query.device):
        launch: Any = decode[(splits, pairs)]
        launch(
            *(query, key, value, key_slot, member, value_slot, capacity, clip, mask, part, state),
            *(*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *mask_strides),
            *(key_plane, value_plane, kv_heads, share, tokens, keys, chunk, scaling, lowest),
            G=groups,
            QUERY_GROUPS=capacity.shape[0],
            SHARED=shared,
            D=channels,
            HALF=_power(32, channels // 2),
            KEY_PLANES=planes if key_plane else 0,
            VALUE_PLANES=planes if value_plane else 0,
            SLOTS=slots,
            BOOL=is_bool,
            ONE_TOKEN=tokens == 1,
            UNPACK=not interpreted(),
            ROWS=rows,
            BN=block,
            LOOK=8 * block if tokens == 1 else block,
            num_warps=4,
            num_stages=3,
            enable_fp_fusion=False,
        )
        launch = combine[(share * tokens, pairs)]
        launch(
            *(part, state, value_slot, out, kv_heads, share, tokens, splits),
            D=channels,
            LANES=_power(1, channels),
            PLANES=planes if value_plane else 0,
            SLOTS=slots,
            ROWS=rows,
            SPLITS=_power(2, splits),
            BLOCK=min(16, _power(2, splits)),
            num_warps=4,
            enable_fp_fusion=False,
        )


def run_one(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tables: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    out: Tensor,
    new: cuda_attention.NewToken | None = None,
) -> None:
    """Launch the kernel for one token; arguments as `cuda.attention.arguments` describes them."""
    mask, (batch_stride, _, key_stride), *_ = _mask_arguments(mask, len(query), 1, key.shape[2])
    planned = cuda_attention.arguments(
        *(query, key, value, (mask, batch_stride, key_stride), tables, sizes, out),
        *(_units(query.device), new),
    )
    planned(query.device)


def unpack(
    x: Tensor,
    slot: Tensor,
    member: Tensor,
    kinds: Tensor | None,
    block: int,
    own_groups: int,
    groups: int,
    planes: int,
    plane_bytes: int,
) -> tuple[Tensor, Tensor]:
    """Payloads as operands of a product: centred counts and thresholds (`unpack_codes`).

    Args:
        x: Payloads of K, or of Q with 1 group or those of K.
        slot: Of K.
        member: Of K.
        kinds: Kinds of blocks of keys; those that no query sees are left out.
        block: What the number of tokens is padded to.
        own_groups: Groups of the payloads.
        groups: Of K.
        planes: High bits of a salient count of the payloads.
        plane_bytes: Bytes of one of them.

    Returns:
        int8 `[B * H, padded, width + slots]`; float32 `[B * H, G, padded]`.
    """
    (batch, heads, tokens, _), (kv_heads, channels) = x.shape, slot.shape
    padded, step = triton.cdiv(tokens, block) * block, min(block, 64)
    width, slots = _power(32, channels), member.shape[1] if groups == 2 else 0
    code = x.new_empty((batch * heads, padded, width + slots), dtype=torch.int8)
    scale = x.new_empty((batch * heads, own_groups, padded), dtype=torch.float32)
    tiles, blocks = (0, 0) if kinds is None else kinds.shape[1:]
    launch: Any = unpack_codes[(padded // step, batch * heads)]
    with on(x.device):
        launch(
            *(x, slot, member, kinds, code, scale, *x.stride()[:3], channels, plane_bytes),
            *(heads, heads // kv_heads, tokens, padded, blocks, tiles),
            D=channels,
            WIDTH=width,
            HALF=_power(16, channels // 2),
            G=own_groups,
            KEY_GROUPS=groups,
            PLANES=planes,
            SLOTS=slots,
            HAS_KINDS=kinds is not None,
            T=step,
            num_warps=4,
        )
    return code, scale


def run_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    query_slot: Tensor,
    tables: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    query_row: list[int],
    rotation: tuple[Tensor | None, Sequence[int]],
    out: Tensor,
) -> None:
    """Launch the kernels for many queries; arguments as `operators.attend` describes them."""
    groups, shared, *_ = sizes
    *_, member, capacity, clip = tables
    *row, planes = query_row
    slots = member.shape[1] if groups == 2 and planes else 0
    operand = ((query, query_slot, clip, row),)
    (encoded,) = encode(operand, capacity, shared, planes, slots, *rotation)
    attend_encoded(encoded, key[None], value, mask, tables, sizes, query_row, out)


def attend_encoded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    tables: tuple[Tensor, ...],
    sizes: tuple[Any, ...],
    query_row: list[int],
    out: Tensor,
) -> None:
    """Launch the kernels behind the encoder of Q; arguments as `operators.attend` describes them.

    But Q is there as payloads uint8 `[B, H, S_q, bytes]`, and K in steps `[T, B, H_kv, S_k, bytes]`, whose
    centred counts are summed.
    """
    (batch, heads, tokens, _), (steps, _, kv_heads, keys, _) = query.shape, key.shape
    groups, _, planes, key_plane, value_plane, scaling = sizes
    key_slot, value_slot, member, capacity, _ = tables
    (_, query_plane, query_planes), channels = query_row, key_slot.shape[-1]
    slots = member.shape[1] if groups == 2 else 0
    bm, bn, warps, stages = _prefill_config(query.device, out.dtype)
    tiles, blocks = triton.cdiv(tokens, bm), triton.cdiv(keys, bn)
    width = _power(32, channels)
    mask, mask_strides, lowest, is_bool = _mask_arguments(mask, batch, tokens, keys)
    with on(query.device):
        kinds = None
        if mask is not None:
            kinds = query.new_empty((batch, tiles, blocks), dtype=torch.int8)
            launch: Any = classify[(blocks, tiles, batch)]
            launch(
                *(mask, kinds, *mask_strides, tokens, keys, lowest),
                **{"BOOL": is_bool, "BM": bm, "BN": bn, "num_warps": 4},
            )

        own: Any = (capacity.shape[0], groups, query_planes, query_plane)
        query_code, query_scale = unpack(query, key_slot, member, None, bm, *own)
        own = (groups, groups, planes if key_plane else 0, key_plane)
        unpacked = [unpack(step, key_slot, member, kinds, bn, *own) for step in key]
        key_code, key_scale = unpacked[0]  # the thresholds of all steps are the same
        query_padded, padded, plane = query_code.shape[1], key_code.shape[1], key_code.numel()
        if steps > 1:
            key_code = torch.stack([code for code, _ in unpacked])
        numbers = value.new_empty((batch * kv_heads, padded, width), dtype=out.dtype)
        launch = unpack_values[(padded // bn, batch * kv_heads)]
        launch(
            *(value, value_slot, kinds, numbers, *value.stride()[:3], channels, value_plane),
            *(kv_heads, keys, padded, blocks, tiles),
            G=groups,
            PLANES=planes if value_plane else 0,
            HAS_KINDS=kinds is not None,
            T=bn,
            D=channels,
            WIDTH=width,
            HALF=_power(16, channels // 2),
            num_warps=4,
            enable_fp_fusion=False,
        )
        launch = prefill[(tiles, batch * heads)]
        launch(
            *(query_code, query_scale, key_code, key_scale, numbers, mask, kinds, out),
            *(*mask_strides, heads, heads // kv_heads, tokens, query_padded, keys, padded, blocks),
            *(scaling, lowest, plane, steps),
            G=groups,
            QUERY_GROUPS=capacity.shape[0],
            D=channels,
            WIDTH=width,
            SLOTS=slots,
            STEPPED=steps > 1,
            BLOCKS=_power(2, blocks),
            BOOL=is_bool,
            PRECISION="tf32x3" if out.dtype == torch.float32 else "tf32",
            BM=bm,
            BN=bn,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
        )
