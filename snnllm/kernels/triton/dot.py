"""Collapsed linear of few rows in Triton: limited by the memory of the weights, the products by dp4a.

The layout of the weights and the algebra are those of `snnllm.kernels.triton.linear`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def early(weight_at, nbytes):  # type: ignore[no-untyped-def]
    """Start as soon as the encoder runs: bring weights to the L2 cache, then wait for its results.

    Needs compute capability 9.0. One thread asks for `nbytes` (a multiple of 16) from `weight_at` on.
    """
    tl.inline_asm_elementwise(
        """{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }""",
        "=r,l,r",
        [weight_at.to(tl.int64), nbytes],
        tl.int32,
        False,
        1,
    )
    tl.extra.cuda.gdc_wait()


@triton.jit
def _dp4a(acc, codes, counts, SIGNED: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Acc + the products of four codes and four signed counts in int32 words."""
    if ASM:
        if SIGNED:
            return tl.inline_asm_elementwise(
                "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, counts, acc], tl.int32, True, 1
            )
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;", "=r,r,r,r", [codes, counts, acc], tl.int32, True, 1
        )
    for byte in tl.static_range(4):
        code = (codes << (24 - 8 * byte)) >> 24 if SIGNED else (codes >> (8 * byte)) & 255
        acc += code * ((counts << (24 - 8 * byte)) >> 24)
    return acc


@triton.jit(do_not_specialize=["rows"])
def dot_product(  # type: ignore[no-untyped-def]
    count_ptr,
    weight_ptr,
    threshold_ptr,
    zero_point_ptr,
    count_sum_ptr,
    segment_ptr,
    scale_ptr,
    weight_zero_ptr,
    row_sum_ptr,
    shift_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    rows,
    columns,
    width,
    groups,
    weight_groups,
    segments,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACCUMULATORS: tl.constexpr,
    MERGED: tl.constexpr,
    ASM: tl.constexpr,
    EARLY: tl.constexpr,
    BN: tl.constexpr,
    KW: tl.constexpr,
):
    """One row of counts: memory-bound, the products on the integer units (dp4a), BN outputs."""
    m = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = n < columns
    n = tl.minimum(n, columns - 1).to(tl.int64)
    WORDS: tl.constexpr = 4 * BITS  # of a block of weights; one of counts has 32
    PLANES: tl.constexpr = 8 // BITS
    MASK: tl.constexpr = 0x0F0F0F0F if BITS == 4 else 0x03030303
    word = tl.arange(0, KW)
    # A word of weights meets PLANES words of counts, WORDS apart.
    count_at = count_ptr + m * (width // 4) + word // WORDS * 32 + word % WORDS
    pitch = tl.multiple_of(width // (4 * PLANES), 4)
    weight_at = weight_ptr + (n * pitch)[:, None] + word[None, :]
    if EARLY:
        first_n = (tl.program_id(0) * BN).to(tl.int64)
        words = min(BN, columns - tl.program_id(0) * BN) * pitch
        early(weight_ptr + first_n * pitch, words * 4)
    if HAS_RESIDUAL:  # under way while the weights come
        residual = tl.load(residual_ptr + m * columns + n)
    total = tl.zeros([BN], tl.int32 if MERGED else tl.float32)
    for s in range(segments):
        start = tl.multiple_of(tl.load(segment_ptr + 4 * s), 128)
        stop = tl.multiple_of(tl.load(segment_ptr + 4 * s + 1), 128)
        group, weight_group = tl.load(segment_ptr + 4 * s + 2), tl.load(segment_ptr + 4 * s + 3)
        acc = tl.zeros([BN, KW], tl.int32)
        last = stop // 128 * WORDS
        for w in range(start // 128 * WORDS, last, KW):
            within = word < last - w
            packed = tl.load(weight_at + w, mask=within[None, :], other=0)
            for plane in tl.static_range(PLANES):
                counts = tl.load(count_at + (w // WORDS * 32 + plane * WORDS), mask=within, other=0)
                counts = tl.broadcast_to(counts[None, :], [BN, KW])
                codes = packed if BITS == 8 else (packed >> (plane * BITS)) & MASK
                acc = _dp4a(acc, codes, counts, BITS == 8, ASM)
        sums = tl.sum(acc, axis=1)
        z = tl.load(zero_point_ptr + m * groups + group)
        q = tl.load(count_sum_ptr + m * segments + s)
        r = tl.load(row_sum_ptr + n * segments + s)
        zu = tl.load(weight_zero_ptr + n * weight_groups + weight_group)
        sums = sums - z * r - zu * q
        if SHIFT:
            sums += tl.load(shift_ptr + n * segments + s)
        if ACCUMULATORS:
            at = (s * rows.to(tl.int64) + m) * columns + n
            tl.store(out_ptr + at, sums, mask=inside)
        elif MERGED:
            total += sums
        else:
            threshold = tl.load(threshold_ptr + m * groups + group)
            scale = tl.load(scale_ptr + n * weight_groups + weight_group)
            total += (threshold * sums.to(tl.float32)) * scale
    if not ACCUMULATORS:
        if MERGED:
            threshold, scale = tl.load(threshold_ptr + m * groups), tl.load(scale_ptr + n)
            total = (threshold * total.to(tl.float32)) * scale
        if HAS_BIAS:
            total += tl.load(bias_ptr + n)
        y = total.to(out_ptr.dtype.element_ty)
        if HAS_RESIDUAL:  # as torch adds: the output is rounded first
            y = (y.to(tl.float32) + residual.to(tl.float32)).to(y.dtype)
        tl.store(out_ptr + m * columns + n, y, mask=inside)
