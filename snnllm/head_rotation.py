"""The rotation of Q and K behind RoPE: an order of the channels and Hadamard blocks.

RoPE turns pairs of channels, so an order cannot be folded into the weights in front of it, signs can
(`snnllm.transforms.pair_signs`). What is left runs here: a gather, additions, and one product a channel.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurons.backends.spec import DTYPES
from snnllm import shared_input
from snnllm.hadamard import butterfly_operations, hadamard_transform, in_blocks, rotation_blocks
from snnllm.kernels.cpu.rotation import rotate_rows, rotates

MAX_CHANNELS = 256
"""Of a head: the order is kept in bytes."""


class HeadRotation(nn.Module):
    """Order the channels of Q or K as their saliency groups, and rotate inside each group.

        x' = x[order of the KV head] blockdiag(H_p / sqrt(p), ..)

    The groups are cut into powers of two as those of `snnllm.hadamard.OnlineRotation` are. Q and K have
    the same order and blocks, so `Q K^T` stays the same number. The operations run in a defined order
    (`hadamard_transform`), in kernels too: the same bits everywhere.

    Args:
        heads: KV heads.
        channels: Channels of a head, D.
        salient: How many of them are salient; they come last.
        name: Said in errors.

    Attributes:
        order: Original channel of every new position, a uint8 buffer `[H_kv, D]`.
        blocks: Sizes of the Hadamard blocks.

    Raises:
        ValueError: Heads that are too wide.
    """

    order: Tensor
    _index: tuple[Tensor, int, Tensor] | None = None

    def __init__(self, heads: int, channels: int, salient: int, name: str) -> None:
        super().__init__()
        if channels > MAX_CHANNELS:
            raise ValueError(
                f"{name}: the rotation of Q and K takes heads of at most {MAX_CHANNELS} channels, got "
                f"{channels}; convert with a pipeline that does not rotate, such as rtn."
            )
        self.name = name
        self.blocks = rotation_blocks((channels - salient, salient))
        self._fits = fits_kernel(self.blocks)
        self.register_buffer("order", torch.arange(channels).to(torch.uint8).repeat(heads, 1))

    def sort(self, groups: Tensor) -> None:
        """Choose the order that brings the channels of a group together, integers `[H_kv, D]`.

        Raises:
            ValueError: Another shape.
        """
        if groups.shape != self.order.shape:
            raise ValueError(
                f"{self.name}: expected channel groups {tuple(self.order.shape)}, got "
                f"{tuple(groups.shape)}."
            )
        self.order.copy_(torch.argsort(groups.long(), dim=-1, stable=True))

    def check_order(self) -> None:
        """Refuse an order that kernels must not see; waits for the device. On `meta` there is none.

        Raises:
            ValueError: A row does not have every channel once.
        """
        if self.order.is_meta:
            return
        order, (heads, channels) = self.order, self.order.shape
        every = torch.arange(channels, device=order.device).expand(heads, channels)
        if not torch.equal(order.long().sort(-1).values, every):
            raise ValueError(
                f"{self.name}: the order of Q and K must have every channel 0..{channels - 1} once in "
                f"each of {heads} heads; the checkpoint is damaged, restore it or convert again."
            )

    @property
    def index(self) -> Tensor:
        """The order, int64, checked; waits for the device once after it changes.

        Raises:
            ValueError: It is no order.
        """
        known = self._index
        if torch.compiler.is_compiling():
            return self.order.long()
        if known is None or known[0] is not self.order or known[1] != self.order._version:
            self.check_order()
            known = self.order, self.order._version, self.order.long()
            self._index = known
        return known[2]

    def __getstate__(self) -> dict[str, object]:
        """State without what is derived from it, for deepcopy and pickle."""
        return {**self.__dict__, "_index": None}

    def forward(self, x: Tensor) -> Tensor:
        """Rotate Q or K behind RoPE, `[B, H, S, D]`, H a multiple of H_kv; float32 out."""
        index = self.index
        if self._in_kernel(x):
            from snnllm.kernels.attention.rotation import rotate_operand  # needs Triton

            return rotate_operand(x.detach(), self.order, self.blocks)
        batch, heads, tokens, channels = x.shape
        if rotates(x, self.blocks):
            share = heads // len(index) * tokens
            return rotate_rows(x, self.blocks, False, self.order.contiguous(), max(share, 1))
        grouped = x.float().reshape(batch, len(index), heads // len(index) * tokens, channels)
        grouped = grouped.gather(-1, index[:, None].expand_as(grouped))
        rotated = in_blocks(grouped, self.blocks, hadamard_transform)
        return rotated.view(batch, heads, tokens, channels)

    def _in_kernel(self, x: Tensor) -> bool:
        return (
            self._fits
            and shared_input.kernels_run_on(x.device.type)
            and not (x.requires_grad and torch.is_grad_enabled())
            and x.dtype in DTYPES
        )

    @property
    def macs(self) -> int:
        """Operations of one row, those of a butterfly one."""
        return butterfly_operations(self.blocks)

    def extra_repr(self) -> str:
        """Shape and blocks for `print(model)`."""
        return f"heads={len(self.order)}, blocks={self.blocks}"


def fits_kernel(blocks: tuple[int, ...]) -> bool:
    """Whether kernels rotate these blocks: no block behind a smaller one, 8 channels or more, in fours."""
    channels = sum(blocks)
    return channels >= 8 and channels % 4 == 0 and sorted(blocks, reverse=True) == list(blocks)
