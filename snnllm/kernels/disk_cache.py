"""Where compiled kernels are kept for the next process."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

CACHE_VARIABLE = "SNNLLM_CACHE_DIR"


def cache_directory() -> Path:
    """Return the directory of compiled kernels: `SNNLLM_CACHE_DIR`, else the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "snnllm"


def store(path: Path, data: bytes) -> None:
    """Write a file into the cache under a private name and rename it, so that readers never see half of it.

    Raises:
        OSError: The cache is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as private:
        whole = Path(private) / path.name
        whole.write_bytes(data)
        whole.replace(path)
