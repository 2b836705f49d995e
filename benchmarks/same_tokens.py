"""Greedy tokens of a spiking checkpoint on two devices, and tokens a second on each.

    snnllm convert smollm2 checkpoint
    python benchmarks/same_tokens.py checkpoint --devices cpu cuda

The collapsed view of one checkpoint continues the same prompts on both. Spike counts are integers
and equal wherever the float numbers in front of the encoders are; these differ between devices by
rounding, so that a count at the border of two may differ by one, which the layers behind it carry on: in
some checkpoints as far as noise of 1e-7 in the embeddings does (benchmarks/RESULTS.md). At the first
difference the table says how far the two tokens were apart: `gap` is the logit of the token chosen on
a device minus that of the other device's token, computed there. Without a checkpoint or the second
device the exit status is 77 (skipped).
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from snnllm.modeling import load

SKIPPED = 77
PROMPTS = (
    "Once upon a time, there was",
    "The capital of France is",
    "Spiking neural networks are",
    "In 1969, the first",
)


class Difference(NamedTuple):
    """The first step at which two continuations differ.

    Attributes:
        step: Index of the new token.
        gaps: On each device, by how much it prefers its own token to the other's, in logits.
    """

    step: int
    gaps: tuple[float, float]


def first_difference(
    tokens: tuple[Tensor, Tensor], logits: tuple[Tensor, Tensor]
) -> Difference | None:
    """Compare new tokens `[n]` with logits `[n, V]` of two devices."""
    differs = (tokens[0] != tokens[1]).nonzero()
    if not len(differs):
        return None
    step = int(differs[0])
    a, b = int(tokens[0][step]), int(tokens[1][step])
    gaps = (logits[0][step, a] - logits[0][step, b], logits[1][step, b] - logits[1][step, a])
    return Difference(step, (float(gaps[0]), float(gaps[1])))


def continuation(model: Any, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor, float]:
    """New tokens, their logits, and tokens a second of a second run, greedy, on the model's device.

    Behind the end of the text its last token is repeated, and logits are 0.
    """
    arguments = {
        "do_sample": False,
        "max_new_tokens": tokens,
        "cache_implementation": "static",
    }
    prompt = prompt.to(model.device)
    out = model.generate(
        prompt,
        **arguments,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,  # transformers' own loop, which keeps the logits
    )
    start = time.perf_counter()
    again = model.generate(prompt, **arguments).cpu()  # recorded steps, where there are any
    seconds = time.perf_counter() - start
    new = out.sequences[0, prompt.shape[1] :].cpu()
    if not torch.equal(again[0, prompt.shape[1] :], new):
        raise SystemExit("Two runs on one device give different tokens.")
    missing = tokens - len(new)
    logits = nn.functional.pad(torch.cat(out.logits).float().cpu(), (0, 0, 0, missing))
    return nn.functional.pad(new, (0, missing), value=int(new[-1])), logits, len(new) / seconds


def main(argv: list[str] | None = None) -> int:
    """Print a row per prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="of `snnllm convert`")
    parser.add_argument("--devices", nargs=2, default=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", nargs="+", default=list(PROMPTS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    if args.checkpoint is None:
        print(
            "same_tokens compares what a checkpoint writes: none is given; skipped.",
            file=sys.stderr,
        )
        return SKIPPED
    if any(d.startswith("cuda") for d in args.devices) and not torch.cuda.is_available():
        print("same_tokens compares with a GPU: there is no CUDA device; skipped.", file=sys.stderr)
        return SKIPPED
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    dtype = getattr(torch, args.dtype)
    models = [load(args.checkpoint, dtype).to(device) for device in args.devices]
    first, second = args.devices
    print(f"torch {torch.__version__}, {args.dtype}, {args.tokens} tokens")
    print(f"| prompt | equal tokens | gap {first} | gap {second} | {first}, tokens/s | {second} |")
    print("|---|---|---|---|---|---|")
    for text in args.prompt:
        prompt = tokenizer(text, return_tensors="pt").input_ids
        a, b = (continuation(model, prompt, args.tokens) for model in models)
        found = first_difference((a[0], b[0]), (a[1], b[1]))
        equal = f"{args.tokens} of {args.tokens}" if found is None else str(found.step)
        gaps = ("-", "-") if found is None else tuple(f"{gap:.4f}" for gap in found.gaps)
        print(f"| {text} | {equal} | {gaps[0]} | {gaps[1]} | {a[2]:.1f} | {b[2]:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
