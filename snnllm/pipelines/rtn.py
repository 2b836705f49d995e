"""The `rtn` pipeline: saliency masks from calibration windows, round-to-nearest weights.

Method.md sections 2 to 4 without learning: per block, score the channels on the already converted
stream, choose the salient ones, round the weights, push the stream through the spiking block.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snnllm.attention import SPIKING_ATTENTION, SpikingLlamaAttention
from snnllm.config import FLOAT_BITS, MaskScope, SpikeConfig, WeightRange
from snnllm.execution import spiking_modules
from snnllm.linear import SpikingLinear
from snnllm.modeling import spike_block
from snnllm.pipelines.streaming import INPUT_GROUPS, BlockStatistics, BlockStream, load_block
from snnllm.saliency import allocate, allocate_map
from snnllm.sources import Source
from snnllm.weights import round_to_nearest

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlockReport:
    """What converting one block did.

    Attributes:
        index: Block number.
        sqnr_db: Signal to quantisation noise of the block output, dB, against the float block on the
            same (converted) input.
        spike_rate: Signed events per neuron and possible event, `mean |q - z| / qmax`, in [0, 1].
        seconds: Wall time of the block.
        peak_mib: Peak resident memory of the process so far, MiB.
    """

    index: int
    sqnr_db: float
    spike_rate: float
    seconds: float
    peak_mib: float


def convert_blocks(
    source: Source,
    spike: SpikeConfig,
    windows: Tensor,
    seed: int,
    device: torch.device,
    allocation: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """Convert a model block by block.

    Args:
        source: The dense LLaMA.
        spike: The spiking configuration (with `group_steps` for every module in `allocation`).
        windows: Calibration token ids `[n, S]`.
        seed: Seed of the `random` score.
        device: Where a block runs.
        allocation: Explicit maps channel -> T, `[K]` integers per full module name; scores decide
            for every module that is not named.

    Yields:
        The spiking block and its report, in order.
    """
    generator = torch.Generator().manual_seed(seed)
    stream = BlockStream(source, windows, device)
    for index in range(source.config.num_hidden_layers):
        start = time.perf_counter()
        block = load_block(source, index, device)
        statistics = BlockStatistics(block, source.config, spike)
        with statistics.observing():
            target = list(stream.run(block))
        fill_block(block, index, source, spike, statistics, generator, allocation or {})
        with SpikeRateMeter(block) as rate:
            converted = list(stream.run(block))
        stream.hidden = converted
        report = BlockReport(
            index, sqnr_db(target, converted), rate(), time.perf_counter() - start, peak_mib()
        )
        _log.info(
            "block %d: SQNR %.2f dB, spike rate %.4f, %.1f s, peak %.0f MiB",
            *(report.index, report.sqnr_db, report.spike_rate, report.seconds, report.peak_mib),
        )
        yield block, report


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
    dense = {p: block.get_submodule(p) for paths in INPUT_GROUPS for p in paths}
    groups = channel_groups(index, spike, statistics, generator, allocation)
    importance: dict[str, Tensor | None] = dict.fromkeys(dense)
    if spike.weight_range is WeightRange.CLIP:
        for paths, inputs in zip(INPUT_GROUPS, statistics.inputs, strict=True):
            importance |= dict.fromkeys(paths, inputs.second_moment.diagonal())
    spike_block(block, index, source.config, spike)
    block.to(next(iter(dense.values())).weight.device)
    for path, linear in dense.items():
        module = block.get_submodule(path)
        if isinstance(module, SpikingLinear):
            assert isinstance(linear, nn.Linear)
            fill_linear(module, linear, groups[path], importance[path])
    attention = block.self_attn
    attention.config._attn_implementation = "sdpa"
    if isinstance(attention, SpikingLlamaAttention):
        attention.config._attn_implementation = SPIKING_ATTENTION
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
        quantized = round_to_nearest(weight[:, order], layout.weight_bits, layout.group_size, h)
    except ValueError as error:
        raise ValueError(f"{module.name}: {error}") from error
    module.set_weight(quantized, bias)


class SpikeRateMeter:
    """Measure the mean spike rate of a block's linears while it runs; calling it gives the rate."""

    def __init__(self, block: nn.Module) -> None:
        self._modules = [m for _, m in spiking_modules(block) if isinstance(m, SpikingLinear)]
        self._events = self._possible = 0.0
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Callable[[], float]:
        for module in self._modules:
            if module.layout.activation_bits != FLOAT_BITS:
                self._hooks.append(module.register_forward_pre_hook(self._count))
        return lambda: self._events / self._possible if self._possible else 0.0

    def __exit__(self, *exc: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _count(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, SpikingLinear)
        if self._possible > 0 and module is self._modules[0]:
            self.__exit__()  # one window is enough
            return
        encoder = module.encoder
        rows = inputs[0].reshape(-1, module.in_features)
        self._events += float(encoder.centre(encoder.encode(rows)).abs().sum())
        capacity = torch.tensor(encoder.capacities)[encoder.channel_group.long().cpu()].sum()
        self._possible += float(capacity) * rows.shape[0]


def sqnr_db(target: list[Tensor], actual: list[Tensor]) -> float:
    """`10 log10(sum target^2 / sum (target - actual)^2)` in dB over all windows."""
    signal = sum(float(t.double().square().sum()) for t in target)
    noise = sum(float((t - a).double().square().sum()) for t, a in zip(target, actual, strict=True))
    return float("inf") if noise == 0 else 10.0 * float(torch.log10(torch.tensor(signal / noise)))


def peak_mib() -> float:
    """Peak resident memory of this process, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024.0**2 if sys.platform == "darwin" else 1024.0)
