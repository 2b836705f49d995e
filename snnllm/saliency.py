"""Optimal Brain Spiking: which channels get more time steps (method.md section 4).

Scores are computed in float32 from statistics that stream over calibration windows, so their memory
does not grow with the number of windows. Source: SpikeLLM (arXiv 2407.04752), section 4.2 and
Theorem 1; `hessian` is the optimal-brain-surgeon score of GPTQ (arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from snnllm.config import Score
from snnllm.kernels.spec import MAX_GROUPS

HESSIAN_DAMPING = 0.01


class InputStatistics:
    """Streaming statistics of one linear input `X [tokens, C]`.

    Args:
        weights: Float weights `[N, C]` of the linears that read this input; needed by `abs` only.
        score: The score that will be asked for; decides what is accumulated.
    """

    def __init__(self, weights: Sequence[Tensor], score: Score) -> None:
        self.score = score
        self.tokens = 0
        channels = weights[0].shape[1]
        device = weights[0].device
        self.max_abs = torch.zeros(channels, device=device)
        self._moment = torch.zeros(channels, channels, device=device)
        self._sum = torch.zeros(channels, device=device)
        self._absolute = [torch.zeros(channels, device=device) for _ in weights]
        self._grams = [w.float().T @ w.float() for w in weights] if score is Score.ABS else []

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add the tokens of `x [..., C]`."""
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.tokens += rows.shape[0]
        self.max_abs = torch.maximum(self.max_abs, rows.abs().amax(0))
        self._moment.addmm_(rows.T, rows)
        self._sum += rows.sum(0)
        for total, gram in zip(self._absolute, self._grams, strict=False):
            total.add_((rows * (rows @ gram)).abs().sum(0))

    @property
    def second_moment(self) -> Tensor:
        """Mean of `x x^T` over the tokens, float32 `[C, C]`."""
        if self.tokens == 0:
            raise ValueError("No calibration token has reached this input.")
        return self._moment / self.tokens

    @property
    def mean(self) -> Tensor:
        """Mean of `x` over the tokens, float32 `[C]`."""
        return self._sum / max(1, self.tokens)

    @property
    def covariance(self) -> Tensor:
        """Mean of `(x - mean) (x - mean)^T` over the tokens, float32 `[C, C]`."""
        mean = (self._sum / max(1, self.tokens)).double()
        return (self.second_moment.double() - torch.outer(mean, mean)).float()

    def scores(self, weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
        """One score vector `[C]` per linear that reads this input, larger is more salient."""
        moment = self.second_moment  # raises if no token came
        if self.score is Score.ABS:
            return [total / self.tokens for total in self._absolute]
        return [linear_score(self.score, w, moment, self.max_abs, generator) for w in weights]


def linear_score(
    score: Score, weight: Tensor, second_moment: Tensor, max_abs: Tensor, generator: torch.Generator
) -> Tensor:
    """Saliency of the input channels of one linear.

        first_order    s_c = mean_tokens x_c (X W^T W)_c = sum_k M_ck (W^T W)_ck
        gauss_newton   s_c = mean_tokens x_c^2 * ||W[:, c]||^2
        hessian        s_c = ||W[:, c]||^2 / [H^-1]_cc,  H = 2 M + 0.01 mean(diag) I
        max_abs        s_c = max_tokens |x_c|

    Args:
        score: Any score but `abs`, which needs every token (`InputStatistics`).
        weight: float `[N, C]`.
        second_moment: `M = mean x x^T`, `[C, C]`.
        max_abs: `[C]`.
        generator: Source of the `random` score.

    Returns:
        float32 `[C]`.
    """
    w = weight.float()
    if score is Score.FIRST_ORDER:
        return (second_moment * (w.T @ w)).sum(1)
    if score is Score.GAUSS_NEWTON:
        return second_moment.diagonal() * w.square().sum(0)
    if score is Score.HESSIAN:
        return w.square().sum(0) / _inverse_diagonal(second_moment)
    if score is Score.MAX_ABS:
        return max_abs.clone()
    if score is Score.RANDOM:
        return torch.rand(w.shape[1], generator=generator).to(w.device)
    raise ValueError(f"Score {score} needs every token; use InputStatistics.")


def _inverse_diagonal(second_moment: Tensor) -> Tensor:
    hessian = 2.0 * second_moment
    damping = HESSIAN_DAMPING * hessian.diagonal().mean()
    eye = torch.eye(hessian.shape[0], device=hessian.device)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian + damping * eye)).diagonal()


class KeyValueStatistics:
    """Streaming scores of the K and V channels of one attention layer.

        K: S = K * (Q^T Q K)      V: S = V * (P^T P V)       per head, mean over tokens

    summed over the query heads that share a KV head. `gauss_newton` uses the diagonals
    `k_c^2 sum_t q_tc^2` and `v_jc^2 sum_i P_ij^2`; `hessian`, which is defined for weights, falls
    back to it.

    Args:
        kv_heads: Number of KV heads `H_kv`.
        head_dim: Channels `D` of a head.
        score: The score.
    """

    def __init__(self, kv_heads: int, head_dim: int, score: Score) -> None:
        self.score = score
        self.windows = 0
        self.key = torch.zeros(kv_heads, head_dim)
        self.value = torch.zeros(kv_heads, head_dim)

    @torch.no_grad()
    def update(self, query: Tensor, key: Tensor, value: Tensor, probability: Tensor) -> None:
        """Add a batch of windows.

        Args:
            query: `[B, H, S, D]` after RoPE.
            key: `[B, H_kv, S, D]` after RoPE.
            value: `[B, H_kv, S, D]`.
            probability: softmax output P, `[B, H, S, S]`.
        """
        batch, kv_heads, tokens, dim = key.shape
        q = query.float().reshape(batch, kv_heads, -1, dim)
        p = probability.float().reshape(batch, kv_heads, -1, tokens)
        k, v = key.float(), value.float()
        self.windows += batch
        if self.score is Score.MAX_ABS:
            self.key = torch.maximum(self.key, k.abs().amax((0, 2)).cpu())
            self.value = torch.maximum(self.value, v.abs().amax((0, 2)).cpu())
            return
        if self.score in (Score.GAUSS_NEWTON, Score.HESSIAN):
            s_k = k.square() * q.square().sum(2, keepdim=True)
            s_v = v.square() * p.square().sum(2).unsqueeze(-1)
        else:
            s_k = k * (k @ (q.mT @ q))
            s_v = v * (p.mT @ (p @ v))
        if self.score is Score.ABS:
            s_k, s_v = s_k.abs(), s_v.abs()
        self.key += s_k.mean(2).sum(0).cpu()
        self.value += s_v.mean(2).sum(0).cpu()

    def scores(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Scores of K and V, `[H_kv, D]` each."""
        if self.windows == 0:
            raise ValueError("No calibration window has reached this attention layer.")
        if self.score is Score.RANDOM:
            shape = self.key.shape
            return torch.rand(shape, generator=generator), torch.rand(shape, generator=generator)
        if self.score is Score.MAX_ABS:
            return self.key, self.value
        return self.key / self.windows, self.value / self.windows


def salient_mask(score: Tensor, ratio: float) -> Tensor:
    """The fraction `ratio` of channels with the largest scores, ranked jointly over all dimensions.

    Args:
        score: float, any shape, finite.
        ratio: Fraction in [0, 1]; `round(ratio * numel)` channels are chosen, ties by lowest index.

    Returns:
        bool, the shape of `score`.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    _check_finite(score)
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    order = torch.argsort(score.flatten().cpu(), descending=True, stable=True)
    mask[order[: round(ratio * score.numel())]] = True
    return mask.view(score.shape)


def first_channels(score: Tensor, count: int) -> Tensor:
    """Mark the `count` largest scores of the last dimension.

    Args:
        score: float `[..., C]`, finite.
        count: Channels to choose in each row, ties by lowest index.

    Returns:
        uint8 `[..., C]`, 1 for the chosen channels.

    Raises:
        ValueError: A score is NaN or infinite.
    """
    _check_finite(score)
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    mask = torch.zeros(score.shape, dtype=torch.uint8, device=score.device)
    return mask.scatter_(-1, order[..., :count], 1)


def _check_finite(score: Tensor) -> None:
    if not torch.isfinite(score).all():
        raise ValueError("Saliency scores must be finite; the calibration activations overflowed.")


def allocate(score: Tensor, ratio: float, groups: int) -> Tensor:
    """Channel groups for the policy (ratio, T): group 1 is salient, group 0 the rest.

    Returns:
        uint8, the shape of `score`; all zero when there is one group.
    """
    if groups == 1:
        return torch.zeros(score.shape, dtype=torch.uint8)
    return salient_mask(score, ratio).to(torch.uint8)


def allocate_map(steps_per_channel: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Channel groups for an explicit map channel -> T.

    Args:
        steps_per_channel: Integers >= 1, `[C]`.

    Returns:
        `(channel_group, group_steps)`: uint8 `[C]` and the steps of each group, ascending.

    Raises:
        ValueError: A channel has no step, steps are no integers, or more than `MAX_GROUPS` values differ.
    """
    if steps_per_channel.is_floating_point():
        raise ValueError(f"Time steps are integers, got a map of {steps_per_channel.dtype}.")
    if steps_per_channel.numel() == 0 or int(steps_per_channel.min()) < 1:
        raise ValueError("Every channel needs at least one time step.")
    values, groups = torch.unique(steps_per_channel, sorted=True, return_inverse=True)
    if values.numel() > MAX_GROUPS:
        raise ValueError(
            f"At most {MAX_GROUPS} different step counts are supported, got {values.numel()}."
        )
    return groups.to(torch.uint8), tuple(int(v) for v in values)
