"""One decoder block, stage by stage over all calibration windows: what each linear reads and writes.

Converting the linears of a block in the order of execution needs the input of every linear behind
the ones already converted. Running the block anew for each would repeat its attention four times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from snnllm.pipelines.batches import Batches
from snnllm.pipelines.streaming import BlockStream


class _Reached(Exception):
    """The forward pass has come to the input that was wanted."""


class StagedBlock:
    """Runs a decoder block in four stages; the linears may be replaced in between.

    Args:
        block: The block, dense or spiking.
        stream: Where its input hidden states are, and its mask and positions.

    Attributes:
        residual: The residual stream that the next linear writes to, one tensor per batch; behind the
            last one it is the output of the block.
    """

    def __init__(self, block: nn.Module, stream: BlockStream) -> None:
        self.block: Any = block
        self.residual = stream.hidden
        self._stream = stream

    def inputs(self, path: str) -> Batches:
        """Inputs of the linear at `path`, float32 `[b, S, K]` per batch.

        Call in the order of execution, with `write` for the linears that write to the stream.
        """
        block = self.block
        if path.startswith("self_attn") and path != "self_attn.o_proj":
            return self._map(block.input_layernorm)
        if path == "self_attn.o_proj":
            context = self._stream.context

            def attention(x: Tensor) -> Tensor:
                normed = block.input_layernorm(x)
                return _input_of(block.self_attn.o_proj, lambda: block.self_attn(normed, **context))

            return self._map(attention)
        if path == "mlp.down_proj":

            def mlp(x: Tensor) -> Tensor:
                normed = block.post_attention_layernorm(x)
                return _input_of(block.mlp.down_proj, lambda: block.mlp(normed))

            return self._map(mlp)
        return self._map(block.post_attention_layernorm)

    def keys(self) -> Iterator[Tensor]:
        """K behind RoPE of each batch, float32 `[b, H_kv, S, D]`, in front of the first stage."""
        attention, (cos, sin) = self.block.self_attn, self._stream.context["position_embeddings"]
        for hidden in self._stream.hidden:
            with torch.no_grad():
                x = self.block.input_layernorm(hidden.to(self._stream.device))
                key = attention.k_proj(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                turned: Tensor = apply_rotary_pos_emb(key, key, cos, sin)[1]
            yield turned

    def write(self, path: str, inputs: Batches) -> None:
        """Add the output of the linear at `path` to the residual stream."""
        linear = self.block.get_submodule(path)
        with torch.no_grad():
            self.residual = self._stream.keep(
                r.to(self._stream.device) + linear(x.to(self._stream.device))
                for r, x in zip(self.residual, inputs, strict=True)
            )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batches:
        with torch.no_grad():
            return self._stream.keep(function(r.to(self._stream.device)) for r in self.residual)


def _input_of(linear: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What `run` gives to `linear`, without running further."""
    seen: list[Tensor] = []

    def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise _Reached

    handle = linear.register_forward_pre_hook(observe)
    try:
        with suppress(_Reached):
            run()
    finally:
        handle.remove()
    return seen[0]
