"""Channel groups: which channels share a threshold and how many steps they may fire."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ChannelGroups", "check_groups", "clip_factors"]


def check_groups(channel_group: Tensor, groups: int, shape: tuple[int, ...] | None = None) -> None:
    """Refuse groups that an encoder cannot index with.

    Args:
        channel_group: group of each channel.
        groups: G, the number of groups; values on the ``meta`` device cannot be checked.
        shape: the only shape allowed; None for any ``[C]`` or ``[H, C]``.

    Raises:
        TypeError: if it is no uint8 tensor.
        ValueError: if the shape or a value does not fit.
    """
    if not isinstance(channel_group, Tensor) or channel_group.dtype != torch.uint8:
        got = getattr(channel_group, "dtype", type(channel_group).__name__)
        raise TypeError(f"channel_group must be a uint8 tensor or a channel count, got {got}.")
    got_shape = tuple(channel_group.shape)
    if shape is not None and got_shape != shape:
        raise ValueError(
            f"channel_group must have one group for each channel, shape {shape}, got {got_shape}."
        )
    if channel_group.dim() not in (1, 2) or channel_group.numel() == 0:
        raise ValueError(f"channel_group must be [C] or [H, C] and not empty, got {got_shape}.")
    if not channel_group.is_meta and int(channel_group.max()) >= groups:
        raise ValueError(
            f"channel_group must lie in 0..{groups - 1} (steps has {groups} groups), "
            f"got {int(channel_group.max())}."
        )


def clip_factors(clip: float | Sequence[float], groups: int) -> Tensor:
    """Factors on the range of each group, float32 ``[G]``; ValueError outside of (0, 1]."""
    factors = [clip] * groups if isinstance(clip, int | float) else list(clip)
    if len(factors) != groups or not all(0.0 < f <= 1.0 for f in factors):
        raise ValueError(f"clip must hold {groups} factors in (0, 1], got {clip}.")
    return torch.tensor(factors, dtype=torch.float32)


class ChannelGroups(nn.Module):
    """Base of modules with a buffer of channel groups, which kernels use as an index unchecked.

    Attributes:
        channel_group: uint8 ``[C]`` or ``[H, C]``, values below the number of groups.
        steps: steps of each group; their number is G.
        name: name of the layer, for messages.
    """

    channel_group: Tensor
    steps: tuple[int, ...]
    name: str

    def set_groups(self, channel_group: Tensor) -> None:
        """Choose the group of every channel.

        Args:
            channel_group: uint8, of the shape of the buffer.

        Raises:
            TypeError: if it is no uint8 tensor.
            ValueError: if the shape differs or a group does not exist.
        """
        self._check_groups(channel_group)
        self.channel_group.copy_(channel_group)

    def check_groups(self) -> None:
        """Check the buffer, for those who load it without `load_state_dict`.

        Raises:
            TypeError: if it is no uint8 tensor.
            ValueError: if a group does not exist.
        """
        self._check_groups(self.channel_group)

    def _check_groups(self, channel_group: Tensor) -> None:
        try:
            check_groups(channel_group, len(self.steps), tuple(self.channel_group.shape))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name or type(self).__name__}: {error}") from error

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = f"{prefix}channel_group"
        if key in state_dict:
            # Before it is copied: uint8 would wrap what it cannot hold.
            self._check_groups(state_dict[key])
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
