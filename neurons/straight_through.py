"""Encoding and decoding as one differentiable step, for training around spikes.

The forward is that of :class:`.SpikeEncoder`, bit for bit: ``x_hat = s * (q - z)``. The backward is
straight-through where the neuron is within its range::

    dx_hat/dx = 1                 dx_hat/ds = (q - z) - x/s          0 <= q <= qmax
    dx_hat/dx = 0                 dx_hat/ds =  q - z                 where q is cut off
    ds/dhi = r_hi / qmax          ds/dlo = -r_lo / qmax              hi, lo: values of x
    ds/dr_hi = hi / qmax          ds/dr_lo = -lo / qmax              r: clip factors of the range

The rounded bias charge z has no gradient. One autograd function does all of it, few passes over
memory, nothing that waits for a device, and no sum whose order is left to chance.

Source: straight-through rounding as in LSQ (arXiv 1902.08153) and OmniQuant (arXiv 2308.13137).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurons.thresholds import MIN_THRESHOLD, align, ranges, threshold_of

__all__ = ["levels_parameters", "levels_through", "spikes_through"]


class _Levels(torch.autograd.Function):
    """``s * (q - z)``; see the module. Arguments as of :func:`levels_through`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        low: Tensor,
        high: Tensor,
        group: Tensor,
        capacity: Tensor,
        shared: bool,
        floor: float,
    ) -> Tensor:
        lo, hi = ranges(x, group, len(capacity), shared)
        s, z = threshold_of(lo * low, hi * high, capacity, floor)
        axes = align(group)
        scale, zero = _spread(s, axes), _spread(z, axes)
        charge = x / scale
        fired = torch.floor(charge + (zero + 0.5))
        most = _spread(capacity, axes)
        inside = (fired >= 0) & (fired <= most)
        events = torch.minimum(fired.clamp_(min=0), most).sub_(zero)
        slope = torch.where(inside, events - charge, events)
        ctx.save_for_backward(x, inside, slope, lo, hi, s, low, high, axes, capacity)
        ctx.floor = floor
        return events.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inside, slope, lo, hi, s, low, high, group, capacity = ctx.saved_tensors
        (gradient,) = gradients
        by_scale = _group_sums(gradient * slope, group, len(capacity))
        by_scale = by_scale * (s > ctx.floor) / capacity
        by_high, by_low = by_scale * high * (hi > 0), -by_scale * low * (lo < 0)
        if lo.shape[-1] == 1:  # one range for all groups
            by_high, by_low = by_high.sum(-1, keepdim=True), by_low.sum(-1, keepdim=True)
        into = gradient * inside
        into += torch.where(x == _spread(hi, group), _spread(by_high, group), 0.0)
        into += torch.where(x == _spread(lo, group), _spread(by_low, group), 0.0)
        factors = (
            (-by_scale * lo).sum_to_size(low.shape) if ctx.needs_input_grad[1] else None,
            (by_scale * hi).sum_to_size(high.shape) if ctx.needs_input_grad[2] else None,
        )
        return into, *factors, None, None, None, None


def levels_through(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    channel_group: Tensor,
    capacity: Tensor,
    shared: bool = False,
    floor: float = MIN_THRESHOLD,
) -> Tensor:
    """Round rows to levels of their (clipped) range, with a straight-through gradient.

    Args:
        x: float32 ``[.., C]``, or ``[.., H, S, C]`` with groups per head.
        low: factors on ``lo`` of each group, ``[G]`` or anything that broadcasts to ``[.., G]``.
        high: factors on ``hi``, likewise.
        channel_group: group of each channel, ``[C]`` or ``[H, C]``.
        capacity: qmax of each group, float32 ``[G]`` on the device of x.
        shared: one range for all groups instead of one each.
        floor: the least threshold.

    Returns:
        ``s * (q - z)``, of the shape of x.
    """
    out: Tensor = _Levels.apply(x, low, high, channel_group, capacity, shared, floor)
    return out


@torch.no_grad()
def levels_parameters(
    x: Tensor,
    low: Tensor,
    high: Tensor,
    channel_group: Tensor,
    capacity: Tensor,
    shared: bool = False,
    floor: float = MIN_THRESHOLD,
) -> tuple[Tensor, Tensor]:
    """Thresholds and bias charges ``[.., G]`` that :func:`levels_through` rounds with."""
    lo, hi = ranges(x, channel_group, len(capacity), shared)
    return threshold_of(lo * low, hi * high, capacity, floor)


def spikes_through(
    x: Tensor, channel_group: Tensor, capacity: Tensor, shared: bool, clip: Tensor
) -> Tensor:
    """Encode to spikes and decode, ``x_hat``, with a straight-through gradient.

    Args:
        x: activations ``[.., C]``, or ``[.., H, S, C]`` with groups per head; any float dtype.
        channel_group: group of each channel, ``[C]`` or ``[H, C]``.
        capacity: qmax of each group, float32 ``[G]`` on the device of x.
        shared: one range for all groups instead of one each.
        clip: factors on the range of each group ``[G]`` in (0, 1]; may require a gradient.

    Returns:
        float32, of the shape of x.
    """
    return levels_through(x.to(torch.float32), clip, clip, channel_group, capacity, shared)


def _spread(values: Tensor, group: Tensor) -> Tensor:
    """Values per group ``[.., G]`` over channels; by selection, one pass a group."""
    spread = values[..., :1]
    for g in range(1, values.shape[-1]):
        spread = torch.where(group == g, values[..., g : g + 1], spread)
    return spread


def _group_sums(values: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sums over the channels of each group, ``[.., G]``."""
    if groups == 1:
        return values.sum(-1, keepdim=True)
    sums = [values.masked_fill(group != g, 0.0).sum(-1, keepdim=True) for g in range(groups)]
    return torch.cat(sums, -1)
