"""The work folder of a conversion: every finished block on disk, so that an interruption costs one block.

It stands beside the output, `OUTPUT.work`, and is removed when the checkpoint is published:

    job.json                    what is converted, how, on which data; a resume must agree with it
    block-00007.safetensors     tensors of a finished block, and its report
    lock                        held by the process that converts
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from snnllm import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from snnllm.pipelines.report import BlockReport
    from snnllm.pipelines.streaming import SavedBlock
    from snnllm.sources import Source

_log = logging.getLogger(__name__)
_JOB, _LOCK = "job.json", "lock"


class WorkFolder:
    """Finished blocks of one conversion.

    Args:
        output: The checkpoint folder that will be made.
        job: JSON-serialisable description of the conversion; equal jobs give equal blocks.
        restart: Throw away what an earlier run has left.

    Attributes:
        folder: The work folder.
        job_sha256: `job_digest` of the job.

    Raises:
        ValueError: An earlier run of another job has left its blocks there.
        BlockingIOError: Another process is converting into the same output.
        OSError: The folder cannot be written to.
    """

    def __init__(self, output: Path, job: Mapping[str, Any], restart: bool = False) -> None:
        self.folder, self.job_sha256 = _folder_beside(output), job_digest(job)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = locked(
            self.folder, f"{self.folder} is in use: another process converts into the same output."
        )
        try:
            if restart:
                self._clear()
            self._check(job)
        except BaseException:
            self._lock.close()
            raise

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _LOCK:
                path.unlink()

    def _check(self, job: Mapping[str, Any]) -> None:
        """Take the folder for `job`, or refuse what belongs to another."""
        path, wanted = self.folder / _JOB, json.loads(json.dumps(job))
        if not path.is_file():
            self._clear()  # without a job its blocks cannot be told from others
            write_durably(path, json.dumps(wanted, indent=2).encode() + b"\n")
            return
        found = json.loads(path.read_text())
        if found != wanted:
            raise ValueError(
                f"{self.folder} holds the blocks of another conversion: "
                f"{'; '.join(differences(found, wanted))}. Give the same model, options and data to "
                "resume it, or discard it with --restart (restart=True)."
            )
        for leftover in (*self.folder.glob("*.tmp"), *self.folder.glob("*.partial-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        if self.count:
            _log.warning("resuming in %s after block %d", self.folder, self.count - 1)

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"

    @property
    def count(self) -> int:
        """Blocks that are finished, counted from the first."""
        index = 0
        while self._path(index).is_file():
            index += 1
        return index

    def save(self, state: dict[str, Tensor], report: BlockReport) -> None:
        """Store a block; after this call it survives a power cut, before it nothing has changed.

        Raises:
            OSError: The disk is full; the blocks before stay.
        """
        from safetensors.torch import save_file

        path = self._path(report.index)
        temporary = path.with_suffix(".tmp")
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        try:
            save_file(tensors, temporary, {"report": json.dumps(dataclasses.asdict(report))})
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            _sync_folder(self.folder)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise OSError(
                f"{path} cannot be written ({error}); free some space and run the same command again: "
                f"it resumes at block {report.index}."
            ) from error

    def load(self, index: int) -> SavedBlock | None:
        """A finished block, or None.

        Raises:
            ValueError: Its file is damaged.
        """
        # Here, as above: to check an output folder need not load torch and transformers.
        from snnllm.pipelines.report import BlockReport
        from snnllm.pipelines.streaming import SavedBlock

        path = self._path(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                report = BlockReport(**json.loads(file.metadata()["report"]))
                names = list(file.keys())
                return SavedBlock({name: file.get_tensor(name) for name in names}, report)
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error}); remove it to convert from this block on again."
            ) from error

    def close(self, remove: bool) -> None:
        """Let the folder go; with `remove` nothing of it stays."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()


def _folder_beside(output: Path) -> Path:
    return output.parent / f"{output.name}.work"


def check_output(output: Path) -> None:
    """Refuse an output folder that cannot be made; tidy up beside one that is finished.

    A run that is killed after its checkpoint has appeared leaves its work folder: it is removed here.

    Raises:
        FileExistsError: The folder exists and is not empty.
        NotADirectoryError: Its path leads through a file.
    """
    try:
        checkpoint.check_output(output)
    except FileExistsError:
        _discard_published(output)
        raise


def _discard_published(output: Path) -> None:
    """Remove the work folder that a finished checkpoint was made in; any other one stays."""
    folder = _folder_beside(output)
    try:
        job = json.loads((folder / _JOB).read_text())
        manifest = json.loads((output / checkpoint.MANIFEST).read_text())
        if manifest["provenance"]["job_sha256"] != job_digest(job):
            return
        with locked(folder, ""):
            shutil.rmtree(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return  # in use, or nothing that a finished run leaves
    _log.warning("%s was left by a run that had finished %s; removed", folder, output)


def job_digest(job: Mapping[str, Any]) -> str:
    """SHA-256 of the description of a conversion: equal ones give equal blocks."""
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def locked(folder: Path, message: str) -> IO[str]:
    """Take a folder for this process, until the returned file is closed or the process ends.

    Raises:
        BlockingIOError: Another process has it; says `message`.
    """
    lock = (folder / _LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        raise BlockingIOError(message) from error
    return lock


def write_durably(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old or the new one, whatever happens."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def differences(found: Any, wanted: Any, prefix: str = "") -> list[str]:
    """What differs between two JSON values, as `key was old and is now new`."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
            for line in differences(found.get(key), wanted.get(key), f"{prefix}.{key}".lstrip("."))
        ]
    return [f"{prefix} was {found!r} and is now {wanted!r}"]


def source_digest(source: Source) -> str:
    """SHA-256 of what tells a model from others without reading all of it: shapes, table, norms."""
    digest = hashlib.sha256(
        json.dumps(source.config.to_dict(), sort_keys=True, default=str).encode()
    )
    names = source.names()
    digest.update("\n".join(sorted(names)).encode())
    middle = f"model.layers.{source.config.num_hidden_layers // 2}."
    for name in sorted(n for n in names if n.startswith((middle, "model.norm", "model.embed"))):
        digest.update(source.tensor(name).contiguous().flatten().float().numpy().tobytes())
    return digest.hexdigest()
