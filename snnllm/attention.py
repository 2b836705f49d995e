"""Spiking attention: Q, K and V as spikes, as a transformers attention function (method.md section 4).

The attention of transformers is not rewritten. `SpikingLlamaAttention` only hands its parent an
encoding stand-in for the cache, and the product Q K^T is done by a function that is registered
under the name "spiking" in transformers' attention and mask registries.

K and V are encoded per token and KV head after RoPE, Q per token and head with one step
(or with the groups and steps of K); P stays float. Q K^T is an integer product in all views. P V has a
float operand, so the views share one float product with the decoded V: the outputs of all views are
equal bit for bit.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlamaConfig
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from neurons import Encoding
from snnllm.attention_products import spiking_scores, step_payloads
from snnllm.block import CACHE_ARGUMENT, ProjectedAttention, static_layer
from snnllm.cache import EncodeOnWrite, RowEncoder, from_payload, to_payload
from snnllm.config import Rotation, SpikeConfig
from snnllm.execution import SpikingModule, View
from snnllm.float_attention import CALIBRATION_ATTENTION, calibration_attention, masked
from snnllm.head_rotation import HeadRotation
from snnllm.kernels.attention.backend import TritonAttention
from snnllm.kernels.cpu.attention import NativeAttention
from snnllm.precision import keeping_float32
from snnllm.transforms import salient_count

LOGGER = logging.getLogger("snnllm.attention")
SPIKING_ATTENTION = "spiking"
_UNKNOWN: object = ...  # survives deepcopy and pickle as itself


class SpikingLlamaAttention(ProjectedAttention, SpikingModule):
    """LLaMA attention whose K and V are encoded to spikes at the write to the cache.

    The ranges of Q, K and V are those of the configuration; `split` in place of `commensurate`.

    Args:
        config: The LLaMA configuration.
        layer_idx: Index of the block.
        spike: The spiking configuration.

    Attributes:
        q_encoder: One step, all channels of a head in one group; or the groups and steps of K
            (`query_groups`), `[H, D]`.
        k_encoder: Own channel groups per KV head, `[H_kv, D]`.
        v_encoder: Likewise.
        qk_rotation: Rotates Q and K in front of their encoders, in a rotated model; else None.
        offset_key: With `key_offset`, a constant current `-offset_key` flows into the neurons of K, float32
            `[H_kv, D]` behind the rotation. It never comes back: the softmax does not change when all keys
            move alike. (SageAttention, arXiv 2410.02367, takes off the mean of the keys at hand.)
    """

    def __init__(self, config: LlamaConfig, layer_idx: int, spike: SpikeConfig) -> None:
        super().__init__(config, layer_idx)
        prefix = f"model.layers.{layer_idx}.self_attn"
        heads, dim = config.num_key_value_heads, int(self.head_dim)  # type: ignore[arg-type]
        groups = torch.zeros(heads, dim, dtype=torch.uint8)
        common: dict[str, Any] = {
            "bits": spike.activation_bits,
            "value_range": str(spike.attention_range),
            "capacity": str(spike.capacity),
            "clip": spike.activation_clip,
        }
        query = groups.repeat_interleave(config.num_attention_heads // heads, 0)
        self.q_encoder = RowEncoder(
            query if spike.query_groups else groups[0],
            steps=spike.kv_steps if spike.query_groups else (1,),
            name=f"{prefix}.q",
            **common,
        )
        self.k_encoder = RowEncoder(
            groups.clone(), steps=spike.kv_steps, name=f"{prefix}.k", **common
        )
        self.v_encoder = RowEncoder(
            groups.clone(), steps=spike.kv_steps, name=f"{prefix}.v", **common
        )
        self.qk_rotation: HeadRotation | None = None
        if spike.rotation is Rotation.GROUPS:
            salient = salient_count(dim, spike.salient_ratio)
            self.qk_rotation = HeadRotation(heads, dim, salient, f"{prefix}.qk_rotation")
        if spike.key_offset:
            self.register_buffer("offset_key", torch.zeros(heads, dim))
        self._native: NativeAttention | object | None = _UNKNOWN
        self._kernels: TritonAttention | object | None = _UNKNOWN

    def set_channel_groups(self, key: Tensor, value: Tensor) -> None:
        """Choose the saliency groups of K and V, uint8 `[H_kv, D]`."""
        self._forget()
        self.k_encoder.set_groups(key)
        self.v_encoder.set_groups(value)
        if self.q_encoder.channel_group.dim() == 2:  # Q is multiplied with K channel by channel
            shared = self.q_encoder.channel_group.shape[0] // key.shape[0]
            self.q_encoder.set_groups(key.repeat_interleave(shared, 0))

    def set_key_offset(self, keys: Iterable[Tensor]) -> None:
        """Set the offset of K to the mean of some keys behind RoPE, `[B, H_kv, S, D]` each."""
        total, count = torch.zeros_like(self.get_buffer("offset_key"), dtype=torch.float64), 0
        for key in keys:
            total += self.rotate(key).double().sum((0, 2))
            count += key.shape[0] * key.shape[2]
        self.get_buffer("offset_key").copy_(total / max(count, 1))

    def check_view(self, view: View) -> None:
        """Refuse a view that the configuration cannot run."""
        if view is not View.COLLAPSED and self.k_encoder.capacity == "power_of_two":
            raise ValueError(
                f"model.layers.{self.layer_idx}.self_attn: capacity='power_of_two' has counts that a "
                f"T-step neuron cannot emit, so it cannot run the {view} view. Use capacity='steps'."
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Attention of the parent with an encoding stand-in for its cache."""
        self.check_view(self.view)
        cache = kwargs.pop("past_key_values", None)
        cache = kwargs.pop("cache", None) if cache is None else cache
        kwargs[CACHE_ARGUMENT] = EncodeOnWrite(cache, self._encode_key_value)
        return super().forward(*args, **kwargs)

    def _attend(
        self,
        projected: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: Any,
        position: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the parent; where it runs in kernels, one of them writes to a static cache."""
        given = (projected, position_embeddings, attention_mask)
        layer, config = static_layer(cache.cache, self.layer_idx), cast(LlamaConfig, self.config)
        if layer is not None and config._attn_implementation == SPIKING_ATTENTION:
            dropout, scaling = cast("tuple[float, float]", (self.attention_dropout, self.scaling))
            kernels = self.kernels_for(projected, attention_mask, dropout, **kwargs)
            if kernels is not None and kernels.stores:
                return kernels.attend_stored(*given, layer, position, scaling), None
        return super()._attend(*given, cache, position, **kwargs)

    def native(self) -> NativeAttention | None:
        """The C functions, where they can run."""
        if torch.compiler.is_compiling():
            return None
        if self._native is _UNKNOWN:
            encoders = (self.q_encoder, self.k_encoder, self.v_encoder)
            reason = NativeAttention.refusal(*encoders)
            self._native = None if reason else NativeAttention(*encoders)
        return cast("NativeAttention | None", self._native)

    def kernels(self) -> TritonAttention | None:
        """The Triton operators, in the collapsed view on a GPU."""
        encoders = (self.q_encoder, self.k_encoder, self.v_encoder)
        if self.view is not View.COLLAPSED:
            return None
        if not torch.compiler.is_compiling() and any(e.watched for e in encoders):
            return None  # who records from the neurons wants to see them run
        return self._prepared()

    def _prepared(self) -> TritonAttention | None:
        if self._kernels is _UNKNOWN:
            self._kernels = self._prepare_kernels()
        return cast("TritonAttention | None", self._kernels)

    def kernels_for(
        self, x: Tensor, mask: Tensor | None, dropout: float, **asked: Any
    ) -> TritonAttention | None:
        """The kernels, where they run on activations and a mask; they never have P for `output_attentions`."""
        return self._if_usable(self.kernels(), x, mask, dropout, **asked)

    def step_kernels_for(
        self, query: Tensor, mask: Tensor | None, dropout: float, **asked: Any
    ) -> TritonAttention | None:
        """The kernels for queries that are encoded already, in every view and whoever records: many of them."""
        kernels = None if torch.compiler.is_compiling() else self._prepared()
        if kernels is None or kernels.few(query):
            return None
        return self._if_usable(kernels, query, mask, dropout, **asked)

    def _if_usable(
        self,
        kernels: TritonAttention | None,
        x: Tensor,
        mask: Tensor | None,
        dropout: float,
        **asked: Any,
    ) -> TritonAttention | None:
        dropped = self.training and dropout > 0.0
        # transformers refuses `output_attentions` in the configuration.
        if kernels is None or dropped or asked.get("output_attentions"):
            return None
        return kernels if kernels.takes(x, mask) else None

    def prepare(self) -> None:
        """Find out how rows are stored and prepare the kernels: both read the channel groups."""
        for encoder in (self.q_encoder, self.k_encoder, self.v_encoder):
            _ = encoder.layout  # which keeps what it has found
        if self.qk_rotation is not None:
            _ = self.qk_rotation.index
        self.kernels()

    def _forget(self) -> None:
        """Drop what was prepared from the encoders: they are changed or moved."""
        self._native = self._kernels = _UNKNOWN
        self.version += 1

    def _prepare_kernels(self) -> TritonAttention | None:
        encoders = (self.q_encoder, self.k_encoder, self.v_encoder)
        if self.k_encoder.channel_group.device.type != "cuda":
            return None
        reason = TritonAttention.refusal(*encoders, self.qk_rotation)
        if reason is not None:
            LOGGER.warning(
                "%s: attention runs on torch operations: %s", self.k_encoder.name, reason
            )
            return None
        return TritonAttention.of(*encoders, self.qk_rotation, self._buffers.get("offset_key"))

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()  # the encoders may move to another device
        with keeping_float32(self):
            super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """State without what is derived from it, for deepcopy and pickle."""
        return {**self.__dict__, "_native": _UNKNOWN, "_kernels": _UNKNOWN}

    def _encode_key_value(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        kernels = self.kernels()
        if kernels is not None and kernels.takes(key) and kernels.takes(value):
            return kernels.encode(key, value)
        return (
            self.encode_payload(self.k_encoder, self.key_current(key)),
            self.encode_payload(self.v_encoder, value),
        )

    def encode_payload(self, encoder: RowEncoder, x: Tensor) -> Tensor:
        """Encode an operand in the current view, uint8 payloads `[B, H, S, bytes]`.

        Outside of the collapsed view the neurons run over their steps: in C on the CPU, and as the
        encoder's `GIFNode` elsewhere and whenever somebody records from it.
        """
        native = self.native()
        if native is not None and not encoder.watched:
            return native.encode(x, encoder, stepped=self.view is not View.COLLAPSED)
        return to_payload(self.run_encoder(encoder, x), encoder.layout)

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate Q or K `[B, H, S, D]` after RoPE, per KV head; `Q K^T` stays the same number."""
        if self.qk_rotation is None:
            return x
        rotated: Tensor = self.qk_rotation(x)
        return rotated

    def key_current(self, key: Tensor) -> Tensor:
        """What the encoder of K sees of K `[B, H_kv, S, D]` behind RoPE: rotated and without the offset."""
        offset, rotated = self._buffers.get("offset_key"), self.rotate(key)
        return rotated if offset is None else rotated.float() - offset.unsqueeze(1)

    def run_encoder(self, encoder: RowEncoder, x: Tensor) -> Encoding:
        """Encode an operand in the current view; outside the collapsed view the neurons really run."""
        if self.view is View.COLLAPSED:
            return encoder.encode(x)
        spikes, encoding = encoder.encode_spikes(x)
        return encoding._replace(count=spikes.sum(0).to(encoding.count.dtype))


def spiking_attention(
    module: SpikingLlamaAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over encoded K and V; the signature is transformers' attention interface.

        P = softmax(scaling * sum_g s_qg s_kg A_g + mask),   out = P (s_v (q_v - z_v))

    Args:
        module: The attention layer.
        query: float `[B, H, S_q, D]` after RoPE.
        key: payloads uint8 `[B, H_kv, S_k, bytes]`.
        value: likewise.
        attention_mask: `[B, 1, S_q, S_k]`, float to add or bool to keep; or None.
        scaling: Factor of the scores, `D**-1/2`.
        dropout: Dropout of P, used in training only.
        **kwargs: What transformers passes to every attention function; `output_attentions` asks for P.

    Returns:
        `[B, S_q, H, D]` in the dtype of the query; and P, or None from the kernels on a GPU, which never
        have all of it. They run when nobody asks for P, and round float sums in another order than torch; for
        many queries in the same one in every view, for a few (`TritonAttention.few`) torch runs the others.
    """
    batch, heads, tokens, _ = query.shape
    dtype, kernels = query.dtype, module.kernels_for(query, attention_mask, dropout, **kwargs)
    if kernels is not None:
        return kernels.attend(query, key, value, attention_mask, scaling, dtype), None
    native = module.native()
    encoded = module.encode_payload(module.q_encoder, module.rotate(query))
    kernels = module.step_kernels_for(query, attention_mask, dropout, **kwargs)
    if kernels is not None:
        steps = step_payloads(module, key)
        return kernels.attend_steps(encoded, steps, value, attention_mask, scaling, dtype), None
    if native is not None and module.view is View.COLLAPSED:
        scores = native.scores(encoded, key, scaling)
    else:
        scores = spiking_scores(module, encoded, key, scaling)
    if native is not None:
        decoded = native.decode_values(value)
    else:
        decoded = module.v_encoder.decode(
            from_payload(value, module.v_encoder.layout), torch.float32
        )
    probability = nn.functional.softmax(masked(scores, attention_mask), dim=-1)
    weights = nn.functional.dropout(probability, p=dropout, training=module.training)
    per_group = weights.view(batch, key.shape[1], -1, decoded.shape[-2])
    # The mask of a float64 model makes P float64.
    out = torch.matmul(per_group, decoded.to(per_group.dtype)).view(batch, heads, tokens, -1)
    return out.transpose(1, 2).to(dtype).contiguous(), probability


def register_attention() -> None:
    """Register the attention functions with transformers. Idempotent."""
    for name, function in (
        (SPIKING_ATTENTION, spiking_attention),
        (CALIBRATION_ATTENTION, calibration_attention),
    ):
        AttentionInterface.register(name, function)
        # A name without a mask function would silently get no mask at all: no causality, no padding.
        AttentionMaskInterface.register(name, eager_mask)
