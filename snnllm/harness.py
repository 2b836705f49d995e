"""Tasks of lm-evaluation-harness on spiking and dense models (optional: the extra `eval`)."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from snnllm.zeroshot import DEFINITIONS, ZERO_SHOT_TASKS

__all__ = [
    "TaskResults",
    "TaskScore",
    "check_task_folder",
    "check_tasks",
    "evaluate_tasks",
    "mean_accuracy",
]

_LOCAL = "_local"
_INSTALL = "lm-evaluation-harness is not installed; run `pip install 'snnllm[eval]'` (or lm_eval)."


@dataclass(frozen=True)
class TaskScore:
    """What the harness measured on one task.

    Attributes:
        task: The harness's own name.
        rows: Where the samples come from: `local` (definitions of `snnllm.zeroshot`) or `harness`.
        samples: Samples that were evaluated, the first ones of the split.
        available: Samples of the split.
        version: Version of the task definition.
        metrics: Value of every metric of the task, such as `acc` (the largest log-likelihood wins)
            and `acc_norm` (the largest log-likelihood per byte of the answer wins).
        stderr: Standard error of every metric that has one.
    """

    task: str
    rows: str
    samples: int
    available: int
    version: str
    metrics: Mapping[str, float]
    stderr: Mapping[str, float]


@dataclass(frozen=True)
class TaskResults:
    """Scores of several tasks.

    Attributes:
        scores: One per task, in the order asked for; groups give one per member.
        harness: Version of lm-evaluation-harness.
        num_fewshot: Examples before the question; None for the default of each task.
        seconds: Wall time.
    """

    scores: tuple[TaskScore, ...]
    harness: str
    num_fewshot: int | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable form with the averages."""
        return {
            **dataclasses.asdict(self),
            "scores": [
                {**dataclasses.asdict(s), "metrics": dict(s.metrics), "stderr": dict(s.stderr)}
                for s in self.scores
            ],
            "mean_acc": mean_accuracy(self.scores, normalised=False),
            "mean_acc_norm": mean_accuracy(self.scores, normalised=True),
        }

    def to_markdown(self) -> str:
        """A table of all metrics in per cent, with the averages in both conventions."""
        lines = ["| task | samples | acc | acc_norm | other |", "|---|--:|--:|--:|---|"]
        for score in self.scores:
            cells = [_percent(score, name) for name in ("acc", "acc_norm")]
            other = ", ".join(
                f"{name} {value:.4f}"
                for name, value in score.metrics.items()
                if name not in ("acc", "acc_norm")
            )
            samples = f"{score.samples} of {score.available}, {score.rows}"
            lines.append(f"| {score.task} | {samples} | {' | '.join(cells)} | {other or '-'} |")
        means = [mean_accuracy(self.scores, normalised=n) for n in (False, True)]
        cells = ["-" if mean is None else f"{100 * mean:.2f}" for mean in means]
        return "\n".join([*lines, f"| mean | | {' | '.join(cells)} | |"])


def _percent(score: TaskScore, metric: str) -> str:
    if metric not in score.metrics:
        return "-"
    error = score.stderr.get(metric)
    spread = "" if error is None else f" +- {100 * error:.2f}"
    return f"{100 * score.metrics[metric]:.2f}{spread}"


def mean_accuracy(scores: Sequence[TaskScore], normalised: bool) -> float | None:
    """Mean accuracy over tasks, in 0..1; None if a task has no accuracy.

    Args:
        scores: Of the tasks.
        normalised: Take `acc_norm` where a task defines it (the averages of OmniQuant and SpikeLLM);
            otherwise `acc` everywhere.
    """
    names = ("acc_norm", "acc") if normalised else ("acc",)
    values = [next((s.metrics[n] for n in names if n in s.metrics), None) for s in scores]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    task_data: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
) -> TaskResults:
    """Evaluate a model on tasks of lm-evaluation-harness.

    The model is handed to the harness's own `HFLM`, so the figures are those of
    `lm_eval --model hf` with the same dtype and batch size.

    Args:
        model: A causal language model of transformers, spiking or dense, on any device.
        tokenizer: Its tokenizer.
        tasks: Names of the harness (tasks, groups or tags).
        task_data: Folder with local rows; the tasks of `ZERO_SHOT_TASKS` are then read from there,
            with the prompts and metrics of the harness. None asks the harness for all rows, which
            needs its data sets in the cache or a network.
        limit: Only the first samples of each task; None takes all.
        batch_size: Requests of a forward pass.
        num_fewshot: Examples before each question; None for the default of each task.

    Returns:
        The scores.

    Raises:
        ImportError: The harness is not installed; the message says how to install it.
        ValueError: An unknown task, no task, or an argument out of range.
        OSError: The rows of a task cannot be read.
    """
    check_tasks(tasks, task_data, limit, batch_size, num_fewshot)
    local = _local(tasks, task_data)
    names = [f"{t}{_LOCAL}" if t in local else t for t in tasks]
    start = time.perf_counter()
    with _quiet_harness():
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ImportError(f"{_INSTALL} ({error})") from error
        # Reading the harness's own index takes many seconds, so only where it is needed.
        manager = TaskManager(
            include_path=str(DEFINITIONS),
            include_defaults=len(local) < len(tasks),
            metadata={"folder": str(task_data)} if local else None,
        )
        _check_known(names, manager)
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        results = lm_eval.simple_evaluate(
            wrapped,
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
        )
    scores = tuple(task_score(results, name) for name in results["n-samples"])
    order = {name: i for i, name in enumerate(tasks)}
    scores = tuple(sorted(scores, key=lambda s: order.get(s.task, len(order))))
    return TaskResults(scores, lm_eval.__version__, num_fewshot, time.perf_counter() - start)


def check_task_folder(task_data: Path | None) -> None:
    """Refuse rows of tasks that are not there.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if task_data is not None and not task_data.is_dir():
        raise FileNotFoundError(f"{task_data} is no folder; --task-data needs one with JSONL rows.")


def check_tasks(
    tasks: Sequence[str],
    task_data: Path | None,
    limit: int | None,
    batch_size: int,
    num_fewshot: int | None,
) -> None:
    """Refuse what `evaluate_tasks` would, as far as that can be told without harness and model.

    Raises:
        ImportError: The harness is not installed.
        ValueError: No task, or an argument out of range.
        FileNotFoundError: There is no folder `task_data`.
    """
    if isinstance(tasks, str) or not tasks:
        raise ValueError(f"tasks must name at least one task, got {tasks!r}.")
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"A task is named twice in {', '.join(tasks)}.")
    for name, value, least in (
        ("limit", limit, 1),
        ("batch_size", batch_size, 1),
        ("num_fewshot", num_fewshot, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}.")
    check_task_folder(task_data)
    if num_fewshot and (local := _local(tasks, task_data)):
        raise ValueError(
            f"The local rows of {', '.join(local)} are all test samples: there are none to show as "
            "examples. Leave num_fewshot at 0, or use the harness's own tasks."
        )
    if find_spec("lm_eval") is None:
        raise ImportError(_INSTALL)


def _local(tasks: Sequence[str], task_data: Path | None) -> list[str]:
    """The tasks whose rows are read from a folder."""
    return [t for t in tasks if task_data is not None and t in ZERO_SHOT_TASKS]


def _check_known(names: Sequence[str], manager: Any) -> None:
    known = {*manager.all_tasks, *manager.all_groups, *manager.all_tags}
    for name in names:
        if name not in known:
            raise ValueError(
                f"lm-evaluation-harness knows no task {name!r}; `lm_eval ls tasks` lists its names. "
                f"Those of the paper are {', '.join(ZERO_SHOT_TASKS)}."
            )


def task_score(results: Mapping[str, Any], name: str) -> TaskScore:
    """The score of one task from the nested results, whose keys look like `acc_stderr,none`."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in results["results"][name].items():
        if "," not in key or not isinstance(value, int | float):
            continue
        metric, _, filtered = key.partition(",")
        base = metric.removesuffix("_stderr")
        if filtered != "none":  # a task may have one metric behind several filters
            base += f" ({filtered})"
        (stderr if metric.endswith("_stderr") else metrics)[base] = float(value)
    counts, local = results["n-samples"][name], name.endswith(_LOCAL)
    return TaskScore(
        task=name.removesuffix(_LOCAL) if local else name,
        rows="local" if local else "harness",
        samples=counts["effective"],
        available=counts["original"],
        version=str(results["versions"].get(name, "")),
        metrics=metrics,
        stderr=stderr,
    )


@contextmanager
def _quiet_harness() -> Iterator[None]:
    """Keep the harness from warning about every sample that it truncates."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
