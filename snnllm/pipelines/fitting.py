"""Fitting one linear to the spikes it will see: offset, clip ratios, and weights by least squares.

    offset  mu     = mean of x                                       (a constant current per neuron)
    ratios  r_g    = argmin_r  E || (x_hat_g(r) - x_g) W_g^T ||^2     (range of a token, per group)
    weights W'     = W + E[d x_hat^T] (E[x_hat x_hat^T] + lambda I)^-1,    d = y - W x_hat

with centred x_hat and d. W' minimises `E || y - W' x_hat ||^2 + lambda || W' - W ||^2`: y is what the
float model has there, so W' also takes back what the converted layers in front did wrong, as far as
it is a linear function of x_hat. The means go into the output offset. Sources: GPTAQ (arXiv
2504.02692) and QEP (arXiv 2504.09629) for targets from the float model, here with a ridge.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from neurons import SpikeEncoder

CLIP_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
SAMPLE_ROWS = 4096
"""Tokens on which the clip ratios are searched."""


def weighted_mean(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of rows `[tokens, K]` with token weights `[tokens]` over all batches, `[K]`."""
    total, weights = None, 0.0
    for rows, weight in batches:
        part = weight @ rows
        total = part if total is None else total + part
        weights += float(weight.sum())
    if total is None:
        raise ValueError("No calibration token has reached this input.")
    return total / weights


def clip_ratios(
    encoder: SpikeEncoder, rows: Tensor, token_weight: Tensor, weight: Tensor
) -> Tensor:
    """Factors on the range of each channel group that give the least output error.

    Every factor is tried on all groups at once. Commensurate thresholds are rounded up in the same way
    then; where the groups choose different factors, the raise may be another one, a few percent.

    Args:
        encoder: Has its groups; its clip factors are changed and restored.
        rows: What it will encode, `[tokens, K]`.
        token_weight: `[tokens]`.
        weight: Float weight behind it, `[N, K]`.

    Returns:
        float32 `[G]`.
    """
    before = encoder.clip.clone()
    groups = encoder.channel_group.long()
    members = [torch.nonzero(groups == g).flatten() for g in range(len(encoder.steps))]
    losses = []
    for ratio in CLIP_RATIOS:
        encoder.clip.copy_(before * ratio)
        error = encoder.decode(encoder.encode(rows)) - rows
        output = [(error[:, m] @ weight[:, m].T).square().sum(1) for m in members]
        losses.append(torch.stack([(token_weight * o).sum() for o in output]))
    encoder.clip.copy_(before)
    loss = torch.stack(losses)
    if encoder.value_range == "shared":  # one range, so one factor
        loss = loss.sum(1, keepdim=True).expand_as(loss)
    best = torch.tensor(CLIP_RATIOS, device=loss.device)[loss.argmin(0)]
    return before * best


@dataclass
class Moments:
    """Streaming second-order statistics of encoded inputs and of what the linear misses.

    Attributes:
        weight: Float weight of the linear, `[N, K]`.
    """

    weight: Tensor

    def __post_init__(self) -> None:
        n, k = self.weight.shape
        self._square = self.weight.new_zeros(k, k)
        self._cross = self.weight.new_zeros(n, k)
        self._input, self._missing = self.weight.new_zeros(k), self.weight.new_zeros(n)
        self._total = 0.0

    def update(self, encoded: Tensor, target: Tensor, token_weight: Tensor) -> None:
        """Add tokens: decoded spikes `[tokens, K]`, target outputs `[tokens, N]`, weights."""
        missing = target - encoded @ self.weight.T
        weighted = encoded * token_weight.unsqueeze(1)
        self._square.addmm_(weighted.T, encoded)
        self._cross.addmm_(missing.T, weighted)
        self._input += weighted.sum(0)
        self._missing += token_weight @ missing
        self._total += float(token_weight.sum())

    @property
    def second_moment(self) -> Tensor:
        """`E[x_hat x_hat^T]`, `[K, K]`."""
        return self._square / self._total

    @property
    def covariance(self) -> Tensor:
        """The same of the centred inputs."""
        mean = self._input / self._total
        return self.second_moment - torch.outer(mean, mean)

    def least_squares(self, ridge: float, centred: bool = True) -> Tensor:
        """`W'` of the module docstring, `[N, K]`.

        Args:
            ridge: lambda in units of the mean variance.
            centred: The means go into an output offset; False where the linear has none.
        """
        covariance = (self.covariance if centred else self.second_moment).double()
        damping = ridge * covariance.diagonal().mean() + 1e-12
        covariance.diagonal().add_(damping)
        mean_in, mean_out = self._input / self._total, self._missing / self._total
        cross = (self._cross / self._total).double()
        if centred:
            cross -= torch.outer(mean_out, mean_in).double()
        fitted: Tensor = self.weight + torch.linalg.solve(covariance, cross.T).T.float()
        return fitted

    def output_offset(self, weight: Tensor) -> Tensor:
        """What makes the mean output of `weight` the mean target, `[N]`."""
        mean_in, mean_out = self._input / self._total, self._missing / self._total
        offset: Tensor = mean_out + (self.weight - weight) @ mean_in
        return offset
