"""The basis of the `rotated` pipeline: which channels are salient before the rotation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from snnllm.attention import SpikingLlamaAttention
from snnllm.checks import check_rotates
from snnllm.config import Score, SpikeConfig
from snnllm.pipelines.streaming import BlockStatistics, BlockStream, Run, load_block
from snnllm.saliency import first_channels, linear_score
from snnllm.sources import Source
from snnllm.transforms import (
    RotatedSource,
    SignedOrder,
    group_rotation,
    pair_signs,
    salient_count,
    sorted_groups,
)


@dataclass(frozen=True)
class Basis:
    """Everything that is rotated, and which channels are salient before the rotation.

    Attributes:
        residual: Salient channels of the residual stream, uint8 `[hidden]`.
        keys: Salient channels of K after RoPE, one uint8 `[H_kv, D]` per layer.
        values: Likewise of V.
        down: Salient channels of the down_proj input, one uint8 `[intermediate]` per layer.
    """

    residual: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    down: tuple[Tensor, ...]

    def fill(self, attention: SpikingLlamaAttention, index: int) -> None:
        """Give the attention of a block its channel groups, and the order that leads to them."""
        keys, values = self.keys[index], self.values[index]
        if attention.qk_rotation is not None:
            attention.qk_rotation.sort(keys)
        attention.set_channel_groups(sorted_groups(keys), sorted_groups(values))

    def groups(self, path: str, channels: int, index: int) -> Tensor:
        """Channel groups of a linear's input in the rotated basis, uint8 `[K]`."""
        if path == "mlp.down_proj":
            return sorted_groups(self.down[index])
        if path == "self_attn.o_proj":
            heads = sorted_groups(self.values[index])
            shared = channels // heads.numel()  # query heads of one KV head
            return heads.repeat_interleave(shared, dim=0).flatten()
        return sorted_groups(self.residual)


def find_basis(source: Source, spike: SpikeConfig, run: Run) -> Basis:
    """Score the channels on the float model.

    The residual score of a channel is its variance after RMSNorm times the squared column norms of
    the linears behind (Gauss-Newton), averaged over all norms; K, V and the down_proj input use the
    configured score. Variances, because the mean is taken off as an offset.
    """
    check_rotates(source, spike)
    stream, device = BlockStream(source, run), run.device
    residual = torch.zeros(source.config.hidden_size, device=device)
    keys, values, down = [], [], []
    ratio = spike.salient_ratio
    for index in range(source.config.num_hidden_layers):
        run.on_stage(f"scores of block {index}")
        block = load_block(source, index, device)
        statistics = BlockStatistics(block, source.config, spike)
        with statistics.observing():
            stream.advance(block)
        for group in (0, 2):
            weight = torch.cat(list(statistics.weights(group)))
            covariance = statistics.inputs[group].covariance
            score = covariance.diagonal() * weight.square().sum(0)
            residual += score / score.sum()
        generator = run.generator(index, 1)
        key, value = statistics.kv.scores(generator)
        count = salient_count(key.shape[1], ratio)
        keys.append(first_channels(key, count))
        values.append(first_channels(value, count))
        score = _down_score(statistics, spike.score, generator)
        down.append(first_channels(score, salient_count(score.numel(), ratio)).cpu())
    mask = first_channels(residual, salient_count(residual.numel(), ratio))
    return Basis(mask.cpu(), tuple(keys), tuple(values), tuple(down))


def _down_score(statistics: BlockStatistics, score: Score, generator: torch.Generator) -> Tensor:
    inputs, weights = statistics.inputs[3], statistics.weights(3)
    if score is Score.ABS:
        return inputs.scores(weights, generator)[0]
    return linear_score(score, weights[0], inputs.covariance, inputs.max_abs, generator)


def rotate_source(source: Source, basis: Basis, generator: torch.Generator | None) -> RotatedSource:
    """Fold the residual and value rotations, and what goes before the online ones, into the weights.

    Without a generator, permute only.
    """
    residual = group_rotation(basis.residual, generator)
    values = [
        torch.stack([group_rotation(head, generator) for head in layer]) for layer in basis.values
    ]
    inner = [SignedOrder.of_groups(layer, generator) for layer in basis.down]
    heads = [pair_signs(len(layer), layer.shape[1], generator) for layer in basis.keys]
    return RotatedSource(source, residual, values, inner, heads)
