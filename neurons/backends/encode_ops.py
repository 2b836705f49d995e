"""The encoder's kernel as an operator of torch, with a fake kernel for compilation."""
# No `from __future__ import annotations`: torch reads the annotations as types.

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["encode"]


@torch.library.custom_op("neurons::encode", mutates_args=())
def encode(
    x: Tensor, channel_group: Tensor, capacities: list[int], clip: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts, thresholds and bias charges; the equations are those of :mod:`neurons.encoder`.

    Nothing is checked on the device: a token with NaN or infinity has a threshold that is not
    finite where the reference has it, and its counts and bias charges mean nothing.

    Args:
        x: activations ``[.., C]``, or ``[.., H, S, C]`` with groups per head; float32, bfloat16 or
            float16, any strides.
        channel_group: group of each channel, uint8 ``[C]`` or ``[H, C]``.
        capacities: qmax of each group, G of them, at most 16.
        clip: factors on the range of each group, float32 ``[G]`` in (0, 1].
        shared: one range for all groups, over all channels.

    Returns:
        Counts ``[.., C]``, uint8 where every capacity is at most 255, else int16; thresholds,
        float32 ``[.., G]``, in units of the activation; bias charges, int32 ``[.., G]``.

    Source: SpikeLLM (arXiv 2407.04752), saliency-based spiking of LLM activations.
    """
    outputs = _outputs(x, capacities)
    if x.numel():
        kernel: Any = import_module("neurons.backends.triton_encode_channels")
        kernel.encode(x, channel_group.contiguous(), tuple(capacities), clip, shared, *outputs)
    return outputs


@encode.register_fake
def _(
    x: Tensor, channel_group: Tensor, capacities: list[int], clip: Tensor, shared: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, capacities)


def _outputs(x: Tensor, capacities: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    shape = (*x.shape[:-1], len(capacities))
    dtype = torch.uint8 if max(capacities) <= 255 else torch.int16
    return (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(shape, dtype=torch.float32),
        x.new_empty(shape, dtype=torch.int32),
    )
