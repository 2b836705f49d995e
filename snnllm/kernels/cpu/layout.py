"""Memory layouts of the C kernels (`kernels.c`): packed weights, padded segments, safe sums."""

from __future__ import annotations

import torch
from torch import Tensor

from snnllm.kernels.spec import EncoderSpec, Segment

OCTET = 8  # channels of a packed unit, and outputs of a vector
NIBBLE, BYTE, WIDE = 0, 1, 2  # weight layouts of kernels.c
_INT16_MAX = 2**15 - 1


def choose_layout(weight_bits: int, capacity: int) -> int:
    """Choose the weight layout: nibbles, bytes while two products fit int16, else wide."""
    if weight_bits <= 4 and capacity <= 255:
        return NIBBLE
    if capacity <= 255 and safe_octets(BYTE, weight_bits, capacity) >= 1:
        return BYTE
    return WIDE


def safe_octets(layout: int, weight_bits: int, capacity: int) -> int:
    """Return how many octets of 8 channels an int16 lane sums without overflow.

    vpmaddubsw adds one pair of products to a lane; an octet holds two pairs of every lane.
    Nibbles are stored as level + 8, in 0..15.
    """
    largest = 15 if layout == NIBBLE else 2 ** (weight_bits - 1)
    return _INT16_MAX // (2 * 2 * capacity * largest)


def padded_starts(segments: tuple[Segment, ...]) -> tuple[list[int], int]:
    """Return where every segment starts when each is padded to whole octets, and the total."""
    starts, position = [], 0
    for start, stop, _, _ in segments:
        starts.append(position)
        position += -(-(stop - start) // OCTET) * OCTET
    return starts, position


def segment_words(
    segments: tuple[Segment, ...],
    starts: list[int],
    encoder: EncoderSpec,
    layout: int,
    weight_bits: int,
) -> Tensor:
    """Return the C structs `Segment`, int64 [S, 7]."""
    rows = []
    for segment, padded_start in zip(segments, starts, strict=True):
        octets = -(-(segment.stop - segment.start) // OCTET)
        capacity = encoder.capacities[segment.act_group]
        chunks = [max(safe_octets(kind, weight_bits, capacity), 1) for kind in (layout, BYTE)]
        rows.append([*segment[:2], padded_start, octets, segment.act_group, *chunks])
    return torch.tensor(rows, dtype=torch.int64)


def pack_levels(levels: Tensor, layout: int) -> Tensor:
    """Pack int8 [N, K] (N multiple of 32, K of 8) into the layout of kernels.c, one byte string."""
    n, k = levels.shape
    if layout == WIDE:  # [block, lane, octet, pair, 2] -> [block, octet, pair, lane, 2]
        tiles = levels.view(n // 8, 8, k // 8, 4, 2).permute(0, 2, 3, 1, 4)
        return tiles.contiguous().flatten()
    tiles = levels.view(n // 8, 8, k // 8, 2, 4).permute(0, 2, 3, 1, 4)
    if layout == BYTE:
        return tiles.contiguous().flatten()
    nibbles = (tiles + 8).to(torch.uint8)
    return (nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)).contiguous().flatten()


def int16_pair(first: Tensor, second: Tensor) -> Tensor:
    """Return int32 words with `first` in the lower and `second` in the upper 16 bits."""
    return (first & 0xFFFF) | (second << 16)
