"""`snnllm eval`: token perplexity and zero-shot tasks of a spiking or dense model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from snnllm.cli.checks import check_at_least_one, check_folder_of, check_usable
from snnllm.cli.options import (
    add_run_options,
    open_model,
    progress,
    window_length,
)
from snnllm.harness import check_tasks, evaluate_tasks
from snnllm.texts import DATA_VARIABLE, load_text, local_tasks
from snnllm.zeroshot import ZERO_SHOT_TASKS

_TEXT = "pydoc:test"
_WINDOW = 2048


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = (
        "Token perplexity on non-overlapping windows: exp of the mean negative "
        "log-likelihood, the protocol of the GPTQ, OmniQuant and SpikeLLM papers; and tasks of "
        "lm-evaluation-harness (pip install 'snnllm[eval]'), with both accuracy conventions: acc, "
        "and acc_norm (log-likelihood per byte of the answer)."
    )
    parser.add_argument("model", help="spiking checkpoint, or a dense LLaMA to compare with")
    parser.add_argument(
        "--text",
        help="text file, JSONL file (field 'text') or dataset name: pydoc:test, wikitext2:test "
        f"(default: {_TEXT}, or none with --tasks)",
    )
    parser.add_argument(
        "--window",
        type=int,
        help="tokens a window (default: 2048, or the context of a smaller model)",
    )
    parser.add_argument(
        "--limit",
        type=int,
        help="only so many windows, spread over the text, and so many samples of each task",
    )
    parser.add_argument(
        "--batch-size", type=int, help="windows (default: 1) or task requests (default: 8) a pass"
    )
    add_task_options(parser)
    parser.add_argument("--json", type=Path, help="write the result here, too")
    add_run_options(parser)
    parser.set_defaults(run=run)


def add_task_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose tasks of the harness."""
    tasks = parser.add_argument_group("zero-shot tasks")
    tasks.add_argument(
        "--tasks",
        type=lambda names: [name.strip() for name in names.split(",") if name.strip()],
        metavar="NAME,NAME",
        help=f"tasks of lm-evaluation-harness; those of the paper: {','.join(ZERO_SHOT_TASKS)}",
    )
    tasks.add_argument(
        "--task-data",
        type=Path,
        metavar="FOLDER",
        help="read the tasks of the paper from JSONL files here (piqa_val.jsonl ...), no network "
        f"(default: ${DATA_VARIABLE}/tasks if it exists)",
    )
    tasks.add_argument(
        "--num-fewshot", type=int, help="examples before each question (default: as the task says)"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if args.tasks is None and (args.task_data is not None or args.num_fewshot is not None):
        raise ValueError("--task-data and --num-fewshot belong to tasks; name some with --tasks.")
    if args.window is not None and args.text is None and args.tasks is not None:
        raise ValueError("--window belongs to perplexity; name a text with --text.")
    check_at_least_one(args, "window", "limit", "batch_size")
    check_folder_of("--json", args.json)
    source = args.text or (None if args.tasks is not None else _TEXT)
    batch, data = args.batch_size, args.task_data or local_tasks()
    # Before the model, which may have to be downloaded first.
    if args.tasks is not None:
        check_tasks(args.tasks, data, args.limit, batch or 8, args.num_fewshot)
    text = None if source is None else load_text(source)
    check_usable(args, args.model, spiking=True)
    # Here, not above: they load torch and transformers, which takes seconds.
    from snnllm.data import token_windows, tokenize
    from snnllm.evaluate import token_perplexity

    model, tokenizer = open_model(args.model, args)
    values: dict[str, Any] = {}
    if text is not None:
        length = window_length(args.window, _WINDOW, model.config)
        windows = token_windows(tokenize(text, tokenizer), length, args.limit)
        result = token_perplexity(model, windows, batch or 1, progress("eval"))
        values = result.to_dict()
        print(
            f"{result.metric} {result.perplexity:.4f}  ({source}, {result.windows} windows, "
            f"{result.tokens} predicted tokens, {result.seconds:.1f} s)"
        )
    if args.tasks is not None:
        scores = evaluate_tasks(
            model,
            tokenizer,
            args.tasks,
            task_data=data,
            limit=args.limit,
            batch_size=batch or 8,
            num_fewshot=args.num_fewshot,
        )
        values["tasks"] = scores.to_dict()
        print(f"{scores.to_markdown()}\n(lm-eval {scores.harness}, {scores.seconds:.1f} s)")
    if args.json is not None:
        args.json.write_text(json.dumps(values, indent=2) + "\n")
    return 0
