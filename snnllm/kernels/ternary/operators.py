"""Linears of ternary weights, with float and with spiking activations, as operators of torch."""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, interpreted, on
from neurons.backends.operator import operator
from snnllm.kernels.ternary.matmul import count_tiles, float_tiles, gather_counts, gather_rows

_GATHER = 1024


def choose_config(rows: int) -> tuple[int, ...]:
    """Tile sizes for a product of M rows: `(R, BM, BN, warps, stages)` of `matmul`."""
    if rows == 1:
        return (8, 1, 16, 4, 3)
    if rows <= 4:
        return (8, 4, 16, 4, 3)
    if rows <= 16:
        return (2, 16, 32, 4, 3)
    return (1, 64, 128, 8, 3)


@operator("snnllm::ternary_linear")
def ternary_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    order: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`y = x W^T + bias` with a packed ternary weight, in the dtype of x.

    Products are exact and sums float32. The order of the sums depends on the number of rows (up to
    4, up to 16, ...) and on nothing else: the outputs of a row do not depend on the other rows.

    Args:
        x: float32, bfloat16 or float16 `[M, K]`, stride 1 along K.
        weight: uint8 `[N, P / 4]`, and so on as in `pack.PackedTernary`.
        scale: float16 `[N, B]`.
        factor: float32 `[B]`.
        order: int32 `[P']`.
        bias: float32 `[N]` or None.

    Returns:
        `[M, N]`.
    """
    rows, columns, width = x.shape[0], len(weight), len(order)
    out = x.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    early = rows <= EARLY_ROWS and early_launch(x.device)
    # Tensor cores multiply halves: a float32 is the sum of three bfloat16.
    pieces, kind = (3, torch.bfloat16) if x.dtype == torch.float32 else (1, x.dtype)
    ordered = x.new_empty((pieces, rows, width), dtype=kind)
    grid, flags = _launch(rows, columns, weight, factor, bias, early)
    with on(x.device):
        kernel: Any = gather_rows[(triton.cdiv(width, _GATHER), rows)]
        kernel(
            *(x, order, ordered, x.stride(0), rows, width),
            PIECES=pieces,
            EARLY=early,
            BLOCK=_GATHER,
        )
        kernel = float_tiles[grid]
        kernel(
            *(ordered, weight, scale, factor, factor if bias is None else bias, out),
            *(rows, columns, width, weight.shape[1], len(factor)),
            PIECES=pieces,
            **flags,
        )
    return out


@ternary_linear.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    order: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _shifted(target: str, source: str, left: int, mask: str) -> str:
    """PTX: `target = (source << left) & mask`."""
    if left == 0:
        return f"and.b32 {target}, {source}, {mask};"
    return f"shl.b32 {target}, {source}, {left}; and.b32 {target}, {target}, {mask};"


@operator("snnllm::ternary_counts")
def ternary_counts(
    count: Tensor,
    threshold: Tensor,
    zero_point: Tensor,
    channel_group: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    order: Tensor,
    segment: Tensor,
    bias: Tensor | None,
    segments: int,
    dtype: torch.dtype,
) -> Tensor:
    """`y` of encoded rows with a packed ternary weight, or their centred accumulators.

    The integers and the outputs are those of the reference backend, bit for bit.

    Args:
        count: uint8 `[M, K]` in original channel order.
        threshold: float32 `[M, G]`.
        zero_point: int32 `[M, G]`, at most 255.
        channel_group: uint8 `[K]`.
        weight: uint8 `[N, P / 4]`, and so on as in `pack.PackedTernary`.
        scale: float16 `[N, B]`.
        factor: float32 `[B]`.
        order: int32 `[P']`.
        segment: Segment that ends with a block in a group, -1 for none, int32 `[G, P' / block]`.
        bias: float32 `[N]` or None.
        segments: S.
        dtype: Of the output; int32 for the accumulators.

    Returns:
        `[M, N]`, or int32 `[S, M, N]`.
    """
    out = _counted(count, weight, segments, dtype)
    (rows, channels), columns, width = count.shape, len(weight), len(order)
    if out.numel() == 0:
        return out
    early = rows <= EARLY_ROWS and early_launch(count.device)
    groups = threshold.shape[1]
    ordered = count.new_empty((groups, rows, width), dtype=torch.bfloat16)
    grid, flags = _launch(rows, columns, weight, factor, bias, early)
    with on(count.device):
        kernel: Any = gather_counts[(triton.cdiv(width, _GATHER), rows)]
        kernel(
            *(count, zero_point, channel_group, order, ordered),
            *(rows, channels, width, groups),
            EARLY=early,
            BLOCK=_GATHER,
        )
        kernel = count_tiles[grid]
        kernel(
            *(ordered, weight, threshold, scale, factor, segment),
            *(factor if bias is None else bias, out),
            *(rows, columns, width, weight.shape[1], len(factor), groups),
            ACCUMULATORS=dtype == torch.int32,
            **flags,
        )
    return out


@ternary_counts.register_fake
def _(
    count: Tensor,
    threshold: Tensor,
    zero_point: Tensor,
    channel_group: Tensor,
    weight: Tensor,
    scale: Tensor,
    factor: Tensor,
    order: Tensor,
    segment: Tensor,
    bias: Tensor | None,
    segments: int,
    dtype: torch.dtype,
) -> Tensor:
    return _counted(count, weight, segments, dtype)


def _counted(count: Tensor, weight: Tensor, segments: int, dtype: torch.dtype) -> Tensor:
    shape = (count.shape[0], weight.shape[0])
    return count.new_empty((segments, *shape) if dtype == torch.int32 else shape, dtype=dtype)


def _launch(
    rows: int, columns: int, weight: Tensor, factor: Tensor, bias: Tensor | None, early: bool
) -> tuple[tuple[int], dict[str, Any]]:
    """Grid and flags of the kernels of a product."""
    at_once, bm, bn, warps, stages = choose_config(rows)
    flags: dict[str, Any] = {
        "BLOCK": 4 * weight.shape[1] // len(factor),
        "HAS_BIAS": bias is not None,
        "ASM": None if interpreted() else _DIGITS,
        "EARLY": early,
        "R": at_once,
        "BM": bm,
        "BN": bn,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": False,
    }
    if early:
        flags["launch_pdl"] = True
    return (triton.cdiv(rows, bm) * triton.cdiv(columns, bn),), flags


_DIGITS = tuple(
    "{ .reg .b32 t; "
    + _shifted("t", "$2", 6 - 2 * plane, "0xC0C0C0C0")
    + " prmt.b32 $0, t, 0, 0x1404; prmt.b32 $1, t, 0, 0x3424; }"
    for plane in range(4)
)
"""For every plane: its digits in four bytes as two pairs of halves, times 2."""
