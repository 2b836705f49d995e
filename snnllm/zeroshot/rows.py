"""What the task definitions of this folder call: reading local rows, and the prompts of WinoGrande.

The harness loads this file by its path, from the definitions.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "SNNLLM_DATA"
"""Environment variable: the rows lie in its subfolder `tasks` if the metadata names no folder."""


def read(file: str, folder: str | None = None, **_: Any) -> dict[str, Any]:
    """Read the rows of a task.

    Args:
        file: Name of the JSONL file, one row a line.
        folder: Where it lies; `$SNNLLM_DATA/tasks` by default.
        _: Other metadata of the harness (its version, arguments of the model).

    Returns:
        The split `validation` as a `datasets.Dataset`, in the order of the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not JSON, or there is none.
    """
    from datasets import Dataset
    from datasets.table import InMemoryTable

    place = Path(folder) if folder else Path(os.environ.get(FOLDER_VARIABLE, "."), "tasks")
    path = place / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: the local zero-shot tasks read their rows from there. Give its "
            f"folder with --task-data (lm_eval: --metadata '{{\"folder\": ...}}'), or set "
            f"{FOLDER_VARIABLE} to the folder that holds tasks/{file}."
        )
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
    if not rows:
        raise ValueError(f"{path} holds no rows.")
    # Named by its contents: `from_list` would hash pickles, which some releases of pyarrow refuse.
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"validation": Dataset(InMemoryTable.from_pylist(rows), fingerprint=digest[:16])}


def winogrande_answer(row: dict[str, str]) -> int:
    """Number of the right option, 0 or 1."""
    return {"1": 0, "2": 1}[row["answer"]]


def winogrande_continuation(row: dict[str, str]) -> str:
    """The sentence after the blank."""
    return row["sentence"].partition("_")[2].strip()


def winogrande_contexts(row: dict[str, str]) -> list[str]:
    """The sentence up to the blank, filled with either option."""
    start = row["sentence"].partition("_")[0]
    return [start + row["option1"], start + row["option2"]]
