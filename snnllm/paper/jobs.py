"""The models of the tables, each once: what they take, and how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from snnllm.durations import duration
from snnllm.memory import estimate
from snnllm.paper.recipes import Conversion, Measure, Row, Table
from snnllm.pipelines.omniquant_options import OmniQuantOptions
from snnllm.pipelines.start import options_of
from snnllm.sources import Source

__all__ = ["CONVERSION", "Job", "Timing", "jobs_of"]

CONVERSION = "conversion"
"""Name of the step that comes before the measures."""


@dataclass(frozen=True)
class Job:
    """One model and everything that the chosen tables measure on it.

    Attributes:
        row: The first row with this model.
        measures: What is measured, in the order of the tables.
    """

    row: Row
    measures: tuple[Measure, ...]

    @property
    def kind(self) -> str:
        """Models of one kind take about the same time."""
        made = self.row.conversion
        if isinstance(made, Conversion):
            return str(made.pipeline)
        return "float" if made is None else "baseline"

    @property
    def steps(self) -> list[str]:
        """What a model takes: its conversion, if it is converted, and its measures."""
        conversion = [CONVERSION] if isinstance(self.row.conversion, Conversion) else []
        return [*conversion, *map(str, self.measures)]


def jobs_of(tables: Sequence[Table]) -> list[Job]:
    """The models of the tables, each once, in the order in which they appear."""
    rows: dict[str, Row] = {}
    measures: dict[str, dict[Measure, None]] = {}
    for table in tables:
        for row in table.rows:
            rows.setdefault(row.name, row)
            measures.setdefault(row.name, {}).update(dict.fromkeys(table.measures_of(row)))
    return [Job(row, tuple(measures[name])) for name, row in rows.items()]


@dataclass(frozen=True)
class Timing:
    """How long the steps of the models take: as long as finished ones, or as estimated.

    Attributes:
        source: The dense model.
        shape: `(windows, tokens of a window)` of the calibration.
        device: Where models run.
        records: What is known about each model, by name; it may grow.
    """

    source: Source
    shape: tuple[int, int]
    device: torch.device
    records: Mapping[str, dict[str, Any]]

    def expected_seconds(self, job: Job, step: str) -> float | None:
        """Seconds that a step will take, from the same step of models of the same kind, else of any.

        Returns:
            The mean. If no such step is done: for a conversion on the CPU the estimate of `snnllm.memory`
            (within a factor of two), else None.
        """
        same: list[float] = []
        other: list[float] = []
        for record in self.records.values():
            seconds = record["seconds"].get(step)
            if seconds is not None:
                (same if record.get("kind") == job.kind else other).append(seconds)
        times = same or (other if step != CONVERSION else [])
        if times:
            return sum(times) / len(times)
        return self._estimated(job) if step == CONVERSION else None

    def _estimated(self, job: Job) -> float | None:
        made = job.row.conversion
        if not isinstance(made, Conversion) or self.device.type != "cpu":
            return None
        options = options_of(made.pipeline, made.options)
        epochs = options.epochs if isinstance(options, OmniQuantOptions) else 0
        return estimate(self.source, made.spike, *self.shape, made.pipeline, epochs).seconds

    def outlook(self, jobs: Sequence[Job]) -> str:
        """How long the rest takes, as far as finished rows and estimates tell."""
        steps = [
            self.expected_seconds(job, step)
            for job in jobs
            for step in job.steps
            if step not in self.records.get(job.row.name, {}).get("seconds", {})
        ]
        known = [s for s in steps if s is not None]
        unknown = len(steps) - len(known)
        parts = [duration(sum(known))] if known or not unknown else []
        parts += [f"{unknown} steps never timed yet"] if unknown else []
        return f"to do: {' and '.join(parts)}"
