"""Weight quantisers as pure functions: asymmetric uniform levels per output channel or group."""

from __future__ import annotations

from collections.abc import Sequence
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


def run_sizes(channels: int, groups: int | Sequence[int] | None) -> tuple[int, ...]:
    """Sizes of the runs of input channels that share a weight scale; they sum to `channels`.

    Args:
        channels: Input channels `K`.
        groups: The size of equal runs (the last may be shorter), all sizes, or None for one run.

    Raises:
        ValueError: The sizes do not sum to `channels`.
    """
    if groups is None:
        return (channels,)
    if isinstance(groups, int):
        full, rest = divmod(channels, groups)
        return (groups,) * full + ((rest,) if rest else ())
    if sum(groups) != channels:
        raise ValueError(f"weight groups {tuple(groups)} do not sum to {channels} input channels.")
    return tuple(groups)


def expand_groups(
    values: Tensor, channels: int, groups: int | Sequence[int] | None = None
) -> Tensor:
    """Repeat values per weight group `[N, J]` over their input channels to `[N, K]`; waits for no device."""
    sizes = run_sizes(channels, groups)
    if values.shape[1] != len(sizes):
        raise ValueError(f"{len(sizes)} weight groups need as many values, got {values.shape[1]}.")
    if len(set(sizes)) == 1:
        return values.repeat_interleave(sizes[0], dim=1)
    return torch.cat([v.expand(-1, n) for v, n in zip(values.split(1, 1), sizes, strict=True)], 1)


def weight_parameters(
    weight: Tensor,
    bits: int,
    groups: int | Sequence[int] | None = None,
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
        groups: Input channels that share a scale (`run_sizes`); None for the whole row.
        importance: `h_c`, mean square of each input channel, `[K]`; None for the full range.

    Returns:
        `(scale, zero)`, float32 and uint8, `[N, J]`.
    """
    sizes = run_sizes(weight.shape[1], groups)
    hs = [None] * len(sizes) if importance is None else importance.split(sizes)
    found = [
        _run_parameters(run, bits, h)
        for run, h in zip(weight.float().split(sizes, dim=1), hs, strict=True)
    ]
    scale, zero = (torch.stack(part, dim=1) for part in zip(*found, strict=True))
    return scale, zero.to(torch.uint8)


def _run_parameters(run: Tensor, bits: int, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point (as a float) of each row of one run of channels, `[N]`."""
    if run.shape[1] == 0:  # a saliency group without channels
        return run.new_full((len(run),), _SCALE_FLOOR), run.new_zeros(len(run))
    low, high = run.amin(-1).clamp(max=0.0), run.amax(-1).clamp(min=0.0)
    scale, zero = _clipped_range(low, high, bits, 1.0)
    if importance is None:
        return scale, zero
    error = _rounding_error(run, scale, zero, bits, importance)
    for ratio in _CLIP_RATIOS:
        other_scale, other_zero = _clipped_range(low, high, bits, ratio)
        other_error = _rounding_error(run, other_scale, other_zero, bits, importance)
        better = other_error < error
        scale = torch.where(better, other_scale, scale)
        zero = torch.where(better, other_zero, zero)
        error = torch.minimum(other_error, error)
    return scale, zero


def _clipped_range(low: Tensor, high: Tensor, bits: int, ratio: float) -> tuple[Tensor, Tensor]:
    """Scale and zero point (as a float) of the range `ratio * [low, high]`."""
    scale = (ratio * (high - low) / (2**bits - 1)).clamp(min=_SCALE_FLOOR)
    return scale, torch.round(-ratio * low / scale).clamp(0, 2**bits - 1)


def _rounding_error(
    run: Tensor, scale: Tensor, zero: Tensor, bits: int, importance: Tensor
) -> Tensor:
    """`sum_c h_c (w_c - w_hat_c)^2` of every row, `[N]`."""
    scale, zero = scale.unsqueeze(-1), zero.unsqueeze(-1)
    codes = torch.round(run / scale).add_(zero).clamp_(0, 2**bits - 1)
    return (codes.sub_(zero).mul_(scale).sub_(run).square_() * importance).sum(-1)


def round_to_nearest(
    weight: Tensor,
    bits: int,
    groups: int | Sequence[int] | None = None,
    importance: Tensor | None = None,
) -> QuantizedWeight:
    """Round-to-nearest weight codes.

    Args:
        weight: float `[N, K]`, finite.
        bits: Width of a level, 2..8.
        groups: Input channels that share a scale (`run_sizes`); None for one per output channel.
        importance: Mean square of each input channel `[K]` for a clip search; None for min/max.

    Returns:
        The codes, scales and zero points.

    Raises:
        ValueError: The weight holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        raise ValueError("The weight holds NaN or infinite values.")
    channels = weight.shape[1]
    scale, zero = weight_parameters(weight, bits, groups, importance)
    s, z = expand_groups(scale, channels, groups), expand_groups(zero, channels, groups)
    codes = (torch.round(weight.float() / s) + z).clamp_(0, 2**bits - 1)
    return QuantizedWeight(codes.to(torch.uint8), scale, zero)


def dequantize(quantized: QuantizedWeight, groups: int | Sequence[int] | None = None) -> Tensor:
    """Real weight `scale * (code - zero)`, float32 `[N, K]`."""
    codes, scale, zero = quantized
    channels = codes.shape[1]
    z = expand_groups(zero.float(), channels, groups)
    return (codes.float() - z) * expand_groups(scale, channels, groups)
