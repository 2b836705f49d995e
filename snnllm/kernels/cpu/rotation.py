"""Hadamard blocks in C on the CPU, with the bits of `snnllm.hadamard`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from snnllm.kernels import get_backend
from snnllm.kernels.cpu.backend import library

LONGEST_BLOCK = 256
"""What the C function has room for."""


def rotates(x: Tensor, blocks: Sequence[int]) -> bool:
    """Whether the C function serves: on the CPU, outside of graphs and gradients, with a compiler."""
    return (
        x.device.type == "cpu"
        and max(blocks, default=0) <= LONGEST_BLOCK
        and not torch.compiler.is_compiling()
        and not (x.requires_grad and torch.is_grad_enabled())
        and get_backend("auto", "cpu").name == "native"
    )


def rotate_rows(
    x: Tensor,
    blocks: tuple[int, ...],
    turned: bool,
    order: Tensor | None = None,
    share: int = 1,
) -> Tensor:
    """Rotate the last axis; carries no gradient.

    Args:
        x: float `[..., K]` on the CPU.
        blocks: Sizes of the Hadamard blocks, powers of two, K channels together.
        turned: In the order of `hadamard.rotate_block` instead of `hadamard.hadamard_transform`.
        order: Channels to gather first, uint8 `[heads, K]`, checked; None: as they are.
        share: Rows, one behind the other, that have the same order.

    Returns:
        float32, contiguous.
    """
    rows = x.detach().float().contiguous()
    out = torch.empty_like(rows)
    sizes, roots = _tables(blocks)
    channels = rows.shape[-1]
    library().snn_rotate(
        *(rows.data_ptr(), None if order is None else order.data_ptr(), out.data_ptr()),
        *(rows.numel() // max(channels, 1), channels, share, 1 if order is None else len(order)),
        *(sizes, roots, len(blocks), int(turned), torch.get_num_threads()),
    )
    return out


@cache
def _tables(
    blocks: tuple[int, ...],
) -> tuple[ctypes.Array[ctypes.c_int64], ctypes.Array[ctypes.c_float]]:
    roots = [p**-0.5 for p in blocks]
    return (ctypes.c_int64 * len(blocks))(*blocks), (ctypes.c_float * len(blocks))(*roots)
