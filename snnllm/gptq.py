"""GPTQ: round weights column by column and let the columns behind absorb the error.

Frantar et al., GPTQ (arXiv 2210.17323); the lazy batch update and the damping follow the paper.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from snnllm.kernels.triton.gptq import round_block, triton_available
from snnllm.weights import QuantizedWeight, expand_groups, weight_parameters

_log = logging.getLogger(__name__)
BLOCK = 128
"""Columns that a kernel keeps in registers; what they do to the columns behind is one matmul."""
CPU_BLOCK = 32
"""The same on the CPU, where the matmul is much faster than the rank-one updates inside a block."""
ROWS = 4096
"""Rows of a sweep: bounds the memory, and on the CPU a block of them stays in the cache."""
SCALE_RATIOS = (0.85, 0.9, 0.95, 1.0, 1.05, 1.1)
DAMPING = 0.01
_MAX_DAMPING = 1.0


def inverse_factor(hessian: Tensor, name: str = "", damping: float = DAMPING) -> Tensor:
    """Upper Cholesky factor `U` of the inverse of the damped Hessian, `H^-1 = U^T U`.

    A factorisation that fails is tried again with ten times the damping, and says so.

    Args:
        hessian: `H`, mean of `x x^T`, `[K, K]`; changed in place where a channel is dead.
        name: Layer name for messages.
        damping: Fraction of the mean diagonal that is added to the diagonal.

    Returns:
        float32 `[K, K]`.

    Raises:
        ValueError: The Hessian is not finite or cannot be factorised at any damping.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError(f"{name}: the Hessian of the calibration inputs is not finite.")
    diagonal = hessian.diagonal()
    diagonal[diagonal <= 0] = 1.0  # a channel that never fired has no say
    mean = diagonal.mean()
    while damping <= _MAX_DAMPING:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed) == 0:
            inverse = torch.cholesky_inverse(factor)
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if int(failed) == 0 and bool(torch.isfinite(upper).all()):
                return upper
        damping *= 10.0
        _log.warning("%s: Cholesky failed, trying again with damping %.3g", name, damping)
    raise ValueError(f"{name}: the Hessian cannot be factorised; use more calibration windows.")


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    groups: int | Sequence[int] | None = None,
    name: str = "",
    clip: bool = True,
) -> QuantizedWeight:
    """Weight codes with second-order error compensation and a search of the scales.

    Columns are rounded in the order of decreasing `diag(H)`; each rounding error is spread over the
    columns that are still free, `w_j -= e U_kj` with `e = (w_k - w_hat_k) / U_kk`. Every output
    channel is rounded with several scales around the one that is best for single weights, and
    keeps the one whose output error `e^T H e` is least.

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T` of the (encoded) inputs, `[K, K]`.
        bits: Width of a level, 2..8.
        groups: Input channels that share a scale (`weights.run_sizes`); None for one per row.
        name: Layer name for messages.
        clip: Search the scales; without it they come from the full range of the weights.

    Returns:
        Codes, scales and zero points, columns in the order of `weight`.

    Raises:
        ValueError: Weight or Hessian are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight holds NaN or infinite values.")
    rows, channels = weight.shape
    hessian = hessian.float()
    importance = hessian.diagonal() if clip else None
    scale, zero = weight_parameters(weight, bits, groups, importance)
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    weight, hessian = weight.float()[:, order], hessian[order][:, order]
    upper = inverse_factor(hessian.clone(), name)
    ratios = torch.tensor(SCALE_RATIOS if clip else (1.0,), device=weight.device)
    s = expand_groups(scale, channels, groups)[:, order]
    z = expand_groups(zero.float(), channels, groups)[:, order]
    chosen, best = torch.empty(rows, channels, dtype=torch.uint8, device=weight.device), []
    for start in range(0, rows, ROWS):  # rows are independent; a part at a time bounds the memory
        part = slice(start, start + ROWS)
        codes, losses = [], []
        for ratio in ratios:
            code = _sweep(weight[part], upper, s[part] * ratio, z[part], 2**bits - 1)
            error = (code.float() - z[part]) * (s[part] * ratio) - weight[part]
            codes.append(code)
            losses.append(((error @ hessian) * error).sum(1))
        best.append(torch.stack(losses).argmin(0))
        row = torch.arange(len(best[-1]), device=weight.device)
        chosen[part] = torch.stack(codes)[best[-1], row]
    out = torch.empty_like(chosen)
    out[:, order] = chosen
    factor = ratios[torch.cat(best)].unsqueeze(1) if rows else ratios.new_ones(0, 1)
    return QuantizedWeight(out, scale * factor, zero.to(torch.uint8))


def _sweep(weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Round all columns of `weight [N, K]`, a block at a time with lazy updates; codes uint8."""
    # Transposed: a column of the weight is then contiguous.
    w, s, z = (t.T.contiguous() for t in (weight, scale, zero))
    codes = torch.empty(w.shape, dtype=torch.uint8, device=w.device)
    fused = w.is_cuda and triton_available()
    run, size = (round_block, BLOCK) if fused else (_round_block, CPU_BLOCK)
    for start in range(0, len(w), size):
        part = slice(start, min(start + size, len(w)))
        local = upper[part, part]
        spread = (local / local.diagonal().unsqueeze(1)).contiguous()
        errors = torch.empty_like(w[part])
        run(w[part], spread, s[part], z[part], top, codes[part], errors)
        w[part.stop :] -= upper[part, part.stop :].T @ (errors / local.diagonal().unsqueeze(1))
    return codes.T.contiguous()


def _round_block(
    weight: Tensor,
    spread: Tensor,
    scale: Tensor,
    zero: Tensor,
    top: int,
    codes: Tensor,
    errors: Tensor,
) -> None:
    """The same as `round_block` with torch operations, for any number of columns."""
    for k in range(len(weight)):
        code = torch.clamp(torch.round(weight[k] / scale[k]) + zero[k], 0, top)
        codes[k] = code.to(torch.uint8)
        errors[k] = weight[k] - (code - zero[k]) * scale[k]
        weight[k + 1 :].addr_(spread[k, k + 1 :], errors[k], alpha=-1.0)
