"""Spiking LLaMAs of any shape with random weights, made where they run: for measuring, not for text."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from snnllm.attention import SpikingLlamaAttention
from snnllm.block import prepare
from snnllm.config import FLOAT_BITS, Rotation, SpikeConfig
from snnllm.linear import SpikingLinear
from snnllm.modeling import SpikingLlamaForCausalLM, spike_block, spiking_config
from snnllm.pipelines.streaming import INPUT_GROUPS
from snnllm.shapes import SHAPES, Shape
from snnllm.transforms import salient_count, sorted_groups
from snnllm.vocabulary import QuantizedTable
from snnllm.weights import QuantizedWeight

__all__ = ["SHAPES", "Shape", "llama_config", "random_dense", "random_spiking"]

_STD = 0.02


def llama_config(shape: Shape, positions: int = 4096) -> LlamaConfig:
    """The configuration of a shape; embeddings and head are not tied."""
    return LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=shape.blocks,
        vocab_size=shape.vocabulary,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
    )


def random_dense(
    config: LlamaConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> LlamaForCausalLM:
    """A dense LLaMA with random weights, made on `device`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng(_devices(device)), device:
            torch.manual_seed(seed)
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def random_spiking(
    config: LlamaConfig, spike: SpikeConfig, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> SpikingLlamaForCausalLM:
    """A spiking LLaMA with random weight codes, made and packed on `device` block by block.

    Linears that share an input have the channel groups of one mask, as `mask_scope="input"` makes them.

    Args:
        config: The dense configuration.
        spike: The spiking one, of integer weights.
        device: Where the model is made; codes that a backend has packed stay in host memory.
        dtype: Of embeddings, norms and head.
        seed: Of everything random.

    Raises:
        ValueError: Weights that are not integer levels.
    """
    if spike.weight_bits == FLOAT_BITS or spike.mean_steps is not None:
        raise ValueError(
            f"{spike.label}: random models have integer weight levels; choose 2 to 8 bits, such as W4A4T2."
        )
    blocks, generator = config.num_hidden_layers, torch.Generator(device).manual_seed(seed)
    with torch.random.fork_rng(_devices(device)):
        torch.manual_seed(seed)
        hollow = LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 0})
        with device:
            model = SpikingLlamaForCausalLM(spiking_config(hollow, spike))
        model.to(dtype)
        if spike.embedding_bits != FLOAT_BITS:
            for table in (model.model.embed_tokens, model.lm_head):
                table.set_table(_random_table(table.weight, generator))
        model.config.num_hidden_layers = blocks
        for index in range(blocks):
            with device:
                block = LlamaDecoderLayer(model.config, index)
                spike_block(block, index, model.config, spike)
            _randomise(block, spike, generator)
            model.model.layers.append(block.to(dtype).eval())
            prepare(block)
    model.eval()
    return model


def _randomise(block: nn.Module, spike: SpikeConfig, generator: torch.Generator) -> None:
    """Fill the linears, rotations and channel groups of an empty spiking block."""
    for module in block.modules():
        if isinstance(module, SpikingLlamaAttention):
            keys = _groups(module.k_encoder.channel_group, spike, generator)
            values = _groups(module.v_encoder.channel_group, spike, generator)
            if module.qk_rotation is not None:
                module.qk_rotation.sort(keys)
                keys, values = sorted_groups(keys), sorted_groups(values)
            module.set_channel_groups(keys, values)
    for paths in INPUT_GROUPS:
        linears = [m for m in map(block.get_submodule, paths) if isinstance(m, SpikingLinear)]
        if not linears:
            continue
        group = _groups(linears[0].encoder.channel_group, spike, generator)
        if spike.rotation is Rotation.GROUPS:
            group = sorted_groups(group)  # as rotations have it
        for linear in linears:
            linear.set_channel_group(group)
            _set_weight(linear, generator)


def _groups(like: Tensor, spike: SpikeConfig, generator: torch.Generator) -> Tensor:
    """Random channel groups for an operand: the salient share of each head or of all channels."""
    salient = min(salient_count(like.shape[-1], spike.salient_ratio), like.shape[-1])
    rank = torch.rand(like.shape, generator=generator, device=like.device).argsort(-1)
    return (rank < salient).to(torch.uint8)


def _set_weight(linear: SpikingLinear, generator: torch.Generator) -> None:
    bits, device = linear.layout.weight_bits, linear.device
    shape = (linear.out_features, linear.in_features)
    codes = torch.randint(2**bits, shape, dtype=torch.uint8, generator=generator, device=device)
    step = _STD * 12**0.5 / 2**bits
    linear.set_weight(
        QuantizedWeight(
            codes,
            torch.full_like(linear.weight_scale, step),
            torch.full_like(linear.weight_zero, 2 ** (bits - 1)),
        ),
        None if linear.bias is None else torch.zeros_like(linear.bias),
    )


def _random_table(like: Tensor, generator: torch.Generator) -> QuantizedTable:
    """Uniform codes of the standard deviation that float tables have."""
    codes = torch.randint(
        *(-127, 128, like.shape), dtype=torch.int8, generator=generator, device=like.device
    )
    scale = torch.full((len(like),), _STD * 3**0.5 / 127, device=like.device)
    return QuantizedTable(codes, scale)


def _devices(device: torch.device) -> list[torch.device]:
    """What `fork_rng` has to restore besides the CPU."""
    return [device] if device.type == "cuda" else []
