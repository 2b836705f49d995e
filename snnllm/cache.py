"""The encoded KV cache: K and V become spike counts once, at the write, in Hugging Face's own caches.

A token's encoding (counts, zero points, thresholds) is laid out as the bytes of one uint8 row, the
"payload". To a cache it is an ordinary key or value tensor `[B, H_kv, S, bytes]`, so dynamic and
static caches, batching, beam reordering and cropping work unchanged. A zero row (an unwritten slot of
a static cache) decodes to zeros.

A row of D channels in G groups (method.md section 2; native byte order)::

    counts                 packed: two counts a byte, the low four bits of channel j and of channel
                           j + D / 2; else one byte a count, or two where a capacity is beyond 255
    thresholds             float32 [G], from the next multiple of four bytes on
    zero points            [G], one byte each, or two where a capacity is beyond 255
    high bits              packed: bit 4, then bit 5, of the counts of the salient channels (group 1), in
                           the order of channels, eight a byte
    zeros                  up to a multiple of 16 bytes

Rows are packed where D is even and the capacities fit: at most 15 in group 0 and at most 63 in group 1.
All heads have the width of the head with the most salient channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from neurons import Encoding, SpikeEncoder
from neurons.modes import ValueRange

_ROW_ALIGNMENT = 16
_LOW_CAPACITY = 15
_PACKED_CAPACITY = 63
_BYTE_CAPACITY = 255
_BYTE_BITS = 8


class _CacheLike(Protocol):
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any: ...


@dataclass(frozen=True, eq=False)
class RowLayout:
    """Where the parts of a stored row lie, in bytes, and the salient channels of every head.

    Attributes:
        channels: D.
        groups: G.
        packed: Whether counts are stored as low and high bits.
        count_bytes: Bytes of a count that is not packed, 1 or 2.
        planes: High bits of a salient count, 0 to 2.
        plane_bytes: Bytes of one of these bits of all salient channels.
        threshold_at: First byte of the thresholds.
        zero_at: Of the zero points.
        high_at: Of the high bits.
        width: Bytes of a row.
        member: Salient channels of every head, int64 `[H or 1, M]`, ascending; -1 at the end of a head
            that has fewer than another.
        byte: Byte, from `high_at` on, of the high bit of a channel, uint8 `[H or 1, D]`.
        bit: Its bit, uint8 `[H or 1, D]`, 0 for channels that are not salient.
    """

    channels: int
    groups: int
    packed: bool
    count_bytes: int
    planes: int
    plane_bytes: int
    threshold_at: int
    zero_at: int
    high_at: int
    width: int
    member: Tensor
    byte: Tensor
    bit: Tensor

    @classmethod
    def of(cls, channel_group: Tensor, capacities: tuple[int, ...]) -> RowLayout:
        """The layout for groups `[D]` or `[H, D]` and the capacity of each group."""
        groups, channels = len(capacities), channel_group.shape[-1]
        packed = (
            channels % 2 == 0
            and groups <= 2
            and capacities[0] <= _LOW_CAPACITY
            and max(capacities) <= _PACKED_CAPACITY
        )
        salient = channel_group.reshape(-1, channels) == 1
        members = int(salient.sum(-1).max())
        planes = max(capacities[-1].bit_length() - 4, 0) if packed and groups == 2 else 0
        plane_bytes = -(-members // _BYTE_BITS)
        count_bytes = 1 if max(capacities) <= _BYTE_CAPACITY else 2
        counts = channels // 2 if packed else channels * count_bytes
        threshold_at = -(-counts // 4) * 4
        zero_at = threshold_at + 4 * groups
        high_at = zero_at + groups * count_bytes
        width = high_at + planes * plane_bytes
        slot = (salient.cumsum(-1) - 1).clamp(min=0)
        last = torch.where(salient, torch.arange(channels, device=salient.device), channels)
        member = last.sort(-1).values[:, :members]
        return cls(
            channels,
            groups,
            packed,
            count_bytes,
            planes,
            plane_bytes,
            threshold_at,
            zero_at,
            high_at,
            -(-width // _ROW_ALIGNMENT) * _ROW_ALIGNMENT,
            member.masked_fill(member == channels, -1).contiguous(),
            (slot // _BYTE_BITS).to(torch.uint8),
            (salient << slot % _BYTE_BITS).to(torch.uint8),
        )

    @cached_property
    def words(self) -> Tensor:
        """The `Row` of kernels/cpu/attention.h, int64, with pointers to the tables of this layout."""
        tables = (self.byte, self.bit, self.member)
        return torch.tensor(
            (
                *(self.channels, self.groups, int(self.packed), self.planes, self.plane_bytes),
                *(self.threshold_at, self.zero_at, self.high_at, self.width, *self.member.shape),
                *(table.data_ptr() for table in tables),
            )
        )


class RowEncoder(SpikeEncoder):
    """A `SpikeEncoder` of attention operands that knows how their rows are stored.

    Raises:
        ValueError: The range is commensurate.
    """

    _layout: tuple[Tensor, int, RowLayout] | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.value_range == ValueRange.COMMENSURATE:
            raise ValueError(
                f"{self.name or 'encoder'}: operands of attention have split or shared ranges; their "
                "kernels and their cache know no commensurate thresholds"
            )

    @property
    def layout(self) -> RowLayout:
        """The layout for the groups as they are; waits for the device once after they change."""
        group, known = self.channel_group, self._layout
        if known is not None and torch.compiler.is_compiling():
            return known[2]  # a graph is for the groups that it was made with
        if known is None or known[0] is not group or known[1] != group._version:
            known = group, group._version, RowLayout.of(group, self.capacities)
            self._layout = known
        return known[2]

    def __getstate__(self) -> dict[str, Any]:
        """State without what is derived from it, for deepcopy and pickle."""
        return {**self.__dict__, "_layout": None}


def to_payload(encoding: Encoding, layout: RowLayout) -> Tensor:
    """Lay an encoding out as bytes.

    Args:
        encoding: counts uint8 or int16 `[..., D]` (`[..., H, S, D]` with groups per head), thresholds
            float32 and zero points `[..., G]`.
        layout: Of the encoder that made it.

    Returns:
        uint8 `[..., layout.width]`.
    """
    count, leading = encoding.count, encoding.count.shape[:-1]
    zero = encoding.zero_point.to(torch.uint8 if layout.count_bytes == 1 else torch.int16)
    if layout.packed:
        low, high = (count & _LOW_CAPACITY).chunk(2, -1)
        counts = low | high << 4
    else:
        counts = _bytes(count)
    gap = counts.new_zeros(*leading, layout.threshold_at - counts.shape[-1])
    parts = [counts, gap, _bytes(encoding.threshold), _bytes(zero)]
    if layout.planes and layout.plane_bytes:
        high = count.gather(-1, _per_row(layout.member.clamp(min=0), leading))
        high = high * (_per_row(layout.member, leading) >= 0)
        high = torch.nn.functional.pad(high, (0, layout.plane_bytes * 8 - high.shape[-1]))
        high = high.view(*leading, layout.plane_bytes, 8)
        place = torch.arange(8, device=count.device, dtype=torch.uint8)
        for plane in range(layout.planes):
            bits = (high >> (4 + plane) & 1) << place
            parts.append(bits.sum(-1, dtype=torch.uint8))
    used = sum(part.shape[-1] for part in parts)
    parts.append(counts.new_zeros(*leading, layout.width - used))
    return torch.cat(parts, dim=-1)


def from_payload(payload: Tensor, layout: RowLayout) -> Encoding:
    """Inverse of `to_payload`."""
    leading = payload.shape[:-1]
    if layout.packed:
        low = payload[..., : layout.channels // 2]
        count = torch.cat([low & _LOW_CAPACITY, low >> 4], -1)
        byte, bit = _per_row(layout.byte.long(), leading), _per_row(layout.bit, leading)
        for plane in range(layout.planes if layout.plane_bytes else 0):
            first = layout.high_at + plane * layout.plane_bytes
            high = payload[..., first : first + layout.plane_bytes].gather(-1, byte)
            count = count | ((high & bit) != 0).to(torch.uint8) << (4 + plane)
    else:
        count = payload[..., : layout.channels * layout.count_bytes].contiguous()
        count = count if layout.count_bytes == 1 else count.view(torch.int16)
    threshold = payload[..., layout.threshold_at : layout.zero_at].contiguous().view(torch.float32)
    zero = payload[..., layout.zero_at : layout.zero_at + layout.groups * layout.count_bytes]
    zero = zero if layout.count_bytes == 1 else zero.contiguous().view(torch.int16)
    return Encoding(count, threshold, zero.to(torch.int32))


def _bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8)


def _per_row(table: Tensor, leading: torch.Size) -> Tensor:
    """A table `[H, N]` for rows `[..., H, S]`, or `[1, N]` for rows of any shape."""
    table = table[0] if table.shape[0] == 1 else table.unsqueeze(-2)
    return table.expand(*leading, table.shape[-1])


class EncodeOnWrite:
    """Stand-in for the cache during one attention call: encodes the new K and V, then stores them.

    Encoding twice is not idempotent (a decoded row has another minimum and maximum), so there is
    exactly one place where K and V become spikes, and it is here.

    Args:
        cache: The real cache, or None when the call uses none.
        encode: Maps new key and value states `[B, H_kv, S, D]` to payloads.
    """

    def __init__(self, cache: _CacheLike | None, encode: Any) -> None:
        self.cache = cache
        self._encode = encode

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode, write and return the payloads of all cached tokens."""
        key, value = self._encode(key_states, value_states)
        if self.cache is None:
            return key, value
        updated: tuple[Tensor, Tensor] = self.cache.update(key, value, layer_idx, *args, **kwargs)
        return updated
