"""Text for calibration and evaluation, as windows of tokens.

A text comes from a file or from a named dataset with a split (``load_text``), is tokenised once as
a whole (``tokenize``), and is cut into windows: one after the other for perplexity
(``token_windows``) or at random offsets for calibration (``random_windows``).

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
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "DATA_VARIABLE",
    "load_text",
    "local_tasks",
    "random_windows",
    "token_windows",
    "tokenize",
]

DATA_VARIABLE = "SNNLLM_DATA"
"""Environment variable: the folder with local copies of datasets (`wikitext2/wiki.test.raw`, `tasks`)."""

_ROW_SEPARATOR = "\n\n"


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
    path = Path(source)
    name, _, split = str(source).partition(":")
    if path.is_file():
        text = _read_file(path, field)
    elif path.is_dir():
        raise ValueError(f"{path} is a folder; give the text file in it.")
    elif name in _DATASETS:
        text = _DATASETS[name](split or "test")
    elif path.suffix or len(path.parts) > 1:
        raise FileNotFoundError(f"There is no text file {path}; check the path.")
    else:
        known = ", ".join(sorted(_DATASETS))
        raise ValueError(
            f"Unknown text {str(source)!r}: it is neither a file nor a dataset ({known}; "
            "with a split, as in pydoc:test)."
        )
    if not text.strip():
        raise ValueError(f"{source} holds no text; give a file with at least one window of text.")
    return text


def tokenize(text: str, tokenizer: Any) -> Tensor:
    """Tokenise the whole text once, with the special tokens the tokenizer adds by default.

    Args:
        text: The text.
        tokenizer: A Hugging Face tokenizer.

    Returns:
        Token ids, int64 ``[N]``.

    Raises:
        ValueError: The text gave no token.
    """
    # verbose=False: the text is longer than the model's context on purpose, windows are cut next.
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    if ids.numel() == 0:
        raise ValueError("The text gave no tokens; give a text that is not empty.")
    return ids


def token_windows(ids: Tensor, window: int, limit: int | None = None) -> Tensor:
    """Cut the tokens into windows that follow each other and do not overlap.

    With N' = floor(N / window) windows available and a limit n < N', window number
    ``floor(i N' / n)`` is taken for i = 0 .. n-1, so that a few windows sample the whole text.
    Tokens after the last whole window are dropped, as in the GPTQ protocol.

    Args:
        ids: Token ids, ``[N]``.
        window: Tokens per window.
        limit: Largest number of windows; None takes all.

    Returns:
        ``[min(N', limit), window]``.

    Raises:
        ValueError: The text is shorter than one window, or an argument is out of range.
    """
    _check_window(ids, window)
    windows = ids[: ids.numel() // window * window].view(-1, window)
    if limit is None or limit >= len(windows):
        return windows
    if limit < 1:
        raise ValueError(f"The limit must be at least 1 window, got {limit}.")
    return windows[torch.arange(limit, device=ids.device) * len(windows) // limit]


def local_tasks() -> Path | None:
    """The folder `tasks` with local rows of zero-shot tasks; None without one."""
    root = os.environ.get(DATA_VARIABLE)
    folder = Path(root, "tasks") if root else None
    return folder if folder is not None and folder.is_dir() else None


def random_windows(ids: Tensor, window: int, count: int, seed: int) -> Tensor:
    """Cut windows at random offsets, uniform and with replacement.

    Args:
        ids: Token ids, ``[N]``.
        window: Tokens per window.
        count: Number of windows.
        seed: Seed of the offsets; the same seed gives the same windows on every machine.

    Returns:
        ``[count, window]``.

    Raises:
        ValueError: The text is shorter than one window, or an argument is out of range.
    """
    _check_window(ids, window)
    if count < 1:
        raise ValueError(f"The number of windows must be at least 1, got {count}.")
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.randint(ids.numel() - window + 1, (count,), generator=generator)
    return ids.unfold(0, window, 1)[offsets.to(ids.device)]


def _check_window(ids: Tensor, window: int) -> None:
    if ids.dim() != 1:
        raise ValueError(f"Token ids must have one axis [N], got shape {list(ids.shape)}.")
    if window < 2:
        raise ValueError(
            f"A window needs at least 2 tokens (one to see, one to predict), got {window}."
        )
    if ids.numel() < window:
        raise ValueError(
            f"The text has {ids.numel()} tokens, fewer than one window of {window}; give a longer "
            f"text or a window of at most {ids.numel()} tokens."
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


def _load_wikitext2(split: str) -> str:
    hub_split = _split_name("wikitext2", split, {"train", "valid", "test"})
    root = os.environ.get(DATA_VARIABLE)
    for path in sorted(Path(root, "wikitext2").glob(f"wiki.{split}*.raw")) if root else ():
        return _read_file(path, field="")
    try:
        # not a requirement: most users have the text in a file or use pydoc
        datasets = importlib.import_module("datasets")
        rows = datasets.load_dataset(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1",
            split="validation" if hub_split == "valid" else hub_split,
        )
        return _join_wikitext(rows["text"])
    except (ImportError, OSError) as error:  # OSError: no network and nothing in the cache
        raise FileNotFoundError(
            f"WikiText-2 ({split}) is not here: set {DATA_VARIABLE} to a folder that holds "
            f"wikitext2/wiki.{split}.raw, or install `datasets` and go online, or give the path "
            f"of a text file. ({type(error).__name__}: {error})"
        ) from error


def _load_pydoc(split: str) -> str:
    _split_name("pydoc", split, {"train", "test"})
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


def _split_name(dataset: str, split: str, known: set[str]) -> str:
    if split not in known:
        names = ", ".join(f"{dataset}:{name}" for name in sorted(known))
        raise ValueError(f"Unknown split {split!r} of {dataset}; known: {names}.")
    return split


_DATASETS: dict[str, Callable[[str], str]] = {"pydoc": _load_pydoc, "wikitext2": _load_wikitext2}
