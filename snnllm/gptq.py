"""GPTQ: round weights column by column and let the columns behind absorb the error.

Frantar et al., GPTQ (arXiv 2210.17323); the lazy batch update and the damping follow the paper.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from snnllm.weights import QuantizedWeight, expand_groups, group_count, weight_parameters

_log = logging.getLogger(__name__)
BLOCK = 128
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
    group_size: int | None = None,
    name: str = "",
) -> QuantizedWeight:
    """Weight codes with second-order error compensation and a clip search.

    Columns are rounded in the order of decreasing `diag(H)`; each rounding error is spread over the
    columns that are still free, `w_j -= e U_kj` with `e = (w_k - w_hat_k) / U_kk`.

    Args:
        weight: float `[N, K]`.
        hessian: Mean of `x x^T` of the (encoded) inputs, `[K, K]`.
        bits: Width of a level, 2..8.
        group_size: Input channels that share a scale; None for one scale per output channel.
        name: Layer name for messages.

    Returns:
        Codes, scales and zero points, columns in the order of `weight`.

    Raises:
        ValueError: Weight or Hessian are not finite.
    """
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name}: the weight holds NaN or infinite values.")
    channels = weight.shape[1]
    hessian = hessian.float().clone()
    scale, zero = weight_parameters(weight, bits, group_size, hessian.diagonal().clone())
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    upper = inverse_factor(hessian[order][:, order], name)
    full = (weight.shape[0], channels)
    s = expand_groups(scale, channels, group_size).expand(full)[:, order]
    z = expand_groups(zero.float(), channels, group_size).expand(full)[:, order]
    codes = _sweep(weight.float()[:, order].contiguous(), upper, s, z, 2**bits - 1)
    assert scale.shape[1] == group_count(channels, group_size)
    out = torch.empty_like(codes)
    out[:, order] = codes
    return QuantizedWeight(out, scale, zero)


def _sweep(weight: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """Round all columns of `weight` (changed in place), blocks of 128 with lazy updates."""
    rows, channels = weight.shape
    codes = torch.empty(rows, channels, dtype=torch.uint8, device=weight.device)
    for start in range(0, channels, BLOCK):
        stop = min(start + BLOCK, channels)
        block = weight[:, start:stop]
        local = upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for k in range(stop - start):
            column, s, z = block[:, k], scale[:, start + k], zero[:, start + k]
            code = torch.clamp(torch.round(column / s) + z, 0, top)
            error = (column - (code - z) * s) / local[k, k]
            codes[:, start + k] = code.to(torch.uint8)
            block[:, k + 1 :] -= torch.outer(error, local[k, k + 1 :])
            errors[:, k] = error
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes
