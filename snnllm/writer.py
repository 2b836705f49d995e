"""Sharded safetensors output, written as the conversion goes."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


class ShardWriter:
    """Collects tensors and writes a shard whenever `shard_bytes` are full.

    Memory is bounded by one shard. `close` gives the shards their Hugging Face names and the index.

    Args:
        folder: Where the shards go.
        shard_bytes: Size at which a shard is written, bytes.
    """

    def __init__(self, folder: Path, shard_bytes: int = 1 << 30) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, tensors: dict[str, Tensor]) -> None:
        """Take tensors by their full names."""
        for name, tensor in tensors.items():
            self._pending[name] = tensor.detach().contiguous().cpu()
            self._pending_bytes += tensor.numel() * tensor.element_size()
        if self._pending_bytes >= self.shard_bytes:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        self._save(self._pending, self.folder / self._part(len(self._shards)))
        self._shards.append(list(self._pending))
        self.total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    @staticmethod
    def _part(number: int) -> str:
        return f"part-{number:05d}.safetensors"

    @staticmethod
    def _save(tensors: dict[str, Tensor], path: Path) -> None:
        # One entry only: safetensors writes several in random order, and equal conversions should
        # give equal files. The schema version is in config.json and in the manifest.
        try:
            save_file(tensors, path, {"format": "pt"})
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OSError(
                f"{path.parent} cannot be written to ({error}); free some space or choose another "
                "output."
            ) from error

    def close(self) -> None:
        """Write the last shard, the final names and, for several shards, the index."""
        self._flush()
        total = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = (
                "model.safetensors"
                if total == 1
                else f"model-{number + 1:05d}-of-{total:05d}.safetensors"
            )
            (self.folder / self._part(number)).rename(self.folder / final)
            weight_map.update(dict.fromkeys(names, final))
        if total > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
