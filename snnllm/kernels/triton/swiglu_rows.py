"""Triton kernels of :mod:`snnllm.kernels.triton.swiglu`: product, rotation, encoding of rows."""

import triton
import triton.language as tl

from neurons.backends.device import interpreted
from neurons.backends.triton_arithmetic import fused
from neurons.backends.triton_encode_row import clipped, gated, read
from neurons.backends.triton_encode_tiles import encode_tiles, range_ends, stacked
from neurons.backends.triton_thresholds import group_parameters, value_of
from snnllm.kernels.triton.rotation import rotated_tile

__all__ = [
    "rotate_and_encode_kernel",
    "silu_mul_encode_kernel",
    "silu_mul_kernel",
]

# Triton's interpreter knows no assembly.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def silu_mul_kernel(  # type: ignore[no-untyped-def]
    gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, channels, BLOCK: tl.constexpr
):
    """A block of one row of ``silu(gate) * up``."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < channels
    gate = tl.load(gate_ptr + row * gate_stride + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + row * up_stride + at, mask=inside, other=0.0)
    tl.store(out_ptr + row * channels + at, gated(gate, up), mask=inside)


@triton.jit
def silu_mul_encode_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    order_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    nullptr,
    sum_ptr,
    gate_stride,
    up_stride,
    positions,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
    TILE: tl.constexpr,
):
    """Encode a row of ``silu(gate) * up``."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    encode_tiles(
        *(gate_ptr + row * gate_stride, up_ptr + row * up_stride, 1.0, order_ptr, capacity_ptr),
        *(clip_ptr, offset_ptr, count_ptr + row * positions, threshold_ptr + row * GROUPS),
        *(nullptr + row * GROUPS, sum_ptr + row * GROUPS, RUNS, GROUPS, RANGE_MODE, GATHER),
        *(HAS_OFFSET, False, False, True, TILE),
    )


@triton.jit
def _quarter(  # type: ignore[no-untyped-def]
    ptr,
    quarter: tl.constexpr,
    MANY: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Four neighbours of every WIDTH, ``[ROWS, 4]``."""
    first = tl.arange(0, ROWS)[:, None] * WIDTH
    at = first + 4 * quarter + tl.arange(0, 4)[None, :]
    return read(ptr, at, tl.broadcast_to(first < MANY, [ROWS, 4]), MANY < ROWS * WIDTH)


@triton.jit
def _columns(  # type: ignore[no-untyped-def]
    ptr, MANY: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """A float32 for every channel, ``[ROWS, WIDTH]``, in the layout of a rotated tile.

    Four at a time, as a thread loads them. A load of WIDTH neighbours would have another layout, and
    the rotated tile would be exchanged once more.
    """
    if WIDTH == 16:
        even = tl.join(_quarter(ptr, 0, MANY, ROWS, WIDTH), _quarter(ptr, 2, MANY, ROWS, WIDTH))
        odd = tl.join(_quarter(ptr, 1, MANY, ROWS, WIDTH), _quarter(ptr, 3, MANY, ROWS, WIDTH))
        x = tl.reshape(tl.permute(tl.join(even, odd), (0, 2, 3, 1)), [ROWS, WIDTH])
    elif WIDTH == 8:
        both = tl.join(_quarter(ptr, 0, MANY, ROWS, WIDTH), _quarter(ptr, 1, MANY, ROWS, WIDTH))
        x = tl.reshape(tl.permute(both, (0, 2, 1)), [ROWS, WIDTH])
    else:
        first = tl.arange(0, ROWS)[:, None] * WIDTH
        at = first + tl.arange(0, WIDTH)[None, :]
        inside = tl.broadcast_to(first < MANY, [ROWS, WIDTH])
        x = read(ptr, at, inside, MANY < ROWS * WIDTH)
    return x


@triton.jit
def _quotient_of_minus(x, divisor, minus, rest):  # type: ignore[no-untyped-def]
    """``-x / divisor``, correctly rounded, as ``quotient_of``, with minus its inverse in two parts.

    The first quotient is nearly of twice the precision before it is rounded, and therefore faithful:
    one Newton step is enough.
    """
    first = fused(x, minus, x * rest)
    return fused(fused(first, divisor, x), minus, first)


@triton.jit
def _counted(charged, capacity):  # type: ignore[no-untyped-def]
    """``clip(floor(charged), 0, capacity)`` as int32, as ``clipped``."""
    if _INTERPRETED:
        count = clipped(charged, capacity)
    else:
        # The conversion itself makes 0 of what is below.
        count = tl.inline_asm_elementwise(
            "cvt.rzi.u32.f32 $0, $1;", "=r,r", [tl.minimum(charged, capacity)], tl.int32, True, 1
        )
    return count


@triton.jit
def _store_counts(  # type: ignore[no-untyped-def]
    ptr, count, at, inside, MASKED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Store counts ``[ROWS, WIDTH]``, the first of a row at a position of its own: ``[ROWS, 1]``."""
    if WIDTH >= 4:
        # Bytes packed by hand: a store of bytes would have another layout, as in `_columns`.
        even, odd = tl.split(tl.reshape(count, [ROWS, WIDTH // 2, 2]))
        c0, c2 = tl.split(tl.reshape(even, [ROWS, WIDTH // 4, 2]))
        c1, c3 = tl.split(tl.reshape(odd, [ROWS, WIDTH // 4, 2]))
        word = c0 + (c1 + (c2 + (c3 << 8) << 8) << 8)
        to = ptr.to(tl.pointer_type(tl.int32)) + at // 4 + tl.arange(0, WIDTH // 4)[None, :]
        if MASKED:
            tl.store(to, word, mask=tl.broadcast_to(inside, [ROWS, WIDTH // 4]))
        else:
            tl.store(to, word)
    else:
        to = ptr + at + tl.arange(0, WIDTH)[None, :]
        tl.store(to, count.to(tl.uint8), mask=tl.broadcast_to(inside, [ROWS, WIDTH]))


@triton.jit
def _in_group(first, RUNS: tl.constexpr, group: tl.constexpr):  # type: ignore[no-untyped-def]
    """Whether channels are those of a group."""
    return (first >= RUNS[4 * group + 3]) & (first < RUNS[4 * group + 3] + RUNS[4 * group + 2])


@triton.jit
def _piece_charges(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    offset_ptr,
    MANY: tl.constexpr,
    P: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
):
    """Minus the rotated activations of a piece, offsets off, in tiles ``[TILE / WIDTH, WIDTH]``."""
    # A power of two: the product is exact, and one rounding is that of the difference. (Among
    # subnormals there may be two, but thresholds start at 1e-5.)
    EXACT: tl.constexpr = P == 1 or P == 4 or P == 16 or P == 64 or P == 256
    tiles = ()  # type: tuple[object, ...]
    for first in tl.static_range(0, MANY, TILE):
        x = rotated_tile(gate_ptr + first, up_ptr + first, MANY - first, P, TILE, True)
        minus_root = tl.full([TILE // WIDTH, WIDTH], -(P**-0.5), tl.float32)
        if HAS_OFFSET:
            offset = _columns(offset_ptr + first, MANY - first, TILE // WIDTH, WIDTH)
            x = fused(x, minus_root, offset) if EXACT else x * minus_root + offset
        else:
            x *= minus_root
        tiles += (x,)
    return tiles


@triton.jit
def _piece_ranges(  # type: ignore[no-untyped-def]
    tiles,
    FIRST: tl.constexpr,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The largest ``range_bits`` of the groups in a piece, int32 ``[2, GROUPS]``.

    Of minus the activations. Integers, of which a thread takes the maximum of three at once: the
    bits of floats from zero on are in their order, those of other floats are negative and, as they
    are without a sign, in the order of their magnitudes. NaN is beyond infinity in one or the other.
    """
    channel = tl.arange(0, ROWS) * WIDTH
    none = tl.zeros([ROWS], tl.int32)
    ranges = ()  # type: tuple[object, ...]
    for group in tl.static_range(GROUPS):
        below, above = none, none
        for tile in tl.static_range(len(tiles)):
            low = tl.max(tiles[tile].to(tl.int32, bitcast=True), 1)
            high = tl.max(tiles[tile].to(tl.uint32, bitcast=True), 1).to(tl.int32, bitcast=True)
            # The largest of all is negative if one is.
            high = tl.where(high < 0, high & 0x7FFFFFFF, none)
            if GROUPS > 1:
                own = _in_group(FIRST + tile * (ROWS * WIDTH) + channel, RUNS, group)
                low, high = tl.where(own, low, none), tl.where(own, high, none)
            below, above = tl.maximum(below, low), tl.maximum(above, high)
        ranges += (tl.join(below, above),)
    return tl.reshape(tl.max(stacked(ranges, GROUPS), 0), [2, GROUPS])


@triton.jit
def _piece_counts(  # type: ignore[no-untyped-def]
    tiles,
    count_ptr,
    thresholds,
    zeros,
    capacities,
    multiples,
    scale,
    FIRST: tl.constexpr,
    MANY: tl.constexpr,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the counts of a piece, or their multiples; returns their sums by group, ``[GROUPS]``."""
    number = tl.arange(0, GROUPS)
    place = tl.arange(0, ROWS) * WIDTH
    none = tl.zeros([ROWS], tl.int32)
    zero = tl.zeros([ROWS], tl.float32)
    wide = tl.zeros([ROWS, WIDTH], tl.float32)
    one, null = tl.full([], 1.0, tl.float32), tl.full([], 0.0, tl.float32)
    sums0, sums1 = none, none
    divisor = value_of(thresholds, number, 0) * scale
    other = value_of(thresholds, number, GROUPS - 1) * scale
    inverse, other_inverse = tl.div_rn(one, divisor), tl.div_rn(one, other)
    rest = fused(null - divisor, inverse, one) * inverse
    other_rest = fused(null - other, other_inverse, one) * other_inverse
    bias = value_of(zeros, number, 0) + 0.5
    other_bias = value_of(zeros, number, GROUPS - 1) + 0.5
    most = value_of(capacities, number, 0)
    other_most = value_of(capacities, number, GROUPS - 1)
    if RANGE_MODE == 2:
        multiple = value_of(multiples, number, 0).to(tl.int32)
        other_multiple = value_of(multiples, number, GROUPS - 1).to(tl.int32)
    for tile in tl.static_range(len(tiles)):
        channel = FIRST + tile * (ROWS * WIDTH) + place
        inside = channel < FIRST + MANY
        # A row of a tile is within a block, and so within a group.
        own = _in_group(channel, RUNS, 0)
        at = channel + (RUNS[0] - RUNS[3])
        if GROUPS > 1:
            at = tl.where(own, at, channel + (RUNS[4] - RUNS[7]))
        charge = tiles[tile] * scale
        minus = wide - tl.where(own, zero + inverse, zero + other_inverse)[:, None]
        minus_rest = wide - tl.where(own, zero + rest, zero + other_rest)[:, None]
        divisors = wide + tl.where(own, zero + divisor, zero + other)[:, None]
        charged = _quotient_of_minus(charge, divisors, minus, minus_rest)
        charged += tl.where(own, zero + bias, zero + other_bias)[:, None]
        count = _counted(charged, tl.where(own, zero + most, zero + other_most)[:, None])
        if RANGE_MODE == 2:
            count *= tl.where(own, none + multiple, none + other_multiple)[:, None]
        total = tl.where(inside, tl.sum(count, 1), none)
        sums0 += tl.where(own, total, none)
        sums1 += tl.where(own, none, total)
        _store_counts(
            *(count_ptr, count, at[:, None], inside[:, None]),
            *((tile + 1) * (ROWS * WIDTH) > MANY, ROWS, WIDTH),
        )
    sums = tl.join(sums0, sums1) if GROUPS > 1 else sums0[:, None]
    return tl.sum(sums, 0)


@triton.jit
def _pad(count_ptr, START: tl.constexpr, STOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Zeros behind the counts of a group."""
    lane = tl.arange(0, 64)
    for first in tl.static_range(START, STOP, 64):
        none = tl.zeros([64], tl.int32).to(tl.uint8)
        tl.store(count_ptr + first + lane, none, mask=first + lane < STOP)


@triton.jit
def rotate_and_encode_kernel(  # type: ignore[no-untyped-def]
    gate_ptr,
    up_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    nullptr,
    sum_ptr,
    gate_stride,
    up_stride,
    positions,
    PIECES: tl.constexpr,
    RUNS: tl.constexpr,
    GROUPS: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Rotate and encode a row of ``silu(gate) * up``: one or two groups of whole blocks.

    PIECES as in ``rotate_kernel``, RUNS as in :mod:`neurons.backends.triton_encode_tiles`, both flat.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    gate_ptr += row * gate_stride
    up_ptr += row * up_stride
    count_ptr += row * positions
    number = tl.arange(0, GROUPS)
    both = tl.zeros([2, GROUPS], tl.int32)
    charges = ()  # type: tuple[object, ...]
    for piece in tl.static_range(len(PIECES) // 5):
        tiles = _piece_charges(
            *(gate_ptr + PIECES[5 * piece], up_ptr + PIECES[5 * piece]),
            *(offset_ptr + PIECES[5 * piece], PIECES[5 * piece + 1], PIECES[5 * piece + 2]),
            *(PIECES[5 * piece + 3], PIECES[5 * piece + 4], HAS_OFFSET),
        )
        bits = _piece_ranges(
            *(tiles, PIECES[5 * piece], RUNS, GROUPS),
            *(PIECES[5 * piece + 3] // PIECES[5 * piece + 4], PIECES[5 * piece + 4]),
        )
        both = tl.maximum(both, bits)
        charges += (tiles,)
    low, high = range_ends(both, GROUPS, RANGE_MODE)
    capacities, clips = tl.load(capacity_ptr + number), tl.load(clip_ptr + number)
    units, thresholds, zeros, multiples = group_parameters(
        low, high, capacities, clips, number, GROUPS, RANGE_MODE
    )
    tl.store(threshold_ptr + row * GROUPS + number, units)
    tl.store(nullptr + row * GROUPS + number, (zeros * multiples).to(tl.int32))
    # As in `encode_tiles`: a power of two off both changes no quotient that the bias does not absorb,
    # and keeps the parts of the inverse from becoming subnormal.
    scale = tl.where(tl.max(thresholds, 0) < 1e30, 1.0, 2.0**-64)
    sums = tl.zeros([GROUPS], tl.int32)
    for piece in tl.static_range(len(PIECES) // 5):
        sums += _piece_counts(
            *(charges[piece], count_ptr, thresholds, zeros, capacities, multiples, scale),
            *(PIECES[5 * piece], PIECES[5 * piece + 1], RUNS, GROUPS, RANGE_MODE),
            *(PIECES[5 * piece + 3] // PIECES[5 * piece + 4], PIECES[5 * piece + 4]),
        )
    tl.store(sum_ptr + row * GROUPS + number, sums)
    for group in tl.static_range(GROUPS):
        _pad(count_ptr, RUNS[4 * group] + RUNS[4 * group + 2], RUNS[4 * group + 1])
