"""Block-by-block calibration: hidden states stream through one decoder block at a time.

Only one block's weights are in memory. The converted stream is the input of the next block, so that
every saliency score and every report is taken on what the spiking model will really see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from snnllm.attention import (
    SPIKING_ATTENTION,
    SpikingLlamaAttention,
    register_attention,
)
from snnllm.config import SpikeConfig
from snnllm.execution import choose_views
from snnllm.float_attention import CALIBRATION_ATTENTION
from snnllm.modeling import spike_block
from snnllm.pipelines.batches import Batches, DiskBatches
from snnllm.pipelines.report import BlockReport
from snnllm.precision import FLOAT32_BUFFERS
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
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SavedBlock:
    """A block that an earlier run has finished.

    Attributes:
        state: Its tensors as stored, names relative to the block.
        report: What was reported of it.
    """

    state: dict[str, Tensor]
    report: BlockReport


@dataclass(frozen=True)
class Run:
    """What the pipelines need besides the model and its configuration.

    Attributes:
        windows: Calibration token ids `[n, S]`.
        seed: Seed of everything random.
        device: Where a block runs.
        spill: Folder for activations that do not fit into memory; None keeps them there.
        saved: The finished block of an index, or None if it is still to be converted.
        on_stage: Told what comes next, as "block 3: o_proj", for progress.
    """

    windows: Tensor
    seed: int = 0
    device: torch.device = _CPU
    spill: Path | None = None
    saved: Callable[[int], SavedBlock | None] = lambda index: None
    on_stage: Callable[[str], None] = lambda stage: None

    def generator(self, *where: int) -> torch.Generator:
        """Random numbers of one place (a block, say): the same ones after an interruption."""
        state = np.random.SeedSequence([self.seed, *where]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]) >> 1)


class BlockStream:
    """The hidden states of all calibration windows, in front of some block.

    Args:
        source: The dense model; gives the embedding.
        run: Windows, device, and where activations go that do not fit.

    Attributes:
        hidden: One float32 tensor `[b, S, hidden]` per batch of windows, kept on `store`.
        store: Where hidden states wait: the device if they fit there easily, else the CPU.
    """

    def __init__(self, source: Source, run: Run) -> None:
        register_attention()
        device, windows = run.device, run.windows
        self.config, self.device, self._spill = source.config, device, run.spill
        table = source.tensor("model.embed_tokens.weight")
        length = windows.shape[1]
        self.store = torch.device("cpu")
        if run.spill is None:
            self.store = _store(device, windows.numel(), self.config)
        self.hidden = self.keep(
            nn.functional.embedding(batch, table).float()
            for batch in windows.split(_batch_size(device, length, self.config))
        )
        position = torch.arange(length, device=device).unsqueeze(0)
        rotary = LlamaRotaryEmbedding(self.config).to(device)
        self._rope = rotary(self.hidden[0].to(device), position)
        blocked = torch.full((length, length), torch.finfo(torch.float32).min, device=device)
        self._mask = blocked.triu(1).view(1, 1, length, length)

    def keep(self, tensors: Iterable[Tensor]) -> Batches:
        """Hold activations, one tensor per batch, until they are needed: in memory or in a file."""
        if self._spill is not None:
            return DiskBatches(self._spill, tensors)
        return [tensor.to(self.store) for tensor in tensors]

    def advance(self, block: nn.Module) -> None:
        """Move behind `block`, a batch at a time."""
        for batch in range(len(self.hidden)):
            self.hidden[batch] = self.run_one(block, batch)

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
        ValueError: The shapes do not fit the config.
    """
    config = deepcopy(source.config)
    config._attn_implementation = CALIBRATION_ATTENTION
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, index)
    state = {name: tensor.float() for name, tensor in source.block(index).items()}
    try:
        block.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"Block {index} of {source.name} does not fit its config: {error}"
        ) from error
    return block.to(device).eval()


def round_to_storage(block: nn.Module, dtype: torch.dtype) -> None:
    """Round what a checkpoint stores in the dtype of the model, in place, before the block runs."""
    if dtype == torch.float32:  # nothing to round; the tensors may be those of the source
        return
    for name, tensor in block.state_dict().items():
        tensor.copy_(stored(name, tensor, dtype))


def stored(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms and biases in the model's dtype; integers, scales and offsets as they are."""
    if not tensor.is_floating_point() or name.rpartition(".")[2].startswith(FLOAT32_BUFFERS):
        return tensor
    return tensor.to(dtype)


def restore_block(
    source: Source, index: int, spike: SpikeConfig, state: dict[str, Tensor], device: torch.device
) -> nn.Module:
    """The spiking block that `state` was saved from; it computes the same bits.

    Raises:
        RuntimeError: The state belongs to another configuration.
    """
    block: nn.Module = load_block(source, index, _CPU)
    make_spiking(block, index, source.config, spike)
    # Assigned, not copied: what is there now may be the tensors of the source.
    values = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    block.load_state_dict(values, assign=True)
    choose_views(block)
    block.to(device).eval()
    return block


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
