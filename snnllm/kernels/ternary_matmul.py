"""Linears of ternary weights and float activations in Triton; the weights stay packed (`ternary_pack`).

    y[m, n] = sum_b scale[n, b] factor_b sum_{k in b} (2 d[n, k]) x[m, k]

Products are exact, as a digit is -1, 0 or 1, and run on tensor cores with float32 sums; an activation of
float32 is the sum of three of bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from snnllm.kernels.triton_dot import early


@triton.jit
def _digits(packed, PLANE: tl.constexpr, ASM: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Digits of a plane of packed bytes, times 2, as bfloat16 or float16."""
    if ASM is None:
        bits = (packed.to(tl.int16) << (14 - 2 * PLANE)) & -16384  # 0xC000
    else:
        bits = tl.inline_asm_elementwise(ASM[PLANE], "=r,=r,r", [packed], tl.int16, True, 4)
    return bits.to(dtype, bitcast=True)


@triton.jit
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


@triton.jit
def _scales(scale_at, factor_ptr, block, blocks):  # type: ignore[no-untyped-def]
    """Thresholds times factors of some blocks, 0 beyond the last."""
    known = block < blocks
    scale = tl.load(scale_at + block, mask=known, other=0.0)
    return scale.to(tl.float32) * tl.load(factor_ptr + block, mask=known, other=0.0)


@triton.jit(do_not_specialize=["rows"])
def spike_tiles(  # type: ignore[no-untyped-def]
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
    """One tile of outputs, computed as `Y^T = W X^T`, the weights from registers.

    Few activations would leave a tensor core without work and a program with one long chain of it. So R
    blocks are multiplied at once: a row of the left operand is a block of a weight row, a column of the
    right one a block of a row of activations, and of their product `[BN R, BM R]` only the pairs of
    equal blocks count.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    tile = tl.program_id(0)
    tile_m, tile_n = tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, 8)
    first_m, first_n = tile_m * BM, tile_n * BN
    left, right = tl.arange(0, BN * R), tl.arange(0, BM * R)
    # Rows beyond the end repeat the last one: nothing is masked.
    m = tl.minimum(first_m + right // R, rows - 1).to(tl.int64)
    n = tl.minimum(first_n + left // R, columns - 1).to(tl.int64)
    SPAN: tl.constexpr = BLOCK // 4
    byte = tl.arange(0, SPAN)
    x_at = x_ptr + (m * width + right % R * BLOCK)[None, :] + byte[:, None]
    weight_at = weight_ptr + (n * pitch)[:, None] + (left % R * SPAN)[:, None] + byte[None, :]
    scale_at = scale_ptr + n * blocks
    if EARLY:
        early(weight_ptr + first_n.to(tl.int64) * pitch, min(BN, columns - first_n) * pitch)
    total = tl.zeros([BN * R, BM * R], tl.float32)
    following = _scales(scale_at, factor_ptr, left % R, blocks)
    for block in range(0, blocks, R):
        scale = following  # of this step: loaded a step before, as its sums would wait for it
        following = _scales(scale_at, factor_ptr, block + R + left % R, blocks)
        if R == 1:
            packed = tl.load(weight_at + block * SPAN)
        else:
            inside = (left % R)[:, None] * SPAN + byte[None, :] < pitch - block * SPAN
            packed = tl.load(weight_at + block * SPAN, mask=inside, other=0)
        acc = tl.zeros([BN * R, BM * R], tl.float32)
        for piece in tl.static_range(PIECES):
            for plane in tl.static_range(4):
                at = piece * rows.to(tl.int64) * width + (block * BLOCK + plane * SPAN)
                digits, x = _digits(packed, plane, ASM, x_ptr.dtype.element_ty), tl.load(x_at + at)
                if ASM is None:  # the interpreter cannot multiply bfloat16
                    digits, x = digits.to(tl.float32), x.to(tl.float32)
                acc = tl.dot(digits, x, acc)
        total = tl.fma(acc, tl.broadcast_to(scale[:, None], [BN * R, BM * R]), total)
    if R > 1:
        same = (left % R)[:, None] == (right % R)[None, :]
        total = tl.where(same, total, 0.0)
        total = tl.sum(tl.reshape(total, [BN * R, BM, R]), axis=2)
        total = tl.sum(tl.reshape(total, [BN, R, BM]), axis=1)
    out_m, out_n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    valid = (out_m < rows)[:, None] & (out_n < columns)[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + tl.minimum(out_n, columns - 1))[:, None]
    out_at = out_ptr + (out_m.to(tl.int64) * columns)[:, None] + out_n[None, :]
    tl.store(out_at, tl.trans(total).to(out_ptr.dtype.element_ty), mask=valid)
