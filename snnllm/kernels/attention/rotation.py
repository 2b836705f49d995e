"""The rotation of Q and K in Triton: the bits of :class:`snnllm.head_rotation.HeadRotation`.

Lanes gather four neighbours of the new order each, from one word of the order and four loads that stay
within the row, and mix them. Then the fours change places with the rows: a thread holds every fourth
channel of a row, and all longer butterflies run in its registers. Which blocks a butterfly belongs to is
known when the kernel is compiled, and costs no instruction.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import interpreted, on
from neurons.backends.operator import operator

__all__ = ["fuses", "mixed_halves", "mixing_of", "place_of", "rotate_operand", "rotated_halves"]

_MANY_ROWS = 1024
_VALUES = 1024  # that a warp holds in registers


@lru_cache(maxsize=256)
def mixing_of(blocks: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What kernels need to know of Hadamard blocks in descending sizes.

    Args:
        blocks: As :func:`snnllm.head_rotation.fits_kernel` wants them.

    Returns:
        For h = 1, 2, 4, .. how many channels, from the first on, are in blocks longer than h; and
        first channel and size of every block, one after the other.
    """
    lanes = triton.next_power_of_2(sum(blocks))
    mixed = []
    for stage in range(lanes.bit_length() - 1):
        many = sum(p for p in blocks if p > 1 << stage)
        mixed.append(lanes if many == sum(blocks) else many)  # lanes of no channel are zeros
    starts, first = [], 0
    for p in blocks:
        starts += [first, p]
        first += p
    return tuple(mixed), tuple(starts)


def fuses(blocks: Sequence[int]) -> bool:
    """Whether :func:`rotated_halves` gives the two halves of a row: D is a power of two."""
    channels = sum(blocks)
    return channels & (channels - 1) == 0


@triton.jit
def _quarter(x_at, order, NUMBER: tl.constexpr, inside):  # type: ignore[no-untyped-def]
    """The channels in one byte of each word of the order, float32."""
    at = (order >> (8 * NUMBER)) & 255
    return tl.load(x_at + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _pair(a, b, own, MIXED: tl.constexpr, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum and difference, where `own` says so unless MIXED of ALL pairs are mixed or none."""
    if MIXED == 0:
        x, y = a, b
    elif MIXED < ALL:
        x, y = tl.where(own, a + b, a), tl.where(own, a - b, b)
    else:
        x, y = a + b, a - b
    return x, y


@triton.jit
def _neighbours(x, L: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first and the second of every pair along the axis of L fours, `[L / 2, R * 4]`."""
    return tl.split(tl.permute(tl.reshape(x, [L // 2, 2, 4 * R]), (0, 2, 1)))


@triton.jit
def _scaled(  # type: ignore[no-untyped-def]
    x, FIRST: tl.constexpr, BLOCKS: tl.constexpr, L: tl.constexpr, N: tl.constexpr
):
    """`[L, N]`, rows are fours of channels from FIRST on, times `p^(-1/2)` of their blocks."""
    channel = FIRST + 4 * tl.arange(0, L)[:, None]
    if BLOCKS[len(BLOCKS) - 1] < 4:  # else a four is in one block
        channel += tl.arange(0, N)[None, :] % 4
    root = tl.zeros_like(channel).to(tl.float32) + BLOCKS[1] ** -0.5
    for block in tl.static_range(1, len(BLOCKS) // 2):
        root = tl.where(channel >= BLOCKS[2 * block], BLOCKS[2 * block + 1] ** -0.5, root)
    return x * root


@triton.jit
def _as_rows(x, L: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """`[L, R * 4]`, fours in front, to rows of neighbours `[R, L * 4]`."""
    x = tl.permute(tl.reshape(x, [L, R, 2, 2]), (1, 0, 2, 3))
    return tl.reshape(x, [R, 4 * L])


@triton.jit
def rotated_halves(  # type: ignore[no-untyped-def]
    x_at,
    order_at,
    inside,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    R: tl.constexpr,
):
    """Gather rows and rotate them: float32 `[R, LANES / 2]` twice, the lower channels and the upper.

    Operands:
        x_at: pointers to rows of D channels, `[R, 1]`.
        order_at: pointers to the words of their order (int32, a byte a channel), likewise.
        inside: rows that are there, bool likewise.
        MIXED: with BLOCKS, of `mixing_of`.
        LANES: the power of two from D on, 8 or more.
    """
    L: tl.constexpr = LANES // 4
    i = tl.arange(0, L)[None, :]
    inside = inside & (i < D // 4)
    order = tl.load(order_at + i, mask=inside, other=0)
    a = _quarter(x_at, order, 0, inside)
    b = _quarter(x_at, order, 1, inside)
    c = _quarter(x_at, order, 2, inside)
    d = _quarter(x_at, order, 3, inside)
    return mixed_halves(a, b, c, d, MIXED, BLOCKS, LANES, R)


@triton.jit
def mixed_halves(  # type: ignore[no-untyped-def]
    a, b, c, d, MIXED: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, R: tl.constexpr
):
    """:func:`rotated_halves` of rows that are gathered: the channels of each four, float32 `[R, LANES / 4]`."""
    L: tl.constexpr = LANES // 4
    i = tl.arange(0, L)[None, :]
    a, b = _pair(a, b, 4 * i < MIXED[0], MIXED[0], LANES)
    c, d = _pair(c, d, 4 * i + 2 < MIXED[0], MIXED[0], LANES)
    a, c = _pair(a, c, 4 * i < MIXED[1], MIXED[1], LANES)
    b, d = _pair(b, d, 4 * i < MIXED[1], MIXED[1], LANES)
    # From [R, L, 2, 2] on, the last axes are the channels of a four.
    x = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (1, 0, 2, 3))
    low, high = _neighbours(x, L, R)
    pair = tl.arange(0, L // 2)
    for stage in tl.static_range(len(MIXED) - 2):
        if stage > 0:
            # The number in the pair comes in front: after the last pass the fours are in order again.
            low, high = _neighbours(tl.permute(tl.join(low, high), (2, 0, 1)), L, R)
        own = (pair % (L >> (stage + 1)) * (8 << stage) < MIXED[stage + 2])[:, None]
        low, high = _pair(low, high, own, MIXED[stage + 2], LANES)
    low = _scaled(low, 0, BLOCKS, L // 2, 4 * R)
    high = _scaled(high, LANES // 2, BLOCKS, L // 2, 4 * R)
    return _as_rows(low, L // 2, R), _as_rows(high, L // 2, R)


@triton.jit
def place_of(row, heads, tokens, batch_stride, head_stride, token_stride):  # type: ignore[no-untyped-def]
    """Head of rows of an operand `[B, H, S, D]`, counted as if it were contiguous, and where they lie."""
    pair = row // tokens
    head, batch = pair % heads, (pair // heads).to(tl.int64)
    at = batch * batch_stride + head.to(tl.int64) * head_stride
    return head, at + (row % tokens).to(tl.int64) * token_stride


@triton.jit(do_not_specialize=["rows", "tokens"])
def _rotate(  # type: ignore[no-untyped-def]
    x_ptr,
    order_ptr,
    out_ptr,
    batch_stride,
    head_stride,
    token_stride,
    rows,
    heads,
    share,
    tokens,
    MIXED: tl.constexpr,
    BLOCKS: tl.constexpr,
    D: tl.constexpr,
    LANES: tl.constexpr,
    R: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    inside = (row < rows)[:, None]
    head, x_at = place_of(row, heads, tokens, batch_stride, head_stride, token_stride)
    order_at = order_ptr + (head // share * (D // 4))[:, None]
    low, high = rotated_halves(
        *(x_ptr + x_at[:, None], order_at, inside, MIXED, BLOCKS, D, LANES, R)
    )
    j = tl.arange(0, LANES // 2)[None, :]
    out_at = out_ptr + row.to(tl.int64)[:, None] * D + j
    tl.store(out_at, low, mask=inside)
    tl.store(out_at + LANES // 2, high, mask=inside & (j < D - LANES // 2))


def rotate_operand(x: Tensor, order: Tensor, blocks: Sequence[int]) -> Tensor:
    """Rotate Q or K behind RoPE. Carries no gradient.

    Args:
        x: float32, bfloat16 or float16 ``[B, H, S, D]``, stride 1 along D.
        order: original channel of every new position, uint8 ``[H_kv, D]``, contiguous, not checked.
        blocks: sizes of the Hadamard blocks, D channels together, as
            :func:`snnllm.head_rotation.fits_kernel` wants them.

    Returns:
        float32 ``[B, H, S, D]``, contiguous.
    """
    rotated: Tensor = _rotate_operand_op(x.detach(), order, list(blocks))
    return rotated


@operator("snnllm::rotate_operand")
def _rotate_operand_op(x: Tensor, order: Tensor, blocks: list[int]) -> Tensor:
    """Arguments of :func:`rotate_operand`."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    _, heads, tokens, channels = x.shape
    rows, lanes = out[..., 0].numel(), triton.next_power_of_2(channels)
    if rows == 0:
        return out
    mixed, starts = mixing_of(tuple(blocks))
    many = rows >= _MANY_ROWS and not interpreted()
    per_program = max(1, _VALUES // lanes) if many else 2
    launch: Any = _rotate[(triton.cdiv(rows, per_program),)]
    with on(x.device):
        launch(
            *(x, order.view(torch.int32), out, *x.stride()[:3]),
            *(rows, heads, heads // len(order), tokens),
            MIXED=mixed,
            BLOCKS=starts,
            D=channels,
            LANES=lanes,
            R=per_program,
            num_warps=1,
            enable_fp_fusion=False,
        )
    return out


@_rotate_operand_op.register_fake
def _(x: Tensor, order: Tensor, blocks: list[int]) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)
