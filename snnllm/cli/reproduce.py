"""`snnllm reproduce`: the tables of the paper on any LLaMA."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from snnllm.cli.checks import checked_device
from snnllm.cli.options import (
    progress,
    window_length,
)
from snnllm.durations import duration
from snnllm.paper.jobs import Job, jobs_of
from snnllm.paper.measures import Settings, standard_measures
from snnllm.paper.parallel import Workers
from snnllm.paper.recipes import Measure, Table, Training
from snnllm.paper.report import write_results
from snnllm.paper.runner import Reporter, Runner
from snnllm.paper.tables import TABLES
from snnllm.pipelines.omniquant_options import Execution
from snnllm.pipelines.report import BlockReport
from snnllm.sources import Source, open_source
from snnllm.texts import DATA_VARIABLE, check_text, local_tasks
from snnllm.zeroshot import ZERO_SHOT_TASKS

_ALL = "all"
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
_QUICK_EPOCHS = 1
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
        "tables", nargs="+", choices=[*TABLES, _ALL], metavar="TABLE", help=_names()
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
    parser.set_defaults(run=run)


def _names() -> str:
    return f"{', '.join(TABLES)}, or {_ALL}"


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
    training.add_argument("--epochs", type=int, help=f"default: 20, as published [{_QUICK_EPOCHS}]")
    training.add_argument("--train-batch", type=int, help="windows of a training step (default: 1)")
    training.add_argument(
        "--execution", choices=[*map(str, Execution)], help="how a training step runs"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 if a row failed."""
    # As `snnllm simulate`: the command line reaches up to the scripts (architecture test).
    from sims import paper as drawing

    if args.dry_run and args.restart:
        raise ValueError("--dry-run changes nothing; leave --restart out to see what is done.")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}.")
    for text in (*args.text, args.calibration):
        check_text(text)
    checked_device(args.device)
    source = open_source(args.model)
    runner, tables = _opened(args, source)
    try:
        if args.dry_run:
            print("\n".join(plan(tables, runner)))
            return 0
        workers, path = None, args.output / "source.pt"  # one name, whatever ended an earlier run
        jobs = jobs_of(tables)
        if args.jobs > 1 and any(runner.pending(job) for job in jobs):
            torch.save(source, path)
            workers = Workers(args.jobs, partial(_worker, args, path))
        try:
            done = runner.execute(jobs, workers)
        finally:
            path.unlink(missing_ok=True)
        figures = drawing.figures(tables, runner.record, args.output / "figures")
        files = write_results(runner, tables, device_name(runner.device), figures)
    finally:
        runner.close()
    print(files[0].read_text(encoding="utf-8").partition("## Figures")[0])
    print("\n".join(f"wrote {path}" for path in files))
    if not done:
        print("some rows failed; the same command tries them again")
    return 0 if done else 1


def _opened(
    args: argparse.Namespace, source: Source, worker: int | None = None
) -> tuple[Runner, list[Table]]:
    """The output folder as the options describe it, and the tables; a worker is silent."""
    from sims import paper as drawing

    settings = settings_of(args, source)
    tables = chosen_tables(args, settings)
    leader = worker is None
    if leader:
        reporter = Reporter(tqdm.write, progress, _block_bar)
    else:
        reporter = Reporter(lambda _: None, lambda _: None, lambda *_: lambda _: None)
    runner = Runner(
        source,
        settings,
        {**standard_measures(settings, reporter.windows), **drawing.measures()},
        args.output,
        device_of(args.device, worker),
        reporter,
        restart=args.restart and leader,
        keep=args.keep,
        look=args.dry_run or not leader,
        at_once=1 if leader else args.jobs,
    )
    return runner, tables


def device_of(name: str, worker: int | None) -> torch.device:
    """The device of a worker process: the GPUs in turn, unless one is named."""
    device = checked_device(name)
    if worker is not None and name == "cuda":
        device = torch.device("cuda", worker % torch.cuda.device_count())
    return device


def _worker(args: argparse.Namespace, path: Path, number: int) -> tuple[Runner, dict[str, Job]]:
    """What a worker process works with; the source as the leader saved it, which a GGUF file takes long."""
    source = torch.load(path, mmap=True, weights_only=False)  # a file of this very run
    runner, tables = _opened(args, source, number)
    if runner.device.type == "cuda":
        torch.cuda.set_device(runner.device)
    return runner, {job.row.name: job for job in jobs_of(tables)}


def settings_of(args: argparse.Namespace, source: Source) -> Settings:
    """The settings that the options describe.

    Raises:
        ValueError: A number below 1.
    """
    preset = _QUICK if args.quick else _FULL
    values: dict[str, Any] = {name: _given(args, name, default) for name, default in preset.items()}
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


def _given(args: argparse.Namespace, name: str, default: int | None) -> int | None:
    value: int | None = getattr(args, name, None)
    if value is not None and value < 1:
        raise ValueError(f"{name.replace('_', ' ')} must be at least 1, got {value}.")
    return default if value is None else value


def chosen_tables(args: argparse.Namespace, settings: Settings) -> list[Table]:
    """The tables with the rows and measures that are wanted.

    Raises:
        ValueError: No row is left.
        ImportError: Zero-shot tasks are wanted, but the harness is not installed.
    """
    epochs = _QUICK_EPOCHS if args.quick and args.epochs is None else args.epochs
    training = Training(epochs, args.train_batch, args.execution)
    names = list(TABLES) if _ALL in args.tables else list(dict.fromkeys(args.tables))
    tables = [TABLES[name](training).chosen(args.quick, args.rows) for name in names]
    tables = [table for table in tables if table.rows]
    if not tables:
        raise ValueError(
            f"No row of {', '.join(names)} contains {' or '.join(map(repr, args.rows))}; "
            "--dry-run lists the rows."
        )
    if not settings.tasks:
        tables = [
            dataclasses.replace(t, measures=tuple(m for m in t.measures if m is not Measure.TASKS))
            for t in tables
        ]
    elif any(Measure.TASKS in t.measures for t in tables) and find_spec("lm_eval") is None:
        raise ImportError(
            "The zero-shot tasks need lm-evaluation-harness: pip install 'snnllm[eval]'; --no-tasks "
            "leaves them out."
        )
    return tables


def plan(tables: Sequence[Table], runner: Runner) -> list[str]:
    """What the tables consist of, what is done, and how long the rest takes."""
    lines = []
    for table in tables:
        lines.append(f"{table.name}: {table.title}; {runner.timing.outlook(jobs_of([table]))}")
        for row in table.rows:
            job = Job(row, table.measures_of(row))
            seconds = runner.record(row)["seconds"]
            steps = [
                f"{step} {_state(step in seconds, seconds.get(step), runner, job, step)}"
                for step in job.steps
            ]
            lines.append(f"  {row.title}: {', '.join(steps)}")
    return [
        *lines,
        f"all, models that tables share counted once: {runner.timing.outlook(jobs_of(tables))}",
    ]


def _state(done: bool, seconds: float | None, runner: Runner, job: Job, step: str) -> str:
    if done:
        return f"done in {seconds:.1f} s"
    expected = runner.timing.expected_seconds(job, step)
    return "to do" if expected is None else f"to do, about {duration(expected)}"


def _block_bar(label: str, blocks: int) -> Callable[[BlockReport], None]:
    """A progress bar over the blocks of a conversion."""
    bar = tqdm(total=blocks, desc=label, unit="block", leave=False)

    def update(report: BlockReport) -> None:
        bar.set_postfix_str(f"SQNR {report.sqnr_db:.1f} dB")
        bar.update()
        if bar.n >= blocks:
            bar.close()

    return update


def device_name(device: torch.device) -> str:
    """What the device is called by its maker, or the architecture of the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU"
