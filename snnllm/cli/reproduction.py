"""What `snnllm reproduce` does when its options are sound; it loads torch and transformers."""

from __future__ import annotations

import argparse
import dataclasses
import platform
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from tqdm import tqdm

# As `snnllm simulate`: the command line reaches up to the scripts (architecture test).
from sims import paper as drawing
from snnllm.cli.checks import checked_device
from snnllm.cli.options import ConversionBar, progress
from snnllm.cli.reproduce import ALL, QUICK_EPOCHS, settings_of
from snnllm.durations import duration
from snnllm.paper.jobs import Job, jobs_of
from snnllm.paper.measures import standard_measures
from snnllm.paper.parallel import Workers
from snnllm.paper.recipes import Measure, Table, Training
from snnllm.paper.report import write_results
from snnllm.paper.runner import Reporter, Runner
from snnllm.paper.tables import TABLES
from snnllm.pipelines.report import BlockReport
from snnllm.sources import Source, open_source


def run(args: argparse.Namespace) -> int:
    """Measure and write; 1 if a row failed."""
    chosen_tables(args)  # what is wrong with them is said before a model is opened
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
        files = write_results(runner, tables, device_name(runner.device), figures, args.rows)
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
    settings = settings_of(args, source)
    tables = chosen_tables(args)
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


def chosen_tables(args: argparse.Namespace) -> list[Table]:
    """The tables with the rows and measures that are wanted.

    Raises:
        ValueError: No row is left.
        ImportError: Zero-shot tasks are wanted, but the harness is not installed.
    """
    epochs = QUICK_EPOCHS if args.quick and args.epochs is None else args.epochs
    training = Training(epochs, args.train_batch, args.execution)
    names = list(TABLES) if ALL in args.tables else list(dict.fromkeys(args.tables))
    tables = [TABLES[name](training).chosen(args.quick, args.rows) for name in names]
    tables = [table for table in tables if table.rows]
    if not tables:
        raise ValueError(
            f"No row of {', '.join(names)} contains {' or '.join(map(repr, args.rows))}; "
            "--dry-run lists the rows."
        )
    if args.no_tasks:
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
    bar = ConversionBar(blocks, label, leave=False)

    def update(report: BlockReport) -> None:
        bar.on_block(report)
        if bar.n >= blocks:
            bar.close()

    return update


def device_name(device: torch.device) -> str:
    """What the device is called by its maker, or the architecture of the CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU"
