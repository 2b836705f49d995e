"""A linear without multiplications: ternary weight spikes add or subtract activations.

    A[j, m, n] = sum_{c in run j} sum_t s_t[n, c] a[m, c],   s_t in {-1, 0, 1}

The reference of the ternary linear; it counts what it does while it does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from snnllm.ternary import weight_spikes

_ELEMENTS = 1 << 22
"""Activations that are selected at once, which bounds the memory."""


@dataclass
class AdditiveWork:
    """Operations of ternary linears.

    Attributes:
        additions: Activations that a weight spike +1 added to a sum.
        subtractions: Those that a weight spike -1 took from it.
        scalings: Multiplications of finished sums: by the threshold of the weights, and, for
            spiking activations, by that of the neurons.
    """

    additions: int = 0
    subtractions: int = 0
    scalings: int = 0

    @property
    def synaptic_operations(self) -> int:
        """Additions and subtractions."""
        return self.additions + self.subtractions


def additive_sums(
    activations: Tensor, levels: Tensor, runs: Sequence[tuple[int, int]], work: AdditiveWork
) -> Tensor:
    """Sums of activations over ternary weight spikes, by additions and subtractions only.

    A silent weight or an activation of 0 costs nothing and is not counted.

    Args:
        activations: int64 `[M, K]`.
        levels: Spike counts of the weights, int8 `[N, K]`.
        runs: `(start, stop)` of the columns that are summed together.
        work: What is done is added here.

    Returns:
        int64 `[J, M, N]`.
    """
    rows, outputs = len(activations), len(levels)
    sums = activations.new_zeros(len(runs), rows, outputs)
    nothing = activations.new_zeros(())
    for index, (start, stop) in enumerate(runs):
        level = levels[:, start:stop]
        steps = int(level.abs().max()) if level.numel() else 0
        train = weight_spikes(level, steps)
        chunk = max(1, _ELEMENTS // max(1, outputs * (stop - start)))
        for first in range(0, rows, chunk):
            charge = activations[first : first + chunk, None, start:stop]
            heard = charge != 0
            for spikes in train:
                plus, minus = (spikes == 1) & heard, (spikes == -1) & heard
                sums[index, first : first + chunk] += torch.where(plus, charge, nothing).sum(-1)
                sums[index, first : first + chunk] -= torch.where(minus, charge, nothing).sum(-1)
                work.additions += int(plus.sum())
                work.subtractions += int(minus.sum())
    return sums


def fixed_point(x: Tensor) -> tuple[Tensor, Tensor]:
    """Float activations as integers of 24 bits on a grid of one power of two per token.

        unit = 2^(ceil(log2 max|x|) - 24),   a = round(x / unit)

    Sums of integers do not depend on their order, so every execution agrees bit for bit; the error
    is at most 2^-25 of the largest activation of the token, that of one float32 rounding.

    Args:
        x: float `[M, K]`.

    Returns:
        int64 `[M, K]` and float32 `[M]`.

    Raises:
        ValueError: NaN or infinity.
    """
    largest = x.double().abs().amax(-1, keepdim=True)
    if not bool(torch.isfinite(largest).all()):
        raise ValueError("the input holds NaN or infinity; it has no fixed-point form.")
    exponent = torch.frexp(largest).exponent - 24
    exponent = exponent.clamp(min=-120)  # the unit must be a float32
    integers = torch.round(x.double() * _power_of_two(-exponent)).to(torch.int64)
    return integers, _power_of_two(exponent).float().squeeze(-1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """`2^exponent` in float64, from its bits: exact on every device."""
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)
