"""On what the rows of the tables are calibrated and measured. Nothing here loads torch."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snnllm.checkpoint import file_digest

__all__ = ["TABLE_NAMES", "Settings", "short_name"]

TABLE_NAMES = ("main", "gptq", "saliency", "efficiency", "equivalence", "speed")
"""The tables (`snnllm.paper.tables`), in the order in which they run."""


@dataclass(frozen=True)
class Settings:
    """On what the rows are calibrated and measured.

    Attributes:
        texts: Evaluation texts, files or data set names.
        calibration: Calibration text; never an evaluation text.
        calibration_windows: Windows at random offsets.
        calibration_window: Tokens of one.
        window: Tokens of an evaluation window.
        limit: Evaluation windows of a text; None for all.
        sample_limit: The same for tables that compare many variants.
        tasks: Zero-shot tasks.
        task_data: Folder with local rows of the tasks; None for those of the harness.
        task_limit: Samples of a task; None for all.
        prompt_tokens: Tokens for operations, equivalence and figures.
        speed_prompt: Tokens of the timed prefill; decoding starts after a quarter of it.
        speed_tokens: Decoded tokens of a repetition.
        repeat: Timed repetitions.
        batch_size: Windows of a forward pass.
        task_batch: Task requests of a forward pass.
        seed: Seed of everything random.
    """

    texts: tuple[str, ...]
    calibration: str
    calibration_windows: int
    calibration_window: int
    window: int
    limit: int | None = None
    sample_limit: int | None = 40
    tasks: tuple[str, ...] = ()
    task_data: Path | None = None
    task_limit: int | None = None
    prompt_tokens: int = 256
    speed_prompt: int = 512
    speed_tokens: int = 16
    repeat: int = 5
    batch_size: int = 1
    task_batch: int = 8
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON types; files and folders by their last name, which means the same elsewhere."""
        values = dataclasses.asdict(self)
        values["texts"] = [short_name(text) for text in self.texts]
        values["calibration"] = short_name(self.calibration)
        values["task_data"] = "local rows" if self.task_data is not None and self.tasks else None
        return values

    def rows_digest(self) -> str | None:
        """SHA-256 of the local rows of the tasks; None without local rows or without tasks."""
        if self.task_data is None or not self.tasks:
            return None
        digest = hashlib.sha256()
        for path in sorted(self.task_data.glob("*.jsonl")):
            digest.update(f"{path.name} {file_digest(path)}\n".encode())
        return digest.hexdigest()


def short_name(text: str) -> str:
    """A file by its last name; a data set as it is called."""
    return Path(text).name if Path(text).exists() else text
