"""Conversion pipelines: how the masks and the integer weights of a spiking LLaMA are found."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from snnllm.config import SpikeConfig


class Pipeline(StrEnum):
    """The pipelines of `snnllm.convert`.

    Attributes:
        RTN: Saliency masks, weights rounded to nearest (method.md sections 2 to 4).
        ROTATED: Rotation inside the saliency groups, GPTQ weights.
        GPTQ: Weights as ternary spike trains, linears that only add (section 6).
        OMNIQUANT: Learned transformation and clipping, trained block by block (section 5).
    """

    RTN = "rtn"
    ROTATED = "rotated"
    GPTQ = "gptq"
    OMNIQUANT = "omniquant"


def default_pipeline(spike: SpikeConfig, allocation: Mapping[str, Any]) -> Pipeline:
    """The best pipeline without training that can make a configuration.

    Returns:
        `gptq` for ternary weights, `rtn` for float activations or explicit maps of steps, else
        `rotated`.
    """
    if spike.mean_steps is not None:
        return Pipeline.GPTQ
    return Pipeline.ROTATED if spike.encodes_activations and not allocation else Pipeline.RTN


def check_makes(pipeline: Pipeline, spike: SpikeConfig) -> None:
    """Refuse a configuration that a pipeline does not make.

    Raises:
        ValueError: Ternary weights or float activations, and which pipeline makes them.
    """
    if spike.mean_steps is not None and pipeline is not Pipeline.GPTQ:
        raise ValueError(
            f"mean_steps: the pipeline {pipeline} makes integer levels; ternary weights go with "
            "pipeline='gptq'."
        )
    if pipeline is Pipeline.ROTATED and not spike.encodes_activations:
        raise ValueError(
            "The rotated pipeline needs spiking activations; choose activation bits <= 8."
        )
