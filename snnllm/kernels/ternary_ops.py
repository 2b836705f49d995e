"""The linear of ternary weights and float activations as an operator of torch."""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, interpreted, on
from snnllm.kernels.ternary_matmul import gather_rows, spike_tiles

_GATHER = 1024


def choose_config(rows: int) -> tuple[int, ...]:
    """Tile sizes for a product of M rows: `(R, BM, BN, warps, stages)` of `spike_tiles`."""
    if rows == 1:
        return (8, 1, 16, 4, 3)
    if rows <= 4:
        return (8, 4, 16, 4, 3)
    if rows <= 16:
        return (4, 16, 16, 4, 3)
    return (1, 64, 128, 4, 3)


@torch.library.custom_op("snnllm::ternary_linear", mutates_args=())
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
        weight: uint8 `[N, P / 4]`, and so on as in `ternary_pack.PackedTernary`.
        scale: float16 `[N, B]`.
        factor: float32 `[B]`.
        order: int32 `[P]`.
        bias: float32 `[N]` or None.

    Returns:
        `[M, N]`.
    """
    rows, columns, width = x.shape[0], len(weight), len(order)
    out = x.new_empty(rows, columns)
    if out.numel() == 0:
        return out
    at_once, bm, bn, warps, stages = choose_config(rows)
    early = rows <= EARLY_ROWS and early_launch(x.device)
    # Tensor cores multiply halves: a float32 is the sum of three bfloat16.
    pieces, kind = (3, torch.bfloat16) if x.dtype == torch.float32 else (1, x.dtype)
    ordered = x.new_empty((pieces, rows, width), dtype=kind)
    flags: dict[str, Any] = {"launch_pdl": True} if early else {}
    with on(x.device):
        kernel: Any = gather_rows[(triton.cdiv(width, _GATHER), rows)]
        kernel(
            *(x, order, ordered, x.stride(0), rows, width),
            PIECES=pieces,
            EARLY=early,
            BLOCK=_GATHER,
        )
        kernel = spike_tiles[(triton.cdiv(rows, bm) * triton.cdiv(columns, bn),)]
        kernel(
            *(ordered, weight, scale, factor, factor if bias is None else bias, out),
            *(rows, columns, width, weight.shape[1], len(factor)),
            BLOCK=4 * weight.shape[1] // len(factor),
            HAS_BIAS=bias is not None,
            ASM=None if interpreted() else _DIGITS,
            EARLY=early,
            PIECES=pieces,
            R=at_once,
            BM=bm,
            BN=bn,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=False,
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


_DIGITS = tuple(
    "{ .reg .b32 t; "
    + _shifted("t", "$2", 6 - 2 * plane, "0xC0C0C0C0")
    + " prmt.b32 $0, t, 0, 0x1404; prmt.b32 $1, t, 0, 0x3424; }"
    for plane in range(4)
)
"""For every plane: its digits in four bytes as two pairs of halves, times 2."""
