"""From raw integer sums to the output of a linear: the one place where scales and zero points enter."""

from __future__ import annotations

import torch
from torch import Tensor

from neurons.encoder import Encoding
from neurons.thresholds import unit_of
from snnllm.kernels.spec import LinearSpec


def centre(raw: Tensor, count: Tensor, zero_point: Tensor, spec: LinearSpec) -> Tensor:
    """Centre raw accumulators (method.md section 3).

        A = sum_k (q - z)(w - zw) = acc - z rowsum(w) - zw (sum_k q - z K_seg)

    Args:
        raw: `sum_k q w` per segment, int32 `[S, M, N]`.
        count: Spike counts in encoded order, int32 `[M, K]`.
        zero_point: Bias charges, int32 `[M, G]`.
        spec: The linear.

    Returns:
        int32 `[S, M, N]`.
    """
    out = torch.empty_like(raw)
    for index, (start, stop, act_group, weight_group) in enumerate(spec.segments):
        z = zero_point[:, act_group, None]
        row_sum = spec.levels[:, start:stop].sum(1, dtype=torch.int32)
        centred_sum = count[:, start:stop].sum(1, dtype=torch.int32)[:, None] - z * (stop - start)
        zero = spec.zero[:, weight_group]
        out[index] = raw[index] - z * row_sum - zero * centred_sum
    return out


def kernel_threshold(encoding: Encoding) -> Tensor:
    """Thresholds that scale the accumulators of an encoding, float32 `[M, G]`: s, or the unit."""
    if encoding.multiple is None:
        return encoding.threshold
    return unit_of(encoding.threshold, encoding.multiple).expand_as(encoding.threshold)


def in_units(accumulators: Tensor, multiple: Tensor | None, spec: LinearSpec) -> Tensor:
    """Accumulators of spike counts, int32 `[S, M, N]`, in units of commensurate thresholds.

    Args:
        accumulators: Of spike counts; multiplied in place.
        multiple: int32 `[M, G]`, or None: then nothing changes.
        spec: The linear.
    """
    if multiple is None:
        return accumulators
    groups = [segment.act_group for segment in spec.segments]
    return accumulators.mul_(multiple.T[groups].unsqueeze(-1))


def scale_and_sum(accumulators: Tensor, threshold: Tensor, spec: LinearSpec) -> Tensor:
    """Scale centred accumulators and sum them in the order that every execution shares.

        y = (s A_0) sw_0 + (s A_1) sw_1 + ... + bias,   each product and sum one float32 operation
        y = (s (A_0 + A_1 + ...)) sw + bias             where merged, an int32 sum

    Args:
        accumulators: int32 `[S, M, N]`, in units where the thresholds are commensurate.
        threshold: float32 `[M, G]`; the unit in every column where they are commensurate.
        spec: The linear.

    Returns:
        float32 `[M, N]`.
    """
    segments = spec.segments
    if spec.merged:
        accumulators, segments = accumulators.sum(0, True, dtype=torch.int32), segments[:1]
    total: Tensor | None = None
    for index, segment in enumerate(segments):
        s = threshold[:, segment.act_group, None]
        term = (s * accumulators[index].float()) * spec.scale[:, segment.weight_group]
        total = term if total is None else total + term
    assert total is not None  # a specification has at least one channel
    return total if spec.bias is None else total + spec.bias
