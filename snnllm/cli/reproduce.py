"""`snnllm reproduce`: the tables of the paper on any LLaMA."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snnllm.cli.checks import check_at_least_one, check_usable
from snnllm.cli.options import window_length
from snnllm.harness import check_task_folder
from snnllm.paper.settings import TABLE_NAMES, Settings
from snnllm.pipelines.omniquant_options import Execution
from snnllm.texts import DATA_VARIABLE, load_text, local_tasks
from snnllm.zeroshot import ZERO_SHOT_TASKS

if TYPE_CHECKING:
    from snnllm.sources import Source

ALL = "all"
_QUICK: dict[str, Any] = {
    "window": 512,
    "limit": 4,
    "sample_limit": 2,
    "task_limit": 2,
    "calibration_windows": 2,
    "calibration_window": 256,
    "prompt_tokens": 32,
    "speed_prompt": 64,
    "speed_tokens": 4,
    "repeat": 1,
    "batch_size": 1,
    "task_batch": 4,
}
QUICK_EPOCHS = 1
_FULL: dict[str, Any] = {
    **{f.name: f.default for f in dataclasses.fields(Settings) if f.name in _QUICK},
    "window": 2048,
    "calibration_windows": 128,
    "calibration_window": 2048,
    "batch_size": 4,
    "task_batch": 32,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Describe the command and add its options."""
    parser.description = (
        "Convert and measure every row of the tables; write results.md, CSV, JSON and "
        "figures. Given again after an interruption it continues; a row that fails does not stop the "
        "others. Every option has a default; --quick is a short run of a few rows for a CPU."
    )
    parser.add_argument(
        "tables", nargs="+", choices=[*TABLE_NAMES, ALL], metavar="TABLE", help=_names()
    )
    parser.add_argument("--model", default="smollm2", help="dense LLaMA (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="results folder")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="few rows, little data, one epoch")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only rows whose name contains one of the texts, or several of them (as --dry-run lists them)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the rows, what is done and how long the rest takes; write nothing",
    )
    parser.add_argument("--restart", action="store_true", help="discard what OUTPUT holds")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="rows at once, each on a GPU of its own where there are several (--device cuda), or on a CPU of "
        "many cores; speed is always measured alone (default: 1)",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the checkpoints (OUTPUT/checkpoints)"
    )
    _add_data_options(parser)
    _add_training_options(parser)
    parser.set_defaults(run=run, resumes=True)


def _names() -> str:
    return f"{', '.join(TABLE_NAMES)}, or {ALL}"


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data (in brackets: with --quick)")

    def number(option: str, field: str, text: str) -> None:
        full, quick = (d[field] for d in (_FULL, _QUICK))
        default = "all" if full is None else full
        data.add_argument(
            option, dest=field, type=int, help=f"{text} (default: {default} [{quick}])"
        )

    data.add_argument(
        "--text",
        nargs="+",
        default=["wikitext2:test"],
        help="evaluation texts: files or data sets, one perplexity each (default: wikitext2:test)",
    )
    data.add_argument(
        "--calibration",
        default="wikitext2:train",
        help="calibration text, never an evaluation text (default: %(default)s)",
    )
    number("--nsamples", "calibration_windows", "calibration windows")
    number("--seqlen", "calibration_window", "tokens of one, at most the context of the model")
    number("--window", "window", "tokens of an evaluation window, at most the context of the model")
    number("--limit", "limit", "evaluation windows of each text")
    number("--sample-limit", "sample_limit", "evaluation windows in tables that compare variants")
    number("--task-limit", "task_limit", "samples of each zero-shot task")
    data.add_argument(
        "--task-data",
        type=Path,
        help=f"folder with the rows of the tasks (default: ${DATA_VARIABLE}/tasks if it exists, else "
        "the data sets of lm-evaluation-harness)",
    )
    data.add_argument("--no-tasks", action="store_true", help="leave the zero-shot tasks out")
    number("--prompt-tokens", "prompt_tokens", "tokens for operations, equivalence and figures")
    number("--speed-prompt", "speed_prompt", "prompt of the timed prefill")
    number("--batch-size", "batch_size", "windows of a forward pass")
    number("--task-batch", "task_batch", "task requests of a forward pass")
    data.add_argument("--seed", type=int, default=0, help="seed of everything random (default: 0)")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    training = parser.add_argument_group("rows that are trained")
    training.add_argument("--epochs", type=int, help=f"default: 20, as published [{QUICK_EPOCHS}]")
    training.add_argument("--train-batch", type=int, help="windows of a training step (default: 1)")
    training.add_argument(
        "--execution", choices=[*map(str, Execution)], help="how a training step runs"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 if a row failed."""
    if args.dry_run and args.restart:
        raise ValueError("--dry-run changes nothing; leave --restart out to see what is done.")
    check_at_least_one(args, "jobs")
    numbers_of(args)
    check_task_folder(args.task_data)
    for text in (*args.text, args.calibration):
        load_text(text)  # what is missing is said before seconds are spent
    check_usable(args, args.model)
    # Here, not above: it loads torch and transformers, which takes seconds.
    from snnllm.cli import reproduction

    return reproduction.run(args)


def settings_of(args: argparse.Namespace, source: Source) -> Settings:
    """The settings that the options describe.

    Raises:
        ValueError: A number below 1.
    """
    values = numbers_of(args)
    for name in ("window", "calibration_window"):
        # Longer windows than the context would measure untrained positions.
        values[name] = window_length(None, values[name], source.config)
    for name in ("prompt_tokens", "speed_prompt"):
        values[name] = min(values[name], values["window"] - 1)
    return Settings(
        texts=tuple(args.text),
        calibration=args.calibration,
        tasks=() if args.no_tasks else ZERO_SHOT_TASKS,
        task_data=args.task_data or local_tasks(),
        seed=args.seed,
        **values,
    )


def numbers_of(args: argparse.Namespace) -> dict[str, Any]:
    """The numbers among the settings, as given or by default.

    Raises:
        ValueError: One below 1.
    """
    preset = _QUICK if args.quick else _FULL
    return {name: _given(args, name, default) for name, default in preset.items()}


def _given(args: argparse.Namespace, name: str, default: int | None) -> int | None:
    value: int | None = getattr(args, name, None)
    if value is not None and value < 1:
        raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {value}.")
    return default if value is None else value
