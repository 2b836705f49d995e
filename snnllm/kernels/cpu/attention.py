"""Spiking attention in C on the CPU: encode to payload bytes, integer Q K^T, decode V.

The payload is the byte layout of `snnllm.cache`. Bit for bit equal to the torch operations of
`snnllm.attention`, which run wherever this does not: on other devices, without a compiler, inside
`torch.compile`, and for spikes whose products do not fit 8-bit operands.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from neurons import ValueRange
from snnllm.cache import RowEncoder
from snnllm.kernels import get_backend
from snnllm.kernels.cpu.backend import library
from snnllm.kernels.spec import non_finite_error

_INT16_MAX = 2**15 - 1
_INT8_MAX = 127
_MAX_GROUPS = 8
_MAX_CHANNELS = 512
_NON_FINITE = 1


class NativeAttention:
    """The C attention functions for one pair of Q and K encoders.

    Args:
        query: Encoder of Q: one channel group, or the groups of K.
        key: Encoder of K.
        value: Encoder of V.
    """

    def __init__(self, query: RowEncoder, key: RowEncoder, value: RowEncoder) -> None:
        for encoder in (query, key, value):
            encoder.check_groups()  # the C functions index with them
        self._query, self._key, self._value = query, key, value
        self._library = library()
        self._capacities = {
            id(e): torch.tensor(e.capacities, dtype=torch.int64) for e in (query, key, value)
        }
        product = 2 * max(key.capacities) * max(query.capacities)
        self._chunk = _INT16_MAX // product

    @staticmethod
    def refusal(query: RowEncoder, key: RowEncoder, value: RowEncoder) -> str | None:
        """Why these encoders cannot run natively, or None."""
        encoders = (query, key, value)
        if any(e.channel_group.device.type != "cpu" for e in encoders):
            return "the model is not on the CPU"
        if any(max(e.capacities) > 255 or len(e.steps) > _MAX_GROUPS for e in encoders):
            return "spike counts beyond 255 or more than 8 groups"
        if key.channel_group.shape[-1] > _MAX_CHANNELS:
            return f"heads of more than {_MAX_CHANNELS} channels"
        if query.steps not in ((1,), key.steps) or max(query.capacities) > _INT8_MAX:
            return "spikes of Q beyond 7 bits, or with groups of its own"
        if 2 * max(key.capacities) * max(query.capacities) > _INT16_MAX:
            return "products of spikes beyond 16 bits"
        if get_backend("auto", "cpu").name != "native":
            return "the native kernels cannot be built here"
        return None

    def encode(self, x: Tensor, encoder: RowEncoder, stepped: bool = False) -> Tensor:
        """Payloads of `x [B, H, S, D]`: uint8 `[B, H, S, bytes]`.

        Args:
            x: float activations.
            encoder: one of the three encoders.
            stepped: run the neurons over their steps instead of the closed form; the same counts.

        Raises:
            ValueError: NaN or infinity; names the layer.
        """
        x = x.detach().float()
        if x.stride(-1) != 1:
            x = x.contiguous()
        shape = tuple(x.shape)
        layout = encoder.layout
        out = torch.empty(*shape[:-1], layout.width, dtype=torch.uint8)
        group = encoder.channel_group
        code = self._library.snn_encode_heads(
            x.data_ptr(),
            _int64(shape),
            _int64(x.stride()),
            layout.words.data_ptr(),
            group.data_ptr(),
            1 if group.dim() == 1 else group.shape[0],
            self._capacities[id(encoder)].data_ptr(),
            _int64(encoder.steps) if stepped else None,
            encoder.levels,
            encoder.value_range == ValueRange.SHARED,
            encoder.clip.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if code == _NON_FINITE:
            raise non_finite_error(encoder.name)
        return out

    def scores(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """`scaling * sum_g (A_g s_qg) s_kg` of Q and K payloads.

        Args:
            query: `[B, H, S_q, bytes]`.
            key: `[B, H_kv, S_k, bytes]`.
            scaling: Factor, rounded to float32 as torch does.

        Returns:
            float32 `[B, H, S_q, S_k]`.
        """
        (batch, heads, tokens, _), (_, kv_heads, keys, _) = query.shape, key.shape
        key = key.contiguous()
        out = torch.empty(batch, heads, tokens, keys)
        code = self._library.snn_attention_scores(
            _int64((batch, kv_heads, heads, tokens, keys)),
            self._query.layout.words.data_ptr(),
            self._key.layout.words.data_ptr(),
            query.data_ptr(),
            key.data_ptr(),
            self._key.channel_group.data_ptr(),
            self._chunk,
            scaling,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        if code:
            raise MemoryError(f"{self._key.name}: no memory for a block of keys.")
        return out

    def decode_values(self, payload: Tensor) -> Tensor:
        """V as floats, `[B, H_kv, S, D]`, of payloads `[B, H_kv, S, bytes]`."""
        payload = payload.contiguous()
        batch, heads, tokens, _ = payload.shape
        layout = self._value.layout
        out = torch.empty(batch, heads, tokens, layout.channels)
        self._library.snn_decode_heads(
            payload.data_ptr(),
            batch * heads * tokens,
            tokens,
            heads,
            layout.words.data_ptr(),
            self._value.channel_group.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


def _int64(values: tuple[int, ...]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)
