"""Weights as ternary spike trains: thresholds, saliency, step allocation, GPTQ (method.md section 6).

    w_hat[n, c] = alpha[n, j] * sum_t s_t,   s_t in {-1, 0, 1},   t = 0..T_c-1

The spikes are those of the signed GIF neuron with two levels, charged with `w / alpha` at the first
step; alpha is its threshold, one per output row and run of columns with the same number of steps.
Sources: SpikeLLM (arXiv 2407.04752), Remark 1 and Theorem 1; GPTQ (arXiv 2210.17323); coordinate
descent on the quadratic loss: QuantEase (arXiv 2309.01885).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neurons.functional import signed_events, signed_gif_count
from snnllm.column_sweep import CPU_LAZY_COLUMNS, LAZY_COLUMNS, BlockCoder, column_sweep
from snnllm.gptq import DAMPING, ROWS, inverse_factor
from snnllm.kernels.triton.gptq import triton_available
from snnllm.kernels.triton.ternary_gptq import fire_block, refine_block
from snnllm.step_allocation import GROUP_SIZE, StepClass, classes_of, column_steps, threshold_runs
from snnllm.weights import expand_groups

_log = logging.getLogger(__name__)
_RATIOS = tuple(0.2 + 0.05 * i for i in range(17))
_SMALLEST, _LARGEST = 2.0**-14, 65504.0  # normal float16


class TernaryWeight(NamedTuple):
    """Ternary spike trains of a weight; columns sorted by class, as they are stored.

    Attributes:
        levels: Spike counts, int8 `[N, K]`, in `-T..T` of the column.
        threshold: float16 `[N, J]`, one per row and run of columns (`threshold_runs`).
        order: Original channel of every column, int64 `[K]`.
        classes: Steps and sizes of the classes, steps ascending.
    """

    levels: Tensor
    threshold: Tensor
    order: Tensor
    classes: tuple[StepClass, ...]


def weight_spikes(levels: Tensor, steps: int) -> Tensor:
    """The spike train of a neuron charged at step 0: `sign(q)` for `|q|` steps, then silence.

    Args:
        levels: Spike counts `[*]` in `-steps..steps`, integers.
        steps: T.

    Returns:
        int8 `[T, *]` in {-1, 0, 1}; the sum over time is `levels`.

    Raises:
        ValueError: A level beyond what T steps can emit.
    """
    plus, minus = signed_events(levels, steps)
    return plus.to(torch.int8) - minus.to(torch.int8)


def column_score(weight: Tensor, hessian: Tensor, name: str = "") -> Tensor:
    """Second-order saliency `s_c = sum_n w_nc^2 / [H^-1]_cc` (Optimal Brain Surgeon).

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T`, `[K, K]`; damped here, and more if it cannot be factorised.
        name: Layer name for messages.

    Returns:
        float32 `[K]`.

    Raises:
        ValueError: The Hessian is not finite or cannot be factorised.
    """
    upper = inverse_factor(hessian.float().clone(), name)
    return weight.float().square().sum(0) / upper.square().sum(0)  # H^-1 = U^T U


def find_thresholds(weight: Tensor, importance: Tensor, steps: int) -> Tensor:
    """Thresholds that minimise `sum_c h_c (w_c - alpha q_c)^2` for every row of a run of columns.

    A grid over `alpha = r max|w| / T`; every point is refined once, by the least-squares
    `alpha = sum h w q / sum h q^2` of its counts `q = clip(round(w / alpha), -T, T)`.

    Args:
        weight: float32 `[columns, N]`, a column contiguous.
        importance: `h_c = diag(H)`, `[columns]`.
        steps: T.

    Returns:
        float16 `[N]`.
    """
    h, largest = importance.unsqueeze(1), weight.abs().amax(0)
    grid = torch.tensor([[ratio / steps] for ratio in _RATIOS], device=weight.device)
    thresholds, losses = [], []
    # The whole grid at once takes few kernels; a point at a time stays in the caches of a CPU.
    for points in grid.split(len(grid) if weight.is_cuda else 1):
        alpha = _storable(largest * points)
        count = signed_gif_count(weight / alpha.unsqueeze(1), steps)
        weighted = h * count
        square = (weighted * count).sum(1)
        fitted = (weighted * weight).sum(1) / square
        alpha = _storable(torch.where(square > 0, fitted, alpha))
        per_column = alpha.unsqueeze(1)
        error = weight - per_column * signed_gif_count(weight / per_column, steps)
        losses.append((h * error.square_()).sum(1))
        thresholds.append(alpha)
    best = torch.cat(losses).argmin(0, keepdim=True)
    return torch.cat(thresholds).gather(0, best).squeeze(0).half()


def _storable(threshold: Tensor) -> Tensor:
    """Thresholds as they will be read back from float16, away from zero and infinity."""
    return threshold.clamp(_SMALLEST, _LARGEST).half().to(threshold.dtype)


def fused(tensor: Tensor) -> bool:
    """Whether a block of columns runs as one kernel."""
    return tensor.is_cuda and triton_available()


class TernaryCoder(BlockCoder):
    """Rounds the columns of a sweep to ternary spike trains; a block is a run of one threshold.

    Args:
        importance: `diag(H)` in the order of the sweep, `[K]`.
        steps: Steps of every column in that order.

    Attributes:
        levels: Spike counts so far, float32 `[columns, N]` each.
        thresholds: float32 `[N]` of every run so far.
    """

    def __init__(self, importance: Tensor, steps: Sequence[int]) -> None:
        self._importance, self._steps = importance, steps
        self.levels: list[Tensor] = []
        self.thresholds: list[Tensor] = []
        self._run = 0

    def begin(self, weight: Tensor, start: int) -> None:
        """Search the thresholds of a run on its compensated weights."""
        self._run = self._steps[start]
        importance = self._importance[start : start + len(weight)]
        self.thresholds.append(find_thresholds(weight, importance, self._run).float())

    def round(self, column: int, weight: Tensor) -> Tensor:
        """Let the neurons of a column fire."""
        threshold = self.thresholds[-1]
        count = signed_gif_count(weight / threshold, self._run)
        self.levels.append(count.unsqueeze(0))
        return count * threshold

    def round_columns(self, column: int, weight: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
        """Let the neurons of several columns fire; on a GPU in one kernel."""
        if not fused(weight):
            return super().round_columns(column, weight, spread)
        counts, errors = torch.empty_like(weight), torch.empty_like(weight)
        fire_block(weight, spread, self.thresholds[-1], self._run, counts, errors)
        self.levels.append(counts)
        return counts * self.thresholds[-1], errors


def ternary_gptq(
    weight: Tensor,
    hessian: Tensor,
    steps: Tensor,
    group_size: int | None = GROUP_SIZE,
    name: str = "",
    damping: float = DAMPING,
    refinements: int = 0,
) -> TernaryWeight:
    """Encode a weight as ternary spike trains with GPTQ error compensation.

    Classes are swept in the order of increasing steps, so that the columns with more steps absorb
    the errors of the coarse ones; inside a class the order is that of decreasing `diag(H)`.

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T` of the inputs, `[K, K]`.
        steps: Steps of every channel, int `[K]`.
        group_size: Columns of a class that share a threshold; None for all.
        name: Layer name for messages.
        damping: Fraction of the mean diagonal that is added to the diagonal of the Hessian.
        refinements: Passes of `refine` after the sweep.

    Returns:
        The trains, columns sorted by class.

    Raises:
        ValueError: Weight or Hessian are not finite, the weight does not fit float16, or a step
            count is out of range.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight holds NaN or infinite values.")
    if weight.numel() and float(weight.abs().max()) > _LARGEST:
        raise ValueError(f"{name}: weights beyond {_LARGEST:g} have no float16 threshold.")
    largest = weight.abs().amax(1)
    tiny = int(((largest > 0) & (largest < _SMALLEST)).sum())
    if tiny:
        _log.warning("%s: %d rows below %.1g become zero", name, tiny, _SMALLEST)
    classes, hessian = classes_of(steps), hessian.float()
    upper, hessian, order = _sorted(hessian, steps.to(hessian.device), name, damping)
    weight = weight.float()[:, order]
    runs, column = threshold_runs(classes, group_size), column_steps(classes)
    parts = []
    for part in weight.split(ROWS):  # rows are independent; a part at a time bounds the memory
        coder = TernaryCoder(hessian.diagonal(), column.tolist())
        column_sweep(part, upper, coder, runs)
        levels, threshold = torch.cat(coder.levels).T, torch.stack(coder.thresholds, 1)
        for _ in range(refinements):
            levels, threshold = refine(part, hessian, levels, threshold, column, runs)
        parts.append((levels.to(torch.int8), threshold.half()))
    levels, threshold = (torch.cat(p) for p in zip(*parts, strict=True))
    return TernaryWeight(levels, threshold, order, classes)


def _sorted(
    hessian: Tensor, steps: Tensor, name: str, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Factor of the inverse and damped Hessian in the order of the sweep, and that order."""
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    order = order[torch.argsort(steps[order], stable=True)]
    hessian = hessian[order][:, order].clone()
    upper = inverse_factor(hessian, name, damping)
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return upper, hessian, order


def refine(
    weight: Tensor,
    hessian: Tensor,
    levels: Tensor,
    threshold: Tensor,
    steps: Tensor,
    runs: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Least-squares thresholds with the whole Hessian, then every column anew given all others.

    Each part lowers `tr((W - W_hat) H (W - W_hat)^T)` or leaves it, up to the rounding of the
    thresholds to float16. A column sees the weight that is best given all other columns,
    `w_hat_c + (E H)_c / H_cc`, and its neurons fire on that.

    Args:
        weight: float32 `[N, K]`, columns in stored order.
        hessian: Damped, in that order, `[K, K]`.
        levels: Spike counts, float32 `[N, K]`.
        threshold: float32 `[N, J]`.
        steps: Steps of every column, `[K]`.
        runs: Sizes of the runs of columns that share a threshold.

    Returns:
        New levels and thresholds.
    """
    threshold = _least_squares(weight, hessian, levels, threshold, runs)
    alpha = expand_groups(threshold, weight.shape[1], runs).T.contiguous()
    q = levels.T.clone(memory_format=torch.contiguous_format)
    gradient = hessian @ (weight.T - q * alpha)  # of half the loss, negative: [K, N]
    most = steps.to(q)
    run, size = (refine_block, LAZY_COLUMNS) if fused(q) else (_refine_columns, CPU_LAZY_COLUMNS)
    for start in range(0, len(q), size):
        part = slice(start, min(start + size, len(q)))
        local, changes = hessian[part, part].contiguous(), torch.empty_like(q[part])
        run(gradient[part], local, alpha[part], most[part], q[part], changes)
        gradient[part.stop :].addmm_(hessian[part.stop :, part], changes, alpha=-1.0)
    return q.T.contiguous(), threshold


def _refine_columns(
    gradient: Tensor,
    hessian: Tensor,
    threshold: Tensor,
    steps: Tensor,
    counts: Tensor,
    changes: Tensor,
) -> None:
    """The same as `refine_block` with torch operations, for any number of columns."""
    for k, change in enumerate(changes):
        charge = counts[k] + gradient[k] / (hessian[k, k] * threshold[k])
        count = signed_gif_count(charge, steps[k])
        torch.mul(count - counts[k], threshold[k], out=change)
        counts[k] = count
        gradient[k + 1 :].addr_(hessian[k, k + 1 :], change, alpha=-1.0)


def _least_squares(
    weight: Tensor, hessian: Tensor, levels: Tensor, threshold: Tensor, runs: Sequence[int]
) -> Tensor:
    """Thresholds of every row that minimise its loss given its levels, float32 `[N, J]`.

    `A_jk = q_j^T H q_k` and `b_j = q_j^T H w` of the runs j and k; a threshold that would not be
    positive stays.
    """

    def per_run(values: Tensor) -> Tensor:
        return torch.stack([part.sum(1) for part in values.split(tuple(runs), dim=1)], 1)

    right = per_run((weight @ hessian) * levels)
    start, rows = 0, []
    for size in runs:
        part = slice(start, start + size)
        start = part.stop
        rows.append(per_run((levels[:, part] @ hessian[part]) * levels))
    matrix = torch.stack(rows, 1).double()
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    matrix.diagonal(dim1=1, dim2=2).add_((1e-6 * mean + 1e-30).unsqueeze(1))
    fitted = torch.linalg.solve(matrix, right.double().unsqueeze(-1)).squeeze(-1).float()
    return torch.where(fitted > _SMALLEST, _storable(fitted), threshold)


def dequantize_ternary(ternary: TernaryWeight, group_size: int | None = GROUP_SIZE) -> Tensor:
    """The real weight, float32 `[N, K]` in the original channel order."""
    runs = threshold_runs(ternary.classes, group_size)
    alpha = expand_groups(ternary.threshold.float(), ternary.levels.shape[1], runs)
    out = torch.empty_like(alpha)
    out[:, ternary.order] = ternary.levels.float() * alpha
    return out
