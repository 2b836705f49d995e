"""What the attention kernels in Triton share: masks, block by block, and a product of floats."""

from __future__ import annotations

import triton
import triton.language as tl

from neurons.backends.device import interpreted

HIDDEN = tl.constexpr(0)
PARTIAL = tl.constexpr(1)
WHOLE = tl.constexpr(2)
# Triton's interpreter multiplies the bits of bfloat16 numbers.
_WIDENS = tl.constexpr(interpreted())


@triton.jit
def float_product(a, b, acc, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """`a b + acc` in float32."""
    if _WIDENS:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def masked_scores(score, mask_at, inside, lowest, BOOL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores with a mask; minus infinity where it hides, as at places that are not inside."""
    if BOOL:
        seen = tl.load(mask_at, mask=inside, other=0) != 0
        return tl.where(seen, score, float("-inf"))
    bias = tl.load(mask_at, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(bias > lowest, score + bias, float("-inf"))


@triton.jit
def shows(mask_at, inside, lowest, BOOL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where a mask lets keys through, and where it does so without a bias."""
    if BOOL:
        seen = tl.load(mask_at, mask=inside, other=0) != 0
        return seen, seen
    bias = tl.load(mask_at, mask=inside, other=float("-inf")).to(tl.float32)
    return bias > lowest, bias == 0.0


@triton.jit(do_not_specialize=["queries"])
def classify(  # type: ignore[no-untyped-def]
    mask_ptr,
    kind_ptr,
    batch_stride,
    query_stride,
    key_stride,
    queries,
    keys,
    lowest,
    BOOL: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Kind of every tile of queries and block of keys, int8 `[B, tiles, blocks]`.

    HIDDEN: no query of the tile sees a key of the block. WHOLE: all see all of them, without a bias.
    """
    block, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = tile * BM + tl.arange(0, BM)
    n = block * BN + tl.arange(0, BN)
    at = mask_ptr + batch.to(tl.int64) * batch_stride + (m.to(tl.int64) * query_stride)[:, None]
    inside = (m < queries)[:, None] & (n < keys)[None, :]
    seen, plain = shows(at + (n * key_stride)[None, :], inside, lowest, BOOL)
    whole = plain | (m >= queries)[:, None]
    kind = tl.where(
        tl.min(tl.min(whole.to(tl.int32), 1), 0) == 1,
        WHOLE,
        tl.max(tl.max(seen.to(tl.int32), 1), 0),
    )
    at = (batch * tl.num_programs(1) + tile).to(tl.int64) * tl.num_programs(0) + block
    tl.store(kind_ptr + at, kind.to(tl.int8))
