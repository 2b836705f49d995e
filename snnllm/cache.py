"""The encoded KV cache: K and V become spike counts once, at the write, in Hugging Face's own caches.

A token's encoding (counts, zero points, thresholds) is laid out as the bytes of one uint8 row, the
"payload". To a cache it is an ordinary key or value tensor `[B, H_kv, S, bytes]`, so dynamic and
static caches, batching, beam reordering and cropping work unchanged. A zero row (an unwritten slot of
a static cache) decodes to zeros.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from neurons import Encoding, SpikeEncoder


class _CacheLike(Protocol):
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any: ...


def to_payload(encoding: Encoding) -> Tensor:
    """Lay an encoding out as bytes.

    Args:
        encoding: counts uint8 or int16 `[..., D]`, thresholds float32 and zero points `[..., G]`.

    Returns:
        uint8 `[..., D * itemsize + 6 * G]`: counts, zero points (int16), thresholds (float32).
    """
    parts = (encoding.count, encoding.zero_point.to(torch.int16), encoding.threshold)
    return torch.cat([p.contiguous().view(torch.uint8) for p in parts], dim=-1)


def from_payload(payload: Tensor, encoder: SpikeEncoder) -> Encoding:
    """Inverse of `to_payload` for rows that `encoder` has encoded."""
    groups = len(encoder.steps)
    dtype = torch.uint8 if max(encoder.capacities) <= 255 else torch.int16
    tail = 6 * groups
    count, zero, threshold = payload.split(
        (payload.shape[-1] - tail, 2 * groups, 4 * groups), dim=-1
    )
    return Encoding(
        count.contiguous().view(dtype),
        threshold.contiguous().view(torch.float32),
        zero.contiguous().view(torch.int16).to(torch.int32),
    )


class EncodeOnWrite:
    """Stand-in for the cache during one attention call: encodes the new K and V, then stores them.

    Encoding twice is not idempotent (a decoded row has another minimum and maximum), so there is
    exactly one place where K and V become spikes, and it is here.

    Args:
        cache: The real cache, or None when the call uses none.
        encode: Maps new key and value states `[B, H_kv, S, D]` to payloads.
    """

    def __init__(self, cache: _CacheLike | None, encode: Any) -> None:
        self._cache = cache
        self._encode = encode

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Encode, write and return the payloads of all cached tokens."""
        key, value = self._encode(key_states, value_states)
        if self._cache is None:
            return key, value
        updated: tuple[Tensor, Tensor] = self._cache.update(key, value, layer_idx, *args, **kwargs)
        return updated
