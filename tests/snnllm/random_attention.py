"""Attention whose heads have different salient channels, for tests of its kernels."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig

from snnllm.attention import SpikingLlamaAttention
from snnllm.config import SpikeConfig
from snnllm.kernels.attention.backend import TritonAttention


def random_attention(
    *sizes: int,
    seed: int,
    density: float = 0.3,
    device: str | torch.device = "cpu",
    **spike: Any,
) -> tuple[SpikingLlamaAttention, torch.Generator]:
    """A block with random groups, and what drew them.

    With `rotation="groups"` the order in front of the groups is random; so is the offset of K with `key_offset`.

    Args:
        sizes: Heads, heads of K and V, channels of a head.
        seed: Of the generator.
        density: Of salient channels of K and V, if they have several steps.
        device: Of the block.
        spike: For `SpikeConfig`.
    """
    heads, kv_heads, dim = sizes
    config = LlamaConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
    )
    module = SpikingLlamaAttention(config, 0, SpikeConfig(**spike)).eval().to(device)
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, kv_heads, dim, generator=generator) < density
    masks = (masks & (len(module.k_encoder.steps) > 1)).to(device, torch.uint8)
    module.set_channel_groups(masks[0], masks[1])
    if module.qk_rotation is not None:
        module.qk_rotation.sort(torch.rand(kv_heads, dim, generator=generator).argsort(-1))
    if "offset_key" in module._buffers:
        offset = torch.randn(kv_heads, dim, generator=generator)
        module.get_buffer("offset_key").copy_(offset)
    return module, generator


def kernels_of(module: SpikingLlamaAttention) -> TritonAttention:
    """The kernels of a block that they serve."""
    encoders = (module.q_encoder, module.k_encoder, module.v_encoder)
    assert TritonAttention.refusal(*encoders, module.qk_rotation) is None
    return TritonAttention.of(*encoders, module.qk_rotation, module._buffers.get("offset_key"))
