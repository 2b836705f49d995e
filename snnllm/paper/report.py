"""Write the tables: Markdown, CSV and JSON, with a manifest of how they came about."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from snnllm.conversion import package_versions
from snnllm.paper.jobs import Job, jobs_of
from snnllm.paper.published import Published, published_values, recognise
from snnllm.paper.recipes import Line, Table
from snnllm.paper.runner import Runner
from snnllm.pipelines.omniquant_options import OmniQuantOptions, Recipe
from snnllm.work import write_durably

__all__ = ["manifest", "published_lines", "table_lines", "write_results"]


def table_lines(table: Table, runner: Runner, model: str | None) -> list[Line]:
    """The lines of a table; rows of a recognised model also say what is published."""
    lines = table.lines([(row, runner.record(row)) for row in table.rows])
    if table.name == "main" and model is not None:
        known = published_values()
        for row, line in zip(table.rows, lines, strict=True):
            for metric in ("wikitext2", "c4", "tasks"):
                line[f"published {metric}"] = " / ".join(
                    f"{p.value:g}"
                    for p in known
                    if (p.model, p.bits, p.method, p.metric)
                    == (model, row.bits, row.published, metric)
                )
    return lines


def published_lines(model: str) -> list[str]:
    """Every published value of a model with its source, as a Markdown table."""
    values = [p for p in published_values() if p.model == model]
    return [
        "| published | bits | method | value | table | source |",
        "|---|---|---|--:|---|---|",
        *(_published_line(p) for p in values),
    ]


def _published_line(p: Published) -> str:
    return f"| {p.metric} | {p.bits} | {p.method} | {p.value:g} | {p.table or '-'} | {p.source} |"


def manifest(
    runner: Runner, tables: Sequence[Table], device: str, only: Sequence[str] = ()
) -> dict[str, Any]:
    """How the results came about: versions, device, model, data, settings, times, errors."""
    jobs = jobs_of(tables)
    rows = {}
    for job in jobs:
        record = runner.record(job.row)
        rows[job.row.name] = {
            "title": job.row.title,
            "seconds": record["seconds"],
            "at_once": record.get("at_once", 1),
            "epochs": ((record.get("recipe") or {}).get("options") or {}).get("epochs"),
            "errors": record["errors"],
        }
    return {
        **runner.run,
        "published": recognise(runner.source.config, runner.source.name),
        "device_name": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **package_versions()},
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": sum(sum(row["seconds"].values()) for row in rows.values()),
        "elapsed_seconds": runner.elapsed,
        "only_rows": list(only),
        "rows_not_shown": len(runner.records.keys() - rows.keys()),
        "rows": rows,
    }


def _commit() -> str | None:
    """Commit of the source tree, with `+` where it has changes; None outside of a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed package may lie inside a repository that is not its own.
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_results(
    runner: Runner,
    tables: Sequence[Table],
    device: str,
    figures: Sequence[tuple[str, Path]],
    only: Sequence[str] = (),
) -> list[Path]:
    """Write `results.md`, `manifest.json`, and a CSV and JSON file per table.

    Args:
        runner: Holds the records.
        tables: What was asked for.
        device: Name of the device.
        figures: Captions and files, inside the output folder.
        only: Texts by which the rows were chosen, empty for all.

    Returns:
        The files.
    """
    output, stated = runner.output, manifest(runner, tables, device, only)
    model = stated["published"]
    text = [f"# Results on {stated['model']}", "", *_summary(stated), ""]
    files = []
    for table in tables:
        lines = table_lines(table, runner, model)
        text += [f"## {table.title}", "", *markdown(lines, table.formats), "", table.note, ""]
        text += _failures(jobs_of([table]), runner)
        files += [
            _write_csv(lines, output / f"{table.name}.csv"),
            _write_json({"manifest": stated, "lines": lines}, output / f"{table.name}.json"),
        ]
    if model is not None:
        text += [f"## Published values of {model}", "", *published_lines(model), ""]
    if figures:
        text += ["## Figures", ""]
        for caption, path in figures:
            text += [f"![{caption}]({path.relative_to(output).as_posix()})", "", caption, ""]
    shown = json.dumps({k: v for k, v in stated.items() if k != "rows"}, indent=2)
    text += ["## Manifest", "", "```json", shown, "```", "", *_times(stated["rows"])]
    path = output / "results.md"
    write_durably(path, ("\n".join(text) + "\n").encode())
    return [path, _write_json(stated, output / "manifest.json"), *files]


def _summary(stated: Mapping[str, Any]) -> list[str]:
    s = stated["settings"]
    windows = "all windows" if s["limit"] is None else f"at most {s['limit']} windows"
    sample = "all" if s["sample_limit"] is None else f"at most {s['sample_limit']}"
    samples = "all samples" if s["task_limit"] is None else f"the first {s['task_limit']} samples"
    lines = [
        f"Perplexity on {windows} of {s['window']} tokens ({', '.join(s['texts'])}; tables that compare "
        f"variants: {sample} of the first text); calibrated on {s['calibration_windows']} windows of "
        f"{s['calibration_window']} tokens of {s['calibration']}. {stated['device_name']}, "
        f"{stated['seconds'] / 60:.1f} minutes of conversion and measurement; this call took "
        f"{stated['elapsed_seconds'] / 60:.1f} minutes."
    ]
    epochs = sorted({row["epochs"] for row in stated["rows"].values()} - {None})
    if epochs:
        lines += [
            f"Epochs of the rows that are trained: {' or '.join(map(str, epochs))}; in the paper "
            f"{OmniQuantOptions.recipe(Recipe.PAPER).epochs}, on 128 windows of 2048 tokens."
        ]
    if stated["only_rows"]:
        lines += [f"Only rows whose name contains {' or '.join(map(repr, stated['only_rows']))}."]
    if stated["rows_not_shown"]:
        lines += [
            f"{stated['rows_not_shown']} more rows lie in this folder; calls for their tables show them."
        ]
    at_once = max((row["at_once"] for row in stated["rows"].values()), default=1)
    if at_once > 1:
        lines += [
            f"{at_once} rows ran at once (speed was measured alone): minutes and times are shared."
        ]
    if s["tasks"]:
        lines += [f"Zero-shot tasks: {samples} of {', '.join(s['tasks'])}.{_errors(s)}"]
    return lines


def _errors(settings: Mapping[str, Any]) -> str:
    """The largest standard error of accuracies over so many samples, that of a coin."""
    samples, tasks = settings["task_limit"], len(settings["tasks"])
    if samples is None:
        return ""
    one, mean = (50 / math.sqrt(n) for n in (samples, samples * tasks))
    return f" Standard error of an accuracy: up to {one:.1f} points, of their mean {mean:.1f}."


def markdown(lines: Sequence[Line], formats: Mapping[str, str]) -> list[str]:
    """Lines as a Markdown table; columns in the order in which they first appear, empty ones left out."""
    columns = _columns(lines)
    if not columns:
        return ["(no rows)"]

    def cell(line: Line, column: str) -> str:
        value = line.get(column)
        if value is None:
            return "-"
        return f"{value:{formats.get(column, '.4g')}}" if isinstance(value, float) else str(value)

    kinds = [isinstance(line.get(c), int | float) for c in columns for line in lines]
    numeric = {c: any(kinds[i * len(lines) : (i + 1) * len(lines)]) for i, c in enumerate(columns)}
    return [
        f"| {' | '.join(columns)} |",
        f"|{'|'.join('--:' if numeric[c] else '---' for c in columns)}|",
        *(f"| {' | '.join(cell(line, c) for c in columns)} |" for line in lines),
    ]


def _columns(lines: Sequence[Line]) -> list[str]:
    names = dict.fromkeys(name for line in lines for name in line)
    return [n for n in names if any(line.get(n) not in (None, "") for line in lines)]


def _failures(jobs: Sequence[Job], runner: Runner) -> list[str]:
    lines = [
        f"- {job.row.title}, {step}: FAILED: {message.splitlines()[0]}"
        for job in jobs
        for step, message in runner.record(job.row)["errors"].items()
    ]
    return [*lines, ""] if lines else []


def _times(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    steps = list(dict.fromkeys(step for row in rows.values() for step in row["seconds"]))
    lines: list[Line] = [
        {"seconds": row["title"], **{s: row["seconds"].get(s) for s in steps}}
        for row in rows.values()
    ]
    return markdown(lines, dict.fromkeys(steps, ".1f"))


def _write_csv(lines: Sequence[Line], path: Path) -> Path:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, _columns(lines), extrasaction="ignore")
    writer.writeheader()
    writer.writerows(lines)
    write_durably(path, file.getvalue().encode())
    return path


def _write_json(values: Any, path: Path) -> Path:
    write_durably(path, json.dumps(values, indent=2).encode() + b"\n")
    return path
