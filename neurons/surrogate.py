"""Straight-through surrogate gradients of multi-level and signed spikes.

The forward is the firing rule of :mod:`neurons.functional`; the backward passes the gradient where
the neuron is within its range and blocks it outside. Summed over a train with soft reset, that is
the straight-through gradient of the closed-form count: 1 for charges in ``[0, T*(L-1)]`` (signed:
``[-T*(L-1), T*(L-1)]``), 0 elsewhere.

Source: SpikingJelly 2.0, ``surrogate.MultiLevelSpikeCount`` (round half to even, no offset).
"""

from spikingjelly.activation_based import surrogate
from torch import Tensor

from neurons import functional

__all__ = ["GIFSpikeCount", "SignedSpikeCount"]


def _straight_through(spike: Tensor, x: Tensor, lower: float, upper: float) -> Tensor:
    if not x.requires_grad:
        return spike
    window = x.clamp(lower, upper)
    # The difference is exactly 0, so the spikes stay exact integers.
    return spike.detach() + (window - window.detach())


class GIFSpikeCount(surrogate.MultiLevelSpikeCount):
    """Fire the unsigned neuron with a straight-through gradient.

    ``s = clip(floor(h), 0, D)`` with ``ds/dh = 1`` where ``lower <= h - 1/2 <= upper``; h is the
    charged membrane in thresholds, whose 1/2 is the rounding offset. With ``spiking=False`` the
    continuous primitive ``clip(h - 1/2, 0, D)``.

    Args:
        max_spike_count: D = L - 1, the largest spike.
        spiking: emit spikes (True) or the continuous primitive (False).
        grad_window: ``(lower, upper)``, in thresholds; None: ``(0, D)``.

    Raises:
        TypeError: if max_spike_count is not an integer.
        ValueError: if it is below 1, or the window is empty.
    """

    @staticmethod
    def spiking_function(
        x: Tensor, max_spike_count: int, grad_min: float, grad_max: float
    ) -> Tensor:
        """Spikes of the charged membrane ``x`` [*] (thresholds); see the class."""
        spike = functional.gif_fire(x, max_spike_count + 1)
        return _straight_through(spike, x, grad_min + 0.5, grad_max + 0.5)

    @staticmethod
    def primitive_function(
        x: Tensor, max_spike_count: int, grad_min: float, grad_max: float
    ) -> Tensor:
        """Continuous version ``clip(x - 1/2, 0, D)`` of the charged membrane ``x`` [*]."""
        return (x - 0.5).clamp(0, max_spike_count)


class SignedSpikeCount(surrogate.MultiLevelSpikeCount):
    """Fire the signed neuron with a straight-through gradient.

    ``s = sign(h) * clip(ceil(|h| - 1/2), 0, D)`` with ``ds/dh = 1`` where ``lower <= h <= upper``;
    h is the charged membrane in thresholds. With ``spiking=False`` the continuous primitive
    ``clip(h, -D, D)``.

    Args:
        max_spike_count: D = L - 1, the largest magnitude of a spike.
        spiking: emit spikes (True) or the continuous primitive (False).
        grad_window: ``(lower, upper)``, in thresholds; None: ``(-D, D)``.

    Raises:
        TypeError: if max_spike_count is not an integer.
        ValueError: if it is below 1, or the window is empty.
    """

    def __init__(
        self,
        max_spike_count: int,
        spiking: bool = True,
        grad_window: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(max_spike_count, spiking, grad_window)
        if grad_window is None:
            self.grad_min = -self.grad_max

    @staticmethod
    def spiking_function(
        x: Tensor, max_spike_count: int, grad_min: float, grad_max: float
    ) -> Tensor:
        """Spikes of the charged membrane ``x`` [*] (thresholds); see the class."""
        spike = functional.signed_gif_fire(x, max_spike_count + 1)
        return _straight_through(spike, x, grad_min, grad_max)

    @staticmethod
    def primitive_function(
        x: Tensor, max_spike_count: int, grad_min: float, grad_max: float
    ) -> Tensor:
        """Continuous version ``clip(x, -D, D)`` of the charged membrane ``x`` [*]."""
        return x.clamp(-max_spike_count, max_spike_count)
