"""A converted stories260K, made once for all simulation tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.modeling import load


@pytest.fixture(scope="session")
def spiking_stories_dir(stories_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as a W4A4T2 checkpoint."""
    folder = tmp_path_factory.mktemp("sims") / "stories-w4a4t2"
    windows = torch.randint(3, 500, (2, 32), generator=torch.Generator().manual_seed(0))
    convert(stories_dir, folder, SpikeConfig.preset("W4A4T2"), windows, pipeline="rtn")
    return folder


@pytest.fixture(scope="session")
def spiking_stories(spiking_stories_dir: Path) -> Any:
    """The checkpoint, loaded. Shared: leave it as it is."""
    return load(spiking_stories_dir)


@pytest.fixture(scope="session")
def prompt_ids(stories_tokenizer: Any) -> torch.Tensor:
    """A short prompt, [S]."""
    ids = stories_tokenizer("Once upon a time there was a little girl", return_tensors="pt")
    return ids.input_ids[0]
