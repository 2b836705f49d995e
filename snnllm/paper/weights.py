"""The table of weights as ternary spike trains beside binary and uniform ones (`reproduce gptq`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from snnllm.baselines import Rounded, bi_llm, pb_llm, plain_gptq
from snnllm.checks import check_finite
from snnllm.config import Score, SpikeConfig
from snnllm.paper.lines import find, perplexities
from snnllm.paper.recipes import (
    Baseline,
    Conversion,
    Line,
    Measure,
    Record,
    Row,
    Table,
    Training,
    settings_digest,
)
from snnllm.pipelines import Pipeline
from snnllm.pipelines.gptq import convert_blocks
from snnllm.pipelines.gptq_options import GptqOptions
from snnllm.pipelines.streaming import Run
from snnllm.sources import Source, dense_model
from snnllm.step_budget import mean_steps_of

__all__ = ["gptq", "weight_lines"]

Quantiser = Callable[..., Rounded]
PLAIN = GptqOptions(damping=0.01, refinements=0, compensate=False, salient_steps=5)
"""Method.md section 6 to the letter: 10 % of the columns at T = 5, one sweep, original weights."""
_SAME_STEPS = 1 - 0.4 / 7
"""Share of binary weights at which PB-LLM spends 1.4 binarisations on a weight."""


def gptq(training: Training) -> Table:
    """Perplexity, steps, stored bits and additive share of ternary, binary and uniform weights."""
    rows = (
        Row("float model", "FP", None, quick=True),
        _ternary("no saliency", "TW1A16", quick=True),
        _ternary("1.2 steps", "TW1.2A16"),
        _ternary("1.4 steps, default", "TW1.4A16", quick=True),
        _ternary("2.0 steps", "TW2A16"),
        _ternary("3.0 steps", "TW3A16"),
        _ternary(
            "1.4 steps, random columns", "TW1.4A16", GptqOptions(score=Score.RANDOM), quick=True
        ),
        _ternary(
            "1.4 steps, random columns of T = 5",
            "TW1.4A16",
            GptqOptions(score=Score.RANDOM, salient_steps=5),
        ),
        _ternary("1.4 steps, 10 % T = 5", "TW1.4A16", GptqOptions(salient_steps=5)),
        _ternary("1.4 steps, no refinement", "TW1.4A16", GptqOptions(refinements=0)),
        _ternary("1.4 steps, not compensated", "TW1.4A16", GptqOptions(compensate=False)),
        _ternary("1.4 steps, groups of 64", "TW1.4A16", weight_group_size=64),
        _ternary("1.4 steps, plain: one sweep, 10 % T = 5", "TW1.4A16", PLAIN),
        _ternary("1.4 steps", "TW1.4A8"),
        _ternary("1.4 steps", "TW1.4A4T2"),
        _ternary("2.0 steps", "TW2A8"),
        _rival("PB-LLM 95 %", pb_llm, low=0.95),
        _rival("PB-LLM 94.3 %, 1.4 steps", pb_llm, quick=True, low=_SAME_STEPS),
        _rival("PB-LLM 90 %", pb_llm, low=0.9),
        _rival("PB-LLM 80 %", pb_llm, low=0.8),
        _rival("PB-LLM 94.3 %, as published", pb_llm, PLAIN, low=_SAME_STEPS),
        _rival("BiLLM", bi_llm),
        _rival("BiLLM, as published", bi_llm, PLAIN),
        _rival("GPTQ 2 bits, groups of 128", plain_gptq, quick=True, bits=2),
        _rival("GPTQ 2 bits, groups of 32", plain_gptq, bits=2, group_size=32),
        _rival("GPTQ 3 bits, groups of 128", plain_gptq, bits=3),
        _rival("GPTQ 2 bits, as published", plain_gptq, PLAIN, bits=2),
    )
    return Table(
        "gptq",
        "Weights as ternary spike trains",
        rows,
        (Measure.PERPLEXITY,),
        weight_lines,
        {"steps": ".2f", "stored bits": ".2f", "additive MACs %": ".0f", "seconds": ".1f"},
        "All rows run in the loop of the pipeline gptq, on the inputs that the layers converted before "
        "give; rows 'as published' and 'plain' do without the fit to the float model and with one sweep. "
        "Ternary rows are checkpoints, the others float weights that their codes stand for. Steps: mean time "
        "steps of a weight (PB-LLM, BiLLM: binarisations, 8 for a weight of 8 bits; GPTQ: bits). Stored "
        "bits include scales and indices.",
    )


def _ternary(
    label: str, preset: str, options: GptqOptions | None = None, quick: bool = False, **fields: Any
) -> Row:
    spike = SpikeConfig.preset(preset, **fields)
    made = Conversion(Pipeline.GPTQ, spike, options or GptqOptions())
    return Row(f"ternary, {label}", preset, made, quick)


def _rival(
    label: str,
    quantiser: Quantiser,
    options: GptqOptions | None = None,
    quick: bool = False,
    **arguments: Any,
) -> Row:
    options = options or GptqOptions()
    settings = {
        "quantiser": quantiser.__name__,
        "arguments": arguments,
        "options": dataclasses.asdict(options),
    }
    name = "".join(c if c.isalnum() else "-" for c in label.lower())
    build = partial(_build, partial(quantiser, **arguments), options)
    made = Baseline(f"{name}-{settings_digest(settings)}", settings, build)
    return Row(label, "A16", made, quick)


@dataclass
class _Cost:
    """What the linears of a model cost, weighted by their sizes."""

    weights: int = 0
    bits: float = 0.0
    additive: float = 0.0
    steps: float = 0.0

    def add(self, rounded: Rounded) -> None:
        size = rounded.weight.numel()
        self.weights += size
        self.bits += size * rounded.bits
        self.additive += size * rounded.additive
        self.steps += size * rounded.steps

    def facts(self) -> dict[str, float]:
        """Figures per weight."""
        return {
            "weight_steps": self.steps / self.weights,
            "stored_bits": self.bits / self.weights,
            "additive": self.additive / self.weights,
        }


def _build(
    quantiser: Quantiser,
    options: GptqOptions,
    source: Source,
    windows: Tensor,
    seed: int,
    device: torch.device,
) -> tuple[nn.Module, dict[str, Any]]:
    """A float model whose linears hold rounded weights, and what storing them would take."""
    check_finite(source)
    cost = _Cost()

    def encode(name: str, linear: nn.Linear, wanted: Tensor, hessian: Tensor) -> nn.Module:
        rounded = quantiser(wanted, hessian, name=name)
        cost.add(rounded)
        linear.weight = nn.Parameter(rounded.weight, requires_grad=False)
        return linear

    model = dense_model(source)
    spike, run = SpikeConfig.preset("TW1A16"), Run(windows, seed, device)
    blocks = convert_blocks(source, spike, run, options, encode=encode)
    for own, (block, _) in zip(model.model.layers, blocks, strict=True):
        own.load_state_dict(block.state_dict(), assign=True)  # never into the source
    return model, cost.facts()


def weight_lines(rows: Sequence[tuple[Row, Record]]) -> list[Line]:
    """Perplexity, steps, stored bits and additive share."""
    lines = []
    for row, record in rows:
        line: Line = {"method": row.label, "bits": row.bits}
        line |= perplexities(record, "perplexity") | _costs(record)
        line["seconds"] = find(record, "conversion", "seconds")
        if line["seconds"] is None and isinstance(row.conversion, Baseline):
            line["seconds"] = find(record, "seconds", "loading")  # where its weights are rounded
        lines.append(line)
    return lines


def _costs(record: Record) -> Line:
    """Of a ternary checkpoint by its conversion, of another model by what its builder said."""
    columns = find(record, "conversion", "spike", "weight_columns")
    if columns:
        return {
            "steps": mean_steps_of(columns),
            "stored bits": 8 * find(record, "conversion", "bytes_per_weight"),
            "additive MACs %": 100.0,
        }
    additive = find(record, "model", "additive")
    return {
        "steps": find(record, "model", "weight_steps"),
        "stored bits": find(record, "model", "stored_bits"),
        "additive MACs %": None if additive is None else 100 * additive,
    }
