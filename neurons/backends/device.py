"""Where kernels run: the device of a launch, Triton's interpreter, early starts."""

import os
from functools import lru_cache
from typing import Any

import torch

__all__ = ["EARLY_ROWS", "early_launch", "interpreted", "on"]

EARLY_ROWS = 64
"""With at most so many rows the kernel behind may start early (programmatic dependent launch)."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=64)
def early_launch(device: torch.device) -> bool:
    """Whether kernels on a device may start before the one in front ends: capability 9.0."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def on(device: torch.device) -> Any:
    """Context that launches on a device: Triton takes the current one; -1 changes nothing (CPU)."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
