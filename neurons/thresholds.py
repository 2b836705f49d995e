"""Thresholds and bias charges: from the range of a token and channel group to ``s`` and ``z``.

The equations are those of `neurons.encoder`. float32, IEEE division, no fused multiply-add.

Commensurate thresholds (:func:`commensurate`) are those of split ranges, rounded up to multiples of
one unit per token, so that the groups lie on one integer grid.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neurons.modes import LARGEST_CHARGE, ValueRange, check_commensurate, mode_of

MIN_THRESHOLD = 1e-5  # in units of the activation; an all-zero row has no range
_CANDIDATES = 4  # multiples of the last group that are tried
_MOST_COST = 1e30  # kernels compare integers that have no room for more
_ROUND_UP = 1 + 2.0**-18  # more than the bits that are cut off
_UNIT_BITS = ~31  # a unit has 19 bits, so its multiples below 32 are exact


class Parameters(NamedTuple):
    """Threshold, bias charge and multiple of every token and channel group.

    Attributes:
        threshold: ``s``, float32 ``[.., G]``, in units of the activation.
        zero_point: ``z``, int32 ``[.., G]``, in thresholds.
        multiple: ``m`` with ``s = m * unit``, int32 ``[.., G]``; None unless commensurate.
    """

    threshold: Tensor
    zero_point: Tensor
    multiple: Tensor | None


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
        value_range: "split", "shared" or "commensurate" (split, then :func:`commensurate`).
        clip: Factors on ``lo`` and ``hi`` of each group, float32 ``[G]`` in (0, 1]: a smaller
            threshold, larger values saturate. None for the full range.

    Returns:
        Thresholds, float32 ``[.., G]``, in units of x; bias charges, int32 ``[.., G]``.

    Raises:
        ValueError: if the range is unknown, or the capacities cannot be commensurate.

    Source: SpikeLLM (arXiv 2407.04752); the range includes zero, so that 0 encodes to 0.
    """
    return parameters(x, channel_group, capacities, value_range, clip)[:2]


def parameters(
    x: Tensor,
    channel_group: Tensor,
    capacities: Sequence[int],
    value_range: ValueRange | str = ValueRange.SPLIT,
    clip: Tensor | None = None,
) -> Parameters:
    """:func:`encode_parameters` with the multiples of commensurate thresholds."""
    mode = mode_of(ValueRange, value_range)
    # A tensor divisor: CUDA would multiply by the reciprocal of a Python one.
    capacity = torch.tensor(capacities, dtype=torch.float32, device=x.device)
    shared = mode == ValueRange.SHARED
    lo, hi = ranges(x.to(torch.float32), channel_group, len(capacity), shared)
    if clip is not None:
        lo, hi = lo * clip, hi * clip
    threshold, multiple = split_threshold(lo, hi, capacity, MIN_THRESHOLD), None
    if mode == ValueRange.COMMENSURATE:
        unit, multiple = commensurate(threshold, capacities)
        threshold = unit * multiple
        multiple = multiple.to(torch.int32)
    return Parameters(threshold, bias_charge(lo, threshold, capacity).to(torch.int32), multiple)


def commensurate(threshold: Tensor, capacities: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Unit and multiples that round the thresholds of a token up to one integer grid.

    With ``M_g = 255 // capacity_g`` and L the last group, for n of ``M_L, M_L - 1, .., M_L - 3``
    that are at least 1::

        u_n  = max(max_{g != L} s_g / M_g, s_L / n)         a little more, rounded to 19 bits
        m_g  = min(ceil(s_g / u_n), M_g)
        cost = max_g (u_n * m_g) / s_g              at most 1e30

    of which the least cost is taken, of equal ones the largest n. The charge ``m_g * q`` of a spike
    count is at most 255. One group keeps its threshold. NaN and infinity give NaN or infinity,
    by which multiple is undefined.

    Args:
        threshold: s, thresholds of split ranges, float32 ``[.., G]``, positive.
        capacities: qmax of each group; the last one the largest, all at most 63 if there are
            several.

    Returns:
        The unit u, float32 ``[.., 1]``; the multiples m, integers in float32 ``[.., G]``. The new
        threshold is ``u * m``, exact for m < 32 (capacities of 8 and more).

    Raises:
        ValueError: if the capacities do not fit.
    """
    check_commensurate(capacities)
    if len(capacities) == 1:
        return threshold, torch.ones_like(threshold)
    most = [LARGEST_CHARGE // capacity for capacity in capacities]
    tried = range(most[-1], max(most[-1] - _CANDIDATES, 0), -1)
    device = threshold.device
    divisor = torch.tensor([[*most[:-1], n] for n in tried], dtype=torch.float32, device=device)
    s = threshold.unsqueeze(-2)
    unit = (s / divisor).amax(-1, keepdim=True) * _ROUND_UP  # [.., n, 1]
    unit = (unit.view(torch.int32) & _UNIT_BITS).view(torch.float32)
    multiple = torch.minimum(torch.ceil(s / unit), divisor[:1])
    # The first of the least costs; a NaN counts as the least.
    cost = (unit * multiple / s).amax(-1, keepdim=True).clamp(max=_MOST_COST)
    best = cost.argmin(-2, keepdim=True)
    unit = unit.take_along_dim(best, -2).squeeze(-2)
    return unit, multiple.take_along_dim(best, -2).squeeze(-2)


def unit_of(threshold: Tensor, multiple: Tensor) -> Tensor:
    """The unit ``[.., 1]`` of commensurate thresholds and multiples, both ``[.., G]``; exact."""
    if threshold.shape[-1] == 1:
        return threshold
    # The quotient is within 2**-23 of a number of 19 bits, the nearest one.
    quotient = threshold[..., :1] / multiple[..., :1]
    return ((quotient.view(torch.int32) + 16) & _UNIT_BITS).view(torch.float32)


def ranges(x: Tensor, channel_group: Tensor, groups: int, shared: bool) -> tuple[Tensor, Tensor]:
    """``lo`` and ``hi`` of every token, ``[.., G]``, or ``[.., 1]`` where there is one range."""
    if groups == 1 or shared:
        return row_range(x)
    return _group_ranges(x, align(channel_group), groups)


def threshold_of(lo: Tensor, hi: Tensor, capacity: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """``s`` and ``z`` of a range, float32 ``[.., G]``."""
    threshold = split_threshold(lo, hi, capacity, floor)
    return threshold, bias_charge(lo, threshold, capacity)


def split_threshold(lo: Tensor, hi: Tensor, capacity: Tensor, floor: float) -> Tensor:
    """``s = max((hi - lo) / qmax, floor)``, float32 ``[.., G]``."""
    return ((hi - lo) / capacity).clamp(min=floor)


def bias_charge(lo: Tensor, threshold: Tensor, capacity: Tensor) -> Tensor:
    """``z = clip(round(-lo / s), 0, qmax)``, float32 ``[.., G]``."""
    return torch.minimum(torch.round(-lo / threshold).clamp(min=0), capacity)
