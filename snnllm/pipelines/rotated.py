"""The `rotated` pipeline: rotation inside the saliency groups, then GPTQ on the encoded inputs.

1. A pass of the float model scores the channels of the residual stream (one mask for the whole
   model), of the values and keys of each head, and of the inputs of down_proj.
2. One residual basis, `permutation x blockdiag(rotations)`, and a basis per value head are folded
   into the weights (`RotatedSource`); keys, queries and the down_proj input are rotated online.
3. Block by block, input by input: the spiking inputs of everything already converted give the
   Hessian for GPTQ with a clip search.

No training. The salient groups have sizes with Hadamard matrices (`transforms.salient_count`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neurons import SpikeEncoder
from snnllm.attention import SPIKING_ATTENTION, SpikingLlamaAttention
from snnllm.config import FLOAT_BITS, Rotation, Score, SpikeConfig
from snnllm.gptq import gptq
from snnllm.modeling import spike_block, spiking_linear
from snnllm.pipelines.report import BlockReport, SpikeRateMeter, peak_mib, sqnr_db
from snnllm.pipelines.streaming import (
    INPUT_GROUPS,
    BlockStatistics,
    BlockStream,
    linear_of,
    load_block,
)
from snnllm.saliency import first_channels
from snnllm.sources import Source
from snnllm.transforms import (
    OnlineRotation,
    RotatedSource,
    group_rotation,
    salient_count,
    sorted_groups,
)
from snnllm.weights import QuantizedWeight

_log = logging.getLogger(__name__)


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


def find_basis(source: Source, spike: SpikeConfig, windows: Tensor, device: torch.device) -> Basis:
    """Score the channels on the float model.

    The residual score of a channel is its mean square after RMSNorm, averaged over all norms, times
    the squared column norms of the linears behind (Gauss-Newton); K, V and the down_proj input use
    the configured score.
    """
    stream = BlockStream(source, windows, device)
    residual = torch.zeros(source.config.hidden_size, device=device)
    keys, values, down = [], [], []
    generator = torch.Generator().manual_seed(0)
    ratio = spike.salient_ratio
    for index in range(source.config.num_hidden_layers):
        block = load_block(source, index, device)
        statistics = BlockStatistics(block, source.config, spike)
        with statistics.observing():
            stream.hidden = list(stream.run(block))
        for group in (0, 2):
            columns = torch.stack([w.square().sum(0) for w in statistics.weights(group)]).sum(0)
            score = statistics.inputs[group].second_moment.diagonal() * columns
            residual += score / score.sum()
        key, value = statistics.kv.scores(generator)
        count = salient_count(key.shape[1], ratio)
        keys.append(first_channels(key, count))
        values.append(first_channels(value, count))
        score = statistics.inputs[3].scores(statistics.weights(3), generator)[0]
        down.append(first_channels(score, salient_count(score.numel(), ratio)))
    mask = first_channels(residual, salient_count(residual.numel(), ratio))
    return Basis(mask.cpu(), tuple(keys), tuple(values), tuple(d.cpu() for d in down))


def rotated_config(spike: SpikeConfig) -> SpikeConfig:
    """The configuration of a rotated model."""
    if not spike.encodes_activations:
        raise ValueError(
            "The rotated pipeline needs spiking activations; choose activation bits <= 8."
        )
    return dataclasses.replace(spike, rotation=Rotation.GROUPS, score=Score(spike.score))


def rotate_source(source: Source, basis: Basis, generator: torch.Generator) -> RotatedSource:
    """Fold the residual and value rotations into the weights."""
    residual = group_rotation(basis.residual, generator)
    values = [
        torch.stack([group_rotation(head, generator) for head in layer]) for layer in basis.values
    ]
    return RotatedSource(source, residual, values)


def convert_blocks(
    source: Source,
    basis: Basis,
    spike: SpikeConfig,
    windows: Tensor,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """Convert block by block.

    Args:
        source: The rotated model (`rotate_source`).
        basis: The masks behind the rotation.
        spike: The configuration, with `rotation="groups"`.
        windows: Calibration token ids `[n, S]`.
        generator: Source of the online rotations.
        device: Where a block runs.

    Yields:
        The spiking block and its report, in order.
    """
    stream = BlockStream(source, windows, device)
    for index in range(source.config.num_hidden_layers):
        start = time.perf_counter()
        block = load_block(source, index, device)
        target = list(stream.run(block))
        convert_block(block, index, source, basis, spike, stream, generator)
        with SpikeRateMeter(block) as rate:
            converted = list(stream.run(block))
        stream.hidden = converted
        report = BlockReport(
            index, sqnr_db(target, converted), rate(), time.perf_counter() - start, peak_mib()
        )
        _log.info("%s", report)
        yield block, report


def convert_block(
    block: nn.Module,
    index: int,
    source: Source,
    basis: Basis,
    spike: SpikeConfig,
    stream: BlockStream,
    generator: torch.Generator,
) -> None:
    """Make one block spiking in place: attention, then the linears input by input."""
    dense = {p: linear_of(block, p) for paths in INPUT_GROUPS for p in paths}
    device = next(iter(dense.values())).weight.device
    attention_only = dataclasses.replace(
        spike, modules_to_not_convert=(*spike.modules_to_not_convert, *dense)
    )
    # A copy: the attention writes its implementation into its config, the source stays dense.
    spike_block(block, index, deepcopy(source.config), attention_only)
    attention: Any = block.self_attn
    encoded = isinstance(attention, SpikingLlamaAttention)
    attention.config._attn_implementation = SPIKING_ATTENTION if encoded else "sdpa"
    if encoded:
        rotation = [group_rotation(head, generator) for head in basis.keys[index]]
        attention.qk_rotation.copy_(torch.stack(rotation))
        attention.set_channel_groups(
            torch.stack([sorted_groups(h) for h in basis.keys[index]]),
            torch.stack([sorted_groups(h) for h in basis.values[index]]),
        )
    block.to(device)
    for paths in INPUT_GROUPS:
        kept = spike.modules_to_not_convert
        converted = [p for p in paths if not f"model.layers.{index}.{p}".endswith(kept)]
        if converted:
            _convert_input(block, index, converted, basis, spike, stream, generator)


def _convert_input(
    block: nn.Module,
    index: int,
    paths: list[str],
    basis: Basis,
    spike: SpikeConfig,
    stream: BlockStream,
    generator: torch.Generator,
) -> None:
    """Convert the linears that share one input, on the spikes they will really see."""
    prefix = f"model.layers.{index}"
    dense = [linear_of(block, p) for p in paths]
    device = dense[0].weight.device
    modules = [
        spiking_linear(d, spike, f"{prefix}.{p}").to(device)
        for d, p in zip(dense, paths, strict=True)
    ]
    first = modules[0]
    rotation = first.rotation
    if rotation is not None:
        rotation.randomise(basis.down[index].to(device), generator)
    groups = _rotated_groups(paths[0], first.in_features, index, basis)
    if len(first.layout.steps) == 1:
        groups = torch.zeros_like(groups)
    for module in modules:
        module.set_channel_group(groups)
        module.rotation = rotation
    hessian = encoded_moment(block, paths[0], first.encoder, rotation, stream)
    weight = torch.cat([linear.weight.detach().float() for linear in dense])
    if rotation is not None:
        weight = weight @ rotation.matrix()
    if first.layout.weight_bits != FLOAT_BITS:
        order = first.order
        h = hessian[order][:, order]
        weight = weight[:, order]
        quantized = gptq(weight, h, first.layout.weight_bits, first.layout.group_size, first.name)
    start = 0
    for path, module, linear in zip(paths, modules, dense, strict=True):
        rows = slice(start, start + module.out_features)
        start = rows.stop
        bias = None if linear.bias is None else linear.bias.detach()
        if module.layout.weight_bits == FLOAT_BITS:
            module.set_float_weight(weight[rows], bias)
        else:
            module.set_weight(QuantizedWeight(*(part[rows] for part in quantized)), bias)
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, module)


def _rotated_groups(path: str, channels: int, index: int, basis: Basis) -> Tensor:
    """Channel groups of a linear's input in the rotated basis, uint8 `[K]`."""
    if path == "mlp.down_proj":
        return sorted_groups(basis.down[index])
    if path == "self_attn.o_proj":
        heads = torch.stack([sorted_groups(h) for h in basis.values[index]])
        shared = channels // heads.numel()  # query heads of one KV head
        return heads.repeat_interleave(shared, dim=0).flatten()
    return sorted_groups(basis.residual)


class _Reached(Exception):
    """The forward pass has come to the input that was wanted."""


def encoded_moment(
    block: nn.Module,
    path: str,
    encoder: SpikeEncoder,
    rotation: OnlineRotation | None,
    stream: BlockStream,
) -> Tensor:
    """Weighted mean of `x_hat x_hat^T` of one linear's encoded input over the stream, `[K, K]`.

    Every token counts by `token_weights`.
    """
    channels = encoder.channel_group.numel()
    device = encoder.channel_group.device
    moment = torch.zeros(channels, channels, device=device)
    current, tokens = 0, 0.0

    def observe(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal tokens
        rows = inputs[0].reshape(-1, channels)
        if rotation is not None:
            rows = rotation(rows)
        encoded = encoder.decode(encoder.encode(rows))
        weights = token_weights(path, stream.hidden[current]).to(device)
        moment.addmm_((encoded * weights.unsqueeze(1)).T, encoded)
        tokens += float(weights.sum())
        raise _Reached

    handle = linear_of(block, path).register_forward_pre_hook(observe)
    try:
        for current in range(len(stream.hidden)):
            with suppress(_Reached):
                stream.run_one(block, current)
    finally:
        handle.remove()
    return moment / tokens


def token_weights(path: str, hidden: Tensor) -> Tensor:
    """How much an error of a linear's output matters at each token, `[tokens]`.

    What o_proj and down_proj write is divided by the size of the residual stream at the next norm. A
    few tokens have massive activations there; unweighted, they alone would decide how the weights
    are rounded, though an error at them is the one that matters least.

    Args:
        path: The linear in its block.
        hidden: Residual stream in front of the block, `[1, tokens, hidden]`.
    """
    mean_square = hidden.float().square().mean(-1).flatten()
    if path not in ("self_attn.o_proj", "mlp.down_proj"):
        return torch.ones_like(mean_square)
    return 1.0 / (mean_square + 1e-6 * mean_square.mean() + 1e-12)
