"""Spiking checkpoints on disk: manifest, verification, loader shim, atomic publication."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from snnllm.config import SCHEMA_VERSION, SpikeConfig
from snnllm.locate import SPIKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

MANIFEST = "spikellm_manifest.json"
SHIM = "spiking_llama_hf.py"
_SHIM_TEXT = '''"""Loader of a spiking LLaMA: the code is in the package snnllm, this file only points to it."""

try:
    from snnllm.modeling import SpikingLlamaConfig, SpikingLlamaForCausalLM  # noqa: F401
except ImportError as error:
    raise ImportError(
        "This checkpoint is a spiking LLaMA and needs the package snnllm. Run `pip install snnllm`."
    ) from error
'''
AUTO_MAP = {
    "AutoConfig": "spiking_llama_hf.SpikingLlamaConfig",
    "AutoModelForCausalLM": "spiking_llama_hf.SpikingLlamaForCausalLM",
}


class CheckpointError(ValueError):
    """A folder that is not a sound spiking checkpoint."""


def file_digest(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def finish(folder: Path, config: PreTrainedConfig, extra: dict[str, Any] | None = None) -> None:
    """Write what makes a folder of config and shards a spiking checkpoint: shim, auto_map, manifest.

    Args:
        folder: Holds `config.json` and safetensors shards already.
        config: The configuration that was saved.
        extra: Provenance to record in the manifest, if it is known.
    """
    (folder / SHIM).write_text(_SHIM_TEXT)
    path = folder / "config.json"
    values = json.loads(path.read_text())
    values["auto_map"] = AUTO_MAP
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "files": {
            p.name: {"bytes": p.stat().st_size, "sha256": file_digest(p)}
            for p in sorted(folder.glob("*.safetensors"))
        },
        "spiking_config_sha256": _config_digest(values),
        "provenance": extra or {},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _config_digest(config: dict[str, Any]) -> str:
    """SHA-256 of the spiking part of a `config.json`; the rest may be edited freely."""
    spiking = json.dumps(config.get("quantization_config"), sort_keys=True)
    return hashlib.sha256(spiking.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: There is none, it is not JSON, or it has another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {MANIFEST}: it is not a finished spiking checkpoint. Convert a LLaMA "
            "with `snnllm convert`."
        )
    manifest = _read_json(path)
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise CheckpointError(
            f"{folder} was written with checkpoint schema {manifest.get('schema_version')}, this "
            f"snnllm reads schema {SCHEMA_VERSION}. Install the matching release or convert again."
        )
    return manifest


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); convert again.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not valid: it holds no JSON object; convert again.")
    return values


def verify(folder: Path) -> None:
    """Check that a checkpoint is complete and unchanged since it was written.

    Raises:
        CheckpointError: A file is missing, truncated or altered, or the format is another.
        ValueError: The spiking configuration is not valid, or of another schema version.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json: it is not a model folder.")
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind != SPIKING:
        raise CheckpointError(
            f"{folder} holds a {kind!r} model, not a spiking LLaMA. Convert it first: "
            f"snnllm convert {folder} OUTPUT."
        )
    manifest = read_manifest(folder)
    SpikeConfig.from_dict(config.get("quantization_config") or {})  # another schema is said first
    if manifest.get("spiking_config_sha256") != _config_digest(config):
        raise CheckpointError(
            f"{folder}/config.json: the quantization_config was altered after it was written, so the "
            "weights would be read with other bits or steps; restore it or convert again."
        )
    files = manifest.get("files")
    if not files:
        raise CheckpointError(f"{folder} lists no weight files; convert again.")
    for name, recorded in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{folder}: {name} is missing; copy it again or convert again.")
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes instead of {recorded['bytes']}: it is truncated or was "
                "replaced; copy it again or convert again."
            )
        if file_digest(path) != recorded["sha256"]:
            raise CheckpointError(
                f"{path} was altered after it was written (its SHA-256 differs from the manifest); "
                "copy it again or convert again."
            )


def check_output(output: Path) -> None:
    """Refuse an output folder that cannot be made, before any work is done.

    Raises:
        FileExistsError: It exists and is not empty.
        NotADirectoryError: Its path leads through a file.
    """
    for parent in output.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(
                f"{output} cannot be made: {parent} is a file; choose another output."
            )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(
            f"{output} exists and is not empty; choose another output or remove it."
        )


@contextmanager
def published(output: Path, within: Path | None = None) -> Iterator[Path]:
    """A working folder that becomes `output` only when the block ends without an error.

    Args:
        output: The folder to make.
        within: Where to work, on the same file system; None works beside `output`.

    Yields:
        The folder to write to, in a folder of its own beside `output` (the same file system, and no
        other process has it). It is removed on an error, so that nothing half-written is left that
        loads; only a killed process leaves its `output.partial-*`, without a manifest.

    Raises:
        OSError: `output` exists and is not empty, its path leads through a file, its parent
            cannot be written to, or the disk is full.
    """
    check_output(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    private = Path(tempfile.mkdtemp(prefix=f"{output.name}.partial-", dir=within or output.parent))
    try:
        work = private / output.name  # mkdtemp's own folder is closed to everyone else
        work.mkdir()
        yield work
        for path in work.iterdir():
            path.chmod(
                path.stat().st_mode | 0o644
            )  # safetensors writes 0600; copies may be read-only
        check_output(output)  # somebody may have been quicker
        if output.exists():
            output.rmdir()
        os.replace(work, output)
    finally:
        shutil.rmtree(private, ignore_errors=True)
