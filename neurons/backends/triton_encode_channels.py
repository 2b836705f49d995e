"""Encode in the original channel order in Triton: one kernel from activations to spike counts.

A program owns one or several tokens and holds their channels in registers: it reads them once, for
the range of every group and for the counts. Groups may differ between heads, and heads may lie
anywhere in memory: a transposed ``[B, H, S, C]`` is read where it is.

The integers are those of :meth:`neurons.SpikeEncoder.encode`, bit for bit.
"""

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import on
from neurons.backends.triton_encode import INTERPRETED
from neurons.backends.triton_encode_row import (
    clipped,
    quotient_of,
    range_bits,
    spike_parameters,
    wider,
)

__all__ = ["encode"]

_SMALL = 1024  # elements of a program whose tokens are short
_PER_WARP = 256  # of them
_VECTOR = 4  # channels that a thread reads at once
_FEW_ROWS = 256
_LONG = 32768  # channels that need all the registers there are


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
    columns, per_program, warps = _tile(rows, channels)
    launch: Any = _encode[(triton.cdiv(rows, per_program),)]
    with on(x.device):
        launch(
            *(tokens, channel_group, _values(capacities, x.device), clip),
            *(count, threshold, zero_point, rows, heads, length),
            *tokens.stride()[:3],
            channels if channel_group.dim() == 2 else 0,
            tokens.stride(3),
            CHANNELS=channels,
            GROUPS=len(capacities),
            SHARED=shared,
            ROWS=per_program,
            COLUMNS=columns,
            num_warps=warps,
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


def _tile(rows: int, channels: int) -> tuple[int, int, int]:
    """Columns of a tile, tokens of a program, and its warps."""
    whole = triton.next_power_of_2(channels)
    if INTERPRETED:
        return min(whole, 32), min(2, triton.next_power_of_2(rows)), 1
    if whole < _SMALL:
        tokens = min(_SMALL // whole, triton.next_power_of_2(rows))
        return whole, tokens, max(1, whole * tokens // _PER_WARP)
    # Few rows leave the device idle: a row then has as many threads as it can use.
    few = rows < _FEW_ROWS
    warps = triton.next_power_of_2(triton.cdiv(channels, 256 if few else 1536))
    warps = min(warps, 32 if few or channels > _LONG else 16)
    return min(whole, 32 * warps * _VECTOR), 1, warps


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
    batch_stride,
    head_stride,
    token_stride,
    group_stride,
    channel_stride,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
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
    count_row = count_ptr + row * CHANNELS
    column = tl.arange(0, COLUMNS)
    charges = ()  # type: tuple[Any, ...]
    numbers = ()  # type: tuple[Any, ...]
    for first in tl.static_range(0, CHANNELS, COLUMNS):
        inside = _inside(inside_row, first, column, CHANNELS, COLUMNS)
        at = (first + column).to(tl.int64) * channel_stride
        x = tl.load(x_row[:, None] + at[None, :], mask=inside, other=0.0)
        charges += (x.to(tl.float32),)
        numbers += (_number(group_row, first, column, inside, GROUPS),)
    thresholds = ()  # type: tuple[Any, ...]
    zeros = ()  # type: tuple[Any, ...]
    capacities = ()  # type: tuple[Any, ...]
    largest = tl.zeros([ROWS], tl.float32)
    for group in tl.static_range(GROUPS):
        if group == 0 or not SHARED:
            lo = tl.zeros([ROWS, COLUMNS], tl.float32)
            hi = tl.zeros([ROWS, COLUMNS], tl.float32)
            for tile in tl.static_range(len(charges)):
                x = charges[tile]
                if GROUPS > 1 and not SHARED:
                    # The range includes zero, so zeros may stand for the other groups.
                    x = tl.where(numbers[tile] == group, x, 0.0)
                lo, hi = wider(lo, hi, x, x)
            ends = tl.max(range_bits(lo, hi), 1).to(tl.float32, bitcast=True)
            low, high = tl.split(ends)
        capacity = tl.load(capacity_ptr + group)
        threshold, zero = spike_parameters(-low, high, capacity, tl.load(clip_ptr + group))
        tl.store(threshold_ptr + row * GROUPS + group, threshold, mask=inside_row)
        tl.store(zero_ptr + row * GROUPS + group, zero.to(tl.int32), mask=inside_row)
        thresholds += (threshold,)
        zeros += (zero,)
        capacities += (capacity,)
        largest = tl.maximum(largest, threshold)
    # Divisors are to stay below 2**100. A power of two off both changes no quotient, but of those so
    # small that the bias absorbs them.
    if tl.max(largest, 0) < 1e30:
        _counts(
            *(charges, group_row, count_row, inside_row, column, thresholds, zeros, capacities),
            *(1.0, CHANNELS, GROUPS, COLUMNS),
        )
    else:
        _counts(
            *(charges, group_row, count_row, inside_row, column, thresholds, zeros, capacities),
            *(2.0**-64, CHANNELS, GROUPS, COLUMNS),
        )


@triton.jit
def _inside(inside_row, first, column, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Which elements of a tile there are; only the last one needs to look at its channels."""
    inside = inside_row[:, None]
    if first + COLUMNS > CHANNELS:
        inside = inside & (first + column < CHANNELS)[None, :]
    return inside


@triton.jit
def _number(group_row, first, column, inside, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Groups of the channels of a tile; nothing is read for a single one."""
    number = column[None, :]
    if GROUPS > 1:
        number = tl.load(group_row[:, None] + (first + column)[None, :], mask=inside, other=0)
    return number


@triton.jit
def _counts(  # type: ignore[no-untyped-def]
    charges,
    group_row,
    count_row,
    inside_row,
    column,
    thresholds,
    zeros,
    capacities,
    SCALE: tl.constexpr,
    CHANNELS: tl.constexpr,
    GROUPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Store the counts of all tiles."""
    minuses = ()  # type: tuple[Any, ...]
    inverses = ()  # type: tuple[Any, ...]
    for group in tl.static_range(GROUPS):
        divisor = thresholds[group] * SCALE
        minuses += (-divisor,)
        inverses += (tl.div_rn(tl.zeros_like(divisor) + 1.0, divisor),)
    for first in tl.static_range(0, CHANNELS, COLUMNS):
        x = charges[first // COLUMNS]
        if SCALE != 1.0:
            x *= SCALE
        inside = _inside(inside_row, first, column, CHANNELS, COLUMNS)
        nothing = tl.zeros_like(x)
        minus = nothing + minuses[0][:, None]
        inverse = nothing + inverses[0][:, None]
        bias = nothing + (zeros[0] + 0.5)[:, None]
        top = nothing + capacities[0]
        if GROUPS > 1:
            # Read again: registers are better spent on more programs.
            number = _number(group_row, first, column, inside, GROUPS)
            for group in tl.static_range(1, GROUPS):
                member = number == group
                minus = tl.where(member, minuses[group][:, None], minus)
                inverse = tl.where(member, inverses[group][:, None], inverse)
                bias = tl.where(member, (zeros[group] + 0.5)[:, None], bias)
                top = tl.where(member, capacities[group], top)
        count = clipped(quotient_of(x, minus, inverse) + bias, top)
        at = count_row[:, None] + (first + column)[None, :]
        tl.store(at, count.to(count_row.dtype.element_ty), mask=inside)
