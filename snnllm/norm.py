"""RMSNorm with a defined order of operations: the same bits on a CPU, a GPU and in a fused kernel.

LLaMA's normalisation, ``y = gain * (x / sqrt(mean(x^2) + eps))``, sums thousands of squares, and
libraries differ in the order. Spike counts are compared bit for bit between views and devices, so
here the order is part of the definition (:func:`rms_norm`).
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 1024
"""Partial sums of the squares of a row; a power of two."""


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise rows as transformers' ``LlamaRMSNorm`` does, in a defined order.

    In float32, every operation rounded once, division and square root as IEEE has them::

        lane[j] = x[j]^2 + x[j + 1024]^2 + x[j + 2048]^2 + ...       in this order, j < 1024
        sum     = lanes added in neighbours, 1024 -> 512 -> .. -> 1
        y       = weight * (x * (1 / sqrt(sum / K + eps)))           rounded to x.dtype after each *

    Args:
        x: rows ``[.., K]``, float32, bfloat16 or float16.
        weight: gains ``[K]`` in the dtype of x; None where they are folded into the next weights.
        eps: added to the mean of the squares.

    Returns:
        ``[.., K]`` in the dtype of x.

    Raises:
        TypeError: if the gains are not in the dtype of x.

    Source: transformers, ``LlamaRMSNorm``: the cast before the gain.
    """
    check_gain(x, weight)
    y = (x.float() * _scale(x.float(), eps)).to(x.dtype)
    return y if weight is None else y * weight


def check_gain(x: Tensor, weight: Tensor | None) -> None:
    """Refuse gains that would change the dtype of the row or do not fit it."""
    if weight is None:
        return
    if weight.dtype != x.dtype:
        raise TypeError(
            f"weight must be {x.dtype} as x is, got {weight.dtype}; convert one of them."
        )
    if tuple(weight.shape) != (x.shape[-1],):
        raise ValueError(f"weight must be [{x.shape[-1]}], got {tuple(weight.shape)}.")


def _scale(x: Tensor, eps: float) -> Tensor:
    """``1 / sqrt(mean(x^2) + eps)`` of float32 rows, ``[.., 1]``."""
    channels = x.shape[-1]
    squares = torch.nn.functional.pad(x * x, (0, -channels % LANES))
    lanes, *rest = squares.unflatten(-1, (-1, LANES)).unbind(-2)
    for chunk in rest:
        lanes = lanes + chunk
    while lanes.shape[-1] > 1:
        lanes = lanes[..., 0::2] + lanes[..., 1::2]
    # A tensor divisor: CUDA would multiply by the reciprocal of a Python one.
    variance = lanes / torch.full((), channels, dtype=torch.float32, device=x.device)
    # Through float64: torch's float32 root on a CPU is not always the nearest one, this is.
    root = torch.sqrt((variance + eps).double()).float()
    return torch.ones_like(root) / root
