"""Hadamard blocks that run online: pure functions with a defined order of additions, and their module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from snnllm.kernels.cpu.rotation import rotate_rows, rotates

BLOCK = 256
"""Most channels that an online rotation mixes; more are hardly flatter, and no thread holds them."""
RADIX = 16
"""Neighbours that a thread mixes at once; in a longer block, the rest follows on the other axis."""


def rotation_blocks(sizes: Sequence[int]) -> tuple[int, ...]:
    """Sizes of the Hadamard blocks of channel groups, one after the other: powers of two.

    As many blocks of `BLOCK` channels as a group holds, then the powers of two of what is left:
    1408 = 5 * 256 + 128.

    Args:
        sizes: Channels of the groups.
    """
    blocks: list[int] = []
    for size in sizes:
        rest = size % BLOCK
        powers = [1 << bit for bit in reversed(range(BLOCK.bit_length())) if rest >> bit & 1]
        blocks += [BLOCK] * (size // BLOCK) + powers
    return tuple(blocks)


def hadamard_transform(x: Tensor) -> Tensor:
    """Multiply the last axis by `H_p / sqrt(p)` with butterflies in a defined order.

    For h = 1, 2, 4, .., p/2, the pairs h apart become their sum and their difference; `p^(-1/2)` last.
    One rounding for each operation in float32, so that every device gives the same bits.

    Args:
        x: float32 `[..., p]`, p a power of two.

    Returns:
        float32 `[..., p]`.
    """
    p = x.shape[-1]
    y = x.movedim(-1, 0).contiguous()  # whole rows are added, not neighbours
    for _ in range(p.bit_length() - 1):
        # A pass pairs neighbours and puts their number in the pair in front: the bits of h = 1, 2, 4, ..
        a, b = y[0::2], y[1::2]
        y = torch.cat((a + b, a - b))
    scaled: Tensor = y * p**-0.5
    return scaled.movedim(0, -1).contiguous()


def rotate_block(x: Tensor) -> Tensor:
    """`hadamard_transform` of a block; one longer than `RADIX` comes out in the order of a transpose.

    The output `i * RADIX + j` is at `j * p / RADIX + i`: where the thread that computes it stores it
    beside its others.

    Args:
        x: float32 `[..., p]`, p a power of two.

    Returns:
        float32 `[..., p]`.
    """
    y, p = hadamard_transform(x), x.shape[-1]
    return y if p <= RADIX else y.unflatten(-1, (p // RADIX, RADIX)).mT.flatten(-2)


def in_blocks(x: Tensor, blocks: Sequence[int], transform: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a transform to the blocks of the last axis of `x [..., K]`, neighbours of one size at once.

    Args:
        x: float32 `[..., K]`.
        blocks: Sizes of the blocks, K channels together.
        transform: Of tensors `[..., p]`.
    """
    parts, first = [], 0
    for p, same in groupby(blocks):
        width = p * len(list(same))
        part = x[..., first : first + width].unflatten(-1, (-1, p))
        parts.append(transform(part).flatten(-2))
        first += width
    return torch.cat(parts, dim=-1)


def butterfly_operations(blocks: Sequence[int]) -> int:
    """Additions of one row in Hadamard blocks: `log2 p` for each channel of a block."""
    return sum(p * (p.bit_length() - 1) for p in blocks)


class OnlineRotation(nn.Module):
    """A rotation inside channel groups that runs before an encoder: `x' = x R`, `R` orthogonal.

    Every group is cut into Hadamard blocks (`rotation_blocks`), so that a row costs additions only,
    at most `log2 BLOCK` for each channel, and one product with `p^(-1/2)`. What comes before the
    Hadamard matrices, an order that brings the channels of a group together and signs, is folded
    into the weights in front (`SignedOrder`).

    The operations run in a defined order (`rotate_block`), in which the GPU kernel that fuses them
    with the encoder runs them, too: the same bits everywhere.

    Args:
        sizes: Channels of the groups, in their order.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(n for n in sizes if n > 0)
        self.blocks = rotation_blocks(self.sizes)

    def forward(self, x: Tensor) -> Tensor:
        """Rotate the last axis of `x [..., K]`; float32 out."""
        if rotates(x, self.blocks):
            return rotate_rows(x, self.blocks, turned=True)
        return in_blocks(x.float(), self.blocks, rotate_block)

    @property
    def macs(self) -> int:
        """Operations of one row, those of a butterfly one."""
        return butterfly_operations(self.blocks)

    def matrix(self) -> Tensor:
        """`R`, float32 `[K, K]`, to fold its inverse into a weight: `W' = W R`."""
        return self.forward(torch.eye(sum(self.sizes)))

    def extra_repr(self) -> str:
        """Groups for `print(model)`."""
        return f"sizes={self.sizes}"
