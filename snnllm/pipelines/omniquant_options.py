"""Options of the `omniquant` pipeline, and the published recipe as one of their presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from snnllm.config import SpikeConfig


class Loss(StrEnum):
    """Distance of the block output from the full-precision stream.

    Attributes:
        MSE: Mean of the squared error, as published.
        RELATIVE: The error of each token divided by the mean square of its hidden state, which is what
            the next norm divides by. A few tokens have massive activations; unweighted, they alone
            would decide.
    """

    MSE = "mse"
    RELATIVE = "relative"


class Recipe(StrEnum):
    """Presets of the options: ours, and the published one (method.md section 5)."""

    DEFAULT = "default"
    PAPER = "paper"


class Execution(StrEnum):
    """How a training step runs.

    Attributes:
        AUTO: GRAPH on CUDA, EAGER elsewhere.
        EAGER: Operation by operation.
        COMPILED: The forward pass compiled by `torch.compile` (a C++ compiler or Triton is needed).
        GRAPH: The whole step recorded once a block as a CUDA graph and replayed; CUDA only.
    """

    AUTO = "auto"
    EAGER = "eager"
    COMPILED = "compiled"
    GRAPH = "graph"


@dataclass(frozen=True)
class OmniQuantOptions:
    """What is learned around the spikes, and how.

    A learning rate of 0 leaves the values as they are initialised.

    Attributes:
        epochs: Passes over the calibration windows, >= 0.
        batch: Windows of a training step.
        scale_rate: Learning rate of the equivalent transformation (LET).
        scale_power: `a` in the initial scales `max|x|^a / max|w|^(1-a)`; None starts from 1.
        scale_down: Scale between up_proj and down_proj as well (not in the paper).
        clip_rate: Learning rate of weight clipping (LWC), and of activation clipping.
        clip_activations: Learn clip factors of the ranges of activations per channel group.
        offset: Take a learned offset (the shift of LET) off every input of a linear.
        segment_scales: Weight scales per saliency group of the input; not with commensurate thresholds.
        query_groups: Q has the channel groups and steps of K.
        key_offset: Take the mean of the keys before training off, in front of their encoder.
        rotate: Start from the rotated basis of the `rotated` pipeline instead of the channels; float
            activations are not rotated.
        weight_rate: Learning rate of the weights themselves, in units of the standard deviation of
            each weight matrix; 0 keeps the original weights (the paper).
        loss: Distance to the full-precision stream.
        second_loss: Weight of a second loss, against the dense block on the converted stream.
        decay: Learning rates fall along a cosine to 0; otherwise they are constant.
        low_precision: bfloat16 for the linears that read a norm, on CUDA; the encoders, the attention
            and what writes to the residual stream stay in float32 or TF32.
        execution: How a training step runs.
    """

    epochs: int = 10
    batch: int = 1
    scale_rate: float = 5e-3
    scale_power: float | None = None
    scale_down: bool = True
    clip_rate: float = 1e-2
    clip_activations: bool = True
    offset: bool = True
    segment_scales: bool = True
    query_groups: bool = True
    key_offset: bool = True
    rotate: bool = True
    weight_rate: float = 3e-3
    loss: Loss = Loss.RELATIVE
    second_loss: float = 0.0
    decay: bool = True
    low_precision: bool = True
    execution: Execution = Execution.AUTO

    def __post_init__(self) -> None:
        for name, enum in (("loss", Loss), ("execution", Execution)):
            object.__setattr__(self, name, enum(getattr(self, name)))
        for name, least in (("epochs", 0), ("batch", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an int >= {least}, got {value!r}.")
        for name in ("scale_rate", "clip_rate", "weight_rate", "second_loss"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise ValueError(f"{name} must be finite and >= 0, got {value!r}.")
        if self.scale_power is not None and not 0.0 <= self.scale_power <= 1.0:
            raise ValueError(f"scale_power must lie in [0, 1] or be None, got {self.scale_power}.")

    @classmethod
    def recipe(cls, name: Recipe | str, **overrides: Any) -> OmniQuantOptions:
        """A preset, with single fields replaced.

        Raises:
            ValueError: There is no such recipe, or a field is out of range.
        """
        return dataclasses.replace(cls(**_RECIPES[Recipe(name)]), **overrides)


_RECIPES: Mapping[Recipe, Mapping[str, Any]] = {
    Recipe.DEFAULT: {},
    Recipe.PAPER: {
        "epochs": 20,
        "scale_power": 0.75,
        "scale_down": False,
        "clip_activations": False,
        "offset": False,
        "segment_scales": False,
        "query_groups": False,
        "key_offset": False,
        "rotate": False,
        "scale_rate": 1e-3,
        "weight_rate": 0.0,
        "loss": Loss.MSE,
        "decay": False,
    },
}

PAPER_FIELDS: Mapping[str, Any] = {
    "value_range": "shared",
    "weight_range": "minmax",
    "mask_scope": "linear",
    "score": "first_order",
}
"""Fields of `SpikeConfig` that belong to the published recipe."""


def recipe_config(name: Recipe | str, preset: str, **overrides: Any) -> SpikeConfig:
    """The spiking configuration of a recipe: a preset name, and single fields replaced."""
    fields = PAPER_FIELDS if Recipe(name) is Recipe.PAPER else {}
    return SpikeConfig.preset(preset, **{**fields, **overrides})
