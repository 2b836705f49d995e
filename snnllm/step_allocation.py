"""How many time steps the weight columns of a linear get, and which columns share a threshold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snnllm.config import GROUP_SIZE as GROUP_SIZE
from snnllm.step_budget import MAX_STEPS, check_mean_steps
from snnllm.weights import run_sizes

DISTORTION = (1.0, 0.1902, 0.0822, 0.0469, 0.0307, 0.0218, 0.0164, 0.0128)
"""Mean square error of the best clip(round(w / a), -T, T) of a Gaussian, T = 0..7 (Max, 1960)."""


class StepClass(NamedTuple):
    """Columns that have the same number of steps.

    Attributes:
        steps: T.
        columns: How many columns.
    """

    steps: int
    columns: int


def allocate_steps(score: Tensor, mean_steps: float) -> Tensor:
    """Spend a budget of steps where it takes away most of `sum_c s_c D(T_c)`.

    Every column starts with one step; the next step goes to the column with the largest
    `s_c (D(T_c) - D(T_c + 1))`, where D is the error of T-step trains of Gaussian weights. D is
    convex, so this is the optimum.

    Args:
        score: Loss of a column without spikes, `[K]`, not negative (`ternary.column_score`).
        mean_steps: Steps of a column on average, 1..7; met up to rounding to whole steps.

    Returns:
        Steps of every channel, int64 `[K]`.

    Raises:
        ValueError: The budget is out of range, or a score is negative or not finite.
    """
    check_mean_steps(mean_steps)
    if not bool(torch.isfinite(score).all()) or bool((score < 0).any()):
        raise ValueError("scores of columns must be finite and not negative.")
    distortion = torch.tensor(DISTORTION, dtype=torch.float64, device=score.device)
    gains = score.double().unsqueeze(1) * (distortion[1:-1] - distortion[2:])  # [K, T = 2..7]
    spent = round((mean_steps - 1.0) * len(score))
    # Stable, and early steps first: a column gets its second step before its third.
    chosen = torch.argsort(gains.T.flatten(), descending=True, stable=True)[:spent]
    return 1 + torch.bincount(chosen % len(score), minlength=len(score))


def allocate_salient(score: Tensor, mean_steps: float, steps: int) -> Tensor:
    """Two classes: the columns with the largest scores get `steps`, the others one step.

    Args:
        score: `[K]`.
        mean_steps: Steps of a column on average, in `1..steps`.
        steps: T of the salient columns, at least 2.

    Returns:
        Steps of every channel, int64 `[K]`.

    Raises:
        ValueError: The budget cannot be met.
    """
    check_mean_steps(mean_steps, steps)
    salient = round((mean_steps - 1.0) / (steps - 1) * len(score))
    out = torch.ones(len(score), dtype=torch.int64, device=score.device)
    out[torch.argsort(score, descending=True, stable=True)[:salient]] = steps
    return out


def classes_of(steps: Tensor) -> tuple[StepClass, ...]:
    """The classes of a map channel -> steps, int `[K]`; steps ascending.

    Raises:
        ValueError: Not integers, or a step count outside of 1..127.
    """
    if steps.is_floating_point() or steps.dim() != 1 or not len(steps):
        raise ValueError(f"weight steps must be integers [K], got {steps.dtype} {steps.shape}.")
    if not 1 <= int(steps.min()) <= int(steps.max()) <= MAX_STEPS:
        raise ValueError(
            f"weight steps must be in 1..{MAX_STEPS}, got {int(steps.min())}..{int(steps.max())}."
        )
    values, counts = torch.unique(steps.cpu(), return_counts=True)
    return tuple(StepClass(int(t), int(n)) for t, n in zip(values, counts, strict=True))


def threshold_runs(classes: Sequence[StepClass], group_size: int | None) -> tuple[int, ...]:
    """Sizes of the runs of columns that share a threshold: at most `group_size`, within a class."""
    return tuple(size for c in classes for size in run_sizes(c.columns, group_size))


def column_steps(classes: Sequence[StepClass]) -> Tensor:
    """Steps of every column in stored order (sorted by class), int64 `[K]`."""
    steps = torch.tensor([c.steps for c in classes])
    return steps.repeat_interleave(torch.tensor([c.columns for c in classes]))
