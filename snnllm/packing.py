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
    if 8 % bits == 0:  # whole codes in a byte
        places = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        codes = (packed.unsqueeze(-1) >> places) & ((1 << bits) - 1)
        return codes.flatten(1)[:, :channels].contiguous()
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).reshape(rows, width * 8)[:, : channels * bits]
    weights = 1 << torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.reshape(rows, channels, bits) * weights).sum(-1, dtype=torch.uint8)


def digit_word(base: int) -> tuple[int, int]:
    """Bytes of a word and digits of `base` in it: the fewest bits a digit, 5 trits in a byte.

    Args:
        base: 2..255.
    """
    words = [(size, _digits(base, size)) for size in (1, 4)]
    return min(words, key=lambda word: word[0] / word[1])


def _digits(base: int, size: int) -> int:
    count = 0
    while base ** (count + 1) <= 256**size:
        count += 1
    return count


def digits_width(columns: int, base: int) -> int:
    """Bytes of one packed row of `columns` digits."""
    size, digits = digit_word(base)
    return -(-columns // digits) * size


def pack_digits(values: Tensor, base: int) -> Tensor:
    """Pack digits of any base into little-endian words, row by row.

    Args:
        values: Integers `[N, K]` in `0..base-1`.
        base: 2..255; 3 packs five digits into a byte (1.6 bits each).

    Returns:
        uint8 `[N, digits_width(K, base)]`.
    """
    size, digits = digit_word(base)
    rows, columns = values.shape
    padded = torch.nn.functional.pad(values.to(torch.int64), (0, -columns % digits))
    weights = base ** torch.arange(digits, device=values.device)
    words = (padded.view(rows, padded.shape[1] // digits, digits) * weights).sum(-1)
    shifts = 8 * torch.arange(size, device=values.device)
    return ((words.unsqueeze(-1) >> shifts) & 255).to(torch.uint8).flatten(1)


def unpack_digits(packed: Tensor, columns: int, base: int) -> Tensor:
    """Inverse of `pack_digits`.

    Args:
        packed: uint8 `[N, digits_width(columns, base)]`.
        columns: K.
        base: As in `pack_digits`.

    Returns:
        uint8 `[N, K]`.

    Raises:
        ValueError: The row has another number of bytes than K digits need.
    """
    size, digits = digit_word(base)
    width = digits_width(columns, base)
    if packed.shape[1] != width:
        raise ValueError(
            f"{columns} digits of base {base} take {width} bytes a row, got {packed.shape[1]}."
        )
    kind = torch.int16 if size == 1 else torch.int64
    shifts = 8 * torch.arange(size, device=packed.device)
    words = (
        (packed.view(len(packed), width // size, size).to(torch.int64) << shifts).sum(-1).to(kind)
    )
    weights = (base ** torch.arange(digits, device=packed.device)).to(kind)
    values = torch.div(words.unsqueeze(-1), weights, rounding_mode="floor") % base
    return values.to(torch.uint8).flatten(1)[:, :columns].contiguous()
