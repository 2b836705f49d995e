"""What ternary spike trains are compared with: PB-LLM, BiLLM and plain GPTQ in the same pipeline.

- PB-LLM (Shang et al., arXiv 2310.00034): the salient weights, anywhere in the matrix, at 8 bits, the
  rest `mean + alpha sign(w - mean)`.
- BiLLM (Huang et al., arXiv 2402.04291): salient columns of a block binarised twice (the residual
  again), the bell of the others split where two binarisations fit best.
- GPTQ (Frantar et al., arXiv 2210.17323) with uniform levels, as in `snnllm.gptq`.

They give float weights and say what storing them takes and which share of the multiply-accumulates
of a matmul are additions. The first two follow the published algorithms with one difference: signs are
taken from the compensated weight of the sweep (BiLLM rounds a block before its columns compensate).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snnllm.column_sweep import BlockCoder, column_sweep
from snnllm.gptq import DAMPING, gptq, inverse_factor
from snnllm.weights import dequantize, run_sizes

BLOCK = 128
_HIGH_BITS, _SCALE_BITS = 8, 16
_SPLITS = tuple(0.1 + 0.01 * i for i in range(81))
_MOST_SALIENT = 50
"""Salient columns of a block that BiLLM tries at most."""


@dataclass(frozen=True)
class Rounded:
    """A quantised weight and its cost.

    Attributes:
        weight: float32 `[N, K]`.
        bits: Stored bits per weight, indices and scales included.
        additive: Share of the multiply-accumulates that are additions, in [0, 1].
        steps: Mean steps: binarisations of a weight, 8 for one of 8 bits; the bits of plain GPTQ.
    """

    weight: Tensor
    bits: float
    additive: float
    steps: float


def pb_llm(
    weight: Tensor, hessian: Tensor, low: float, name: str = "", damping: float = DAMPING
) -> Rounded:
    """PB-LLM: the fraction `1 - low` of the weights with the largest `w^2 / [H^-1]_cc` at 8 bits.

    Binary weights have a mean and a magnitude per row, salient ones an asymmetric 8-bit scale per
    row, all from the weights before the sweep, as published.

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T`, `[K, K]`.
        low: Fraction of binary weights, in [0, 1].
        name: Layer name for messages.
        damping: Of the Hessian.

    Raises:
        ValueError: `low` is not a fraction, or the Hessian is not usable.
    """
    if not 0.0 <= low <= 1.0:
        raise ValueError(f"low must be a fraction in [0, 1], got {low}.")
    weight = weight.float()
    upper = inverse_factor(hessian.float().clone(), name, damping)
    saliency = (weight.square() / upper.diagonal().square()).flatten()
    salient = torch.zeros_like(saliency, dtype=torch.bool)
    salient[torch.argsort(saliency, descending=True)[: round((1.0 - low) * len(saliency))]] = True
    coder = _PartlyBinary(weight, salient.view_as(weight))
    rounded = column_sweep(weight, upper, coder, run_sizes(weight.shape[1], BLOCK))
    scales = 4 * _SCALE_BITS / weight.shape[1]  # mean, magnitude, 8-bit scale and zero of a row
    high = 1.0 - low
    # A bit a weight says which kind it is; the salient ones are stored at 8 bits.
    bits = 1.0 + low + _HIGH_BITS * high + scales
    return Rounded(rounded, bits, low, low + _HIGH_BITS * high)


def plain_gptq(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int = BLOCK, name: str = ""
) -> Rounded:
    """GPTQ with uniform levels; stored scales are float16, zero points as wide as a level.

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T`, `[K, K]`.
        bits: Width of a level.
        group_size: Input channels that share a scale.
        name: Layer name for messages.
    """
    codes = gptq(weight, hessian, bits, group_size, name)
    groups = codes.scale.shape[1] / weight.shape[1]
    scale = codes.scale.half().float()
    rounded = dequantize(codes._replace(scale=scale), group_size)
    return Rounded(rounded, bits + groups * (_SCALE_BITS + bits), 0.0, float(bits))


class _PartlyBinary(BlockCoder):
    """Columns of PB-LLM: 8 bits where `salient`, else one bit."""

    def __init__(self, weight: Tensor, salient: Tensor) -> None:
        rest = (~salient).sum(1).clamp(min=1)
        self._mean = torch.where(salient, 0.0, weight).sum(1) / rest
        distance = (weight - self._mean.unsqueeze(1)).abs()
        self._alpha = torch.where(salient, 0.0, distance).sum(1) / rest
        kept = torch.where(salient, weight, 0.0)
        low, high = kept.amin(1).clamp(max=0.0), kept.amax(1).clamp(min=0.0)
        self._scale = ((high - low) / (2**_HIGH_BITS - 1)).clamp(min=1e-8)
        self._zero = torch.round(-low / self._scale)
        self._salient = salient.T.contiguous()
        self._start = 0

    def begin(self, weight: Tensor, start: int) -> None:
        """Scales are those of whole rows."""
        self._start = start

    def round(self, column: int, weight: Tensor) -> Tensor:
        """Round a column."""
        code = torch.round(weight / self._scale) + self._zero
        high = (code.clamp(0, 2**_HIGH_BITS - 1) - self._zero) * self._scale
        low = self._mean + self._alpha * torch.sign(weight - self._mean)
        return torch.where(self._salient[self._start + column], high, low)


def bi_llm(weight: Tensor, hessian: Tensor, name: str = "", damping: float = DAMPING) -> Rounded:
    """BiLLM: structural salience with residual binarisation, bell-shaped split of the rest.

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T`, `[K, K]`.
        name: Layer name for messages.
        damping: Of the Hessian.

    Raises:
        ValueError: The Hessian is not usable.
    """
    weight = weight.float()
    upper = inverse_factor(hessian.float().clone(), name, damping)
    coder = _TwiceBinary(upper.diagonal())
    sizes = run_sizes(weight.shape[1], BLOCK)
    rounded = column_sweep(weight, upper, coder, sizes)
    channels, rows = weight.shape[1], weight.shape[0]
    salient = float(torch.stack(coder.salient).sum()) / channels
    # A sign a weight, a second one for salient columns, a bit of the split for the others; per row
    # and block two magnitudes and a mean for the salient columns, two for the rest; which columns.
    scales = 5 * _SCALE_BITS * len(sizes) / channels
    bits = 1.0 + salient + (1.0 - salient) + scales + 1.0 / rows
    return Rounded(rounded, bits, 1.0, 1.0 + salient)


class _TwiceBinary(BlockCoder):
    """Columns of BiLLM; parameters of a block come from its compensated weights."""

    def __init__(self, diagonal: Tensor) -> None:
        self._diagonal = diagonal
        self.salient: list[Tensor] = []

    def begin(self, weight: Tensor, start: int) -> None:
        """Choose salient columns, their two magnitudes, and the split of the rest."""
        saliency = weight.square() / self._diagonal[start : start + len(weight), None].square()
        order = torch.argsort(saliency.sum(1), descending=True)
        best, self._mask = torch.full_like(weight[0, 0], torch.inf), weight.new_zeros(len(weight))
        for count in range(1, min(_MOST_SALIENT, len(weight)) + 1):
            mask = torch.zeros(len(weight), device=weight.device)
            mask[order[:count]] = 1.0
            value = _residual(weight, mask, *_magnitudes(weight, mask))
            rest = _binary(weight, (1.0 - mask).unsqueeze(1).expand_as(weight))
            error = (weight - torch.where(mask.bool().unsqueeze(1), value, rest)).square().sum()
            self._mask = torch.where(error < best, mask, self._mask)
            best = torch.minimum(error, best)
        self.salient.append(self._mask.sum())
        self._parameters = _magnitudes(weight, self._mask)
        ordinary = (1.0 - self._mask).unsqueeze(1)
        self._split(weight, ordinary)

    def _split(self, weight: Tensor, ordinary: Tensor) -> None:
        """The break point of the bell that leaves the least error, one for the block."""
        size = weight.abs()
        largest = (size * ordinary).amax()
        best = torch.full_like(largest, torch.inf)
        self._outer = torch.zeros_like(weight, dtype=torch.bool)
        for ratio in _SPLITS:
            outer = size > ratio * largest
            value = _split_value(weight, outer, ordinary)
            error = (ordinary * (weight - value).square()).sum()
            self._outer = torch.where(error < best, outer, self._outer)
            best = torch.minimum(error, best)
        self._inner_alpha = _mean(size, ordinary * ~self._outer)
        self._outer_alpha = _mean(size, ordinary * self._outer)

    def round(self, column: int, weight: Tensor) -> Tensor:
        """Round a column."""
        mean, first, second = self._parameters
        high = mean + _twice(weight - mean, first, second)
        alpha = torch.where(self._outer[column], self._outer_alpha, self._inner_alpha)
        return torch.where(self._mask[column] > 0, high, alpha * torch.sign(weight))


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `[columns, N]` over the columns of a mask, `[N]`; 0 where it is empty."""
    return (values * mask).sum(0) / mask.sum(0).clamp(min=1)


def _binary(weight: Tensor, mask: Tensor) -> Tensor:
    return _mean(weight.abs(), mask) * torch.sign(weight)


def _split_value(weight: Tensor, outer: Tensor, ordinary: Tensor) -> Tensor:
    size = weight.abs()
    inner, far = _mean(size, ordinary * ~outer), _mean(size, ordinary * outer)
    return torch.where(outer, far, inner) * torch.sign(weight)


def _magnitudes(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, magnitude, and magnitude of the residual of the salient columns, `[N]` each."""
    chosen = mask.unsqueeze(1).expand_as(weight)
    mean = _mean(weight, chosen)
    centred = weight - mean
    first = _mean(centred.abs(), chosen)
    second = _mean((centred - first * torch.sign(centred)).abs(), chosen)
    return mean, first, second


def _twice(centred: Tensor, first: Tensor, second: Tensor) -> Tensor:
    once = first * torch.sign(centred)
    return once + second * torch.sign(centred - once)


def _residual(weight: Tensor, mask: Tensor, mean: Tensor, first: Tensor, second: Tensor) -> Tensor:
    return mean + _twice(weight - mean, first, second)
