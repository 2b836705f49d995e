"""Bit packing of weight codes: `bits` per weight on disk and in memory, for every width from 1 to 8."""

from __future__ import annotations

import torch
from torch import Tensor


def packed_width(channels: int, bits: int) -> int:
    """Bytes of one packed row of `channels` codes."""
    return (channels * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes into a little-endian bit stream, row by row.

    Args:
        codes: uint8 `[N, K]`, values in `0..2**bits-1`.
        bits: Width of a code, 1..8.

    Returns:
        uint8 `[N, ceil(K*bits/8)]`; bit `i` of the stream is bit `i % 8` of byte `i // 8`. With four
        bits this is the usual order: the even code in the low nibble.
    """
    rows, channels = codes.shape
    if bits == 8:
        return codes.clone()
    shifts = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = ((codes.unsqueeze(-1) >> shifts) & 1).reshape(rows, channels * bits)
    padded = torch.nn.functional.pad(
        stream, (0, packed_width(channels, bits) * 8 - channels * bits)
    )
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (padded.view(rows, -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, channels: int, bits: int) -> Tensor:
    """Inverse of `pack`.

    Args:
        packed: uint8 `[N, ceil(K*bits/8)]`.
        channels: K.
        bits: Width of a code, 1..8.

    Returns:
        uint8 `[N, K]`.

    Raises:
        ValueError: The row has another number of bytes than K codes need.
    """
    rows, width = packed.shape
    if width != packed_width(channels, bits):
        raise ValueError(
            f"{channels} codes of {bits} bits take {packed_width(channels, bits)} bytes a row, "
            f"got {width}."
        )
    if bits == 8:
        return packed.clone()
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).reshape(rows, width * 8)[:, : channels * bits]
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.reshape(rows, channels, bits) * weights).sum(-1, dtype=torch.uint8)
