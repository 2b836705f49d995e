"""Activations of all calibration windows, a tensor per batch: in memory, or in a file when they do not fit."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, MutableSequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DiskBatches(MutableSequence[Tensor]):
    """float32 tensors in one file, of which only those in use are in memory.

    The file has no name (it is unlinked at once), so that a killed process leaves nothing behind.

    Args:
        folder: Where there is space.
        tensors: What to write, one after the other.

    Raises:
        OSError: The folder cannot be written to, or the disk is full.
    """

    def __init__(self, folder: Path, tensors: Iterable[Tensor] = ()) -> None:
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed with it)
        self._places: list[tuple[int, tuple[int, ...]]] = []
        for tensor in tensors:
            self.append(tensor)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        offset, shape = self._places[index]
        return self._read(offset, shape)

    def __setitem__(self, index: Any, tensor: Any) -> None:
        offset, shape = self._places[index]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"batch {index} has shape {shape}, got {tuple(tensor.shape)}.")
        self._write(offset, tensor)

    def __delitem__(self, index: Any) -> None:
        raise TypeError("Batches in a file are replaced, not deleted.")

    def insert(self, index: int, value: Tensor) -> None:
        """Append a tensor; other places are taken."""
        if index != len(self._places):
            raise IndexError("Batches in a file are appended only.")
        offset = self._places[-1][0] + 4 * math.prod(self._places[-1][1]) if self._places else 0
        self._write(offset, value)
        self._places.append((offset, tuple(value.shape)))

    def window(self, batch: int, row: int) -> Tensor:
        """One window of a batch, `[1, S, C]`, without reading the others."""
        offset, (_, *rest) = self._places[batch]
        return self._read(offset + 4 * row * math.prod(rest), (1, *rest))

    def _read(self, offset: int, shape: tuple[int, ...]) -> Tensor:
        values = np.empty(shape, dtype=np.float32)
        view = values.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise OSError("A file of activations is shorter than what was written to it.")
            done += count
        return torch.from_numpy(values)

    def _write(self, offset: int, tensor: Tensor) -> None:
        values = tensor.detach().cpu().float().contiguous().numpy()
        view = values.reshape(-1).view(np.uint8).data
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)
        except OSError as error:
            raise OSError(
                error.errno,
                f"activations cannot be written to {self._folder} ({error.strerror}); free some "
                "space, use fewer calibration windows or a larger --max-memory",
            ) from error


Batches = MutableSequence[Tensor]
"""One float32 tensor `[b, S, C]` per batch of windows."""


def window(batches: Batches, batch: int, row: int) -> Tensor:
    """Window `row` of a batch, `[1, S, C]`."""
    if isinstance(batches, DiskBatches):
        return batches.window(batch, row)
    return batches[batch][row : row + 1]
