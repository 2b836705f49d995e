"""Spiking attention on a GPU: what the Triton operators need of the encoders, prepared once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neurons import ValueRange
from snnllm.cache import RowEncoder, RowLayout
from snnllm.head_rotation import HeadRotation, fits_kernel
from snnllm.kernels.cuda import attention as cuda_attention
from snnllm.kernels.triton.backend import TritonBackend

_LEAST_SLOTS = 32  # what an int8 product sums over at least
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_CHANNELS = 128


@dataclass(frozen=True, eq=False)
class TritonAttention:
    """The Triton attention operators for the encoders of one block; see `operators` for the fields.

    One difference to the torch path: NaN or infinity in the input raises nothing here. Tokens that do not
    fit a static cache stop the device (an assertion), after which the process has to start anew.
    """

    query_slot: Tensor
    key_slot: Tensor
    value_slot: Tensor
    member: Tensor
    query_capacity: Tensor
    capacity: Tensor
    query_clip: Tensor
    key_clip: Tensor
    value_clip: Tensor
    groups: int
    shared: bool
    planes: int
    slots: int
    query_row: list[int]
    key_row: list[int]
    value_row: list[int]
    order: Tensor | None
    blocks: list[int]
    offset: Tensor | None

    @classmethod
    def of(
        cls,
        query: RowEncoder,
        key: RowEncoder,
        value: RowEncoder,
        rotation: HeadRotation | None = None,
        offset: Tensor | None = None,
    ) -> TritonAttention:
        """Prepare the tables; waits for the device. The kernels rotate Q and K, and take the offset off K."""
        for encoder in (query, key, value):
            encoder.check_groups()  # the kernels index with them
        if rotation is not None:
            _ = rotation.index  # which checks it
        device, layouts = key.channel_group.device, (query.layout, key.layout, value.layout)
        groups = len(key.steps)
        most = max(layout.member.shape[1] for layout in layouts)
        slots = max(_LEAST_SLOTS, 1 << (most - 1).bit_length()) if groups == 2 else 0
        member = torch.full((len(key.layout.member), slots), -1, dtype=torch.int32, device=device)
        member[:, : key.layout.member.shape[1]] = key.layout.member
        query_slot, key_slot, value_slot = (_slots(layout) for layout in layouts)
        query_capacity, capacity = (
            torch.tensor(encoder.capacities, dtype=torch.float32).to(device)
            for encoder in (query, key)
        )
        query_row, key_row, value_row = (
            [layout.width, layout.plane_bytes if layout.planes else 0] for layout in layouts
        )
        return cls(
            query_slot=query_slot,
            key_slot=key_slot,
            value_slot=value_slot,
            member=member,
            query_capacity=query_capacity,
            capacity=capacity,
            query_clip=query.clip.contiguous(),
            key_clip=key.clip.contiguous(),
            value_clip=value.clip.contiguous(),
            groups=groups,
            shared=key.value_range == ValueRange.SHARED,
            planes=key.layout.planes,
            slots=slots,
            query_row=[*query_row, query.layout.planes],
            key_row=key_row,
            value_row=value_row,
            order=None if rotation is None else rotation.order,
            blocks=[] if rotation is None else list(rotation.blocks),
            offset=None if offset is None else offset.contiguous(),
        )

    @staticmethod
    def refusal(
        query: RowEncoder,
        key: RowEncoder,
        value: RowEncoder,
        rotation: HeadRotation | None = None,
    ) -> str | None:
        """Why these encoders, behind this rotation, cannot run on the kernels, or None."""
        reason = TritonBackend().available()
        if reason is not None:
            return reason
        if not all(encoder.layout.packed for encoder in (query, key, value)):
            return "spike counts of Q, K or V beyond 4 bits, or of salient channels beyond 6"
        if query.steps not in ((1,), key.steps) or key.steps != value.steps:
            return "Q with channel groups of its own"
        if key.channel_group.shape[-1] > _MAX_CHANNELS:
            return f"heads of more than {_MAX_CHANNELS} channels"
        if rotation is not None and not fits_kernel(rotation.blocks):
            return f"a rotation of Q and K in blocks of {rotation.blocks} channels"
        return None

    def encode(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Payloads of K, not rotated yet, and V, float `[B, H_kv, S, D]`: uint8 `[B, H_kv, S, bytes]`."""
        from snnllm.kernels.attention.operators import encode_key_value  # needs Triton

        encoded: tuple[Tensor, Tensor] = encode_key_value(
            *(_channels_last(key), _channels_last(value), self.key_slot, self.value_slot),
            *(self.capacity, self.key_clip, self.value_clip, self.shared, self.planes, self.slots),
            *(self.key_row, self.value_row, self.order, self.blocks, self.offset),
        )
        return encoded

    def takes(self, x: Tensor, mask: Tensor | None = None) -> bool:
        """Whether the kernels know activations of this dtype, and a mask of this shape and dtype."""
        if x.dtype not in _DTYPES or mask is None:
            return x.dtype in _DTYPES
        return mask.dim() == 4 and mask.shape[1] == 1 and mask.dtype in (torch.bool, *_DTYPES)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
        rotated: bool = False,
    ) -> Tensor:
        """Attention output `[B, S_q, H, D]` of float queries over payloads; K has been rotated, Q may be."""
        from snnllm.kernels.attention.operators import attend  # needs Triton

        out: Tensor = attend(
            *(_channels_last(query), key, value, mask),
            *(self.query_slot, self.key_slot, self.value_slot, self.member),
            *(self.query_capacity, self.query_clip, self.groups, self.shared, self.planes),
            *(self.query_row, self.key_row[1], self.value_row[1], scaling, dtype),
            *(None if rotated else self.order, self.blocks),
        )
        return out

    def few(self, query: Tensor) -> bool:
        """Whether queries `[B, H, S_q, D]` are so few that another kernel attends, with sums in another order."""
        from snnllm.kernels.attention.operators import few_queries  # needs Triton

        return few_queries(query.shape[1], len(self.key_slot), query.shape[2])

    def attend_steps(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        """`attend` of many encoded queries, with the integers summed over the steps of K: the same floats.

        Args:
            query: Payloads uint8 `[B, H, S_q, bytes]`.
            key: Payloads of every step, uint8 `[T, B, H_kv, S_k, bytes]`.
            value: Payloads `[B, H_kv, S_k, bytes]`.
            mask: As `attend` takes it.
            scaling: Factor of the scores.
            dtype: Of the result.
        """
        from snnllm.kernels.attention.launch import attend_encoded  # needs Triton

        batch, heads, tokens, _ = query.shape
        out = query.new_zeros((batch, tokens, heads, self.key_slot.shape[-1]), dtype=dtype)
        if out.numel() and key.shape[3]:
            tables = (
                self.key_slot,
                self.value_slot,
                self.member,
                self.query_capacity,
                self.query_clip,
            )
            attend_encoded(
                query, key, value, mask, tables, self._sizes(scaling), self.query_row, out
            )
        return out

    def _sizes(self, scaling: float) -> tuple[Any, ...]:
        """What the launches of the kernels take as `sizes`."""
        planes = (self.key_row[1], self.value_row[1])
        return (self.groups, self.shared, self.planes, *planes, scaling)

    @property
    def stores(self) -> bool:
        """Whether one kernel does all that is behind the projections up to the cache (`attend_stored`)."""
        from snnllm.kernels.attention.rotation import fuses  # needs Triton

        return self.order is None or fuses(self.blocks)

    def attend_stored(
        self,
        projected: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layer: Any,
        position: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """Write new tokens to a static cache and attend to it.

        Args:
            projected: Queries, keys and values, float `[B, S, (H + 2 H_kv) D]`, contiguous.
            position_embeddings: cos and sin, `[B or 1, S, D]` in that dtype.
            mask: As `attend` takes it.
            layer: transformers' `StaticLayer`, initialised with payloads; changed.
            position: Of the first new token, int64, one element; None: behind those in the cache.
            scaling: Factor of the scores.

        Returns:
            `[B, S, H, D]`.
        """
        from snnllm.kernels.attention.operators import few_queries  # needs Triton
        from snnllm.kernels.attention.store import check_cache, store_heads

        cos, sin = (table.contiguous() for table in position_embeddings)
        (keys, values), kv_heads = (layer.keys, layer.values), len(self.key_slot)
        heads = projected.shape[2] // cos.shape[2] - 2 * kv_heads
        check_cache(projected, cos, sin, heads, keys, values, self.key_row[0], self.value_row[0])
        planes = (self.key_row[1], self.value_row[1])
        if position is not None and type(projected) is Tensor and not torch.compiler.is_compiling():
            query = projected.detach().unflatten(2, (-1, cos.shape[2])).transpose(1, 2)[:, :heads]
            if cuda_attention.unsuitable(query, keys, values, planes) is None:
                return self._attend_new(query, (cos, sin), mask, layer, position, scaling)
        # Many queries are rotated where they are encoded.
        few = few_queries(heads, kv_heads, projected.shape[1])
        query = store_heads(
            *(projected.detach(), cos, sin, heads, few, keys, values),
            *(layer.cumulative_length, position, self.key_slot, self.value_slot, self.capacity),
            *(self.key_clip, self.value_clip, self.shared, self.planes, self.slots),
            *(*planes, self.order, self.blocks, self.offset),
        )
        return self.attend(query, keys, values, mask, scaling, projected.dtype, rotated=few)

    def _attend_new(
        self,
        query: Tensor,
        tables: tuple[Tensor, Tensor],
        mask: Tensor | None,
        layer: Any,
        position: Tensor,
        scaling: float,
    ) -> Tensor:
        """`attend_stored` of one token in one kernel; queries `[B, H, 1, D]` among the projections."""
        from snnllm.kernels.attention.launch import run_one  # needs Triton
        from snnllm.kernels.attention.rotation import mixing_of

        batch, heads, _, channels = query.shape
        out = query.new_empty((batch, 1, heads, channels))
        mixed = () if self.order is None else mixing_of(tuple(self.blocks))[0]
        new = cuda_attention.NewToken(
            *(*tables, self.order, self.offset, self.capacity, self.key_clip),
            *(self.value_clip, position, layer.cumulative_length, mixed),
        )
        run_one(
            *(query, layer.keys, layer.values, mask),
            (self.key_slot, self.value_slot, self.query_capacity, self.query_clip),
            *(self._sizes(scaling), out, new),
        )
        return out


def _slots(layout: RowLayout) -> Tensor:
    """Place of every channel among the salient ones of its head, int32 `[H or 1, D]`; -1 for others."""
    place = 8 * layout.byte.int() + torch.log2(layout.bit.clamp(min=1).float()).int()
    return place.masked_fill(layout.bit == 0, -1).contiguous()


def _channels_last(x: Tensor) -> Tensor:
    return x.detach() if x.stride(-1) == 1 else x.detach().contiguous()
