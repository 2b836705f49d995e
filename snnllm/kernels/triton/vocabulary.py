"""Token embedding and output head in 8 bits (`snnllm.vocabulary`) in Triton, as operators of torch.

For few rows the head is limited by the memory of the codes: each is read once, a program has 64 tokens and all of
their channels. Codes become the dtype of x, which is exact, and are the left operand of `logits^T = codes x^T`; a
program sums in float32, block after block of channels.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import on
from neurons.backends.operator import operator
from snnllm.kernels.triton.linear import tile_of

_EMBEDDED = 1024
"""Channels of a program."""


class Tiles(NamedTuple):
    """How the head is cut.

    Attributes:
        rows: Of hidden states.
        tokens: Of the table.
        channels: Of a step.
        warps: Of a program.
        stages: Steps under way.
    """

    rows: int
    tokens: int
    channels: int
    warps: int
    stages: int


_ONE_ROW = Tiles(16, 128, 128, 2, 6)  # measured on an H200
_ONE_ROW_BYTES = _ONE_ROW.stages * _ONE_ROW.channels * (_ONE_ROW.tokens + 2 * _ONE_ROW.rows)


def choose_tiles(rows: int, channels: int, dtype: torch.dtype, shared: int) -> Tiles:
    """Tiles for M rows of H channels.

    Two warps multiply by mma.sync: tiles of more warps, whose products are asynchronous (wgmma) in Triton 3.6, made
    wrong bfloat16 logits on an H200.

    Args:
        rows: M.
        channels: H.
        dtype: Of the rows.
        shared: Bytes of shared memory that a program may have.
    """
    if dtype == torch.float32:  # no tensor cores
        return Tiles(16, 64, 64, 4, 3) if rows <= 16 else Tiles(32, 64, 32, 4, 3)
    if channels % 128:
        return Tiles(16, 64, 64, 2, 4)
    return _ONE_ROW if rows == 1 and shared >= _ONE_ROW_BYTES else Tiles(16, 64, 128, 2, 4)


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(
        getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 0)
    )


@operator("snnllm::embed")
def embed(ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a table.

    Args:
        ids: Tokens, integers `[...]`, contiguous; the rows of what is no token are NaN.
        codes: int8 `[V, H]`, contiguous.
        scale: float32 `[V]`.
        dtype: Of the result.

    Returns:
        `[..., H]`.
    """
    out = _rows(ids, codes, dtype)
    (tokens, channels), blocks = codes.shape, triton.cdiv(codes.shape[1], _EMBEDDED)
    kernel: Any = _embed[(ids.numel(), blocks)]
    with on(ids.device):
        kernel(ids, codes, scale, out, tokens, channels, BLOCK=_EMBEDDED, num_warps=4)
    return out


@embed.register_fake
def _(ids: Tensor, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _rows(ids, codes, dtype)


def _rows(ids: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.new_empty((*ids.shape, codes.shape[1]), dtype=dtype)


@operator("snnllm::head_logits")
def head_logits(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """The logits `(x codes^T) scale`, rounded to the dtype of x.

    Args:
        x: float32, bfloat16 or float16 `[M, H]`, contiguous.
        codes: int8 `[V, H]`, contiguous.
        scale: float32 `[V]`.

    Returns:
        `[M, V]`.
    """
    (rows, channels), tokens = x.shape, len(codes)
    out = x.new_empty((rows, tokens))
    tiles = choose_tiles(rows, channels, x.dtype, _shared_memory(x.device))
    kernel: Any = _head[(triton.cdiv(rows, tiles.rows) * triton.cdiv(tokens, tiles.tokens),)]
    with on(x.device):
        kernel(
            *(x, codes, scale, out, rows, tokens, channels),
            WHOLE=channels % tiles.channels == 0,
            BM=tiles.rows,
            BN=tiles.tokens,
            BK=tiles.channels,
            num_warps=tiles.warps,
            num_stages=tiles.stages,
        )
    return out


@head_logits.register_fake
def _(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], codes.shape[0]))


@triton.jit
def _embed(  # type: ignore[no-untyped-def]
    id_ptr, code_ptr, scale_ptr, out_ptr, tokens, channels, BLOCK: tl.constexpr
):
    """A block of channels of one row."""
    row, channel = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(id_ptr + row).to(tl.int64)
    known, inside = (token >= 0) & (token < tokens), channel < channels
    token = tl.where(known, token, 0)
    codes = tl.load(code_ptr + token * channels + channel, mask=inside, other=0)
    scale = tl.where(known, tl.load(scale_ptr + token), float("nan"))
    y = (codes.to(tl.float32) * scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * channels + channel, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _head(  # type: ignore[no-untyped-def]
    x_ptr,
    code_ptr,
    scale_ptr,
    out_ptr,
    rows,
    tokens,
    channels,
    WHOLE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """One tile of logits; WHOLE: BK divides the channels."""
    first_m, first_n = tile_of(rows, tokens, BM, BN)
    out_m, out_n = first_m + tl.arange(0, BM), first_n + tl.arange(0, BN)
    # What is beyond the end repeats the last row: loads without masks are wide and asynchronous.
    m, n = tl.minimum(out_m, rows - 1).to(tl.int64), tl.minimum(out_n, tokens - 1).to(tl.int64)
    channel = tl.arange(0, BK)
    code_at = code_ptr + (n * channels)[:, None] + channel[None, :]
    x_at = x_ptr + (m * channels)[None, :] + channel[:, None]
    total = tl.zeros([BN, BM], tl.float32)
    for k in range(0, channels, BK):
        if WHOLE:
            codes, x = tl.load(code_at + k), tl.load(x_at + k)
        else:
            inside = channel < channels - k
            codes = tl.load(code_at + k, mask=inside[None, :], other=0)
            x = tl.load(x_at + k, mask=inside[:, None], other=0.0)
        total = tl.dot(codes.to(x.dtype), x, total, input_precision="ieee")
    y = tl.trans(total * tl.load(scale_ptr + n)[:, None]).to(out_ptr.dtype.element_ty)
    at = (out_m.to(tl.int64) * tokens)[:, None] + out_n[None, :]
    tl.store(out_ptr + at, y, mask=(out_m < rows)[:, None] & (out_n < tokens)[None, :])
