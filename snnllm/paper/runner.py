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
from snnllm.paper.jobs import CONVERSION, Job, Timing
from snnllm.paper.measures import Data, Measures, Subject, stated_steps
from snnllm.paper.recipes import Baseline, Conversion, Measure, Row
from snnllm.paper.settings import Settings
from snnllm.pipelines.report import BlockReport, device_mib
from snnllm.sources import Source, dense_model
from snnllm.work import differences, locked, source_digest, write_durably

if TYPE_CHECKING:
    from snnllm.paper.parallel import Workers

__all__ = ["Reporter", "Runner"]

_log = logging.getLogger(__name__)
LOADING = "loading"
WORKER = "worker"
"""Names of errors that no measure has made, besides `CONVERSION`."""
_NO_MEMORY = ("OutOfMemoryError", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
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
        look: Only look: nothing is made or locked before a model is worked on.
        at_once: Models that the run works on at once; more than one in its worker processes, which look.

    Attributes:
        source: The dense model.
        output: The folder.
        device: Where models run.
        run: Description of the run, as in `run.json`.
        records: What is known about each model, by name.
        timing: How long it takes.
        elapsed: Seconds that `execute` has taken.

    Raises:
        ValueError: The folder holds results of another run, or a text is unusable.
        NotADirectoryError: The folder is a file.
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
        if output.exists() and not output.is_dir():
            raise NotADirectoryError(f"{output} is a file; choose another output folder.")
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
        self._lock, self.elapsed = None, 0.0
        if not look:
            self._rows.mkdir(parents=True, exist_ok=True)
            self._lock = locked(output, f"{output} is in use: another process reproduces into it.")
        try:
            self.records = self._take(restart, look)
        except BaseException:
            self.close()
            raise
        shape = self._data.calibration.shape
        self.timing = Timing(source, (shape[0], shape[1]), device, self.records)

    @property
    def _rows(self) -> Path:
        return self.output / "rows"

    def close(self) -> None:
        """Let the folder go."""
        if self._lock is not None:
            self._lock.close()

    def _take(self, restart: bool, look: bool) -> dict[str, dict[str, Any]]:
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
        return {file.stem: json.loads(file.read_text()) for file in rows}

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

    def execute(self, jobs: Sequence[Job], workers: Workers | None = None) -> bool:
        """Convert and measure whatever is not done.

        Args:
            jobs: The models.
            workers: Several at once; speed is measured afterwards, when nothing else runs, and what had
                too little memory beside the others is tried again.

        Returns:
            Whether everything is done now; errors stand in the records.
        """
        unknown = {m for job in jobs for m in job.measures} - self._measures.keys()
        if unknown:
            raise ValueError(f"Nothing here measures {', '.join(sorted(unknown))}.")
        say, began = self._reporter.say, time.perf_counter()
        todo = [job for job in jobs if self.pending(job)]
        together = [job for job in todo if self.pending(job) != [Measure.SPEED]]
        worked_on: list[Job] = []
        if workers is not None and len(together) > 1:
            with closing(workers.run(together)) as results:
                for number, (job, result) in enumerate(results, start=1):
                    self._take_over(job, result)
                    worked_on.append(job)
                    say(f"[{number}/{len(together)}, {workers.count} at once] {job.row.title}")
                    self._say_errors(job)
        rest = [(job, wanted) for job in todo if (wanted := self._wanted(job, job in worked_on))]
        for number, (job, wanted) in enumerate(rest, start=1):
            say(f"[{number}/{len(rest)}] {job.row.title}; {self.timing.outlook(jobs)}")
            start = time.perf_counter()
            self._work_on(job, wanted)
            say(f"    {time.perf_counter() - start:.1f} s")
            self._say_errors(job)
        self.elapsed += time.perf_counter() - began
        return not any(self.pending(job) for job in jobs)

    def _wanted(self, job: Job, worked_on: bool) -> list[Measure]:
        """What this process measures on a model, which a worker may have worked on just now."""
        pending = self.pending(job)
        if self._at_once > 1:  # the run that has started this one measures speed alone
            return [m for m in pending if m is not Measure.SPEED]
        errors = self.record(job.row)["errors"]
        if not worked_on or all(map(_no_memory, errors.values())):
            return pending
        made = not errors.keys() & {CONVERSION, LOADING, WORKER}
        return [m for m in pending if m is Measure.SPEED and made]

    def _take_over(self, job: Job, result: dict[str, Any] | str) -> None:
        """The record that a worker has written, or what it had written and its end as an error."""
        name = job.row.name
        if isinstance(result, str):
            written = self._rows / f"{name}.json"
            if written.is_file():
                self.records[name] = json.loads(written.read_text())
            record = self.records.setdefault(name, self.record(job.row))
            record["title"], record["kind"] = job.row.title, job.kind
            record["errors"] = {**record["errors"], WORKER: result}
            self._save(name)
        else:
            self.records[name] = result

    def _say_errors(self, job: Job) -> None:
        for step, message in self.record(job.row)["errors"].items():
            self._reporter.say(f"    {step} FAILED: {message}")

    def _work_on(self, job: Job, wanted: Sequence[Measure]) -> None:
        row, name = job.row, job.row.name
        record = self.records.setdefault(name, self.record(row))
        record["title"], record["kind"] = row.title, job.kind
        others = {str(measure) for measure in self.pending(job) if measure not in wanted}
        record["errors"] = {k: v for k, v in record["errors"].items() if k in others}
        record["versions"] = package_versions()
        record["at_once"] = max(self._at_once, record.get("at_once", 1))
        if row.conversion is not None:
            record["recipe"] = row.conversion.to_dict()
        folder = self.output / "checkpoints" / name
        try:
            self._measure(job, folder, wanted)
        finally:
            self._forget()
        if not self._keep and not self.pending(job):
            shutil.rmtree(folder, ignore_errors=True)

    def _measure(self, job: Job, folder: Path, wanted: Sequence[Measure]) -> None:
        row, name = job.row, job.row.name
        if not self._converted(row.conversion, name, folder):
            return
        model = self._attempt(name, LOADING, partial(self._load, row.conversion, name, folder))
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
        for measure in wanted:
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
        finished = (folder / checkpoint.MANIFEST).is_file() and CONVERSION in record
        if not isinstance(conversion, Conversion) or finished:
            return True
        shutil.rmtree(folder, ignore_errors=True)
        report = self._attempt(name, CONVERSION, partial(self._convert, conversion, name, folder))
        if report is None:
            return False
        values = report.to_dict()
        del values["output"]
        record[CONVERSION] = {**values, "device_mib": device_mib(self.device)}
        record["seconds"][CONVERSION] = report.seconds  # also those before an interruption
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


def _deciding(settings: Settings) -> dict[str, Any]:
    """The settings that decide about results; batch sizes only decide about speed."""
    values = settings.to_dict()
    return {k: v for k, v in values.items() if k not in ("batch_size", "task_batch")}


def _no_memory(message: str) -> bool:
    """Whether an error says that a GPU had no memory left; short host memory would end the leader, too."""
    return any(words in message for words in _NO_MEMORY)
