"""Prefill and decoding speed of the views of a spiking checkpoint beside the dense float32 model.

    python benchmarks/model_speed.py DENSE --checkpoint CHECKPOINT --prompt 512 --tokens 16

Without a checkpoint the dense model is converted into a temporary folder first (`rtn`, W4A4T2). All
contenders are interleaved in one process; the table gives medians and ratios to the dense model.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.data import load_text, random_windows, tokenize
from snnllm.execution import View, use_view
from snnllm.modeling import load
from snnllm.sources import Source, dense_model, open_source
from snnllm.speed import Contender, time_contenders


def spiking_model(checkpoint: Path | None, source: Source) -> Any:
    """The checkpoint, or the dense model converted for the occasion."""
    if checkpoint is not None:
        return load(checkpoint)
    ids = tokenize(load_text("pydoc:train"), source.tokenizer())
    with tempfile.TemporaryDirectory() as folder:
        windows = random_windows(ids, 128, 2, 0)
        spike = SpikeConfig.preset("W4A4T2")
        convert(
            source, f"{folder}/out", spike, windows, pipeline="rtn"
        )  # for its time, the quick one
        return load(f"{folder}/out")


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", nargs="?", default="smollm2", help="dense LLaMA (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, help="spiking checkpoint of the same model")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens of the prefill")
    parser.add_argument("--context", type=int, default=128, help="prompt tokens of decoding")
    parser.add_argument("--tokens", type=int, default=16, help="decoded tokens a repetition")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--views", nargs="+", choices=[*View], default=["collapsed", "unrolled"])
    args = parser.parse_args(argv)
    source = open_source(args.dense)
    dense, spiking = dense_model(source), spiking_model(args.checkpoint, source)
    vocabulary = dense.config.vocab_size
    ids = torch.randint(vocabulary, (1, args.prompt), generator=torch.Generator().manual_seed(0))

    contenders = {"dense": Contender(dense)}
    contenders |= {v: Contender(spiking, partial(use_view, spiking, v)) for v in args.views}
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {spiking.config.spike.label}"
    )
    print(
        "| task | "
        + " | ".join(contenders)
        + " | "
        + " | ".join(f"dense / {v}" for v in args.views)
        + " |"
    )
    print("|---" * (1 + len(contenders) + len(args.views)) + "|")
    timings = time_contenders(contenders, ids, ids[:, : args.context], args.tokens, args.repeat)
    for name, field in (
        (f"prefill {args.prompt}", "prefill_seconds"),
        (f"decode after {args.context}", "decode_seconds"),
    ):
        median = {c: getattr(timing, field) for c, timing in timings.items()}
        times = " | ".join(f"{1e3 * median[c]:.1f} ms" for c in contenders)
        ratios = " | ".join(f"{median['dense'] / median[v]:.2f}x" for v in args.views)
        print(f"| {name} | {times} | {ratios} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
