"""Collapsed integer linear in Triton: integer products on tensor cores or by dp4a, scaling included.

Weights stay packed in memory and are unpacked in registers, as the left operand of the product
`Y^T = W C^T`. The K axis is cut into blocks of 128 positions; a block of W-bit codes is stored in
`128 W / 8` bytes, byte j holding the positions j, j + 128 W / 8, j + 2 * 128 W / 8, ... from its low
bits on, so that every plane of bits is a contiguous run of positions. Every segment is padded to whole
blocks with codes 0.

The integers are exact in any order of summation. With unsigned codes `u = level + 2^(W-1)` and zero
points shifted alike,

    A = sum_k (q - z)(u - zu) = sum_k q u - z (sum_k u - zu K) - zu sum_k q

Merged segments have one sum of integers, which is scaled once. Scaling follows
`snnllm.kernels.epilogue` operation by operation (no fused multiply-add), so the outputs are those of
the reference backend, bit for bit.
"""

import triton
import triton.language as tl

from snnllm.kernels.triton.dot import early

BLOCK = 128
"""Positions of a block of packed weights; segments are padded to it."""
WORDS = ("start", "stop", "group", "weight_group")
"""Columns of the segment table, in positions of the padded K axis."""


@triton.jit
def _plane(packed, PLANE: tl.constexpr, BITS: tl.constexpr, UNPACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of one plane of bits of packed bytes, as int8."""
    if UNPACK is None:
        return ((packed >> (PLANE * BITS)) & ((1 << BITS) - 1)).to(tl.int8)
    # Four bytes in a register: Triton would unpack int8 tensors one by one.
    return tl.inline_asm_elementwise(UNPACK[PLANE], "=r,r", [packed], tl.int8, True, 4)


@triton.jit
def _rows_of(  # type: ignore[no-untyped-def]
    s, m, group, threshold_ptr, zero_point_ptr, count_sum_ptr, groups, segments
):
    """Threshold, zero point and sum of counts of some rows, [BM] each.

    They are loaded as one table. A vector of fewer elements than threads the compiler would load again
    in the layout of the accumulators, where a thread holds many columns: dozens of loads, each waiting
    for memory.
    """
    column = tl.arange(0, 4)[None, :]
    of_group, of_segment = (m * groups + group)[:, None], (m * segments + s)[:, None]
    address = tl.where(column == 0, threshold_ptr.to(tl.int64) + 4 * of_group, 0)
    address = tl.where(column == 1, zero_point_ptr.to(tl.int64) + 4 * of_group, address)
    address = tl.where(column >= 2, count_sum_ptr.to(tl.int64) + 4 * of_segment, address)
    table = tl.load(address.to(tl.pointer_type(tl.int32)))
    threshold = tl.sum(tl.where(column == 0, table, 0), axis=1).to(tl.float32, bitcast=True)
    zero_point = tl.sum(tl.where(column == 1, table, 0), axis=1)
    return threshold, zero_point, tl.sum(tl.where(column == 2, table, 0), axis=1)


@triton.jit
def _block_product(  # type: ignore[no-untyped-def]
    acc, count_at, weight_at, k, BITS: tl.constexpr, UNPACK: tl.constexpr
):
    """Add the products of the 128 positions from k on to acc [BN, BM]."""
    BYTES: tl.constexpr = 16 * BITS
    if BITS == 8:
        for half in tl.static_range(2):
            w = tl.load(weight_at + (k + half * 64)).to(tl.int8, bitcast=True)
            c = tl.load(count_at + (k + half * 64))
            acc = tl.dot(w, c, acc, out_dtype=tl.int32)
    else:
        packed = tl.load(weight_at + k // (8 // BITS))
        for plane in tl.static_range(8 // BITS):
            c = tl.load(count_at + (k + plane * BYTES))
            w = _plane(packed, plane, BITS, UNPACK)
            acc = tl.dot(w, c, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def _segment(  # type: ignore[no-untyped-def]
    s,
    m,
    n,
    count_at,
    weight_at,
    threshold_ptr,
    zero_point_ptr,
    count_sum_ptr,
    segment_ptr,
    scale_ptr,
    weight_zero_ptr,
    row_sum_ptr,
    shift_ptr,
    groups,
    weight_groups,
    segments,
    BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALED: tl.constexpr,
    UNPACK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Centred accumulators A of segment s, int32 [BN, BM]; with SCALED `(s A) sw`, float32."""
    start = tl.multiple_of(tl.load(segment_ptr + 4 * s), 128)
    stop = tl.multiple_of(tl.load(segment_ptr + 4 * s + 1), 128)
    acc = tl.zeros([BN, BM], tl.int32)
    for k in range(start, stop, 128):
        acc = _block_product(acc, count_at, weight_at, tl.multiple_of(k, 128), BITS, UNPACK)
    group, weight_group = tl.load(segment_ptr + 4 * s + 2), tl.load(segment_ptr + 4 * s + 3)
    threshold, z, q = _rows_of(
        s, m, group, threshold_ptr, zero_point_ptr, count_sum_ptr, groups, segments
    )
    r = tl.load(row_sum_ptr + n * segments + s)
    zu = tl.load(weight_zero_ptr + n * weight_groups + weight_group)
    acc = acc - z[None, :] * r[:, None] - zu[:, None] * q[None, :]
    if SHIFT:
        acc += tl.load(shift_ptr + n * segments + s)[:, None]
    if SCALED:
        scale = tl.load(scale_ptr + n * weight_groups + weight_group)
        out = (threshold[None, :] * acc.to(tl.float32)) * scale[:, None]
    else:
        out = acc
    return out


@triton.jit
def tile_of(rows, columns, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """First row and column of this program's tile.

    Rasters of 8 tiles along the rows: what is in flight at a time shares operands in the L2 cache.
    """
    tiles_m, tiles_n = tl.cdiv(rows, BM), tl.cdiv(columns, BN)
    tile = tl.program_id(0)
    first = tile // (8 * tiles_n) * 8
    height = min(tiles_m - first, 8)
    tile_m, tile_n = first + tile % (8 * tiles_n) % height, tile % (8 * tiles_n) // height
    return tile_m * BM, tile_n * BN


@triton.jit(do_not_specialize=["rows"])
def matmul(  # type: ignore[no-untyped-def]
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
    UNPACK: tl.constexpr,
    EARLY: tl.constexpr,
    UNROLL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """One tile of outputs, on tensor cores; arguments as `operators.encoded_linear` describes them."""
    first_m, first_n = tile_of(rows, columns, BM, BN)
    out_m, out_n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    # Transposed, neighbours in memory are neighbours in the tile.
    at = (out_m.to(tl.int64) * columns)[:, None] + out_n[None, :]
    out_at = out_ptr + at
    inside = (out_m < rows)[:, None] & (out_n < columns)[None, :]
    # Rows beyond the end repeat the last one: loads without masks are wide and asynchronous.
    m, n = tl.minimum(out_m, rows - 1).to(tl.int64), tl.minimum(out_n, columns - 1).to(tl.int64)
    KB: tl.constexpr = 64 if BITS == 8 else 16 * BITS
    byte = tl.arange(0, KB)
    count_at = count_ptr + (m * width)[None, :] + byte[:, None]
    pitch = tl.multiple_of(width // (8 // BITS), 16)
    weight_at = weight_ptr + (n * pitch)[:, None] + byte[None, :]
    if EARLY:
        early(weight_ptr + first_n.to(tl.int64) * pitch, min(BN, columns - first_n) * pitch)
    SCALED: tl.constexpr = not (ACCUMULATORS or MERGED)
    total = tl.zeros([BN, BM], tl.int32 if MERGED else tl.float32)
    if UNROLL > 0 and not ACCUMULATORS:
        # Few segments: their sum takes no registers while the first one is multiplied.
        for s in tl.static_range(UNROLL):
            part = _segment(
                *(s, m, n, count_at, weight_at, threshold_ptr, zero_point_ptr, count_sum_ptr),
                *(segment_ptr, scale_ptr, weight_zero_ptr, row_sum_ptr, shift_ptr, groups),
                *(weight_groups, segments, BITS, SHIFT, SCALED, UNPACK, BM, BN),
            )
            total = part if s == 0 else total + part
    else:
        for s in range(segments):
            part = _segment(
                *(s, m, n, count_at, weight_at, threshold_ptr, zero_point_ptr, count_sum_ptr),
                *(segment_ptr, scale_ptr, weight_zero_ptr, row_sum_ptr, shift_ptr, groups),
                *(weight_groups, segments, BITS, SHIFT, SCALED, UNPACK, BM, BN),
            )
            if ACCUMULATORS:
                tl.store(out_at + s * rows.to(tl.int64) * columns, tl.trans(part), mask=inside)
            else:
                total += part
    if not ACCUMULATORS:
        if MERGED:
            threshold, _, _ = _rows_of(
                0, m, 0, threshold_ptr, zero_point_ptr, count_sum_ptr, groups, segments
            )
            scale = tl.load(scale_ptr + n)
            total = (threshold[None, :] * total.to(tl.float32)) * scale[:, None]
        if HAS_BIAS:
            total += tl.load(bias_ptr + n)[:, None]
        y = tl.trans(total).to(out_ptr.dtype.element_ty)
        if HAS_RESIDUAL:  # as torch adds: the output is rounded first
            residual = tl.load(residual_ptr + at, mask=inside)
            y = (y.to(tl.float32) + residual.to(tl.float32)).to(y.dtype)
        tl.store(out_at, y, mask=inside)
