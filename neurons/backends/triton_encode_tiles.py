"""Encode rows of few groups in Triton: a program holds its whole row in registers.

Every input is read once. The row comes in tiles in encoded order, the tiles of a group one after the
other, so that threshold and bias charge are scalars and only the last tiles of a group need masks.
The layout is part of the compiled kernel: one for all linears with groups of the same sizes.

The integers are those of :mod:`neurons.backends.triton_encode`, bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.triton_encode_row import (
    charge_of,
    clipped,
    quotient_of,
    range_bits,
    read,
    wider,
)
from neurons.backends.triton_thresholds import group_parameters, value_of

__all__ = [
    "MOST_POSITIONS",
    "encode_tiles",
    "launch_tiles",
    "range_ends",
    "registers",
    "runs_of",
    "stacked",
    "tiles_of",
]

MOST_POSITIONS = 32768
"""64 numbers for each of 512 threads; longer rows would spill."""
_MOST_GROUPS = 4
_VECTOR = 4
"""Neighbours that a thread reads at once; the first of them is a multiple of it."""
_PAIR = 2
"""Channels of a thread in a tile that is gathered: a warp then stays within one or two cache lines."""
_FEW_ROWS = 64
_REGISTERS = 64
"""Of a thread where rows are many: 32 warps on a multiprocessor hide more than a few spills cost."""


def runs_of(order: Tensor | None, segments: Tensor, groups: int, channels: int) -> list[int] | None:
    """Describe a layout to :func:`neurons.backends.triton_encode.encode_rows`, which is faster then.

    Waits for the device: call it once, where the layout is made.

    Args:
        order: original channel of every encoded position, int32 ``[P]``, -1 at padding; None: the
            original order.
        segments: ``(start, stop, group)``, int32 ``[S, 3]``.
        groups: G.
        channels: K.

    Returns:
        Four numbers for each group: start and stop of its positions, how many channels it has, and
        the first of them where they are neighbours in order and begin at a multiple of 4, else -1.
        None where the fast kernel does not apply: more than 4 groups, one with several segments or
        with none, padding that is not at the end of a segment, or more than 32768 positions.
    """
    table = segments.tolist()
    positions = table[-1][1]
    if groups > _MOST_GROUPS or positions > MOST_POSITIONS:
        return None
    if [group for _, _, group in table] != list(range(groups)):
        return None
    channel = torch.arange(positions) if order is None else order.cpu()
    channel = torch.where(channel < channels, channel, -1)
    runs = []
    for start, stop, _ in table:
        own = channel[start:stop]
        many = int((own >= 0).sum())
        if many == 0 or bool((own[:many] < 0).any()):
            return None
        first = int(own[0])
        neighbours = torch.equal(own[:many], torch.arange(first, first + many, dtype=own.dtype))
        runs += [start, stop, many, first if neighbours and first % _VECTOR == 0 else -1]
    return runs


def tiles_of(rows: int, positions: int, gather: bool) -> tuple[int, int]:
    """Positions of a tile, and warps: 20 to 50 positions for a thread, or few where rows are few."""
    most, each = (32, 320) if rows <= _FEW_ROWS else (16, 1536)
    warps = min(most, triton.next_power_of_2(triton.cdiv(positions, each)))
    return 32 * warps * (_PAIR if gather else _VECTOR), warps


def registers(rows: int, warps: int) -> dict[str, int]:
    """Option of a launch that bounds the registers of a thread, where that is faster."""
    # The longest rows have 16 warps, and need more registers.
    return {"maxnreg": _REGISTERS} if rows > _FEW_ROWS and warps < 16 else {}


@triton.jit
def encode_tiles(  # type: ignore[no-untyped-def]
    x_ptr,
    gain_ptr,
    scale,
    order_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    sum_ptr,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Encode one row; pointers to inputs and outputs are those of the row, RUNS is flat.

    With SCALED the row is ``normalized`` by the scale (float32) and, with HAS_GAIN, the gains first;
    with GATED it is ``gated``, the gains are up of this row.
    """
    PADDED: tl.constexpr = 4 if GROUPS == 3 else GROUPS
    lane = tl.arange(0, TILE)
    number = tl.arange(0, PADDED)
    capacities = tl.load(capacity_ptr + number, mask=number < GROUPS, other=1.0)
    clips = tl.load(clip_ptr + number, mask=number < GROUPS, other=1.0)
    charges = ()  # type: tuple[Any, ...]
    ranges = ()  # type: tuple[Any, ...]
    for group in tl.static_range(GROUPS):
        own = _charges(
            *(x_ptr, gain_ptr, scale, order_ptr, offset_ptr, lane, RUNS, group),
            *(GATHER, HAS_OFFSET, SCALED, HAS_GAIN, GATED, TILE),
        )
        charges += (own,)
        ranges += (_range(own, TILE),)
    both = tl.reshape(tl.max(stacked(ranges, GROUPS), 0), [2, PADDED])
    low, high = range_ends(both, PADDED, RANGE_MODE)
    units, thresholds, zeros, multiples = group_parameters(
        low, high, capacities, clips, number, GROUPS, RANGE_MODE
    )
    tl.store(threshold_ptr + number, units, mask=number < GROUPS)
    tl.store(zero_ptr + number, (zeros * multiples).to(tl.int32), mask=number < GROUPS)
    # `quotient_of` takes divisors below 2**100. A power of two off both changes no quotient, but of
    # those so small that the bias absorbs them.
    if tl.max(thresholds, 0) < 1e30:
        totals = _all_counts(
            *(charges, thresholds, zeros, capacities, multiples, count_ptr, lane),
            *(RUNS, GROUPS, RANGE_MODE, 1.0, TILE),
        )
    else:
        totals = _all_counts(
            *(charges, thresholds, zeros, capacities, multiples, count_ptr, lane),
            *(RUNS, GROUPS, RANGE_MODE, 2.0**-64, TILE),
        )
    sums = tl.sum(totals, 0)
    if GROUPS > 1:
        sums = tl.reshape(sums, [PADDED])
    tl.store(sum_ptr + number, sums, mask=number < GROUPS)


@triton.jit
def _charges(  # type: ignore[no-untyped-def]
    x_ptr,
    gain_ptr,
    scale,
    order_ptr,
    offset_ptr,
    lane,
    RUNS: tl.constexpr,
    group: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    GATED: tl.constexpr,
    TILE: tl.constexpr,
):
    """Activations of a group in tiles, float32, 0 at padding."""
    START: tl.constexpr = RUNS[4 * group]
    MANY: tl.constexpr = RUNS[4 * group + 2]
    FIRST: tl.constexpr = RUNS[4 * group + 3]
    own = ()  # type: tuple[Any, ...]
    for first in tl.static_range(0, MANY, TILE):
        channel = FIRST + first + lane
        inside = first + lane < MANY
        if GATHER:
            channel = read(order_ptr + START + first, lane, inside, first + TILE > MANY)
        x = charge_of(
            *(x_ptr, gain_ptr, scale, offset_ptr, channel, inside),
            *(first + TILE > MANY, HAS_OFFSET, SCALED, HAS_GAIN, GATED),
        )
        own += (x,)
    return own


@triton.jit
def _range(own, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Range of a group lane by lane, as ``range_bits``."""
    below = tl.zeros([TILE], tl.float32)
    above = tl.zeros([TILE], tl.float32)
    for tile in tl.static_range(len(own)):
        below, above = wider(below, above, own[tile], own[tile])
    return range_bits(below, above)


@triton.jit
def stacked(parts, GROUPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """What there is of each group in last axes: one reduction for all, one wait for the warps."""
    if GROUPS == 1:
        both = parts[0]
    elif GROUPS == 2:
        both = tl.join(parts[0], parts[1])
    else:
        # A third group stands for the fourth, too.
        both = tl.join(tl.join(parts[0], parts[2]), tl.join(parts[1], parts[GROUPS - 1]))
    return both


@triton.jit
def range_ends(both, PADDED: tl.constexpr, RANGE_MODE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ends of the ranges of all groups, float32 ``[PADDED]``, from the maxima of their ``range_bits``."""
    if RANGE_MODE == 1:
        both = tl.broadcast_to(tl.max(both, 1)[:, None], [2, PADDED])
    below = tl.arange(0, 2)[:, None] == 0
    low = tl.sum(tl.where(below, both, 0), 0).to(tl.float32, bitcast=True)
    high = tl.sum(tl.where(below, 0, both), 0).to(tl.float32, bitcast=True)
    return -low, high


@triton.jit
def _all_counts(  # type: ignore[no-untyped-def]
    charges,
    thresholds,
    zeros,
    capacities,
    multiples,
    count_ptr,
    lane,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the counts of all groups; returns their sums lane by lane, ``stacked``."""
    number = tl.arange(0, thresholds.shape[0])
    totals = ()  # type: tuple[Any, ...]
    for group in tl.static_range(GROUPS):
        threshold = value_of(thresholds, number, group)
        bias = value_of(zeros, number, group) + 0.5
        capacity = value_of(capacities, number, group)
        multiple = 1
        if RANGE_MODE == 2:
            multiple = value_of(multiples, number, group).to(tl.int32)
        total = _counts(
            *(charges[group], threshold, bias, capacity, multiple, count_ptr, lane),
            *(RUNS, group, RANGE_MODE, SCALE, TILE),
        )
        totals += (total,)
    return stacked(totals, GROUPS)


@triton.jit
def _counts(  # type: ignore[no-untyped-def]
    own,
    threshold,
    bias,
    capacity,
    multiple,
    count_ptr,
    lane,
    RUNS: tl.constexpr,
    group: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Store the counts of a group, or their multiples; returns their sums lane by lane."""
    START: tl.constexpr = RUNS[4 * group]
    LENGTH: tl.constexpr = RUNS[4 * group + 1] - RUNS[4 * group]
    MANY: tl.constexpr = RUNS[4 * group + 2]
    total = tl.zeros([TILE], tl.int32)
    zeros = tl.zeros([TILE], tl.float32)
    divisor = threshold * SCALE
    inverse = zeros + tl.div_rn(tl.full([], 1.0, tl.float32), divisor)
    minus = zeros - divisor
    for first in tl.static_range(0, LENGTH, TILE):
        at = START + first + lane
        if first < MANY:
            charge = own[first // TILE]
            if SCALE != 1.0:
                charge *= SCALE
            count = clipped(quotient_of(charge, minus, inverse) + bias, capacity)
            if RANGE_MODE == 2:
                count *= multiple
            if first + TILE > MANY:
                count = tl.where(first + lane < MANY, count, 0)
            total += count
        else:
            count = tl.zeros([TILE], tl.int32)
        if first + TILE <= LENGTH:
            tl.store(count_ptr + at, count.to(tl.uint8))
        else:
            tl.store(count_ptr + at, count.to(tl.uint8), mask=first + lane < LENGTH)
    return total


@triton.jit
def _encode_rows_in_tiles(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    sum_ptr,
    stride,
    positions,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    TILE: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    encode_tiles(
        *(x_ptr + row * stride, x_ptr, 1.0, order_ptr, capacity_ptr, clip_ptr, offset_ptr),
        *(count_ptr + row * positions, threshold_ptr + row * GROUPS, zero_ptr + row * GROUPS),
        *(sum_ptr + row * GROUPS, RUNS, GROUPS, RANGE_MODE, GATHER, HAS_OFFSET, False, False),
        *(False, TILE),
    )


def launch_tiles(
    x: Tensor,
    order: Tensor | None,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    outputs: tuple[Tensor, ...],
    runs: tuple[int, ...],
    early: bool,
) -> None:
    """Launch the kernel; see :func:`neurons.backends.triton_encode.encode_rows`."""
    groups = capacities.shape[0]
    gather = min(runs[3::4]) < 0
    tile, warps = tiles_of(x.shape[0], outputs[0].shape[1], gather)
    launch: Any = _encode_rows_in_tiles[(x.shape[0],)]
    launch(
        *(x, x if order is None else order, capacities, clip, x if offset is None else offset),
        *(*outputs, x.stride(0), outputs[0].shape[1]),
        RUNS=runs,
        GROUPS=groups,
        RANGE_MODE=range_mode,
        GATHER=gather,
        HAS_OFFSET=offset is not None,
        EARLY=early,
        **({"launch_pdl": True} if early else {}),
        TILE=tile,
        num_warps=warps,
        enable_fp_fusion=False,
        **registers(x.shape[0], warps),
    )
