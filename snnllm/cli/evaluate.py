"""`snnllm eval`: token perplexity of a spiking or dense model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from snnllm.cli.options import add_run_options, open_model, progress, window_length
from snnllm.data import load_text, token_windows, tokenize
from snnllm.evaluate import token_perplexity

_WINDOW = 2048


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "eval",
        help="perplexity of a spiking or dense model",
        description="Token perplexity on non-overlapping windows: exp of the mean negative "
        "log-likelihood, the protocol of the GPTQ, OmniQuant and SpikeLLM papers.",
    )
    parser.add_argument("model", help="spiking checkpoint, or a dense LLaMA to compare with")
    parser.add_argument(
        "--text",
        default="pydoc:test",
        help="text file, JSONL file (field 'text') or dataset name: pydoc:test, wikitext2:test "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens a window (default: 2048, or the context of a smaller model)",
    )
    parser.add_argument("--limit", type=int, help="only so many windows, spread over the text")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    text = load_text(args.text)
    model, tokenizer = open_model(args.model, args)
    length = window_length(args.window, _WINDOW, model.config)
    windows = token_windows(tokenize(text, tokenizer), length, args.limit)
    result = token_perplexity(model, windows, args.batch_size, progress("eval"))
    print(
        f"{result.metric} {result.perplexity:.4f}  ({args.text}, {result.windows} windows, "
        f"{result.tokens} predicted tokens, {result.seconds:.1f} s)"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result.to_dict(), indent=2) + "\n")
    return 0
