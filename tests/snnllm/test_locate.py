"""Where models lie and what they are, told from names and `config.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from snnllm.locate import SourceError, check_model, kind_of, locate, spiking_folder


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_llama_passes(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", model_type="llama")
    assert locate(folder) == folder
    assert kind_of(folder) == "llama"
    check_model(folder)
    assert spiking_folder(folder) is None


def test_a_spiking_checkpoint_passes_where_one_will_do(tmp_path: Path) -> None:
    folder = model(tmp_path / "a", model_type="spiking_llama")
    check_model(folder, spiking=True)
    assert spiking_folder(folder) == folder
    with pytest.raises(SourceError, match="is a spiking LLaMA already"):
        check_model(folder)


@pytest.mark.parametrize("spiking", [False, True])
def test_another_model_is_refused(tmp_path: Path, spiking: bool) -> None:
    with pytest.raises(SourceError, match="is a 'gpt2' model. Supported: LLaMA"):
        check_model(model(tmp_path / "a", model_type="gpt2"), spiking)


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_configuration_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SourceError, match=r"config\.json cannot be read"):
        check_model(tmp_path)


def test_a_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="has no config.json"):
        check_model(tmp_path)


def test_a_gguf_file_is_opened_later(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    with pytest.raises(SourceError, match="There is no file"):
        locate(path)
    path.touch()
    assert locate(str(path)) == path
    check_model(path)
