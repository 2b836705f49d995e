"""Ternary weights beside binary and uniform ones: perplexity, steps, stored bits, additive share.

    python benchmarks/ternary.py MODEL --text wikitext2:test --calibration wikitext2:train

Every row converts MODEL anew in the loop of the pipeline `gptq`: the same calibration, the same inputs
from the layers converted before. Ternary rows are reloaded checkpoints, the others float weights that
their codes stand for. Calibration never sees the evaluation text.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from snnllm.baselines import Rounded, bi_llm, pb_llm, plain_gptq
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.data import load_text, random_windows, token_windows, tokenize
from snnllm.evaluate import token_perplexity
from snnllm.modeling import load
from snnllm.pipelines.gptq import GptqOptions, convert_blocks
from snnllm.pipelines.streaming import Run
from snnllm.sources import Source, dense_model, open_source

Quantiser = Callable[..., Rounded]


@dataclass(frozen=True)
class Row:
    """A row of the table: a ternary preset, or another quantiser.

    Attributes:
        label: Name.
        preset: Of a ternary conversion; None for another quantiser.
        quantiser: From weight, second moment and name to a rounded weight.
        options: Of the loop.
        fields: Of the configuration.
    """

    label: str
    preset: str | None = None
    quantiser: Quantiser | None = None
    options: GptqOptions = field(default_factory=GptqOptions)
    fields: dict[str, Any] = field(default_factory=dict)


PLAIN = GptqOptions(damping=0.01, refinements=0, compensate=False, salient_steps=5)
"""Method.md section 6 to the letter: 10 % of the columns at T = 5, one sweep, original weights."""

ROWS = [
    Row("ternary, no saliency", "TW1A16"),
    Row("ternary, 1.2 steps", "TW1.2A16"),
    Row("ternary, 1.4 steps, default", "TW1.4A16"),
    Row("ternary, 2.0 steps", "TW2A16"),
    Row("ternary, 3.0 steps", "TW3A16"),
    Row("ternary, 1.4 steps, random columns", "TW1.4A16", options=GptqOptions(score="random")),
    Row(
        "ternary, 1.4 steps, random columns of T = 5",
        "TW1.4A16",
        options=GptqOptions(score="random", salient_steps=5),
    ),
    Row("ternary, 1.4 steps, 10 % T = 5", "TW1.4A16", options=GptqOptions(salient_steps=5)),
    Row("ternary, 1.4 steps, no refinement", "TW1.4A16", options=GptqOptions(refinements=0)),
    Row("ternary, 1.4 steps, not compensated", "TW1.4A16", options=GptqOptions(compensate=False)),
    Row("ternary, 1.4 steps, groups of 64", "TW1.4A16", fields={"weight_group_size": 64}),
    Row("ternary, 1.4 steps, plain: one sweep, 10 % T = 5", "TW1.4A16", options=PLAIN),
    Row("PB-LLM 95 %", quantiser=partial(pb_llm, low=0.95)),
    Row("PB-LLM 94.3 %, 1.4 steps", quantiser=partial(pb_llm, low=1 - 0.4 / 7)),
    Row("PB-LLM 90 %", quantiser=partial(pb_llm, low=0.9)),
    Row("PB-LLM 80 %", quantiser=partial(pb_llm, low=0.8)),
    Row("PB-LLM 94.3 %, as published", quantiser=partial(pb_llm, low=1 - 0.4 / 7), options=PLAIN),
    Row("BiLLM", quantiser=bi_llm),
    Row("BiLLM, as published", quantiser=bi_llm, options=PLAIN),
    Row("GPTQ 2 bits, groups of 128", quantiser=partial(plain_gptq, bits=2)),
    Row("GPTQ 2 bits, groups of 32", quantiser=partial(plain_gptq, bits=2, group_size=32)),
    Row("GPTQ 3 bits, groups of 128", quantiser=partial(plain_gptq, bits=3)),
    Row("GPTQ 2 bits, as published", quantiser=partial(plain_gptq, bits=2), options=PLAIN),
    Row("ternary, 1.4 steps, A8", "TW1.4A8"),
    Row("ternary, 1.4 steps, A4 T = 2", "TW1.4A4T2"),
    Row("ternary, 2.0 steps, A8", "TW2A8"),
]


@dataclass
class Cost:
    """What the linears of a model cost, weighted by their sizes."""

    weights: int = 0
    bits: float = 0.0
    additive: float = 0.0
    steps: float = 0.0

    def add(self, rounded: Rounded) -> None:
        """Count a linear."""
        size = rounded.weight.numel()
        self.weights += size
        for name in ("bits", "additive", "steps"):
            setattr(self, name, getattr(self, name) + size * getattr(rounded, name))

    def mean(self, name: str) -> float:
        """A figure per weight."""
        return float(getattr(self, name)) / max(1, self.weights)


def fake_quantised(
    source: Source, run: Run, quantiser: Quantiser, options: GptqOptions
) -> tuple[nn.Module, Cost]:
    """A float model whose linears hold rounded weights, and what storing them would take."""
    cost = Cost()

    def encode(name: str, linear: nn.Linear, wanted: Tensor, hessian: Tensor) -> nn.Module:
        rounded = quantiser(wanted, hessian, name=name)
        cost.add(rounded)
        linear.weight = nn.Parameter(rounded.weight, requires_grad=False)
        return linear

    model = dense_model(source)
    spike = SpikeConfig.preset("TW1A16")
    blocks = convert_blocks(source, spike, run, options, encode=encode)
    for own, (block, _) in zip(model.model.layers, blocks, strict=True):
        own.load_state_dict(block.state_dict(), assign=True)  # never into the source
    return model, cost


def ternary(source: Source, run: Run, row: Row, folder: str) -> tuple[nn.Module, Cost]:
    """A ternary checkpoint, converted and reloaded."""
    assert row.preset is not None
    spike = SpikeConfig.preset(row.preset, **row.fields)
    report = convert(
        source,
        f"{folder}/out",
        spike,
        run.windows,
        pipeline="gptq",
        options=row.options,
        device=run.device,
    )
    steps = sum(t * n for c in report.spike.weight_columns.values() for t, n in c)
    columns = sum(n for c in report.spike.weight_columns.values() for _, n in c)
    weights = report.linear_weights
    cost = Cost(weights, 8.0 * report.linear_bytes, float(weights), weights * steps / columns)
    return load(f"{folder}/out"), cost


def main(argv: list[str] | None = None) -> int:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="dense LLaMA (%(default)s)")
    parser.add_argument("--text", default="pydoc:test", help="evaluation text (file or dataset)")
    parser.add_argument("--calibration", default="pydoc:train", help="calibration text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=12, help="evaluation windows, spread evenly")
    parser.add_argument("--batch", type=int, default=1, help="windows evaluated together")
    parser.add_argument("--calibration-windows", type=int, default=16)
    parser.add_argument("--calibration-window", type=int, help="tokens; default as --window")
    parser.add_argument(
        "--rows", nargs="+", default=[""], help="only rows whose name contains one of these texts"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args(argv)

    source = open_source(args.model)
    tokenizer = source.tokenizer()
    windows = token_windows(tokenize(load_text(args.text), tokenizer), args.window, args.limit)
    calibration = random_windows(
        tokenize(load_text(args.calibration), tokenizer),
        args.calibration_window or args.window,
        args.calibration_windows,
        0,
    )
    run = Run(calibration, device=torch.device(args.device))
    base = token_perplexity(dense_model(source).to(args.device), windows, batch_size=args.batch)
    print(
        f"{len(windows)} windows of {args.window}, {args.text}, calibration {len(calibration)} x "
        f"{calibration.shape[1]}, {args.device}, torch {torch.__version__}"
    )
    print("| weights | perplexity | mean steps | stored bits | additive MACs | convert s |")
    print("|---|--:|--:|--:|--:|--:|")
    print(f"| float | {base.perplexity:.2f} | - | 16 | 0 % | - |", flush=True)
    rows: list[dict[str, Any]] = [{"weights": "float", **base.to_dict()}]
    for row in ROWS:
        if not any(part in row.label for part in args.rows):
            continue
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            if row.quantiser is None:
                model, cost = ternary(source, run, row, folder)
            else:
                model, cost = fake_quantised(source, run, row.quantiser, row.options)
        seconds = time.perf_counter() - begin
        result = token_perplexity(model.to(args.device), windows, batch_size=args.batch)
        figures = {name: cost.mean(name) for name in ("steps", "bits", "additive")}
        print(
            f"| {row.label} | {result.perplexity:.2f} | {figures['steps']:.2f} | "
            f"{figures['bits']:.2f} | {100 * figures['additive']:.0f} % | {seconds:.1f} |",
            flush=True,
        )
        rows.append({"weights": row.label, **figures, "seconds": seconds, **result.to_dict()})
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
