"""Encode rows in Triton: from activations to spike counts in the order of a packed weight.

One launch. A program owns a row; for each channel group it reads the charges once for their range
and once more, from the cache, for the counts, so that HBM sees every input byte once and every
output byte once. Loops run over the encoded positions of a group, so a row of any length and any
number of groups cost no padding beyond the last block of each. For few groups and a layout that is
known to the host, :mod:`neurons.backends.triton_encode_tiles` keeps the row in registers instead.

The integers are those of :func:`neurons.thresholds.encode_parameters` and
:meth:`neurons.SpikeEncoder.encode`, bit for bit: float32, IEEE division, no fused multiply-add.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, interpreted, on
from neurons.backends.operator import operator
from neurons.backends.spec import DTYPES
from neurons.backends.triton_encode_row import encode_row
from neurons.backends.triton_encode_tiles import MOST_POSITIONS, launch_tiles

__all__ = ["ALIGNMENT", "EncodedRows", "encode_rows", "stable_layout"]

ALIGNMENT = 64
"""Starts and stops of segments are multiples of it."""
INTERPRETED = interpreted()
"""Whether Triton interprets, which reduces element by element: programs are small then."""
_MAX_GROUPS = 64


class EncodedRows(NamedTuple):
    """Spike counts in encoded order, with what decodes them and what an integer matmul needs.

    With commensurate thresholds ``m s``, s the unit of a row, they are charges in units: ``m q`` and
    ``m z`` stand for q and z.

    Attributes:
        count: q, uint8 ``[M, P]``, 0 at padding.
        threshold: s, float32 ``[M, G]``, in units of the activation.
        zero_point: z, int32 ``[M, G]``, in s.
        count_sum: sum of the counts of every segment, int32 ``[M, S]``.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    threshold: Tensor
    zero_point: Tensor
    count_sum: Tensor


def encode_rows(
    x: Tensor,
    order: Tensor | None,
    segments: Tensor | Sequence[Sequence[int]],
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None = None,
    runs: Sequence[int] | None = None,
) -> EncodedRows:
    """Encode rows into counts in encoded order: the equations of :mod:`neurons.encoder`.

    Carries no gradient. Nothing waits for the device and nothing is checked there: a row with NaN or infinity has a
    threshold that is not finite, in the groups where the reference has it; its counts and zero
    points mean nothing. For ``torch.compile`` and CUDA graphs give the segments as a tensor.

    Args:
        x: activations ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        order: original channel of every encoded position, int32 ``[P]``; -1: padding. None: the
            original order, K padded to a multiple of `ALIGNMENT`.
        segments: ``(start, stop, group)`` of runs of encoded positions, int32 ``[S, 3]`` or a tuple
            of triples. They cover ``0..P`` without gaps, start and stop at multiples of
            `ALIGNMENT`, and their groups ascend; a group may have several or none.
        capacities: qmax of each group, float32 ``[G]``, integers in 1..255, G at most 64.
        clip: factors on the range of each group, float32 ``[G]`` in (0, 1].
        range_mode: a `ValueRange.code`: 0, each group its own range; 1, one range for all groups, over
            all channels in the order; 2, commensurate: own ranges, thresholds in multiples of a unit.
            One group is encoded as with 0.
        offset: float32 ``[K]`` in original channel order, taken off x in float32 first. None: none.
        runs: what :func:`neurons.backends.triton_encode_tiles.runs_of` says of this order and these
            segments, for a faster kernel, compiled for the layout. None: the kernel for all layouts,
            except for one group in one segment in the original order, which needs no description.

    Returns:
        Counts, thresholds, zero points and the sum of the counts of every segment.

    Raises:
        TypeError: if a tensor has the wrong dtype.
        ValueError: if a shape or a stride does not fit, or the mode is unknown.

    Source: SpikeLLM (arXiv 2407.04752), saliency-based spiking of LLM activations.
    """
    table = segments if isinstance(segments, Tensor) else _table(segments, x.device)
    positions = padded(x.shape[-1]) if order is None else order.shape[0]
    check_rows(x)
    check_layout(order, table, capacities, clip, offset, x.shape[1])
    known = known_runs(runs, order, table, capacities, x.shape[1])
    mode = mode_for(range_mode, capacities)
    return EncodedRows(
        *_encode_rows_op(x.detach(), order, table, capacities, clip, mode, offset, positions, known)
    )


def stable_layout(channel_group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Order and segments that bring the channels of a group together, each in its original order.

    Args:
        channel_group: group of each channel, integers ``[K]`` in ``0..G-1``.
        groups: G.

    Returns:
        For :func:`encode_rows`: order ``[P]`` with every group padded to a multiple of `ALIGNMENT`,
        and segments ``[S, 3]``, one for each group that has channels; on the device of the groups.
    """
    pieces, rows, stop = [], [], 0
    for group in range(groups):
        channels = torch.nonzero(channel_group == group).flatten().to(torch.int32)
        start, stop = stop, stop + padded(len(channels))
        if stop > start:
            pieces.append(
                torch.nn.functional.pad(channels, (0, stop - start - len(channels)), value=-1)
            )
            rows.append((start, stop, group))
    return torch.cat(pieces), torch.tensor(rows, dtype=torch.int32, device=channel_group.device)


def padded(channels: int) -> int:
    """K rounded up to a multiple of `ALIGNMENT`."""
    return -(-channels // ALIGNMENT) * ALIGNMENT


def check_rows(x: Tensor) -> None:
    """Refuse what is not ``[M, K]`` of a float dtype on a GPU with stride 1 along K."""
    if not (x.is_cuda or INTERPRETED):
        raise ValueError(f"the kernels need CUDA tensors, got one on {x.device}; move the input.")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {[str(t) for t in DTYPES]}, got {x.dtype}.")
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"x must be [M, K] with K >= 1, got {tuple(x.shape)}.")
    if x.stride(1) != 1 and x.shape[1] > 1:
        raise ValueError(f"x must have stride 1 along K, got {x.stride()}; make it contiguous.")


def check_layout(
    order: Tensor | None,
    table: Tensor,
    capacities: Tensor,
    clip: Tensor,
    offset: Tensor | None,
    channels: int,
) -> None:
    """Refuse dtypes and shapes that the kernels cannot index; arguments of :func:`encode_rows`."""
    groups = capacities.numel()
    expected = {
        "order": (order, torch.int32, None),
        "segments": (table, torch.int32, (table.shape[0], 3)),
        "capacities": (capacities, torch.float32, (groups,)),
        "clip": (clip, torch.float32, (groups,)),
        "offset": (offset, torch.float32, (channels,)),
    }
    for name, (tensor, dtype, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {tensor.dtype}.")
        if shape is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}.")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}.")
    if not 1 <= groups <= _MAX_GROUPS:
        raise ValueError(f"capacities must hold 1 to {_MAX_GROUPS} groups, got {groups}.")
    if table.shape[0] == 0:
        raise ValueError("segments must hold at least one (start, stop, group).")
    if order is not None and (order.dim() != 1 or order.shape[0] % ALIGNMENT):
        raise ValueError(
            f"order must be [P] with P a multiple of {ALIGNMENT}, got {tuple(order.shape)}."
        )


def known_runs(
    runs: Sequence[int] | None,
    order: Tensor | None,
    table: Tensor,
    capacities: Tensor,
    channels: int,
) -> list[int] | None:
    """The runs of :func:`encode_rows`, checked, or those that need no description."""
    segments, groups = table.shape[0], capacities.numel()
    positions = padded(channels) if order is None else order.shape[0]
    if runs is None:
        trivial = order is None and segments == groups == 1 and positions <= MOST_POSITIONS
        return [0, positions, channels, 0] if trivial else None
    if len(runs) != 4 * groups or segments != groups or runs[-3] != positions:
        raise ValueError(
            f"runs must be what runs_of says of the same layout, {groups} groups in as many segments "
            f"of {positions} positions, got {list(runs)} for {segments} segments."
        )
    return list(runs)


def mode_for(range_mode: int, capacities: Tensor) -> int:
    """The range mode of :func:`encode_rows`, checked, as the kernels take it: one group has nothing to share."""
    if range_mode not in (0, 1, 2):
        raise ValueError(f"range_mode must be 0, 1 or 2 (`ValueRange.code`), got {range_mode}.")
    return 0 if capacities.shape[0] == 1 else int(range_mode)


def _table(segments: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    rows = tuple(tuple(int(value) for value in row) for row in segments)
    groups = [row[2] for row in rows]
    starts, stops = [row[0] for row in rows], [row[1] for row in rows]
    if starts != [0, *stops[:-1]] or groups != sorted(groups) or any(s % ALIGNMENT for s in stops):
        raise ValueError(
            f"segments must cover the positions from 0 without gaps, start and stop at multiples "
            f"of {ALIGNMENT} and ascend in their groups, got {rows}."
        )
    return _on_device(rows, device)


@lru_cache(maxsize=1024)
def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def outputs(
    x: Tensor, positions: int, groups: int, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Allocate counts, thresholds, zero points and sums."""
    rows = x.shape[0]
    return (
        x.new_empty((rows, positions), dtype=torch.uint8),
        x.new_empty((rows, groups), dtype=torch.float32),
        x.new_empty((rows, groups), dtype=torch.int32),
        x.new_empty((rows, segments), dtype=torch.int32),
    )


@operator("neurons::encode_rows")
def _encode_rows_op(
    x: Tensor,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    positions: int,
    runs: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results of :func:`encode_rows`, segments as a tensor, P given, the mode that of `mode_for`."""
    count, threshold, zero_point, count_sum = outputs(
        x, positions, capacities.shape[0], segments.shape[0]
    )
    early = x.shape[0] <= EARLY_ROWS and early_launch(x.device)
    if x.shape[0] and runs:
        written = (count, threshold, zero_point, count_sum)
        with on(x.device):
            launch_tiles(
                *(x, order, capacities, clip, range_mode, offset, written, tuple(runs), early)
            )
    elif x.shape[0]:
        block, warps = shape_of_programs(x.shape[0], positions)
        launch: Any = _encode_rows[(x.shape[0],)]
        with on(x.device):
            launch(
                *(x, x if order is None else order, segments, capacities, clip),
                *(x if offset is None else offset, count, threshold, zero_point, count_sum),
                *(x.stride(0), x.shape[1], positions, segments.shape[0], capacities.shape[0]),
                RANGE_MODE=range_mode,
                GATHER=order is not None,
                HAS_OFFSET=offset is not None,
                EARLY=early,
                **({"launch_pdl": True} if early else {}),
                SEGMENTS=triton.next_power_of_2(segments.shape[0]),
                BLOCK=block,
                num_warps=warps,
                enable_fp_fusion=False,
            )
    return count, threshold, zero_point, count_sum


@_encode_rows_op.register_fake
def _(
    x: Tensor,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    positions: int,
    runs: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count, threshold, zero_point, count_sum = outputs(
        x, positions, capacities.shape[0], segments.shape[0]
    )
    return count, threshold, zero_point, count_sum


def shape_of_programs(rows: int, positions: int) -> tuple[int, int]:
    """Positions a program handles at a time, and its warps."""
    if INTERPRETED:
        return ALIGNMENT, 1
    # Few rows leave the device idle: a row then goes through as wide a program as it can fill.
    widest = 4096 if rows < 256 else 1024
    block = min(widest, max(128, triton.next_power_of_2(positions)))
    return block, max(1, block // 256)


@triton.jit
def _encode_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    segment_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    sum_ptr,
    stride,
    channels,
    positions,
    segments,
    groups,
    RANGE_MODE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    encode_row(
        x_ptr + row * stride,
        x_ptr,
        1.0,
        order_ptr,
        segment_ptr,
        capacity_ptr,
        clip_ptr,
        offset_ptr,
        count_ptr + row * positions,
        threshold_ptr + row * groups,
        zero_ptr + row * groups,
        sum_ptr + row * segments,
        channels,
        positions,
        segments,
        groups,
        RANGE_MODE,
        GATHER,
        HAS_OFFSET,
        False,
        False,
        SEGMENTS,
        BLOCK,
    )
