"""Convert and measure the models of the tables; every finished measurement survives an interruption.

OUTPUT/run.json            on what is measured; another run must agree with it
OUTPUT/rows/NAME.json      a model: its conversion, measurements and errors, replaced atomically
OUTPUT/checkpoints/NAME    the converted model, until everything about it is measured
"""

from __future__ import annotations

import gc
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snnllm import checkpoint
from snnllm.conversion import ConversionReport, convert, package_versions
from snnllm.evaluate import Progress
from snnllm.modeling import load
from snnllm.paper.measures import Data, Measures, Settings, Subject, stated_steps
from snnllm.paper.recipes import Baseline, Conversion, Measure, Row, Table
from snnllm.pipelines.report import BlockReport, device_mib
from snnllm.sources import Source, dense_model
from snnllm.work import differences, locked, source_digest, write_durably

if TYPE_CHECKING:
    from snnllm.paper.parallel import Workers

__all__ = ["Job", "Reporter", "Runner", "jobs_of"]

_log = logging.getLogger(__name__)
_CONVERSION, _LOADING = "conversion", "loading"
Made = Conversion | Baseline | None


@dataclass(frozen=True)
class Reporter:
    """How a run shows what it does.

    Attributes:
        say: Shows one line.
        windows: Makes the progress wrapper of a perplexity from its label.
        blocks: Makes the callback of a conversion from its label and the number of blocks.
    """

    say: Callable[[str], None]
    windows: Callable[[str], Progress | None]
    blocks: Callable[[str, int], Callable[[BlockReport], None]]


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


def jobs_of(tables: Sequence[Table]) -> list[Job]:
    """The models of the tables, each once, in the order in which they appear."""
    rows: dict[str, Row] = {}
    measures: dict[str, dict[Measure, None]] = {}
    for table in tables:
        for row in table.rows:
            rows.setdefault(row.name, row)
            measures.setdefault(row.name, {}).update(dict.fromkeys(table.measures_of(row)))
    return [Job(row, tuple(measures[name])) for name, row in rows.items()]


class Runner:
    """A run in an output folder.

    Args:
        source: The dense model.
        settings: On what rows are calibrated and measured.
        measures: How measurements are taken.
        output: The folder.
        device: Where models run.
        reporter: Shows progress.
        restart: Discard what an earlier run has left.
        keep: Keep the checkpoints.
        look: Only look; `run.json` is not written.
        at_once: Worker process of a run that works on so many models at once, and holds the lock.

    Attributes:
        source: The dense model.
        output: The folder.
        device: Where models run.
        run: Description of the run, as in `run.json`.
        records: What is known about each model, by name.

    Raises:
        ValueError: The folder holds results of another run, or a text is unusable.
        BlockingIOError: Another process works in the folder.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        measures: Measures,
        output: Path,
        device: torch.device,
        reporter: Reporter,
        restart: bool = False,
        keep: bool = False,
        look: bool = False,
        at_once: int = 1,
    ) -> None:
        self.source, self.output, self.device = source, output, device
        self._settings, self._measures = settings, measures
        self._reporter, self._keep, self._at_once = reporter, keep, at_once
        self._tokenizer = source.tokenizer()
        self._data = Data.load(settings, self._tokenizer)
        self.run = {
            "model": Path(source.name).name,
            "model_sha256": source_digest(source),
            "device": device.type,
            "data_sha256": self._data.digest(),
            "task_rows_sha256": settings.rows_digest(),
            "settings": _deciding(settings),
        }
        self._rows.mkdir(parents=True, exist_ok=True)
        in_use = f"{output} is in use: another process reproduces into it."
        self._lock = locked(output, in_use) if at_once == 1 else None
        try:
            self._take(restart, look)
        except BaseException:
            self.close()
            raise

    @property
    def _rows(self) -> Path:
        return self.output / "rows"

    def close(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            self._lock.close()

    def _take(self, restart: bool, look: bool) -> None:
        """Read what an earlier run has left, or discard or refuse it."""
        path = self.output / "run.json"
        if restart:
            for folder in (self._rows, self.output / "checkpoints"):
                shutil.rmtree(folder, ignore_errors=True)
            self._rows.mkdir()
            path.unlink(missing_ok=True)
        wanted = json.loads(json.dumps(self.run))
        rows = list(self._rows.glob("*.json"))
        if rows and path.is_file() and (found := json.loads(path.read_text())) != wanted:
            raise ValueError(
                f"{self.output} holds results of another run: "
                f"{'; '.join(differences(found, wanted))}. Give the same settings to continue it, "
                "another --output, or --restart to discard them."
            )
        if not look:
            write_durably(path, json.dumps(wanted, indent=2).encode() + b"\n")
        self.records: dict[str, dict[str, Any]] = {
            file.stem: json.loads(file.read_text()) for file in rows
        }

    def record(self, row: Row) -> dict[str, Any]:
        """What is known about the model of a row; empty parts if nothing is."""
        empty: dict[str, Any] = {"measures": {}, "seconds": {}, "errors": {}}
        return self.records.get(row.name, empty)

    def _save(self, name: str) -> None:
        text = json.dumps(self.records[name], indent=1)
        write_durably(self._rows / f"{name}.json", text.encode() + b"\n")

    def pending(self, job: Job) -> list[Measure]:
        """What is not measured yet."""
        done = self.record(job.row)["measures"]
        return [measure for measure in job.measures if measure not in done]

    def steps(self, job: Job) -> list[str]:
        """What a model takes: its conversion, if it is converted, and its measures."""
        conversion = [_CONVERSION] if isinstance(job.row.conversion, Conversion) else []
        return [*conversion, *map(str, job.measures)]

    def execute(self, jobs: Sequence[Job], workers: Workers | None = None) -> bool:
        """Convert and measure whatever is not done.

        Args:
            jobs: The models.
            workers: Several at once; those whose speed is measured wait until they are alone.

        Returns:
            Whether everything is done now; errors stand in the records.
        """
        unknown = {m for job in jobs for m in job.measures} - self._measures.keys()
        if unknown:
            raise ValueError(f"Nothing here measures {', '.join(sorted(unknown))}.")
        say = self._reporter.say
        todo = [job for job in jobs if self.pending(job)]
        together = [job for job in todo if Measure.SPEED not in self.pending(job)]
        if workers is not None and len(together) > 1:
            with closing(workers.run(together)) as results:
                for number, (job, result) in enumerate(results, start=1):
                    self._take_over(job, result)
                    say(f"[{number}/{len(together)}, {workers.count} at once] {job.row.title}")
                    self._say_errors(job)
            todo = [job for job in todo if job not in together]
        for number, job in enumerate(todo, start=1):
            say(f"[{number}/{len(todo)}] {job.row.title}; {self.outlook(jobs)}")
            start = time.perf_counter()
            self._work_on(job)
            say(f"    {time.perf_counter() - start:.1f} s")
            self._say_errors(job)
        return not any(self.pending(job) for job in jobs)

    def _take_over(self, job: Job, result: dict[str, Any] | BaseException) -> None:
        """The record that a worker has written, or what it had written and its end as an error."""
        name = job.row.name
        if isinstance(result, BaseException):
            written = self._rows / f"{name}.json"
            if written.is_file():
                self.records[name] = json.loads(written.read_text())
            record = self.records.setdefault(name, self.record(job.row))
            record["title"], record["kind"] = job.row.title, job.kind
            record["errors"] = {"worker": f"{type(result).__name__}: {result}"}
            self._save(name)
        else:
            self.records[name] = result

    def _say_errors(self, job: Job) -> None:
        for step, message in self.record(job.row)["errors"].items():
            self._reporter.say(f"    {step} FAILED: {message}")

    def _work_on(self, job: Job) -> None:
        row, name = job.row, job.row.name
        record = self.records.setdefault(name, self.record(row))
        record["title"], record["kind"], record["errors"] = row.title, job.kind, {}
        record["versions"] = package_versions()
        record["at_once"] = self._at_once
        if row.conversion is not None:
            record["recipe"] = row.conversion.to_dict()
        folder = self.output / "checkpoints" / name
        try:
            self._measure(job, folder)
        finally:
            self._forget()
        if not self._keep and not record["errors"]:
            shutil.rmtree(folder, ignore_errors=True)

    def _measure(self, job: Job, folder: Path) -> None:
        row, name = job.row, job.row.name
        if not self._converted(row.conversion, name, folder):
            return
        model = self._attempt(name, _LOADING, partial(self._load, row.conversion, name, folder))
        if model is None:
            return
        subject = Subject(
            title=row.title,
            model=model,
            tokenizer=self._tokenizer,
            conversion=row.conversion,
            source=self.source,
            data=self._data,
            figures=self.output / "figures",
        )
        for measure in self.pending(job):
            result = self._attempt(name, measure, partial(self._measures[measure], subject))
            if result is not None:
                self.records[name]["measures"][str(measure)] = result
                self._save(name)

    def _attempt(self, name: str, step: str, task: Callable[[], Any]) -> Any:
        """Run a step; its time or its error goes into the record. None after an error."""
        record, start = self.records[name], time.perf_counter()
        try:
            result = task()
        except Exception as error:  # one row must not take the others with it
            _log.info("%s, %s failed", name, step, exc_info=True)
            record["errors"][str(step)] = f"{type(error).__name__}: {error}"
            self._save(name)
            return None
        record["seconds"][str(step)] = time.perf_counter() - start
        return result

    def _converted(self, conversion: Made, name: str, folder: Path) -> bool:
        """Whether there is a checkpoint now, if one is needed; it is made or resumed."""
        record = self.records[name]
        finished = (folder / checkpoint.MANIFEST).is_file() and _CONVERSION in record
        if not isinstance(conversion, Conversion) or finished:
            return True
        shutil.rmtree(folder, ignore_errors=True)
        report = self._attempt(name, _CONVERSION, partial(self._convert, conversion, name, folder))
        if report is None:
            return False
        values = report.to_dict()
        del values["output"]
        record[_CONVERSION] = {**values, "device_mib": device_mib(self.device)}
        self._save(name)
        return True

    def _convert(self, conversion: Conversion, name: str, folder: Path) -> ConversionReport:
        return convert(
            self.source,
            folder,
            conversion.spike,
            self._data.calibration,
            pipeline=conversion.pipeline,
            options=conversion.options,
            seed=self._settings.seed,
            device=self.device,
            on_block=self._reporter.blocks(name, self.source.config.num_hidden_layers),
        )

    def _load(self, conversion: Made, name: str, folder: Path) -> Any:
        """The model of a row on its device."""
        facts: dict[str, Any] = {}
        model: Any
        if conversion is None:
            model = dense_model(self.source)
        elif isinstance(conversion, Baseline):
            model, facts = conversion.build(
                self.source, self._data.calibration, self._settings.seed, self.device
            )
        else:
            model = load(folder)
            facts = stated_steps(model)
        self.records[name]["model"] = facts
        return model.to(self.device)

    def _forget(self) -> None:
        """Give memory back before the next model comes."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    # -- time ----------------------------------------------------------------------------------

    def expected_seconds(self, job: Job, step: str) -> float | None:
        """Seconds that a step will take, from the same step of models of the same kind, else of any.

        Returns:
            The mean; None if no such step is done.
        """
        same: list[float] = []
        other: list[float] = []
        for record in self.records.values():
            seconds = record["seconds"].get(step)
            if seconds is not None:
                (same if record.get("kind") == job.kind else other).append(seconds)
        times = same or (other if step != _CONVERSION else [])
        return sum(times) / len(times) if times else None

    def outlook(self, jobs: Sequence[Job]) -> str:
        """How long the rest takes, as far as finished rows tell."""
        steps = [
            self.expected_seconds(job, step)
            for job in jobs
            for step in self.steps(job)
            if step not in self.record(job.row)["seconds"]
        ]
        known = [s for s in steps if s is not None]
        unknown = len(steps) - len(known)
        parts = [f"{sum(known) / 60:.1f} min"] if known or not unknown else []
        parts += [f"{unknown} steps never timed yet"] if unknown else []
        return f"to do: {' and '.join(parts)}"


def _deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide about results; batch sizes only decide about speed."""
    values = settings.to_dict()
    return {k: v for k, v in values.items() if k not in ("batch_size", "task_batch")}
