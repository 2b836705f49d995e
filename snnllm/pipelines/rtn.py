"""The `rtn` pipeline: saliency masks from calibration windows, round-to-nearest weights.

Method.md sections 2 to 4 without learning: per block, score the channels on the already converted
stream, choose the salient ones, round the weights, push the stream through the spiking block.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from snnllm.config import FLOAT_BITS, MaskScope, SpikeConfig, WeightRange
from snnllm.execution import choose_views
from snnllm.linear import SpikingLinear
from snnllm.pipelines.report import BlockReport, SpikeRateMeter, peak_mib, sqnr_db
from snnllm.pipelines.streaming import (
    INPUT_GROUPS,
    BlockStatistics,
    BlockStream,
    Run,
    linear_of,
    load_block,
    make_spiking,
    restore_block,
)
from snnllm.saliency import allocate, allocate_map
from snnllm.sources import Source
from snnllm.weights import round_to_nearest

_log = logging.getLogger(__name__)


def convert_blocks(
    source: Source, spike: SpikeConfig, run: Run, allocation: Mapping[str, Tensor] | None = None
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """Convert a model block by block.

    Args:
        source: The dense LLaMA.
        spike: The spiking configuration (with `group_steps` for every module in `allocation`).
        run: Windows, seed, device; and what an earlier run has finished.
        allocation: Explicit maps channel -> T, `[K]` integers per full module name; scores decide
            for every module that is not named.

    Yields:
        The spiking block and its report, in order.
    """
    stream = BlockStream(source, run)
    for index in range(source.config.num_hidden_layers):
        saved = run.saved(index)
        if saved is not None:
            block = restore_block(source, index, spike, saved.state, run.device)
            stream.advance(block)
            yield block, saved.report
            continue
        start = time.perf_counter()
        run.on_stage(f"block {index}")
        dense = load_block(source, index, run.device)
        statistics = BlockStatistics(dense, source.config, spike)
        with statistics.observing():
            target = stream.keep(stream.run(dense))
        fill_block(dense, index, source, spike, statistics, run.generator(index), allocation or {})
        with SpikeRateMeter(dense) as rate:
            stream.advance(dense)
        report = BlockReport(
            index, sqnr_db(target, stream.hidden), rate(), time.perf_counter() - start, peak_mib()
        )
        _log.info("%s", report)
        yield dense, report


def fill_block(
    block: nn.Module,
    index: int,
    source: Source,
    spike: SpikeConfig,
    statistics: BlockStatistics,
    generator: torch.Generator,
    allocation: Mapping[str, Tensor],
) -> None:
    """Turn a dense block into a spiking one in place: masks, then rounded weights."""
    dense = {p: linear_of(block, p) for paths in INPUT_GROUPS for p in paths}
    groups = channel_groups(index, spike, statistics, generator, allocation)
    importance: dict[str, Tensor | None] = dict.fromkeys(dense)
    if spike.weight_range is WeightRange.CLIP:
        for paths, inputs in zip(INPUT_GROUPS, statistics.inputs, strict=True):
            importance |= dict.fromkeys(paths, inputs.second_moment.diagonal())
    attention = make_spiking(block, index, source.config, spike)
    block.to(dense[INPUT_GROUPS[0][0]].weight.device)
    for path, linear in dense.items():
        module = block.get_submodule(path)
        if isinstance(module, SpikingLinear):
            fill_linear(module, linear, groups[path], importance[path])
    choose_views(block)
    if attention is not None:
        key, value = statistics.kv.scores(generator)
        steps = len(spike.kv_steps)
        attention.set_channel_groups(
            allocate(key, spike.salient_ratio, steps), allocate(value, spike.salient_ratio, steps)
        )


def channel_groups(
    index: int,
    spike: SpikeConfig,
    statistics: BlockStatistics,
    generator: torch.Generator,
    allocation: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Saliency groups, uint8 `[K]`, of every linear of a block by its path in the block."""
    groups: dict[str, Tensor] = {}
    for number, paths in enumerate(INPUT_GROUPS):
        scores = statistics.inputs[number].scores(statistics.weights(number), generator)
        if spike.mask_scope is MaskScope.INPUT:
            scores = [torch.stack(scores).sum(0)] * len(scores)
        for path, score in zip(paths, scores, strict=True):
            name = f"model.layers.{index}.{path}"
            if name in allocation:
                groups[path] = allocate_map(allocation[name])[0]
            else:
                groups[path] = allocate(score, spike.salient_ratio, len(spike.steps_of(name)))
    return groups


def fill_linear(
    module: SpikingLinear, dense: nn.Linear, group: Tensor, importance: Tensor | None = None
) -> None:
    """Store masks and rounded weights of one linear.

    Args:
        module: The empty spiking linear.
        dense: Its float original.
        group: Saliency groups of the input channels, uint8 `[K]`.
        importance: Mean square of each input channel `[K]` for the clip search, or None.

    Raises:
        ValueError: The weight is not finite; names the layer.
    """
    weight = dense.weight.detach().float()
    bias = None if dense.bias is None else dense.bias.detach()
    module.set_channel_group(group)
    layout = module.layout
    if layout.weight_bits == FLOAT_BITS:
        module.set_float_weight(weight, bias)
        return
    try:
        order = module.order
        h = None if importance is None else importance[order]
        quantized = round_to_nearest(weight[:, order], layout.weight_bits, module.weight_groups, h)
    except ValueError as error:
        raise ValueError(f"{module.name}: {error}") from error
    module.set_weight(quantized, bias)
