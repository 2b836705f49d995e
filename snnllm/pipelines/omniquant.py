"""The `omniquant` pipeline: learned transformation and clipping around spikes (method.md section 5).

Block by block: saliency masks on the converted stream; an equivalent transformation, clipping (and, if
wanted, the weights) trained through the spiking forward against the full-precision stream; folding
into norm gains and weights; integer weights. With `OmniQuantOptions(rotate=True)`, the default, the
block is first brought into the basis of the `rotated` pipeline; the published recipe has no rotation.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from snnllm.attention import SpikingLlamaAttention
from snnllm.checks import check_shared_steps, check_unfilled
from snnllm.config import FLOAT_BITS, MaskScope, Rotation, SpikeConfig, WeightRange
from snnllm.execution import choose_views
from snnllm.linear import SpikingLinear
from snnllm.modeling import spiking_linear
from snnllm.pipelines.basis import Basis, find_basis, rotate_source
from snnllm.pipelines.omniquant_block import TrainableBlock
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.pipelines.omniquant_training import Samples, train
from snnllm.pipelines.omniquant_units import Unit
from snnllm.pipelines.report import (
    BlockReport,
    SpikeRateMeter,
    device_mib,
    peak_mib,
    sqnr_db,
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
from snnllm.saliency import allocate
from snnllm.sources import Source
from snnllm.weights import QuantizedWeight

_log = logging.getLogger(__name__)
_READS_NORM = (0, 2)
"""Entries of `INPUT_GROUPS` that read a norm: their values are of moderate size."""


def start(
    source: Source,
    spike: SpikeConfig,
    run: Run,
    options: OmniQuantOptions,
    allocation: Mapping[str, Tensor],
) -> tuple[Source, SpikeConfig, Iterator[tuple[nn.Module, BlockReport]]]:
    """The model and configuration that are really converted, and the blocks as they are.

    Raises:
        ValueError: Something that belongs to another pipeline, or does not go together.
    """
    check_unfilled(spike, "rotated")
    spike = omniquant_config(spike, options)
    basis = None
    if spike.rotation is Rotation.GROUPS:
        if allocation:
            raise ValueError(
                "rotate=True chooses its channels before the rotation; explicit allocation maps go "
                "with OmniQuantOptions(rotate=False)."
            )
        check_shared_steps(source, spike)
        basis = find_basis(source, spike, run)
        source = rotate_source(source, basis, run.generator())
    return source, spike, convert_blocks(source, spike, run, options, basis, allocation)


def omniquant_config(spike: SpikeConfig, options: OmniQuantOptions) -> SpikeConfig:
    """The configuration of a model that this pipeline makes."""
    integer, spiking = spike.weight_bits != FLOAT_BITS, spike.encodes_activations
    rotate = options.rotate and spiking
    return dataclasses.replace(
        spike,
        rotation=Rotation.GROUPS if rotate else Rotation.NONE,
        mask_scope=MaskScope.INPUT if rotate else spike.mask_scope,
        input_offset=options.offset and spiking,
        segment_scales=options.segment_scales and integer and spiking and spike.may_scale_segments,
        query_groups=options.query_groups and spike.encodes_attention,
        key_offset=options.key_offset and spike.encodes_attention,
    )


@dataclass(frozen=True)
class _Job:
    """What all blocks of one conversion share."""

    source: Source
    spike: SpikeConfig
    run: Run
    options: OmniQuantOptions
    basis: Basis | None
    allocation: Mapping[str, Tensor]


def convert_blocks(
    source: Source,
    spike: SpikeConfig,
    run: Run,
    options: OmniQuantOptions,
    basis: Basis | None = None,
    allocation: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """Convert block by block.

    Args:
        source: The dense model, in the rotated basis if there is one.
        spike: The configuration (`omniquant_config`).
        run: Windows, seed, device; and what an earlier run has finished.
        options: What is learned.
        basis: Masks behind the rotation, or None without one.
        allocation: Explicit maps channel -> T per full module name.

    Yields:
        The spiking block and its report, in order; its SQNR is that of the hidden states behind it,
        against the full-precision stream.
    """
    job = _Job(source, spike, run, options, basis, allocation or {})
    stream, target = BlockStream(source, run), BlockStream(source, run)
    for index in range(source.config.num_hidden_layers):
        begin, saved = time.perf_counter(), run.saved(index)
        dense = load_block(source, index, run.device)
        if saved is not None:
            block: nn.Module = restore_block(source, index, spike, saved.state, run.device)
            stream.advance(block)
            target.advance(dense)
            yield block, saved.report
            continue
        block, trained = _convert(dense, index, stream, target, job)
        with SpikeRateMeter(block) as rate:
            stream.advance(block)
        report = BlockReport(
            index,
            sqnr_db(target.hidden, stream.hidden),
            rate(),
            time.perf_counter() - begin,
            peak_mib(),
            device_mib(run.device),
            trained.before,
            trained.after,
            trained.step_ms,
        )
        _log.info("%s", report)
        yield block, report


def _convert(
    dense: Any, index: int, stream: BlockStream, target: BlockStream, job: _Job
) -> tuple[nn.Module, Any]:
    """Train one block and freeze it; moves `target` behind the block."""
    options, device, generator = job.options, job.run.device, job.run.generator(index)
    job.run.on_stage(f"block {index}: inputs")
    statistics = BlockStatistics(dense, job.source.config, job.spike)
    second = None
    with statistics.observing():
        if options.second_loss > 0:
            second = stream.keep(stream.run(dense))
        else:
            for _ in stream.run(dense):
                pass
    target.advance(dense)
    frame = load_block(job.source, index, device)
    attention = _make_frame(frame, index, statistics, stream, job, generator)
    modules = _empty_linears(dense, index, statistics, job, generator)
    inputs = statistics.inputs
    block = TrainableBlock(
        dense,
        attention,
        modules,
        job.source.config,
        [i.max_abs for i in inputs],
        [i.second_moment.diagonal() for i in inputs]
        if job.spike.weight_range is WeightRange.CLIP
        else None,
        [i.mean for i in inputs] if job.spike.input_offset else None,
        options,
    ).to(device)
    if options.low_precision and device.type == "cuda":
        for number in _READS_NORM:
            for unit in block.groups[number]:
                unit.low = torch.bfloat16
    context = (*stream.context["position_embeddings"], stream.context["attention_mask"])
    samples = Samples(stream.hidden, target.hidden, second, context, device)
    trained = train(block, samples, generator, f"block {index}", job.run.on_stage)
    freeze(block, frame, modules)
    round_to_storage(frame, job.source.tensor("model.norm.weight").dtype)
    return frame, trained


def _make_frame(
    frame: Any,
    index: int,
    statistics: BlockStatistics,
    stream: BlockStream,
    job: _Job,
    generator: torch.Generator,
) -> SpikingLlamaAttention | None:
    """Make the attention of a block spiking, its linears stay; the attention, if it is encoded."""
    linears = tuple(p for paths in INPUT_GROUPS for p in paths)
    kept = (*job.spike.modules_to_not_convert, *linears)
    only = dataclasses.replace(job.spike, modules_to_not_convert=kept)
    attention = make_spiking(frame, index, job.source.config, only)
    if attention is None:
        return None
    if job.basis is not None:
        job.basis.fill(attention, index)
    else:
        key, value = statistics.kv.scores(generator)
        ratio, groups = job.spike.salient_ratio, len(job.spike.kv_steps)
        attention.set_channel_groups(allocate(key, ratio, groups), allocate(value, ratio, groups))
    attention.to(job.run.device)
    if job.spike.key_offset:
        attention.set_key_offset(StagedBlock(frame, stream).keys())
    return attention


def _empty_linears(
    dense: Any, index: int, statistics: BlockStatistics, job: _Job, generator: torch.Generator
) -> dict[str, SpikingLinear]:
    """Spiking linears of a block by path, with their channel groups and without weights."""
    spike, device = job.spike, job.run.device
    if job.basis is None:
        groups = channel_groups(index, spike, statistics, generator, job.allocation)
    modules: dict[str, SpikingLinear] = {}
    for paths in INPUT_GROUPS:
        for path in paths:
            name = f"model.layers.{index}.{path}"
            if name.endswith(spike.modules_to_not_convert):
                continue
            linear = linear_of(dense, path)
            module = spiking_linear(linear, spike, name)
            if job.basis is None:
                group = groups[path]
            else:
                group = job.basis.groups(path, linear.in_features, index)
                if len(module.layout.steps) == 1:
                    group = torch.zeros_like(group)
            module.set_channel_group(group)
            modules[path] = module.to(device)
    return modules


@torch.no_grad()
def freeze(block: TrainableBlock, frame: Any, modules: Mapping[str, SpikingLinear]) -> None:
    """Fold what was learned into a block of spiking modules.

    Args:
        block: The trained block.
        frame: A block with the attention that will be used; its linears and gains are replaced.
        modules: The spiking linears by path; a path that is missing stays dense.
    """
    first, second = block.gains()
    # New parameters: the old ones may be the tensors of the source.
    frame.input_layernorm.weight = _fixed(first)
    frame.post_attention_layernorm.weight = _fixed(second)
    columns, rows = block.columns(), block.rows()
    for number, units in enumerate(block.groups):
        for unit in units:
            row = block.row(unit, rows, block.sizes)
            _freeze_unit(unit, columns[number], row, block.sizes, frame, modules)
    for operand, encoder in ((block.query, "q"), (block.key, "k"), (block.value, "v")):
        if operand is not None:
            frame.self_attn.get_submodule(f"{encoder}_encoder").clip.copy_(operand.clip())
    choose_views(frame)
    frame.eval()


def _fixed(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.clone(), requires_grad=False)


def _freeze_unit(
    unit: Unit,
    column: Tensor | None,
    row: Tensor | None,
    sizes: Mapping[str, int],
    frame: Any,
    modules: Mapping[str, SpikingLinear],
) -> None:
    """Store the linears of one unit in their block."""
    weight = unit.effective(column, row)
    bias: Tensor | None = unit._buffers.get("bias")
    bias = bias * row if bias is not None and row is not None else bias
    codes = unit.codes(weight) if unit.rounds else None
    image = None
    if unit.offset is not None and unit.shift is not None:
        image = weight @ unit.offset + unit.shift
    begin = 0
    for path in unit.paths:
        part = slice(begin, begin + sizes[path])
        begin = part.stop
        own_bias = None if bias is None else bias[part]
        module = modules.get(path)
        if module is None:
            linear: Any = linear_of(frame, path)
            linear.weight = _fixed(weight[part])
            linear.bias = None if own_bias is None else _fixed(own_bias)
            continue
        if codes is None:
            module.set_float_weight(weight[part], own_bias)
        else:
            module.set_weight(QuantizedWeight(*(c[part] for c in codes)), own_bias)
        if unit.operand is not None:
            module.encoder.clip.copy_(unit.operand.clip())
        if image is not None and unit.offset is not None:
            module.set_offset(unit.offset, image[part])
        parent, _, name = path.rpartition(".")
        setattr(frame.get_submodule(parent), name, module)
