"""The Python snippets of the README run as they stand there, one after the other; its commands exist."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from snnllm.cli import build_parser
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


def test_the_commands_exist(repository: Path) -> None:
    """Options and names are those of the command line; scripts and targets of make are there."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    parser, seen = build_parser(), 0
    for line in lines:
        match shlex.split(line, comments=True):
            case ["snnllm", *arguments]:
                parser.parse_args(arguments)
            case ["python", "-m", module, *_]:
                assert importlib.util.find_spec(module), module
            case ["python", script, *_]:
                assert (repository / script).is_file(), script
            case ["make", target]:
                assert f"\n{target}:" in makefile, target
            case _:
                continue
        seen += 1
    assert seen > 20
