"""Block-by-block calibration: hidden states stream through one decoder block at a time.

Only one block's weights are in memory. The converted stream is the input of the next block, so that
every saliency score and every report is taken on what the spiking model will really see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from snnllm.attention import (
    CALIBRATION_ATTENTION,
    SPIKING_ATTENTION,
    SpikingLlamaAttention,
    register_attention,
)
from snnllm.config import SpikeConfig
from snnllm.modeling import spike_block
from snnllm.saliency import InputStatistics, KeyValueStatistics
from snnllm.sources import Source

INPUT_GROUPS: tuple[tuple[str, ...], ...] = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
"""Linears of a block that read the same input."""
_SCORE_BYTES = 1 << 30
"""Attention scores of a batch of calibration windows on a GPU."""
_BATCH_TOKENS = 1 << 14


class BlockStream:
    """The hidden states of all calibration windows, in front of some block.

    Args:
        source: The dense model; gives the embedding.
        windows: Token ids `[n, S]`.
        device: Where blocks run.

    Attributes:
        hidden: One float32 tensor `[b, S, hidden]` per batch of windows, kept on `store`.
        store: Where hidden states wait: the device if they fit there easily, else the CPU.
    """

    def __init__(self, source: Source, windows: Tensor, device: torch.device) -> None:
        register_attention()
        self.config, self.device = source.config, device
        table = source.tensor("model.embed_tokens.weight")
        length = windows.shape[1]
        self.store = _store(device, windows.numel(), self.config)
        self.hidden = [
            nn.functional.embedding(batch, table).float().to(self.store)
            for batch in windows.split(_batch_size(device, length, self.config))
        ]
        position = torch.arange(length, device=device).unsqueeze(0)
        rotary = LlamaRotaryEmbedding(self.config).to(device)
        self._rope = rotary(self.hidden[0].to(device), position)
        blocked = torch.full((length, length), torch.finfo(torch.float32).min, device=device)
        self._mask = blocked.triu(1).view(1, 1, length, length)

    def run(self, block: nn.Module) -> Iterator[Tensor]:
        """Outputs of `block` for each batch, `[b, S, hidden]` on `store`; `hidden` stays."""
        for batch in range(len(self.hidden)):
            yield self.run_one(block, batch)

    def run_one(self, block: nn.Module, batch: int) -> Tensor:
        """Output of `block` for one batch of windows, `[b, S, hidden]` on `store`."""
        with torch.no_grad():
            out = block(self.hidden[batch].to(self.device), **self.context, use_cache=False)
        hidden: Tensor = out[0] if isinstance(out, tuple) else out
        return hidden.to(self.store)

    @property
    def context(self) -> dict[str, Any]:
        """Causal mask and position embeddings, as a decoder block and its attention take them."""
        return {"attention_mask": self._mask, "position_embeddings": self._rope}


def _batch_size(device: torch.device, length: int, config: LlamaConfig) -> int:
    """Windows that run together: one on the CPU, whose caches are small."""
    scores = int(config.num_attention_heads) * length**2 * 4
    if device.type == "cpu":
        return 1
    return max(1, min(_SCORE_BYTES // scores, _BATCH_TOKENS // length))


def _store(device: torch.device, tokens: int, config: LlamaConfig) -> torch.device:
    """The device, if all that a pipeline keeps between two passes takes a third of its memory."""
    if device.type != "cuda":
        return torch.device("cpu")
    needed = tokens * 4 * (8 * config.hidden_size + 2 * config.intermediate_size)
    fits = needed < torch.cuda.mem_get_info(device)[0] // 3
    return device if fits else torch.device("cpu")


def load_block(source: Source, index: int, device: torch.device) -> LlamaDecoderLayer:
    """Decoder block `index` in float32, with attention that can be observed.

    Raises:
        ValueError: A weight is NaN or infinite (named), or the shapes do not fit the config.
    """
    config = deepcopy(source.config)
    config._attn_implementation = CALIBRATION_ATTENTION
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, index)
    state = {name: tensor.float() for name, tensor in source.block(index).items()}
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"model.layers.{index}.{name} holds NaN or infinite values; the source is broken."
            )
    try:
        block.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"Block {index} of {source.name} does not fit its config: {error}"
        ) from error
    return block.to(device).eval()


def make_spiking(
    block: nn.Module, index: int, config: LlamaConfig, spike: SpikeConfig
) -> SpikingLlamaAttention | None:
    """Replace the modules of a dense block by empty spiking ones; the attention, if it is one."""
    # A copy: the attention writes its implementation into its config, the source stays dense.
    spike_block(block, index, deepcopy(config), spike)
    attention: Any = block.self_attn
    encoded = isinstance(attention, SpikingLlamaAttention)
    attention.config._attn_implementation = SPIKING_ATTENTION if encoded else "sdpa"
    return attention if encoded else None


def linear_of(block: nn.Module, path: str) -> nn.Linear:
    """The dense linear at `path` of a block."""
    module = block.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


class BlockStatistics:
    """Streaming statistics of one dense block: each linear input, and K and V.

    Attributes:
        inputs: Statistics per entry of `INPUT_GROUPS`.
        kv: Statistics of K and V.
    """

    def __init__(self, block: LlamaDecoderLayer, config: LlamaConfig, spike: SpikeConfig) -> None:
        self._block = block
        self.inputs = [
            InputStatistics([linear_of(block, p).weight for p in paths], spike.score)
            for paths in INPUT_GROUPS
        ]
        head_dim = block.self_attn.head_dim
        self.kv = KeyValueStatistics(config.num_key_value_heads, head_dim, spike.score)

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Collect from everything that runs through the block inside the `with` block."""
        attention: Any = self._block.self_attn
        with ExitStack() as stack:
            for paths, statistics in zip(INPUT_GROUPS, self.inputs, strict=True):
                hook = linear_of(self._block, paths[0]).register_forward_pre_hook(_feed(statistics))
                stack.callback(hook.remove)
            attention.attention_observer = self.kv.update
            try:
                yield
            finally:
                del attention.attention_observer

    def weights(self, group: int) -> Sequence[Tensor]:
        """Float weights of the linears of one input group."""
        return [linear_of(self._block, p).weight.detach() for p in INPUT_GROUPS[group]]


def _feed(statistics: InputStatistics) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        statistics.update(inputs[0])

    return hook
