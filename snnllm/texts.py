"""Texts for calibration and evaluation: files and named datasets. Nothing here loads torch.

Named datasets (a bare name means the split ``test``):

- ``pydoc:train``, ``pydoc:test``: the English prose of ``pydoc_data.topics``, which every Python
  ships, in two halves without a common paragraph. It differs between Python versions.
- ``wikitext2:train``, ``wikitext2:valid``, ``wikitext2:test``: WikiText-2 raw, joined as in the
  GPTQ protocol; from ``$SNNLLM_DATA/wikitext2/wiki.SPLIT*.raw`` where there is such a file, else
  through the package ``datasets`` (its cache or the Hugging Face hub).
"""

from __future__ import annotations

import importlib
import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

from snnllm.hub import offline_unless_it_answers

__all__ = ["DATA_VARIABLE", "check_text", "load_text", "local_tasks"]

DATA_VARIABLE = "SNNLLM_DATA"
"""Environment variable: the folder with local copies of datasets (`wikitext2/wiki.test.raw`, `tasks`)."""

_ROW_SEPARATOR = "\n\n"
_log = logging.getLogger(__name__)


def load_text(source: str | Path, field: str = "text") -> str:
    """Read a text file, a JSONL file or a named dataset.

    Args:
        source: Path of a file, or a dataset name of the list above, such as ``"pydoc:test"``.
            ``*.jsonl`` files hold one JSON object per line; ``*.raw`` files are WikiText files,
            whose rows are joined as in the GPTQ protocol; any other file is taken as it is.
        field: The key of the text in each JSON object of a JSONL file; rows are joined by a blank
            line.

    Returns:
        The text, never blank.

    Raises:
        FileNotFoundError: There is no such file, or no local or hub copy of the dataset.
        ValueError: The name is unknown, the file is no UTF-8 text, or it holds no text.
    """
    text = _reader(source, field)()
    if not text.strip():
        raise ValueError(f"{source} holds no text; give a file with at least one window of text.")
    return text


def check_text(source: str | Path) -> None:
    """Refuse, without reading anything, what `load_text` would not find.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The name or the split is unknown, or it is a folder.
    """
    _reader(source, "")


def local_tasks() -> Path | None:
    """The folder `tasks` with local rows of zero-shot tasks; None without one."""
    root = os.environ.get(DATA_VARIABLE)
    folder = Path(root, "tasks") if root else None
    return folder if folder is not None and folder.is_dir() else None


def _reader(source: str | Path, field: str) -> Callable[[], str]:
    """What reads a text, which exists as far as that can be told without reading it."""
    path = Path(source)
    name, _, split = str(source).partition(":")
    if path.is_file():
        return partial(_read_file, path, field)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the text file in it.")
    if name in _DATASETS:
        dataset, split = _DATASETS[name], split or "test"
        if split not in dataset.splits:
            names = ", ".join(f"{name}:{known}" for known in dataset.splits)
            raise ValueError(f"Unknown split {split!r} of {name}; known: {names}.")
        return partial(dataset.load, split)
    if path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"There is no text file {path}; check the path.")
    known = ", ".join(sorted(_DATASETS))
    raise ValueError(
        f"Unknown text {str(source)!r}: it is neither a file nor a dataset ({known}; "
        "with a split, as in pydoc:test)."
    )


def _read_file(path: Path, field: str) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text (byte {error.start}: {error.reason}); convert it to UTF-8."
        ) from error
    if path.suffix == ".jsonl":
        return _ROW_SEPARATOR.join(_jsonl_rows(text, path, field))
    if path.suffix == ".raw":
        return _join_wikitext(io.StringIO(text))
    return text


def _jsonl_rows(text: str, path: Path, field: str) -> Iterable[str]:
    for number, line in enumerate(io.StringIO(text), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error}).") from error
        if not isinstance(row, dict) or not isinstance(row.get(field), str):
            found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(
                f"{path}, line {number}: expected an object with a string field {field!r}, "
                f"found: {found or 'no fields'}."
            )
        yield row[field]


def _join_wikitext(rows: Iterable[str]) -> str:
    r"""Join rows as the GPTQ protocol does: a blank row is ``""``, another keeps its newline."""
    return _ROW_SEPARATOR.join(row if row.strip() else "" for row in rows)


@cache
def _say_once(message: str) -> None:
    _log.warning(message)


def _load_wikitext2(split: str) -> str:
    root = os.environ.get(DATA_VARIABLE)
    for path in sorted(Path(root, "wikitext2").glob(f"wiki.{split}*.raw")) if root else ():
        if path.name != f"wiki.{split}.raw":  # such as the first part of a long split
            _say_once(f"wikitext2:{split} is read from {path}")
        return _read_file(path, field="")
    try:
        # not a requirement: most users have the text in a file or use pydoc
        datasets = importlib.import_module("datasets")
        with offline_unless_it_answers(datasets.config):
            rows = datasets.load_dataset(
                "Salesforce/wikitext",
                "wikitext-2-raw-v1",
                split="validation" if split == "valid" else split,
            )
        return _join_wikitext(rows["text"])
    except (ImportError, OSError) as error:  # OSError: no network and nothing in the cache
        online = (
            "run `pip install 'snnllm[eval]'`" if isinstance(error, ImportError) else "go online"
        )
        raise FileNotFoundError(
            f"WikiText-2 ({split}) is not here: set {DATA_VARIABLE} to a folder that holds "
            f"wikitext2/wiki.{split}.raw, or give the path of a text file, or {online}. "
            f"({type(error).__name__}: {error})"
        ) from error


def _load_pydoc(split: str) -> str:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    # Topics quote each other at length, so a paragraph counts only where it comes first; each topic
    # then goes to the shorter half.
    halves: dict[str, list[str]] = {"train": [], "test": []}
    sizes = dict.fromkeys(halves, 0)
    seen: set[str] = set()
    for topic in sorted(topics):
        half = min(sizes, key=sizes.__getitem__)
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            prose = _strip_rules(paragraph)
            key = " ".join(prose.split())
            if key and key not in seen:
                seen.add(key)
                halves[half].append(prose)
                sizes[half] += len(prose)
    return _ROW_SEPARATOR.join(halves[split])


def _strip_rules(paragraph: str) -> str:
    """Drop lines that only underline a heading or frame a table."""
    lines = paragraph.rstrip().split("\n")
    return "\n".join(line for line in lines if not re.fullmatch(r"\s*[*=\-~^+|]{3,}\s*", line))


class _Dataset(NamedTuple):
    """How the splits of a named dataset are loaded."""

    load: Callable[[str], str]
    splits: tuple[str, ...]


_DATASETS = {
    "pydoc": _Dataset(_load_pydoc, ("test", "train")),
    "wikitext2": _Dataset(_load_wikitext2, ("test", "train", "valid")),
}
