"""Encoding and decoding as one differentiable step, for training around spikes.

The forward is that of :class:`.SpikeEncoder`, bit for bit: ``x_hat = s * (q - z)``. The backward is
straight-through where the neuron is within its range::

    dx_hat/dx = 1                 dx_hat/ds = (q - z) - x/s          0 <= q <= qmax
    dx_hat/dx = 0                 dx_hat/ds =  q - z                 where q is cut off

The threshold takes its gradient on to the smallest and the largest value of its group, and to the
clip factors; the rounded bias charge z has none. Nothing here waits for a device.

Source: straight-through rounding as in LSQ (arXiv 1902.08153) and OmniQuant (arXiv 2308.13137).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from neurons.encoder import _align, _parameters, _per_channel

__all__ = ["levels_through", "spikes_through"]


class _Levels(torch.autograd.Function):
    """``s * (q - z)`` with ``q = clip(floor(x / s + (z + 1/2)), 0, qmax)``; see the module."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor, z: Tensor, capacity: Tensor) -> Tensor:
        charge = x / s
        fired = torch.floor(charge + (z + 0.5))
        inside = (fired >= 0) & (fired <= capacity)
        events = torch.minimum(fired.clamp(min=0), capacity) - z
        ctx.save_for_backward(inside, torch.where(inside, events - charge, events))
        ctx.shape = s.shape
        return s * events

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inside, slope = ctx.saved_tensors
        (gradient,) = gradients
        return gradient * inside, (gradient * slope).sum_to_size(ctx.shape), None, None


def levels_through(x: Tensor, threshold: Tensor, zero_point: Tensor, capacity: Tensor) -> Tensor:
    """Round to levels with a straight-through gradient.

    Args:
        x: float32 ``[..]``.
        threshold: s, broadcasts against x.
        zero_point: z, integers as float32, of the shape of the threshold.
        capacity: qmax, broadcasts against x.

    Returns:
        ``s * clip(floor(x / s + (z + 1/2)) - z, -z, qmax - z)``, of the shape of x.
    """
    out: Tensor = _Levels.apply(x, threshold, zero_point, capacity)
    return out


def spikes_through(
    x: Tensor,
    channel_group: Tensor,
    capacity: Tensor,
    shared: bool = False,
    clip: Tensor | None = None,
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
    x = x.to(torch.float32)
    threshold, zero_point = _parameters(x, channel_group, capacity, shared, clip)
    group = _align(channel_group)
    return levels_through(
        x,
        _spread(threshold, group),
        _spread(zero_point, group),
        capacity if len(capacity) == 1 else _per_channel(capacity, group),
    )


def _spread(values: Tensor, group: Tensor) -> Tensor:
    """Values per group ``[.., G]`` over channels; by selection, whose gradient is deterministic."""
    spread = values[..., :1]
    for g in range(1, values.shape[-1]):
        spread = torch.where(group == g, values[..., g : g + 1], spread)
    return spread
