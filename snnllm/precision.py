"""Which buffers stay in float32 when a model is cast: rounded, they would change what codes mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

FLOAT32_BUFFERS = ("weight_scale", "offset_", "clip")
"""Starts of the names: scales of weight codes, offsets, and factors on ranges."""


def float32_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of a module (not of its children) that stay in float32."""
    return {
        name: buffer
        for name, buffer in module._buffers.items()
        if buffer is not None and name.startswith(FLOAT32_BUFFERS)
    }


@contextmanager
def keeping_float32(module: nn.Module) -> Iterator[None]:
    """Around `nn.Module._apply`: devices change, the dtype and values of these buffers do not."""
    before = float32_buffers(module)
    yield
    for name, now in float32_buffers(module).items():
        if now.dtype != torch.float32:
            module._buffers[name] = before[name].to(now.device)


def restore_float32(model: nn.Module) -> None:
    """Bring what was loaded in a wider type back to float32, from which it came."""
    for module in model.modules():
        for name, buffer in float32_buffers(module).items():
            module._buffers[name] = buffer.float()
