"""Time and memory of converting one block of a LLaMA shape, and what that makes for the whole model.

    python benchmarks/conversion_speed.py --shape 7B --pipeline rotated --device cuda

Two blocks with random weights are converted on random tokens. The perplexity would mean nothing; the
path, the time of a block and the peaks of memory are real.
"""

from __future__ import annotations

import argparse
import sys
import tempfile

import torch
from transformers import LlamaForCausalLM

from snnllm.config import SpikeConfig
from snnllm.conversion import Pipeline, convert
from snnllm.random_model import SHAPES, Shape, llama_config, random_dense

_CONVERTED = 2
_VOCABULARY = 1024


def random_llama(shape: Shape, blocks: int) -> LlamaForCausalLM:
    """A LLaMA in bf16 with random weights and a small vocabulary."""
    config = llama_config(shape._replace(blocks=blocks, vocabulary=_VOCABULARY))
    return random_dense(config, torch.device("cpu"), torch.bfloat16)


def main(argv: list[str] | None = None) -> int:
    """Convert two blocks and print one row of a table for each pipeline."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cuda = torch.cuda.is_available()
    parser.add_argument(
        "--shape", nargs="+", choices=sorted(SHAPES), default=["7B" if cuda else "smollm2"]
    )
    parser.add_argument("--pipeline", nargs="+", choices=[*Pipeline], default=["rotated"])
    parser.add_argument("--preset", default="W4A4T2")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows")
    parser.add_argument("--window", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    args = parser.parse_args(argv)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(f"{name}, {args.windows} windows of {args.window}, {args.preset}")
    print("| shape | pipeline | s a block | whole model, min | peak GPU GiB |")
    print("|---|---|---|---|---|")
    generator = torch.Generator().manual_seed(0)
    windows = torch.randint(0, _VOCABULARY, (args.windows, args.window), generator=generator)
    for key in args.shape:
        model = random_llama(SHAPES[key], _CONVERTED)
        for pipeline in args.pipeline:
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with tempfile.TemporaryDirectory() as folder:
                spike = SpikeConfig.preset(args.preset)
                report = convert(
                    model, f"{folder}/out", spike, windows, pipeline=pipeline, device=args.device
                )
            # The first block pays for what is compiled once.
            seconds = report.blocks[-1].seconds
            once = report.seconds - sum(block.seconds for block in report.blocks)
            total = (once + SHAPES[key].blocks * seconds) / 60
            peak = torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0
            print(
                f"| {key} | {pipeline} | {seconds:.1f} | {total:.1f} | "
                f"{f'{peak:.1f}' if peak else '-'} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
