"""The model zoo: every row of every table as data. A new table is a function and its name in `TABLE_NAMES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from snnllm.config import Score, SpikeConfig, ValueRange
from snnllm.energy import ENERGY_MODELS
from snnllm.paper import lines
from snnllm.paper.recipes import Conversion, Measure, Row, Table, Training, spikellm
from snnllm.paper.settings import TABLE_NAMES
from snnllm.paper.weights import gptq
from snnllm.pipelines import Pipeline
from snnllm.pipelines.omniquant_options import Recipe

__all__ = ["TABLES", "efficiency", "equivalence", "gptq", "main", "saliency", "speed"]

DENSE = "float model"
PROPOSED = "rotated (ours)"
_PAPER_RATIO_W2A8 = 0.05


def _rtn(preset: str, **fields: object) -> Conversion:
    return Conversion(Pipeline.RTN, SpikeConfig.preset(preset, **fields))


def _rotated(preset: str) -> Conversion:
    return Conversion(Pipeline.ROTATED, SpikeConfig.preset(preset))


def _trained(preset: str, training: Training) -> Conversion:
    options = training.options(Recipe.DEFAULT)
    return Conversion(Pipeline.OMNIQUANT, SpikeConfig.preset(preset), options)


def main(training: Training) -> Table:
    """Perplexity and zero-shot accuracy of every method at W4A4, W2A8 and W2A16."""
    narrow = {"salient_ratio": _PAPER_RATIO_W2A8}
    rows = (
        Row(DENSE, "FP", None, quick=True, published="FP16"),
        Row("rtn", "W4A4", _rtn("W4A4"), quick=True),
        Row("OmniQuant", "W4A4", spikellm("W4A4", training), published="OmniQuant"),
        Row(
            "SpikeLLM, T = 2",
            "W4A4",
            spikellm("W4A4T2", training),
            quick=True,
            published="SpikeLLM T=2",
        ),
        Row("SpikeLLM, T = 4", "W4A4", spikellm("W4A4T4", training), published="SpikeLLM T=4"),
        Row(f"{PROPOSED}, T = 2", "W4A4", _rotated("W4A4T2"), quick=True),
        Row(f"{PROPOSED}, T = 4", "W4A4", _rotated("W4A4T4")),
        Row("rtn", "W2A8", _rtn("W2A8")),
        Row("OmniQuant", "W2A8", spikellm("W2A8", training), published="OmniQuant"),
        Row(
            "SpikeLLM, T = 2",
            "W2A8",
            spikellm("W2A8T2", training, **narrow),
            published="SpikeLLM T=2",
        ),
        Row(PROPOSED, "W2A8", _rotated("W2A8")),
        Row("rtn", "W2A16", _rtn("W2A16")),
        Row("OmniQuant", "W2A16", spikellm("W2A16", training), published="OmniQuant"),
        Row("trained, recipe default (ours)", "W2A16", _trained("W2A16", training)),
    )
    return Table(
        "main",
        "Perplexity and zero-shot accuracy",
        rows,
        (Measure.PERPLEXITY, Measure.TASKS),
        lines.accuracy_lines,
        {"mean steps": ".3f", "convert s": ".0f", "convert device MiB": ".0f"}
        | dict.fromkeys(lines.ACCURACIES, ".2f"),
        "OmniQuant and SpikeLLM are the published recipe on this code, but for epochs and data: channels as "
        "they are, one range for all channels, every linear input and Q, K, V encoded. W2A8 with T = 2 "
        "has 5 % salient channels. At W2A16 the activations are floats, which have no time steps and no "
        "rotated basis, so there is no row with T; the published ones spend the steps on weights. "
        "Accuracies in per cent: acc of every task, and acc_norm where the "
        "task defines it; mean acc_norm is the convention of the published averages (acc_norm where "
        "there is one, else acc).",
    )


def saliency(training: Training) -> Table:
    """Scores, ratios and steps of the salient channels; own and shared ranges."""
    first, ranges = Score.FIRST_ORDER, (ValueRange.SPLIT, ValueRange.SHARED)
    rows = [Row("no saliency", "W4A4", _rtn("W4A4"), quick=True)]
    for own in ranges:
        fields = {"value_range": own}
        for score in Score:
            mapped = score is first and own is ValueRange.SPLIT
            extra = (Measure.SALIENCY_MAP,) if mapped else ()
            made = _rtn("W4A4T2", **fields, score=score)
            rows.append(Row(f"{score}, 10 %, T = 2, {own}", "W4A4", made, score is first, extra))
        for score in (first, Score.GAUSS_NEWTON):
            made = _rtn("W4A4T4", **fields, score=score)
            rows.append(Row(f"{score}, 5 %, T = 4, {own}", "W4A4", made))
    for ratio in (0.02, 0.05, 0.2, 0.4):
        made = _rtn("W4A4T2", salient_ratio=ratio)
        rows.append(Row(f"{first}, {100 * ratio:g} %, T = 2, split", "W4A4", made))
    return Table(
        "saliency",
        "Saliency: scores, ratios, steps, ranges",
        tuple(rows),
        (Measure.SAMPLE,),
        lines.ablation_lines,
        {
            "mean steps": ".3f",
            "SQNR dB, mean": ".2f",
            "SQNR dB, worst": ".2f",
            "spike rate %": ".2f",
        },
        "Pipeline rtn (masks and rounding, no training), so that only the masks differ. Split: salient "
        "channels have a range of their own; shared: one range for all, as in the paper.",
    )


def efficiency(training: Training) -> Table:
    """Operations and energy of the spiking executions and their dense rivals."""
    shared = (Measure.RASTER,)
    rows = (
        Row("rtn, T = 2", "W4A4", _rtn("W4A4T2")),
        Row("OmniQuant", "W4A4", spikellm("W4A4", training)),
        Row("SpikeLLM, T = 2", "W4A4", spikellm("W4A4T2", training), quick=True),
        Row("SpikeLLM, T = 4", "W4A4", spikellm("W4A4T4", training)),
        Row(f"{PROPOSED}, T = 2", "W4A4", _rotated("W4A4T2"), True, shared),
        Row(f"{PROPOSED}, T = 4", "W4A4", _rotated("W4A4T4")),
        Row(PROPOSED, "W2A8", _rotated("W2A8")),
    )
    return Table(
        "efficiency",
        "Operations and energy",
        rows,
        (Measure.SAMPLE, Measure.OPERATIONS),
        lines.efficiency_lines,
        lines.EFFICIENCY_FORMATS,
        "Nothing is measured in joules: energies are counted operations times published energies of "
        "one operation, under each model, for the converted matmuls with what stays float. ACE "
        "(arithmetic computation effort): bits x bits of a multiply-accumulate, T times where a "
        "channel fires T times, over fp16 x fp16 (linears; 6.875 % in the paper for T = 2 "
        "on 10 %). Spikes are events of the signed re-encoding. "
        f"Energy models: {_provenance()}.",
    )


def _provenance() -> str:
    models = [model.provenance for model in ENERGY_MODELS]
    return "; ".join(f"{m.name}: {m.source}, {m.technology}, {m.precision}" for m in models)


def equivalence(training: Training) -> Table:
    """Whether the binary, unrolled and collapsed views are the same numbers."""
    rows = (
        Row("rtn, T = 2", "W4A4", _rtn("W4A4T2")),
        Row("SpikeLLM, T = 2", "W4A4", spikellm("W4A4T2", training)),
        Row("SpikeLLM, T = 4", "W4A4", spikellm("W4A4T4", training)),
        Row(f"{PROPOSED}, T = 2", "W4A4", _rotated("W4A4T2"), quick=True),
    )
    return Table(
        "equivalence",
        "Equivalence of the views",
        rows,
        (Measure.EQUIVALENCE,),
        lines.equivalence_lines,
        {},
        "Integers: int32 accumulators of every spiking layer on the input that reaches it, binary and "
        "unrolled view against the collapsed one. Differences are relative to the largest value.",
    )


def speed(training: Training) -> Table:
    """Prefill and decoding of every view beside the dense model on this device."""
    rows = (
        Row("SpikeLLM, T = 2", "W4A4", spikellm("W4A4T2", training)),
        Row(f"{PROPOSED}, T = 2", "W4A4", _rotated("W4A4T2"), quick=True),
    )
    return Table(
        "speed",
        "Speed of the views on this device",
        rows,
        (Measure.SPEED,),
        lines.speed_lines,
        dict.fromkeys(("prefill ms", "decode ms a token"), ".1f")
        | dict.fromkeys(("prefill, dense / this", "decode, dense / this"), ".2f"),
        "Medians; the contenders are interleaved in one process. The views simulate time steps on "
        "ordinary hardware: binary and unrolled are for analysis, collapsed is for inference.",
    )


_MAKERS = (main, gptq, saliency, efficiency, equivalence, speed)
TABLES: Mapping[str, Callable[[Training], Table]] = dict(zip(TABLE_NAMES, _MAKERS, strict=True))
"""All tables by name, in the order in which they run."""
