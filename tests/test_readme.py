"""The Python snippets of the README run as they stand there, one after the other."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.data import load_text, random_windows, tokenize


def test_the_snippets_run(
    repository: Path, stories_dir: Path, stories_tokenizer: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(snippets) == 3
    ids = tokenize(load_text("pydoc:train")[:30_000], stories_tokenizer)
    windows = random_windows(ids, 64, 2, seed=0)
    target = tmp_path / "demo" / "checkpoint"
    convert(str(stories_dir), target, SpikeConfig.preset("W4A4T2"), windows, pipeline="rotated")
    shutil.copytree(stories_dir, tmp_path / "path" / "to" / "llama")
    monkeypatch.chdir(tmp_path)
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
