"""What a backend relies on in a `LinearSpec`, checked once when the specification is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from neurons.modes import LARGEST_CHARGE

if TYPE_CHECKING:
    from snnllm.kernels.spec import LinearSpec

INT32_MAX = 2**31 - 1
ZERO_MAX = 2**15 - 9  # a kernel may shift levels and zero points by 8, and multiply int16


def check_linear(spec: LinearSpec) -> None:
    """Check shapes, dtypes, ranges and segments of a linear, and that its sums fit int32.

    Raises:
        ValueError: naming the layer, what does not fit and what to do.
    """
    _check_tensors(spec)
    _check_segments(spec)
    _check_levels(spec)
    _check_sums(spec)


def _check_tensors(spec: LinearSpec) -> None:
    name = spec.encoder.name
    if spec.levels.dtype != torch.int8 or spec.levels.dim() != 2:
        raise ValueError(f"{name}: levels must be int8 [N, K], got {spec.levels.dtype}")
    n, k = spec.levels.shape
    if k != spec.encoder.channels:
        raise ValueError(f"{name}: levels have {k} channels, the encoder {spec.encoder.channels}")
    if spec.scale.dtype != torch.float32 or spec.zero.dtype != torch.int32:
        raise ValueError(
            f"{name}: expected float32 scale and int32 zero, got {spec.scale.dtype} and "
            f"{spec.zero.dtype}"
        )
    if spec.scale.dim() != 2 or spec.scale.shape[0] != n or spec.scale.shape != spec.zero.shape:
        raise ValueError(
            f"{name}: scale and zero must both be [N={n}, J], got {tuple(spec.scale.shape)} and "
            f"{tuple(spec.zero.shape)}"
        )
    if spec.bias is not None and (spec.bias.shape != (n,) or spec.bias.dtype != torch.float32):
        raise ValueError(f"{name}: bias must be float32 [{n}], got {tuple(spec.bias.shape)}")


def _check_segments(spec: LinearSpec) -> None:
    groups = [g for g, size in enumerate(spec.encoder.sizes) for _ in range(size)]
    position = 0
    for segment in spec.segments:
        start, stop, act_group, weight_group = segment
        uniform = set(groups[start:stop]) == {act_group}
        if start != position or not uniform or not 0 <= weight_group < spec.scale.shape[1]:
            raise ValueError(
                f"{spec.encoder.name}: {segment} does not continue at {position} inside one "
                "activation group and one weight group; build segments with `segments_of`"
            )
        position = stop
    if position != spec.in_features:
        raise ValueError(
            f"{spec.encoder.name}: segments cover {position} of {spec.in_features} channels"
        )


def _check_levels(spec: LinearSpec) -> None:
    name, bits = spec.encoder.name, spec.weight_bits
    if not 1 <= bits <= 8:
        raise ValueError(f"{name}: weight_bits must be 1..8, got {bits}")
    if spec.out_features == 0:
        return
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if int(spec.levels.min()) < low or int(spec.levels.max()) > high:
        raise ValueError(f"{name}: levels must be in {low}..{high} for {bits} bits; clip them")
    if int(spec.zero.abs().max()) > ZERO_MAX:
        raise ValueError(f"{name}: weight zero points must be in -{ZERO_MAX}..{ZERO_MAX}")


def _check_sums(spec: LinearSpec) -> None:
    """Refuse accumulators that could leave int32: of every segment, or of all where merged."""
    if spec.out_features == 0:
        return
    smallest, largest = spec.levels.amin(1), spec.levels.amax(1)
    in_units = spec.encoder.commensurate and len(spec.encoder.sizes) > 1
    bounds = []
    for start, stop, act_group, weight_group in spec.segments:
        zero = spec.zero[:, weight_group].long()
        reach = int(torch.maximum(largest - zero, zero - smallest).max())
        capacity = LARGEST_CHARGE if in_units else spec.encoder.capacities[act_group]
        bounds.append((reach * (stop - start) * capacity, stop - start))
    if spec.merged:
        bounds = [(sum(bound for bound, _ in bounds), spec.in_features)]
    for bound, channels in bounds:
        if bound > INT32_MAX:
            raise ValueError(
                f"{spec.encoder.name}: an accumulator over {channels} channels can reach {bound}, "
                "beyond int32; use fewer steps or bits, or split the channels into weight groups"
            )
