"""Options of the `gptq` pipeline, and what they can be met with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from snnllm.config import WEIGHT_SCORES, Score, SpikeConfig
from snnllm.step_budget import MAX_STEPS, check_mean_steps


@dataclass(frozen=True)
class GptqOptions:
    """How the spike trains of the weights are found.

    Attributes:
        score: Ranks the columns: `hessian` (second order), `gauss_newton` or `random`.
        salient_steps: Two classes of columns, this many steps (2..127) and one; None spends every step where
            it helps most.
        damping: Fraction of the mean diagonal that is added to the diagonal of the Hessian.
        refinements: Passes over all thresholds and columns after the sweep.
        compensate: Fit the weights to the outputs of the float model first, so that they take back
            what the converted layers in front did wrong; without it GPTQ encodes the original ones.
        ridge: Weight of the original weights in that fit, in units of the mean input variance.
        steps: Explicit maps channel -> T of single linears, by their full names.
    """

    score: Score = Score.HESSIAN
    salient_steps: int | None = None
    damping: float = 0.05
    refinements: int = 2
    compensate: bool = True
    ridge: float = 1.0
    steps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "score", Score(self.score))
        object.__setattr__(self, "steps", {k: tuple(v) for k, v in self.steps.items()})
        if self.score not in WEIGHT_SCORES:
            names = ", ".join(map(str, WEIGHT_SCORES))
            raise ValueError(f"score of weight columns must be one of {names}, got {self.score}.")
        if not (math.isfinite(self.damping) and self.damping > 0.0):
            raise ValueError(f"damping must be finite and > 0, got {self.damping}.")
        if not (math.isfinite(self.ridge) and self.ridge >= 0.0):
            raise ValueError(f"ridge must be finite and >= 0, got {self.ridge}.")
        if self.refinements < 0:
            raise ValueError(f"refinements must be >= 0, got {self.refinements}.")
        if self.salient_steps is not None and not 2 <= self.salient_steps <= MAX_STEPS:
            raise ValueError(
                f"salient_steps of weight columns must be in 2..{MAX_STEPS}, got {self.salient_steps}."
            )


def check_budget(spike: SpikeConfig, options: GptqOptions) -> None:
    """Refuse a budget of steps that cannot be met, for which no model is needed.

    Raises:
        ValueError: No budget, or one out of range.
    """
    if spike.mean_steps is None:
        raise ValueError(
            "The gptq pipeline makes ternary weights; choose a preset such as TW1.4A16, or mean_steps."
        )
    check_mean_steps(spike.mean_steps, options.salient_steps)
