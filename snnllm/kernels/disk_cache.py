"""Where compiled kernels are kept for the next process."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CACHE_VARIABLE = "SNNLLM_CACHE_DIR"


def cache_directory() -> Path:
    """Return the directory of compiled kernels: `SNNLLM_CACHE_DIR`, else the user's cache."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "snnllm"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Where to make a file of the cache: it takes its place whole, if it was made, so nobody reads half of it.

    Each call has a name of its own: processes may make the same file at once.

    Raises:
        OSError: The cache is not writable.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as private:
        whole = Path(private) / path.name
        yield whole
        if whole.exists():
            whole.replace(path)
