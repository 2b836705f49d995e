"""The `gptq` pipeline: weights as ternary spike trains, linear layers that only add (method.md section 6).

Block by block, input by input, on what is converted already: second moments of the inputs (of their
spikes, where activations are encoded), a second-order score of the columns, steps for a budget, and
the GPTQ sweep. Activations stay float (`A16`) or are encoded as by the pipeline `rtn`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnllm.checks import check_unfilled, linear_names
from snnllm.config import Score, SpikeConfig
from snnllm.execution import choose_views
from snnllm.modeling import spiking_linear
from snnllm.pipelines.fitting import Moments
from snnllm.pipelines.gptq_options import GptqOptions as GptqOptions
from snnllm.pipelines.gptq_options import check_budget
from snnllm.pipelines.inputs import InputData, bias_of, each_input, stage_of
from snnllm.pipelines.report import (
    BlockReport,
    SpikeRateMeter,
    device_mib,
    peak_mib,
    sqnr_db,
    with_weight_columns,
)
from snnllm.pipelines.rtn import channel_groups
from snnllm.pipelines.stages import StagedBlock
from snnllm.pipelines.streaming import (
    INPUT_GROUPS,
    BlockStatistics,
    BlockStream,
    Run,
    linear_of,
    load_block,
    make_spiking,
    restore_block,
    round_to_storage,
)
from snnllm.saliency import allocate, linear_score
from snnllm.sources import Source
from snnllm.step_allocation import allocate_salient, allocate_steps
from snnllm.ternary import column_score, ternary_gptq
from snnllm.ternary_linear import TernaryLinear

_log = logging.getLogger(__name__)


Encode = Callable[[str, nn.Linear, Tensor, Tensor], nn.Module]
"""From name, linear, wanted weight `[N, K]` and second moment of the inputs `[K, K]` to its module."""


def start(
    source: Source,
    spike: SpikeConfig,
    run: Run,
    options: GptqOptions,
    allocation: Mapping[str, Tensor],
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """The blocks as they are converted.

    Raises:
        ValueError: The configuration has no ternary weights, or something of another pipeline.
    """
    check_ternary(source, spike, options)
    check_unfilled(spike, "rotated")
    if allocation and not spike.encodes_activations:
        raise ValueError(
            "allocation gives steps to the channels of activations, which are float here; steps of "
            "weight columns go into GptqOptions(steps=...)."
        )
    return convert_blocks(source, spike, run, options, allocation)


def check_ternary(source: Source, spike: SpikeConfig, options: GptqOptions) -> None:
    """Refuse what the weights cannot be encoded with, before any work is done.

    Raises:
        ValueError: No budget of steps, one that cannot be met, or a map that fits no linear.
    """
    check_budget(spike, options)
    known = linear_names(source)
    for name, steps in options.steps.items():
        if name not in known:
            raise ValueError(f"steps names {name!r}, which is no linear; see {known[0]!r}.")
        channels = source.tensor(f"{name}.weight").shape[1]
        if len(steps) != channels:
            raise ValueError(
                f"steps[{name!r}] needs one step count for each of {channels} channels, got "
                f"{len(steps)}."
            )


def allocate_with(score: Tensor, spike: SpikeConfig, options: GptqOptions) -> Tensor:
    """Steps of every column, int64 `[K]`, by its score and the policy of the options."""
    assert spike.mean_steps is not None
    if options.salient_steps is None:
        return allocate_steps(score, spike.mean_steps)
    return allocate_salient(score, spike.mean_steps, options.salient_steps)


def convert_blocks(
    source: Source,
    spike: SpikeConfig,
    run: Run,
    options: GptqOptions,
    allocation: Mapping[str, Tensor] | None = None,
    encode: Encode | None = None,
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """Convert block by block.

    Args:
        source: The dense LLaMA.
        spike: The spiking configuration.
        run: Windows, seed, device; and what an earlier run has finished.
        options: How the weights are encoded.
        allocation: Explicit maps channel -> T of activations, per full module name.
        encode: What becomes of a linear; None for ternary spike trains. Other quantisers run in the
            same loop (`snnllm.baselines`), for comparison.

    Yields:
        The converted block and its report, in order; its SQNR is that of the hidden states behind it,
        against the float model.
    """
    stream, target = BlockStream(source, run), BlockStream(source, run)
    for index in range(source.config.num_hidden_layers):
        saved, begin = run.saved(index), time.perf_counter()
        dense = load_block(source, index, run.device)
        if saved is not None:
            known = with_weight_columns(spike, [saved.report])
            block: Any = restore_block(source, index, known, saved.state, run.device)
            stream.advance(block)
            target.advance(dense)
            yield block, saved.report
            continue
        block, generator = load_block(source, index, run.device), run.generator(index)
        groups = _spike_attention(block, dense, index, source, spike, stream, generator, allocation)
        job = _Job(spike, options, generator)
        floating = StagedBlock(dense, target)
        for paths, data in each_input(StagedBlock(block, stream), floating, index, spike):
            run.on_stage(stage_of(index, paths))
            _convert_input(block, index, paths, data, groups, job, encode)
        round_to_storage(block, source.tensor("model.norm.weight").dtype)
        with SpikeRateMeter(block) as rate:
            stream.advance(block)
        target.hidden = floating.residual
        report = BlockReport(
            index,
            sqnr_db(target.hidden, stream.hidden),
            rate(),
            time.perf_counter() - begin,
            peak_mib(),
            device_mib(run.device),
            weight_columns={
                name: [list(c) for c in module.layout.classes]
                for name, module in block.named_modules()
                if isinstance(module, TernaryLinear)
            },
        )
        _log.info("%s", report)
        yield block, report


@dataclass(frozen=True)
class _Job:
    """What the linears of a block share."""

    spike: SpikeConfig
    options: GptqOptions
    generator: torch.Generator


def _spike_attention(
    block: Any,
    dense: Any,
    index: int,
    source: Source,
    spike: SpikeConfig,
    stream: BlockStream,
    generator: torch.Generator,
    allocation: Mapping[str, Tensor] | None,
) -> dict[str, Tensor]:
    """Make the attention of a block spiking; saliency groups of its linear inputs, by path.

    The linears stay dense. Float activations have no groups.
    """
    groups: dict[str, Tensor] = {}
    statistics = None
    if spike.encodes_activations:
        statistics = BlockStatistics(dense, source.config, spike)
        with statistics.observing():
            for _ in stream.run(dense):
                pass
        groups = channel_groups(index, spike, statistics, generator, allocation or {})
    kept = (*spike.modules_to_not_convert, *(p for paths in INPUT_GROUPS for p in paths))
    attention_only = dataclasses.replace(spike, modules_to_not_convert=kept)
    attention = make_spiking(block, index, source.config, attention_only)
    if attention is not None and statistics is not None:
        ratio, count = spike.salient_ratio, len(spike.kv_steps)
        key, value = (allocate(s, ratio, count) for s in statistics.kv.scores(generator))
        attention.set_channel_groups(key, value)
        choose_views(attention)
    block.to(stream.device)
    return groups


def _convert_input(
    block: Any,
    index: int,
    paths: Sequence[str],
    data: InputData,
    groups: Mapping[str, Tensor],
    job: _Job,
    encode: Encode | None,
) -> None:
    """Convert linears that share an input; those with the same spikes share its statistics."""
    together = not groups or all(torch.equal(groups[p], groups[paths[0]]) for p in paths)
    start = 0
    for members in [list(paths)] if together else [[p] for p in paths]:
        linears = [linear_of(block, p) for p in members]
        group = groups.get(members[0])
        moments = _moments(f"model.layers.{index}.{members[0]}", linears, data, start, group, job)
        weight = moments.weight
        start += len(weight)
        if job.options.compensate:
            weight = moments.least_squares(job.options.ridge, centred=False)
        rows = weight.split([linear.out_features for linear in linears])
        for path, linear, wanted in zip(members, linears, rows, strict=True):
            name, hessian = f"model.layers.{index}.{path}", moments.second_moment
            if encode is None:
                module: nn.Module = _ternary(name, linear, wanted, hessian, group, job)
            else:
                module = encode(name, linear, wanted, hessian)
            parent, _, own = path.rpartition(".")
            setattr(block.get_submodule(parent), own, module)


def _moments(
    name: str,
    linears: Sequence[nn.Linear],
    data: InputData,
    start: int,
    group: Tensor | None,
    job: _Job,
) -> Moments:
    """Statistics of an input, encoded if it is, and of the outputs from `start` on that are wanted.

    Biases stay as they are, so they are no part of what the weights should give.
    """
    weight = torch.cat([linear.weight.detach().float() for linear in linears])
    bias = torch.cat([bias_of(linear) for linear in linears])
    columns, probe = slice(start, start + len(weight)), None
    if group is not None:  # its encoder, with the weight left in float
        floating = dataclasses.replace(
            job.spike, mean_steps=None, weight_columns={}, weight_bits=16
        )
        probe = spiking_linear(linears[0], floating, name).to(weight.device)
        probe.set_channel_group(group)
    moments = Moments(weight)
    for batch, (x, token_weight) in enumerate(data.rows()):
        encoded = x if probe is None else probe.encoder.decode(probe.encoder.encode(x))
        moments.update(encoded, data.outputs(batch)[:, columns] - bias, token_weight)
    return moments


def _ternary(
    name: str,
    linear: nn.Linear,
    wanted: Tensor,
    hessian: Tensor,
    group: Tensor | None,
    job: _Job,
) -> TernaryLinear:
    """The spiking linear of a dense one."""
    spike, options = job.spike, job.options
    if name in options.steps:
        steps = torch.tensor(options.steps[name])
    else:
        if options.score is Score.HESSIAN:
            score = column_score(wanted, hessian, name)
        else:
            unused = hessian.diagonal()
            score = linear_score(options.score, wanted, hessian, unused, job.generator)
        steps = allocate_with(score, spike, options)
    trains = ternary_gptq(
        wanted,
        hessian,
        steps,
        spike.weight_group_size,
        name,
        options.damping,
        options.refinements,
    )
    known = dataclasses.replace(spike, weight_columns={name: trains.classes})
    module = spiking_linear(linear, known, name).to(wanted.device)
    assert isinstance(module, TernaryLinear)
    if group is not None:
        module.set_channel_group(group)
    module.set_weight(trains, None if linear.bias is None else linear.bias.detach())
    choose_views(module)
    return module
