"""Thresholds and bias charges: from the range of a token and channel group to ``s`` and ``z``.

The equations are those of `neurons.encoder`. float32, IEEE division, no fused multiply-add.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import TypeVar

import torch
from torch import Tensor

from neurons.modes import ValueRange

M = TypeVar("M", bound=StrEnum)
MIN_THRESHOLD = 1e-5  # in units of the activation; an all-zero row has no range


def mode_of(kind: type[M], value: str) -> M:
    """The member of an enum by its value; ValueError names the values there are."""
    if isinstance(value, kind):
        return value
    for mode in kind:
        if mode == value:
            return mode
    raise ValueError(f"expected one of {[str(mode) for mode in kind]}, got {value!r}.")


def per_channel(values: Tensor, channel_group: Tensor) -> Tensor:
    """Spread values per group ``[.., G]`` over channels ``[.., C]``; G = 1 stays ``[.., 1]``."""
    if values.shape[-1] > 1 and channel_group.dim() == 1:
        return values.index_select(-1, channel_group.int())
    spread = values[..., :1]
    for g in range(1, values.shape[-1]):
        spread = torch.where(channel_group == g, values[..., g : g + 1], spread)
    return spread


def row_range(x: Tensor) -> tuple[Tensor, Tensor]:
    """``lo`` and ``hi`` of every row, ``[.., 1]``, zero included."""
    # Two reductions are ten times as fast as torch.aminmax on a CPU; both propagate NaN.
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


def _group_ranges(x: Tensor, channel_group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    # The range includes zero, so zeros may stand for the channels of the other groups.
    ranges = [row_range(torch.where(channel_group == g, x, 0.0)) for g in range(groups)]
    return torch.cat([lo for lo, _ in ranges], -1), torch.cat([hi for _, hi in ranges], -1)


def align(channel_group: Tensor) -> Tensor:
    """Groups as they broadcast against x: ``[C]``, or ``[H, 1, C]`` for heads ``[H, C]``."""
    return channel_group if channel_group.dim() == 1 else channel_group.unsqueeze(-2)


def encode_parameters(
    x: Tensor,
    channel_group: Tensor,
    capacities: Sequence[int],
    value_range: ValueRange | str = ValueRange.SPLIT,
    clip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Threshold and bias charge of every token and channel group.

    ``s = max((hi - lo) / qmax, 1e-5)``, ``z = clip(round(-lo / s), 0, qmax)`` with
    ``lo = min(0, min x)``, ``hi = max(0, max x)`` over the group ("split") or all channels
    ("shared"). A group without channels gets ``s = 1e-5``, ``z = 0`` from a split range.

    Args:
        x: activations ``[.., C]``, or ``[.., H, S, C]`` with groups per head; any float dtype.
        channel_group: group of each channel, integers in ``0..G-1``, ``[C]`` or ``[H, C]``.
        capacities: qmax of each group, G of them.
        value_range: "split" or "shared".
        clip: Factors on ``lo`` and ``hi`` of each group, float32 ``[G]`` in (0, 1]: a smaller
            threshold, larger values saturate. None for the full range.

    Returns:
        Thresholds, float32 ``[.., G]``, in units of x; bias charges, int32 ``[.., G]``.

    Raises:
        ValueError: if the range is unknown.

    Source: SpikeLLM (arXiv 2407.04752); the range includes zero, so that 0 encodes to 0.
    """
    # A tensor divisor: CUDA would multiply by the reciprocal of a Python one.
    capacity = torch.tensor(capacities, dtype=torch.float32, device=x.device)
    shared = mode_of(ValueRange, value_range) == ValueRange.SHARED
    threshold, zero_point = parameters(x, channel_group, capacity, shared, clip)
    return threshold, zero_point.to(torch.int32)


def parameters(
    x: Tensor, channel_group: Tensor, capacity: Tensor, shared: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor]:
    """:func:`encode_parameters` with the capacities as a tensor ``[G]`` and ``z`` in float32."""
    lo, hi = ranges(x.to(torch.float32), channel_group, len(capacity), shared)
    if clip is not None:
        lo, hi = lo * clip, hi * clip
    return threshold_of(lo, hi, capacity, MIN_THRESHOLD)


def ranges(x: Tensor, channel_group: Tensor, groups: int, shared: bool) -> tuple[Tensor, Tensor]:
    """``lo`` and ``hi`` of every token, ``[.., G]``, or ``[.., 1]`` where there is one range."""
    if groups == 1 or shared:
        return row_range(x)
    return _group_ranges(x, align(channel_group), groups)


def threshold_of(lo: Tensor, hi: Tensor, capacity: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """``s`` and ``z`` of a range, float32 ``[.., G]``."""
    threshold = ((hi - lo) / capacity).clamp(min=floor)
    return threshold, torch.minimum(torch.round(-lo / threshold).clamp(min=0), capacity)
