"""Weight quantisers as pure functions: asymmetric uniform levels per output channel or group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SCALE_FLOOR = 1e-8


class QuantizedWeight(NamedTuple):
    """Integer weight levels; the real weight is `scale * (code - zero)` (method.md section 3).

    Attributes:
        codes: uint8 `[N, K]`, in `0..2**bits-1`.
        scale: float32 `[N, J]`, one per output channel and weight group.
        zero: uint8 `[N, J]`, the code of the weight 0.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor


def group_count(channels: int, group_size: int | None) -> int:
    """Number `J` of weight groups along `K` input channels."""
    return 1 if group_size is None else -(-channels // group_size)


def expand_groups(values: Tensor, channels: int, group_size: int | None) -> Tensor:
    """Repeat per-group values `[N, J]` over their input channels to `[N, K]` (`[N, 1]` if J = 1)."""
    if group_size is None:
        return values
    return values.repeat_interleave(group_size, dim=1)[:, :channels]


def weight_parameters(
    weight: Tensor, bits: int, group_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of min/max uniform quantisation, range including zero.

        scale = (max(w, 0) - min(w, 0)) / (2**bits - 1),   zero = round(-min(w, 0) / scale)

    Args:
        weight: float `[N, K]`.
        bits: Width of a level, 2..8.
        group_size: Input channels that share a scale; None for the whole row.

    Returns:
        `(scale, zero)`, float32 and uint8, `[N, J]`.
    """
    rows, channels = weight.shape
    groups = group_count(channels, group_size)
    size = channels if group_size is None else group_size
    padded = torch.nn.functional.pad(weight.float(), (0, groups * size - channels))
    blocks = padded.view(rows, groups, size)
    low, high = blocks.amin(-1).clamp(max=0.0), blocks.amax(-1).clamp(min=0.0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=_SCALE_FLOOR)
    zero = torch.round(-low / scale).clamp(0, 2**bits - 1)
    return scale, zero.to(torch.uint8)


def round_to_nearest(weight: Tensor, bits: int, group_size: int | None = None) -> QuantizedWeight:
    """Round-to-nearest weight codes with min/max ranges; no data needed.

    Args:
        weight: float `[N, K]`, finite.
        bits: Width of a level, 2..8.
        group_size: Input channels that share a scale; None for one scale per output channel.

    Returns:
        The codes, scales and zero points.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("The weight holds NaN or infinite values.")
    channels = weight.shape[1]
    scale, zero = weight_parameters(weight, bits, group_size)
    s, z = expand_groups(scale, channels, group_size), expand_groups(zero, channels, group_size)
    codes = (torch.round(weight.float() / s) + z).clamp_(0, 2**bits - 1)
    return QuantizedWeight(codes.to(torch.uint8), scale, zero)


def dequantize(quantized: QuantizedWeight, group_size: int | None = None) -> Tensor:
    """Real weight `scale * (code - zero)`, float32 `[N, K]`."""
    codes, scale, zero = quantized
    channels = codes.shape[1]
    z = expand_groups(zero.float(), channels, group_size)
    return (codes.float() - z) * expand_groups(scale, channels, group_size)
