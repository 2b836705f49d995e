"""Linears of ternary weights in Triton; the weights stay packed (`pack`).

    y[m, n] = sum_b scale[n, b] factor_b sum_{k in b} (2 d[n, k]) x[m, k]

Products are exact, as a digit is -1, 0 or 1, and run on tensor cores with float32 sums. An activation of
float32 is the sum of three of bfloat16. Centred spike counts of up to 255 are exact in bfloat16, and so
is their sum over a block: spiking activations are added as integers, in the same product.

Few activations would leave a tensor core without work and a program with one long chain of it. So R
blocks are multiplied at once: a row of the left operand is a block of a weight row, a column of the right
one a block of a row of activations, and of their product `[BN R, BM R]` only the pairs of equal blocks
count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snnllm.kernels.triton.dot import early
from snnllm.kernels.triton.linear import tile_of


@triton.jit
def _digits(packed, PLANE: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Digits of a plane of packed bytes, times 2, as bfloat16 or float16."""
    if ASM is None:
        bits = (packed.to(tl.int16) << (14 - 2 * PLANE)) & -16384  # 0xC000
    else:
        bits = tl.inline_asm_elementwise(ASM[PLANE], "=r,=r,r", [packed], tl.int16, True, 4)
    return bits.to(dtype, bitcast=True)


@triton.jit(do_not_specialize=["rows"])
def gather_rows(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    out_ptr,
    stride,
    rows,
    width,
    PIECES: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Activations in the order of the packed weight, 0 at padding, as a sum of PIECES numbers."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < width
    channel = tl.load(order_ptr + position, mask=inside, other=-1)
    rest = tl.load(x_ptr + m * stride + channel, mask=channel >= 0, other=0.0)
    if PIECES == 1:
        tl.store(out_ptr + m * width + position, rest.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        for piece in tl.static_range(PIECES):
            part = rest.to(out_ptr.dtype.element_ty)
            at = (piece * rows.to(tl.int64) + m) * width + position
            tl.store(out_ptr + at, part, mask=inside)
            rest -= part.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def gather_counts(  # type: ignore[no-untyped-def]
    count_ptr,
    zero_point_ptr,
    group_ptr,
    order_ptr,
    out_ptr,
    rows,
    channels,
    width,
    groups,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Centred counts in the order of the packed weight, for every group: 0 in the others."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    m = tl.program_id(1).to(tl.int64)
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = position < width
    channel = tl.load(order_ptr + position, mask=inside, other=-1)
    known = channel >= 0
    group = tl.load(group_ptr + channel, mask=known, other=0).to(tl.int32)
    count = tl.load(count_ptr + m * channels + channel, mask=known, other=0).to(tl.int32)
    zero_point = tl.load(zero_point_ptr + m * groups + group, mask=known, other=0)
    centred = (count - zero_point).to(tl.float32)
    for g in range(groups):
        own = tl.where(group == g, centred, 0.0)
        at = (g * rows.to(tl.int64) + m) * width + position
        tl.store(out_ptr + at, own.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _scales(scale_at, factor_ptr, block, blocks):  # type: ignore[no-untyped-def]
    """Thresholds times factors of some blocks, 0 beyond the last."""
    known = block < blocks
    scale = tl.load(scale_at + block, mask=known, other=0.0)
    return scale.to(tl.float32) * tl.load(factor_ptr + block, mask=known, other=0.0)


@triton.jit
def _operands(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    first_m,
    first_n,
    rows,
    columns,
    width,
    pitch,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Addresses of the first R blocks of activations `[BLOCK / 4, BM R]` and weights `[BN R, BLOCK / 4]`.

    Rows beyond the end repeat the last one: nothing is masked.
    """
    left, right = tl.arange(0, BN * R), tl.arange(0, BM * R)
    m = tl.minimum(first_m + right // R, rows - 1).to(tl.int64)
    n = tl.minimum(first_n + left // R, columns - 1).to(tl.int64)
    byte = tl.arange(0, BLOCK // 4)
    x_at = x_ptr + (m * width + right % R * BLOCK)[None, :] + byte[:, None]
    weight_at = weight_ptr + (n * pitch + left % R * (BLOCK // 4))[:, None] + byte[None, :]
    if EARLY:
        early(weight_ptr + first_n.to(tl.int64) * pitch, min(BN, columns - first_n) * pitch)
    return x_at, weight_at


@triton.jit
def _products(  # type: ignore[no-untyped-def]
    x_at,
    weight_at,
    block,
    pitch,
    piece_stride,
    ASM: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Sums of `2 d x` over R blocks, float32 `[BN R, BM R]`."""
    SPAN: tl.constexpr = BLOCK // 4
    if R == 1:
        packed = tl.load(weight_at + block * SPAN)
    else:
        byte = (tl.arange(0, BN * R) % R)[:, None] * SPAN + tl.arange(0, SPAN)[None, :]
        packed = tl.load(weight_at + block * SPAN, mask=byte < pitch - block * SPAN, other=0)
    acc = tl.zeros([BN * R, BM * R], tl.float32)
    for piece in tl.static_range(PIECES):
        for plane in tl.static_range(4):
            x = tl.load(x_at + (piece * piece_stride + (block * BLOCK + plane * SPAN)))
            digits = _digits(packed, plane, ASM, x.dtype)
            if ASM is None:  # the interpreter cannot multiply bfloat16
                digits, x = digits.to(tl.float32), x.to(tl.float32)
            acc = tl.dot(digits, x, acc)
    return acc


@triton.jit
def _pairs(acc, R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The products of equal blocks `[BN R, BM]` of `[BN R, BM R]`."""
    if R == 1:
        out = acc
    else:
        same = (tl.arange(0, BN * R) % R)[:, None] == (tl.arange(0, BM * R) % R)[None, :]
        acc = tl.where(same, acc, tl.zeros_like(acc))
        out = tl.sum(tl.reshape(acc, [BN * R, BM, R]), axis=2)
    return out


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    total,
    bias_ptr,
    out_ptr,
    first_m,
    first_n,
    rows,
    columns,
    HAS_BIAS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Add the bias to `[BN, BM]` and store it."""
    out_m, out_n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    valid = (out_m < rows)[:, None] & (out_n < columns)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + tl.minimum(out_n, columns - 1))[:, None]
    out_at = out_ptr + (out_m.to(tl.int64) * columns)[:, None] + out_n[None, :]
    tl.store(out_at, tl.trans(total).to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["rows", "blocks"])
def float_tiles(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    scale_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    width,
    pitch,
    blocks,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    PIECES: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of outputs of float activations, as `Y^T = W X^T` with the weights from registers."""
    first_m, first_n = tile_of(rows, columns, BM, BN)
    x_at, weight_at = _operands(
        *(x_ptr, weight_ptr, first_m, first_n, rows, columns, width, pitch),
        *(BLOCK, EARLY, R, BM, BN),
    )
    left = tl.arange(0, BN * R)
    n = tl.minimum(first_n + left // R, columns - 1).to(tl.int64)
    scale_at = scale_ptr + n * blocks
    piece_stride = rows.to(tl.int64) * width
    total = tl.zeros([BN * R, BM * R], tl.float32)
    following = _scales(scale_at, factor_ptr, left % R, blocks)
    for block in range(0, blocks, R):
        scale = following  # of this step: loaded a step before, as its sums would wait for it
        following = _scales(scale_at, factor_ptr, block + R + left % R, blocks)
        acc = _products(x_at, weight_at, block, pitch, piece_stride, ASM, PIECES, BLOCK, R, BM, BN)
        total = tl.fma(acc, tl.broadcast_to(scale[:, None], [BN * R, BM * R]), total)
    total = _pairs(total, R, BM, BN)
    if R > 1:
        total = tl.sum(tl.reshape(total, [BN, R, BM]), axis=1)
    _finish(total, bias_ptr, out_ptr, first_m, first_n, rows, columns, HAS_BIAS, BM, BN)


@triton.jit(do_not_specialize=["rows", "blocks"])
def count_tiles(  # type: ignore[no-untyped-def]
    x_ptr,
    weight_ptr,
    threshold_ptr,
    scale_ptr,
    factor_ptr,
    segment_ptr,
    bias_ptr,
    out_ptr,
    rows,
    columns,
    width,
    pitch,
    blocks,
    groups,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of outputs of spiking activations, or its accumulators.

    Integers are summed over the blocks of a segment, which `segment_ptr` ends; then they are scaled and
    added in the order of the segments, as `snnllm.kernels.epilogue` does, without fused multiply-add.
    Sums stay below 2^24 (`pack.exact_in_float`), where float32 holds every integer.
    """
    first_m, first_n = tile_of(rows, columns, BM, BN)
    x_at, weight_at = _operands(
        *(x_ptr, weight_ptr, first_m, first_n, rows, columns, width, pitch),
        *(BLOCK, EARLY, R, BM, BN),
    )
    out_m, out_n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    m, n = tl.minimum(out_m, rows - 1).to(tl.int64), tl.minimum(out_n, columns - 1).to(tl.int64)
    out_at = out_ptr + (out_m.to(tl.int64) * columns)[:, None] + out_n[None, :]
    of_block = (tl.arange(0, BN * R) % R)[:, None]
    total = tl.zeros([BN, BM], tl.float32)
    for group in range(groups):
        threshold = tl.load(threshold_ptr + m * groups + group)
        start_at = x_at + group * rows.to(tl.int64) * width
        segment_at = segment_ptr + group * (width // BLOCK)
        sums = tl.zeros([BN, BM], tl.float32)  # of integers below 2^24
        for block in range(0, blocks, R):
            acc = _products(start_at, weight_at, block, pitch, 0, ASM, 1, BLOCK, R, BM, BN)
            acc = _pairs(acc, R, BM, BN)
            for r in tl.static_range(R):
                # Places beyond the last block have no digits, and end no segment.
                last = tl.minimum(block + r, blocks - 1)
                part = acc
                if R > 1:
                    part = tl.where(of_block == r, acc, 0.0)
                    part = tl.sum(tl.reshape(part, [BN, R, BM]), axis=1)
                sums += part * tl.load(factor_ptr + last)
                segment = tl.load(segment_at + block + r)
                ends = segment >= 0
                if ACCUMULATORS:
                    place = segment * rows.to(tl.int64) * columns
                    valid = (out_m < tl.where(ends, rows, 0))[:, None] & (out_n < columns)[None, :]
                    tl.store(out_at + place, tl.trans(sums.to(tl.int32)), mask=valid)
                else:
                    scale = tl.load(scale_ptr + n * blocks + last).to(tl.float32)
                    term = (threshold[None, :] * sums) * scale[:, None]
                    total = tl.where(ends, total + term, total)
                sums = tl.where(ends, 0.0, sums)
    if not ACCUMULATORS:
        _finish(total, bias_ptr, out_ptr, first_m, first_n, rows, columns, HAS_BIAS, BM, BN)
