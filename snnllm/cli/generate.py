"""`snnllm generate`: continue a prompt."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from snnllm.cli.checks import check_at_least_one, check_prompt
from snnllm.cli.options import add_run_options, open_model

if TYPE_CHECKING:
    from torch import Tensor


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = "Generate text with a spiking checkpoint or a dense LLaMA."
    parser.add_argument("model", help="spiking checkpoint, or a dense LLaMA to compare with")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--chat", action="store_true", help="apply the chat template to the prompt")
    parser.add_argument("--sample", action="store_true", help="sample instead of greedy decoding")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="with --sample (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="with --sample (default: 0)")
    parser.add_argument(
        "--cache",
        choices=["dynamic", "static"],
        help="default: static where steps can be recorded on a GPU (up to 8192 tokens), else dynamic",
    )
    add_run_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Generate, stream to standard output, and print the speed."""
    check_at_least_one(args, "max_new_tokens")
    check_prompt(args.prompt)
    if not args.temperature > 0:
        raise ValueError(f"--temperature must be above 0, got {args.temperature}.")
    model, tokenizer = open_model(args.model, args)
    import torch
    from transformers import TextStreamer

    ids = prompt_ids(tokenizer, args.prompt, args.chat).to(model.device)
    torch.manual_seed(args.seed)
    options: dict[str, Any] = {"do_sample": args.sample, "max_new_tokens": args.max_new_tokens}
    if args.sample:
        options["temperature"] = args.temperature
    if args.cache:
        options["cache_implementation"] = args.cache
    start = time.perf_counter()
    out = model.generate(ids, streamer=TextStreamer(tokenizer, skip_prompt=False), **options)
    seconds = time.perf_counter() - start
    new = out.shape[1] - ids.shape[1]
    print(f"[{new} tokens, {new / seconds:.1f} tokens/s]")
    return 0


def prompt_ids(tokenizer: Any, prompt: str, chat: bool) -> Tensor:
    """Token ids `[1, S]` of a prompt.

    Raises:
        ValueError: An empty prompt, or `chat` with a tokenizer that has no chat template.
    """
    check_prompt(prompt)
    if not chat:
        ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        return ids
    if tokenizer.chat_template is None:
        raise ValueError("--chat: the tokenizer of this model has no chat template.")
    message = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    chat_ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return chat_ids
