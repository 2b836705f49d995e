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

from collections.abc import Callable
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
_TOGETHER = 16
"""Candidates that are tried at once on a GPU; a block of 11,008 rows then takes 90 MB a tensor."""


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
        rank = torch.argsort(torch.argsort(saliency.sum(1), descending=True))

        def error(counts: Tensor) -> Tensor:
            mask = (rank < counts).float()
            value = _residual(weight, *_magnitudes(weight, mask))
            rest = _mean(weight.abs(), 1.0 - mask.unsqueeze(-1)).unsqueeze(-2) * torch.sign(weight)
            chosen = torch.where(mask.bool().unsqueeze(-1), value, rest)
            return (weight - chosen).square().sum((-2, -1))

        most = min(_MOST_SALIENT, len(weight))
        self._mask = (rank < _least(1 + torch.arange(most, device=weight.device), error)).float()
        self.salient.append(self._mask.sum())
        self._parameters = _magnitudes(weight, self._mask)
        self._split(weight, (1.0 - self._mask).unsqueeze(1))

    def _split(self, weight: Tensor, ordinary: Tensor) -> None:
        """The break point of the bell that leaves the least error, one for the block."""
        size = weight.abs()
        largest = (size * ordinary).amax()

        def error(ratios: Tensor) -> Tensor:
            outer = size > (ratios * largest).unsqueeze(-1)
            inner, far = _mean(size, ordinary * ~outer), _mean(size, ordinary * outer)
            alpha = torch.where(outer, far.unsqueeze(-2), inner.unsqueeze(-2))
            return (ordinary * (size - alpha * torch.sign(size)).square()).sum((-2, -1))

        self._outer = size > _least(torch.tensor(_SPLITS, device=size.device), error) * largest
        self._inner_alpha = _mean(size, ordinary * ~self._outer)
        self._outer_alpha = _mean(size, ordinary * self._outer)

    def round(self, column: int, weight: Tensor) -> Tensor:
        """Round a column."""
        high = _residual(weight.unsqueeze(0), *self._parameters).squeeze(0)
        alpha = torch.where(self._outer[column], self._outer_alpha, self._inner_alpha)
        return torch.where(self._mask[column] > 0, high, alpha * torch.sign(weight))


def _least(candidates: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The candidate `[1]` of `[n]` with the least error, the first of equals.

    Args:
        candidates: `[n]`.
        error: From some of them, `[m, 1]`, to their errors `[m]`.
    """
    # Several at once take fewer kernels; one at a time stays in the caches of a CPU.
    parts = candidates.unsqueeze(1).split(_TOGETHER if candidates.is_cuda else 1)
    return candidates[torch.cat([error(part) for part in parts]).argmin().view(1)]


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `[*, columns, N]` over the columns of a mask, `[*, N]`; 0 where it is empty."""
    return (values * mask).sum(-2) / mask.sum(-2).clamp(min=1)


def _magnitudes(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, magnitude, and magnitude of the residual of salient columns `[*, columns]`; `[*, N]` each."""
    chosen = mask.unsqueeze(-1)
    mean = _mean(weight, chosen)
    centred = weight - mean.unsqueeze(-2)
    first = _mean(centred.abs(), chosen)
    rest = centred - first.unsqueeze(-2) * torch.sign(centred)
    return mean, first, _mean(rest.abs(), chosen)


def _residual(weight: Tensor, mean: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Weights `[*, columns, N]` binarised twice with the parameters of their rows, `[*, N]`."""
    mean, first, second = (t.unsqueeze(-2) for t in (mean, first, second))
    centred = weight - mean
    once = first * torch.sign(centred)
    return mean + once + second * torch.sign(centred - once)
