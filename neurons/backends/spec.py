"""What a backend is asked to compute: the dynamics of a layer of neurons, and the train it emits.

With x in thresholds, v the membrane, h the charged membrane and ``lambda`` the decay::

    h[t] = lambda * v[t-1] + x[t] / v_threshold
    s[t] = clip(floor(h[t]), 0, L-1)                              unsigned
    s[t] = sign(h[t]) * clip(ceil(|h[t]| - 1/2), 0, L-1)          signed
    v[t] = h[t] - s[t]                                            soft reset
    v[t] = h[t] where s[t] = 0, else 0                            hard reset

Backward, straight-through: ``ds/dh = w``, 1 where h lies in the window and the neuron may fire, 0
elsewhere; ``dv/dh = c`` with ``c = 1 - w`` (soft reset), 1 (soft, detached) or ``[s = 0]`` (hard)::

    gh[t] = w[t] * gs[t] + c[t] * gv[t]       gv[t-1] = lambda * gh[t]       gx[t] = gh[t] / v_threshold

so one bit of a neuron and step (two with the hard reset) is all that a backward pass has to know.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from neurons import functional
from neurons.surrogate import GIFSpikeCount, SignedSpikeCount

__all__ = ["DTYPES", "Dynamics", "Output", "Reset", "Train", "check_spike_dtype"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # inputs that the kernels read


class Reset(StrEnum):
    """What a spike does to the membrane."""

    SOFT = "soft"  # takes off as many thresholds as were emitted
    HARD = "hard"  # sets it to zero


class Output(StrEnum):
    """What is written of a spike train."""

    SPIKES = "spikes"  # every step
    COUNT = "count"  # the sum over the steps


@dataclass(frozen=True)
class Dynamics:
    """Parameters of a layer of neurons; the equations are those of this module's docstring.

    Args:
        levels: L, spike levels of a step (of either sign).
        signed: negative spikes, too.
        v_threshold: firing threshold, in the units of the input.
        decay: lambda, what is left of the membrane after one step, in (0, 1]; 1: no leak.
        reset: "soft" or "hard".
        detach_reset: whether the reset keeps gradients from flowing through its spikes.
        window: range of the charged membrane, in thresholds, that gradients pass. None:
            ``[1/2, L - 1/2]``, signed ``[-(L-1), L-1]``, the straight-through gradient of the count.

    Raises:
        ValueError: if a parameter is out of range, or a hard reset is to pass gradients.
    """

    levels: int = 16
    signed: bool = False
    v_threshold: float = 1.0
    decay: float = 1.0
    reset: Reset = Reset.SOFT
    detach_reset: bool = False
    window: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise ValueError(f"levels must be at least 2 (no spike, one spike), got {self.levels}.")
        if not 0.0 < self.v_threshold < float("inf"):
            raise ValueError(f"v_threshold must be positive and finite, got {self.v_threshold}.")
        if not 0.0 < self.decay <= 1.0:
            raise ValueError(f"decay must lie in (0, 1], 1 for no leak, got {self.decay}.")
        if self.reset == Reset.HARD and not self.detach_reset:
            raise ValueError("a hard reset passes no gradient; set detach_reset=True.")

    @property
    def bounds(self) -> tuple[float, float]:
        """The window, its default filled in."""
        if self.window is not None:
            return self.window
        return (1.0 - self.levels, self.levels - 1.0) if self.signed else (0.5, self.levels - 0.5)

    def surrogate(self) -> functional.FireRule:
        """The firing rule with its gradient, as the reference loop calls it."""
        lower, upper = self.bounds
        if self.signed:
            return SignedSpikeCount(self.levels - 1, grad_window=(lower, upper))
        return GIFSpikeCount(self.levels - 1, grad_window=(lower - 0.5, upper - 0.5))


class Train(NamedTuple):
    """A spike train and the membrane behind it.

    Attributes:
        spikes: ``[T, *]``, or the counts ``[*]``.
        v: membrane after the last step ``[*]``, float32, in thresholds; empty if not asked for.
        v_seq: membrane after every step ``[T, *]``, float32; None if not asked for.
    """

    spikes: Tensor
    v: Tensor
    v_seq: Tensor | None


def check_spike_dtype(dtype: torch.dtype, dynamics: Dynamics, largest: int) -> None:
    """Refuse a dtype that cannot hold every spike (or count) exactly.

    Args:
        dtype: integer or floating.
        dynamics: for the sign.
        largest: the largest magnitude that can be emitted.

    Raises:
        ValueError: if it does not fit.
    """
    if dtype.is_floating_point:
        fits = largest <= 2 / torch.finfo(dtype).eps
    else:
        info = torch.iinfo(dtype)
        fits = largest <= info.max and (not dynamics.signed or info.min <= -largest)
    if not fits:
        raise ValueError(
            f"{dtype} cannot hold {'+-' if dynamics.signed else ''}{largest} exactly; choose a wider "
            "dtype, fewer levels or fewer steps."
        )
