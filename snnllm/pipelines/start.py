"""From the name of a pipeline to its blocks: options, and what goes with which pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from snnllm.checks import check_unfilled
from snnllm.config import SpikeConfig
from snnllm.pipelines import Pipeline, check_makes, gptq, omniquant, rotated, rtn
from snnllm.pipelines.gptq_options import GptqOptions
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.pipelines.report import BlockReport
from snnllm.pipelines.rotated import RotatedOptions
from snnllm.pipelines.streaming import Run
from snnllm.sources import Source

Options = RotatedOptions | OmniQuantOptions | GptqOptions


def start_pipeline(
    pipeline: Pipeline,
    source: Source,
    spike: SpikeConfig,
    run: Run,
    allocation: Mapping[str, Tensor],
    options: Options | None,
) -> tuple[Source, SpikeConfig, Iterator[tuple[nn.Module, BlockReport]]]:
    """The model and configuration that a pipeline really converts, and its blocks.

    Raises:
        ValueError: Something that belongs to the other pipeline.
    """
    check_makes(pipeline, spike)
    if isinstance(options, GptqOptions):
        return source, spike, gptq.start(source, spike, run, options, allocation)
    if isinstance(options, OmniQuantOptions):
        return omniquant.start(source, spike, run, options, allocation)
    if isinstance(options, RotatedOptions):
        if allocation:
            raise ValueError(
                "The rotated pipeline chooses its channels before the rotation; explicit allocation "
                "maps go with pipeline='rtn'."
            )
        return rotated.start(source, spike, run, options)
    check_unfilled(spike, "rotated")
    return source, spike, rtn.convert_blocks(source, spike, run, allocation)


def options_of(pipeline: Pipeline, options: Options | None) -> Options | None:
    """The options of a pipeline, its defaults if none are given.

    Raises:
        ValueError: Options of another pipeline.
    """
    kinds: dict[Pipeline, type[Options]] = {
        Pipeline.ROTATED: RotatedOptions,
        Pipeline.OMNIQUANT: OmniQuantOptions,
        Pipeline.GPTQ: GptqOptions,
    }
    kind = kinds.get(pipeline)
    if kind is None and options is None:
        return None
    if kind is None or not isinstance(options, kind | None):
        raise ValueError(
            f"options: {type(options).__name__} belongs to another pipeline than {pipeline}; rotated "
            "takes RotatedOptions, omniquant OmniQuantOptions, gptq GptqOptions, rtn none."
        )
    made: Options = kind() if options is None else options
    return made
