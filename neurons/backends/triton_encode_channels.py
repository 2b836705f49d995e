"""Encode in the original channel order in Triton: one kernel from activations to spike counts.

A program owns one or several tokens. It walks through their channels once for the range of every
group and once for the counts; what it reads again comes from the cache. Groups may differ between
heads, and heads may lie anywhere in memory: a transposed ``[B, H, S, C]`` is read where it is.

The integers are those of :meth:`neurons.SpikeEncoder.encode`, bit for bit.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.triton_encode import INTERPRETED, on
from neurons.backends.triton_encode_row import spike_count, spike_parameters, wider

__all__ = ["encode"]

_TILE = 1024  # elements of a program at a time
_PER_WARP = 256


def encode(
    x: Tensor,
    channel_group: Tensor,
    capacities: tuple[int, ...],
    clip: Tensor,
    shared: bool,
    count: Tensor,
    threshold: Tensor,
    zero_point: Tensor,
) -> None:
    """Launch the kernel; arguments as in :func:`neurons.backends.encode_ops.encode`.

    Args:
        x: activations ``[.., C]`` or ``[.., H, S, C]``, any strides.
        channel_group: uint8 ``[C]`` or ``[H, C]``, contiguous.
        capacities: qmax of each group.
        clip: float32 ``[G]``.
        shared: one range for all groups.
        count: ``[.., C]``, contiguous, written.
        threshold: ``[.., G]``, float32, contiguous, written.
        zero_point: ``[.., G]``, int32, contiguous, written.
    """
    tokens = _tokens(x, channel_group)
    _, heads, length, channels = tokens.shape
    rows = threshold[..., 0].numel()
    columns, per_program = _tile(rows, channels)
    launch: Any = _encode[(triton.cdiv(rows, per_program),)]
    with on(x.device):
        launch(
            *(tokens, channel_group, _values(capacities, x.device), clip),
            *(count, threshold, zero_point, rows, heads, length, channels),
            *tokens.stride()[:3],
            channels if channel_group.dim() == 2 else 0,
            tokens.stride(3),
            GROUPS=len(capacities),
            GROUPS_PADDED=triton.next_power_of_2(len(capacities)),
            SHARED=shared,
            ROWS=per_program,
            COLUMNS=columns,
            num_warps=max(1, columns * per_program // _PER_WARP),
            enable_fp_fusion=False,
        )


def _tokens(x: Tensor, channel_group: Tensor) -> Tensor:
    """View x as ``[A, H, S, C]`` whose tokens are in the order of the outputs; copy if none fits."""
    if x.dim() == 4:
        return x
    heads = channel_group.shape[0] if channel_group.dim() == 2 else 1
    length = x.shape[-2] if channel_group.dim() == 2 else -1
    return x.reshape(-1 if length > 0 else 1, heads, length, x.shape[-1])


@lru_cache(maxsize=256)
def _values(capacities: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(capacities, dtype=torch.float32, device=device)


def _tile(rows: int, channels: int) -> tuple[int, int]:
    """Columns that a program handles at a time, and its rows."""
    if INTERPRETED:
        return min(triton.next_power_of_2(channels), 32), min(2, triton.next_power_of_2(rows))
    # Few rows leave the device idle: a row then goes through as wide a program as it can fill.
    columns = min(triton.next_power_of_2(channels), 4 * _TILE if rows < 256 else _TILE)
    return columns, min(max(1, _TILE // columns), triton.next_power_of_2(rows))


@triton.jit
def _encode(  # type: ignore[no-untyped-def]
    x_ptr,
    group_ptr,
    capacity_ptr,
    clip_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    rows,
    heads,
    length,
    channels,
    batch_stride,
    head_stride,
    token_stride,
    group_stride,
    channel_stride,
    GROUPS: tl.constexpr,
    GROUPS_PADDED: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside_row = row < rows
    head = (row // length) % heads
    x_row = (
        x_ptr
        + (row // length // heads) * batch_stride
        + head * head_stride
        + (row % length) * token_stride
    )
    group_row = group_ptr + head * group_stride
    number = tl.arange(0, GROUPS_PADDED)
    thresholds = tl.zeros([ROWS, GROUPS_PADDED], tl.float32)
    zeros = tl.zeros([ROWS, GROUPS_PADDED], tl.float32)
    for group in tl.static_range(GROUPS):
        if group == 0 or not SHARED:
            lo = tl.zeros([ROWS, COLUMNS], tl.float32)
            hi = tl.zeros([ROWS, COLUMNS], tl.float32)
            for first in range(0, channels, COLUMNS):
                column = first + tl.arange(0, COLUMNS)
                inside = inside_row[:, None] & (column < channels)[None, :]
                at = x_row[:, None] + column[None, :].to(tl.int64) * channel_stride
                x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                if GROUPS > 1 and not SHARED:
                    groups = tl.load(group_row[:, None] + column[None, :], mask=inside, other=0)
                    # The range includes zero, so zeros may stand for the other groups.
                    x = tl.where(groups == group, x, 0.0)
                lo, hi = wider(lo, hi, x, x)
            low, high = tl.reduce((lo, hi), 1, wider)
        capacity = tl.load(capacity_ptr + group)
        threshold, zero = spike_parameters(low, high, capacity, tl.load(clip_ptr + group))
        tl.store(threshold_ptr + row * GROUPS + group, threshold, mask=inside_row)
        tl.store(zero_ptr + row * GROUPS + group, zero.to(tl.int32), mask=inside_row)
        own = (number == group)[None, :]
        thresholds = tl.where(own, threshold[:, None], thresholds)
        zeros = tl.where(own, zero[:, None], zeros)
    for first in range(0, channels, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        inside = inside_row[:, None] & (column < channels)[None, :]
        at = x_row[:, None] + column[None, :].to(tl.int64) * channel_stride
        x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        divisor = tl.zeros([ROWS, COLUMNS], tl.float32) + _of(thresholds, number, 0)
        bias = tl.zeros([ROWS, COLUMNS], tl.float32) + _of(zeros, number, 0)
        top = tl.zeros([ROWS, COLUMNS], tl.float32) + tl.load(capacity_ptr)
        if GROUPS > 1:
            groups = tl.load(group_row[:, None] + column[None, :], mask=inside, other=0)
            for group in tl.static_range(1, GROUPS):
                member = groups == group
                divisor = tl.where(member, _of(thresholds, number, group), divisor)
                bias = tl.where(member, _of(zeros, number, group), bias)
                top = tl.where(member, tl.load(capacity_ptr + group), top)
        count = spike_count(x, divisor, bias + 0.5, top)
        count_at = count_ptr + row[:, None] * channels + column[None, :]
        tl.store(count_at, count.to(count_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _of(values, number, group):  # type: ignore[no-untyped-def]
    """Column ``[ROWS, 1]`` of ``[ROWS, G]``; NaN in another column does not reach it."""
    return tl.sum(tl.where((number == group)[None, :], values, 0.0), 1)[:, None]
