"""Weight quantisers as pure functions: asymmetric uniform levels per output channel or group."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_SCALE_FLOOR = 1e-8
_CLIP_RATIOS = tuple(1.0 - 0.025 * i for i in range(1, 21))


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


def _blocks(values: Tensor, group_size: int | None) -> Tensor:
    """View `[N, K]` as weight groups `[N, J, size]`, padded with zeros."""
    rows, channels = values.shape
    groups = group_count(channels, group_size)
    size = channels if group_size is None else group_size
    padded = torch.nn.functional.pad(values.float(), (0, groups * size - channels))
    return padded.view(rows, groups, size)


def weight_parameters(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point of uniform quantisation, range including zero.

        scale = r (max(w, 0) - min(w, 0)) / (2**bits - 1),   zero = round(-r min(w, 0) / scale)

    with r = 1, or, given `importance`, the clip ratio r of a grid in [0.5, 1] that minimises
    `sum_c h_c (w_c - w_hat_c)^2` per output channel and group: the output error of the linear when
    the input channels are uncorrelated.

    Args:
        weight: float `[N, K]`.
        bits: Width of a level, 2..8.
        group_size: Input channels that share a scale; None for the whole row.
        importance: `h_c`, mean square of each input channel, `[K]`; None for the full range.

    Returns:
        `(scale, zero)`, float32 and uint8, `[N, J]`.
    """
    blocks = _blocks(weight, group_size)
    low, high = blocks.amin(-1).clamp(max=0.0), blocks.amax(-1).clamp(min=0.0)
    scale, zero = _clipped_range(low, high, bits, 1.0)
    if importance is None:
        return scale, zero.to(torch.uint8)
    h = _blocks(importance.unsqueeze(0), group_size)
    error = _rounding_error(blocks, scale, zero, bits, h)
    for ratio in _CLIP_RATIOS:
        other_scale, other_zero = _clipped_range(low, high, bits, ratio)
        other_error = _rounding_error(blocks, other_scale, other_zero, bits, h)
        better = other_error < error
        scale = torch.where(better, other_scale, scale)
        zero = torch.where(better, other_zero, zero)
        error = torch.minimum(other_error, error)
    return scale, zero.to(torch.uint8)


def _clipped_range(low: Tensor, high: Tensor, bits: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point (as a float) of the range `ratio * [low, high]`."""
    scale = (ratio * (high - low) / (2**bits - 1)).clamp(min=_SCALE_FLOOR)
    return scale, torch.round(-ratio * low / scale).clamp(0, 2**bits - 1)


def _rounding_error(
    blocks: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor
) -> Tensor:
    """`sum_c h_c (w_c - w_hat_c)^2` of every weight group, `[N, J]`."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    codes = torch.round(blocks / scale).add_(zero).clamp_(0, 2**bits - 1)
    return (codes.sub_(zero).mul_(scale).sub_(blocks).square_() * importance).sum(-1)


def round_to_nearest(
    weight: Tensor,
    bits: int,
    group_size: int | None = None,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Round-to-nearest weight codes.

    Args:
        weight: float `[N, K]`, finite.
        bits: Width of a level, 2..8.
        group_size: Input channels that share a scale; None for one scale per output channel.
        importance: Mean square of each input channel `[K]` for a clip search; None for min/max.

    Returns:
        The codes, scales and zero points.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("The weight holds NaN or infinite values.")
    channels = weight.shape[1]
    scale, zero = weight_parameters(weight, bits, group_size, importance)
    s, z = expand_groups(scale, channels, group_size), expand_groups(zero, channels, group_size)
    codes = (torch.round(weight.float() / s) + z).clamp_(0, 2**bits - 1)
    return QuantizedWeight(codes.to(torch.uint8), scale, zero)


def dequantize(quantized: QuantizedWeight, group_size: int | None = None) -> Tensor:
    """Real weight `scale * (code - zero)`, float32 `[N, K]`."""
    codes, scale, zero = quantized
    channels = codes.shape[1]
    z = expand_groups(zero.float(), channels, group_size)
    return (codes.float() - z) * expand_groups(scale, channels, group_size)
