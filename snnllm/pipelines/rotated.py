"""The `rotated` pipeline: rotation inside the saliency groups, weights fitted to the spikes they see.

1. A pass of the float model scores the channels of the residual stream (one mask for the whole
   model), of the values and keys of each head, and of the inputs of down_proj (`basis.py`).
2. One residual basis, `permutation x blockdiag(rotations)`, and a basis per value head are folded
   into the weights (`RotatedSource`); keys, queries and the down_proj input are rotated online.
3. Block by block, input by input, on what is converted already: the mean of the input becomes an
   offset, the range of each saliency group gets a clip ratio, the weights are fitted to the outputs
   of the float model (`fitting.py`) and rounded by GPTQ with scales per saliency group. K gets an
   offset, too.

No training. The salient groups have sizes with Hadamard matrices (`transforms.salient_count`).
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from snnllm.attention import SpikingLlamaAttention
from snnllm.checks import check_shared_steps
from snnllm.config import FLOAT_BITS, MaskScope, Rotation, SpikeConfig, WeightRange
from snnllm.execution import choose_views
from snnllm.gptq import gptq
from snnllm.linear import SpikingLinear
from snnllm.modeling import spiking_linear
from snnllm.pipelines import Pipeline, check_makes
from snnllm.pipelines.basis import Basis, find_basis, rotate_source
from snnllm.pipelines.fitting import Moments, clip_ratios, weighted_mean
from snnllm.pipelines.inputs import InputData, bias_of, each_input, stage_of
from snnllm.pipelines.report import (
    BlockReport,
    SpikeRateMeter,
    device_mib,
    peak_mib,
    sqnr_db,
)
from snnllm.pipelines.stages import StagedBlock
from snnllm.pipelines.streaming import (
    INPUT_GROUPS,
    BlockStream,
    Run,
    linear_of,
    load_block,
    make_spiking,
    restore_block,
    round_to_storage,
)
from snnllm.sources import Source
from snnllm.weights import QuantizedWeight, dequantize

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RotatedOptions:
    """Parts of the pipeline; each can be left out to see its share.

    Attributes:
        rotate: Random rotations inside the saliency groups. Without them channels are only sorted;
            the inputs of down_proj, Q and K keep the Hadamard transforms that run online.
        offset: Take the mean off every input. (The fit has an output offset in any case.)
        key_offset: Take the mean off the keys.
        clip: Search the clip ratio of each input and group.
        segment_scales: Weight scales per saliency group of the input instead of per output channel; not with
            commensurate thresholds, whose one sum has one scale.
        query_groups: Q has the channel groups and steps of K.
        compensate: Fit outputs to the float model; without it GPTQ rounds the original weights.
        ridge: Weight of the original weights in the fit, in units of the mean input variance.
    """

    rotate: bool = True
    offset: bool = True
    key_offset: bool = True
    clip: bool = True
    segment_scales: bool = True
    query_groups: bool = True
    compensate: bool = True
    ridge: float = 3.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.ridge) and self.ridge >= 0.0):
            raise ValueError(f"ridge must be finite and >= 0, got {self.ridge}.")


def rotated_config(spike: SpikeConfig, options: RotatedOptions) -> SpikeConfig:
    """The configuration of a rotated model."""
    check_makes(Pipeline.ROTATED, spike)
    return dataclasses.replace(
        spike,
        rotation=Rotation.GROUPS,
        mask_scope=MaskScope.INPUT,
        input_offset=options.offset or options.compensate,
        key_offset=options.key_offset and spike.encodes_attention,
        segment_scales=options.segment_scales and spike.may_scale_segments,
        query_groups=options.query_groups,
    )


def start(
    source: Source, spike: SpikeConfig, run: Run, options: RotatedOptions
) -> tuple[Source, SpikeConfig, Iterator[tuple[nn.Module, BlockReport]]]:
    """The rotated model, its configuration, and its blocks as they are converted."""
    check_shared_steps(source, spike)
    spike = rotated_config(spike, options)
    basis = find_basis(source, spike, run)
    moved = rotate_source(source, basis, run.generator() if options.rotate else None)
    return moved, spike, convert_blocks(moved, basis, spike, run, options)


@dataclass(frozen=True)
class _Job:
    """What all blocks of one conversion share."""

    source: Source
    basis: Basis
    spike: SpikeConfig
    options: RotatedOptions
    run: Run


def convert_blocks(
    source: Source, basis: Basis, spike: SpikeConfig, run: Run, options: RotatedOptions
) -> Iterator[tuple[nn.Module, BlockReport]]:
    """Convert block by block.

    Args:
        source: The rotated model (`rotate_source`).
        basis: The masks behind the rotation.
        spike: The configuration (`rotated_config`).
        run: Windows, seed, device; and what an earlier run has finished.
        options: Parts of the pipeline.

    Yields:
        The spiking block and its report, in order; its SQNR is that of the hidden states behind it,
        against the float model.
    """
    job = _Job(source, basis, spike, options, run)
    device = run.device
    stream, target = BlockStream(source, run), BlockStream(source, run)
    for index in range(source.config.num_hidden_layers):
        saved, start = run.saved(index), time.perf_counter()
        dense = load_block(source, index, device)
        if saved is not None:
            block: nn.Module = restore_block(source, index, spike, saved.state, device)
            stream.advance(block)
            target.advance(dense)
            yield block, saved.report
            continue
        block = load_block(source, index, device)
        spiking, floating = StagedBlock(block, stream), StagedBlock(dense, target)
        attention = _spike_attention(block, index, job)
        block.to(device)
        if attention is not None and job.spike.key_offset:
            attention.set_key_offset(spiking.keys())
        for paths, data in each_input(spiking, floating, index, spike):
            run.on_stage(stage_of(index, paths))
            _fit_input(block, index, paths, data, job)
        round_to_storage(block, source.tensor("model.norm.weight").dtype)
        with SpikeRateMeter(block) as rate:
            stream.advance(block)
        target.hidden = floating.residual
        report = BlockReport(
            index,
            sqnr_db(target.hidden, stream.hidden),
            rate(),
            time.perf_counter() - start,
            peak_mib(),
            device_mib(device),
        )
        _log.info("%s", report)
        yield block, report


def _spike_attention(block: nn.Module, index: int, job: _Job) -> SpikingLlamaAttention | None:
    """Replace the attention of a dense block; its linears stay dense. None if it stays, too."""
    linears = tuple(p for paths in INPUT_GROUPS for p in paths)
    kept = (*job.spike.modules_to_not_convert, *linears)
    attention_only = dataclasses.replace(job.spike, modules_to_not_convert=kept)
    attention = make_spiking(block, index, job.source.config, attention_only)
    if attention is not None:
        job.basis.fill(attention, index)
        choose_views(attention)
    return attention


def _fit_input(
    block: nn.Module,
    index: int,
    paths: list[str],
    data: InputData,
    job: _Job,
) -> None:
    """Fit and store the linears at `paths`, which share an input."""
    dense = [linear_of(block, p) for p in paths]
    device = dense[0].weight.device
    modules = [
        spiking_linear(d, job.spike, f"model.layers.{index}.{p}").to(device)
        for d, p in zip(dense, paths, strict=True)
    ]
    weight = torch.cat([linear.weight.detach().float() for linear in dense])
    first, options = modules[0], job.options
    if first.rotation is not None:
        weight = first.rotation(weight)
    groups = job.basis.groups(paths[0], first.in_features, index).to(device)
    first.set_channel_group(groups if len(first.layout.steps) > 1 else torch.zeros_like(groups))
    if options.offset:
        first.get_buffer("offset_input").copy_(weighted_mean(data.encoder_inputs(first)))
    if options.clip:
        first.encoder.clip.copy_(clip_ratios(first.encoder, *data.sample(first), weight))
    moments = Moments(weight)
    for batch, (x, token_weight) in enumerate(data.encoder_inputs(first)):
        encoded = first.encoder.decode(first.encoder.encode(x))
        moments.update(encoded, data.outputs(batch), token_weight)
    fitted = moments.least_squares(options.ridge) if options.compensate else weight
    quantized, rounded = _quantize(first, fitted, moments, job)
    _store(block, paths, modules, quantized, rounded)
    if first.layout.offset:
        taken = first.get_buffer("offset_input").clone()
        given = weight @ taken
        if options.compensate:
            given = moments.output_offset(rounded) - torch.cat(
                [bias_of(linear) for linear in dense]
            )
        for module, part in zip(
            modules, given.split([m.out_features for m in modules]), strict=True
        ):
            module.set_offset(taken, part)


def _store(
    block: nn.Module,
    paths: list[str],
    modules: list[SpikingLinear],
    quantized: QuantizedWeight | None,
    rounded: Tensor,
) -> None:
    """Fill the linears of one input, encoders as the first, and put them into the block."""
    first, start = modules[0], 0
    for path, module in zip(paths, modules, strict=True):
        bias = linear_of(block, path).bias
        rows = slice(start, start + module.out_features)
        start = rows.stop
        module.rotation = first.rotation
        module.set_channel_group(first.encoder.channel_group)
        module.encoder.clip.copy_(first.encoder.clip)
        if quantized is None:
            module.set_float_weight(rounded[rows], None if bias is None else bias.detach())
        else:
            codes = QuantizedWeight(*(part[rows] for part in quantized))
            module.set_weight(codes, None if bias is None else bias.detach())
        choose_views(module)
        parent, _, name = path.rpartition(".")
        setattr(block.get_submodule(parent), name, module)


def _quantize(
    module: SpikingLinear, weight: Tensor, moments: Moments, job: _Job
) -> tuple[QuantizedWeight | None, Tensor]:
    """Codes of a weight `[N, K]` (original channel order), and the real weight that they stand for."""
    bits, order = module.layout.weight_bits, module.order
    if bits == FLOAT_BITS:
        return None, weight
    hessian = moments.covariance if job.options.compensate else moments.second_moment
    clip = job.spike.weight_range is WeightRange.CLIP
    quantized = gptq(
        weight[:, order], hessian[order][:, order], bits, module.weight_groups, module.name, clip
    )
    rounded = torch.empty_like(weight)
    rounded[:, order] = dequantize(quantized, module.weight_groups)
    return quantized, rounded
