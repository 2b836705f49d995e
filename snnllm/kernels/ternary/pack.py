"""Ternary weights as a GPU reads them: two bits a spike, in memory as in the inner loop.

A level of a neuron with T steps is a number of balanced ternary digits, each of which is a spike:

    q = sum_i 3^i d_i,   d_i in {-1, 0, 1},   i < D,   D the least with (3^D - 1) / 2 >= T

so one step takes one digit, two to four take two, five to thirteen three. A digit is stored as a two's
complement number of two bits, which are, moved to the top of a word, the float 2 d (-2: `0xC000...`, 2:
`0x4000...`, in float32, bfloat16 and float16 alike). Five trits in a byte, as they are on disk, would be
a fifth less memory but need multiplications to unpack, and the kernels are not bound by memory alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from neurons import backends
from snnllm.kernels.spec import EncoderSpec, Segment, check_input
from snnllm.step_allocation import StepClass, threshold_runs

BLOCKS = (128, 64)
"""Sizes of a block that the kernels know, in positions; it has one threshold a row."""
STRIDE = 8
"""Activations have a multiple of so many blocks, behind the last block zeros."""


_BFLOAT16_MAX, _FLOAT32_MAX = 1 << 8, 1 << 24
"""Integers up to these are exact."""


class PackedTernary(NamedTuple):
    """A ternary weight for `snnllm.kernels.ternary.operators`.

    A block holds positions that share a threshold and a place in the digits; byte j of it holds the
    digits of the positions j, j + block / 4, j + block / 2, j + 3 block / 4 from its low bits on.

    Attributes:
        weight: uint8 `[N, P / 4]`.
        scale: Threshold of every row and block, float16 `[N, B]`.
        factor: `3^i / 2` of every block, float32 `[B]`.
        order: Channel of every position, -1 for padding, int32 `[P]`; more -1 up to a multiple of
            `STRIDE` blocks.
        ends: Last block of every run of columns that share a threshold.
        channels: K.
    """

    weight: Tensor
    scale: Tensor
    factor: Tensor
    order: Tensor
    ends: tuple[int, ...]
    channels: int

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight, scale, factor and order."""
        return self.weight, self.scale, self.factor, self.order

    @property
    def nbytes(self) -> int:
        """Memory of all of it."""
        return sum(part.nbytes for part in self.tensors)


def digits_of(steps: int) -> int:
    """How many balanced ternary digits hold the levels `-steps..steps`."""
    digits = 1
    while (3**digits - 1) // 2 < steps:
        digits += 1
    return digits


def exact_in_float(
    classes: Sequence[StepClass], group_size: int | None, capacities: Sequence[int]
) -> bool:
    """Whether the kernels add spiking inputs exactly.

    Counts are bfloat16, and sums over the columns of a threshold float32, whose partial sums over
    digits reach `(3^D - 1) / 2` a column.
    """
    reach = max(
        max(threshold_runs((c,), group_size)) * (3 ** digits_of(c.steps) - 1) // 2 for c in classes
    )
    return max(capacities) <= _BFLOAT16_MAX and reach * max(capacities) <= _FLOAT32_MAX


def balanced_digits(levels: Tensor, count: int) -> list[Tensor]:
    """Balanced ternary digits of integers, the lowest first: int16 in {-1, 0, 1}, `[*]` each."""
    rest, out = levels.to(torch.int16), []
    for _ in range(count):
        digit = (rest + 1).remainder_(3).sub_(1)
        rest = (rest - digit).div_(3, rounding_mode="floor")
        out.append(digit)
    return out


def pack_ternary(
    levels: Tensor,
    threshold: Tensor,
    order: Tensor,
    classes: Sequence[StepClass],
    group_size: int | None,
) -> PackedTernary:
    """Pack spike counts in stored order.

    Args:
        levels: int8 `[N, K]`, columns sorted by class.
        threshold: float16 `[N, J]`, one per row and run of columns (`threshold_runs`).
        order: Channel of every column, `[K]`.
        classes: Steps and sizes of the classes.
        group_size: As `threshold_runs` takes it.
    """
    steps = [c.steps for c in classes for _ in threshold_runs((c,), group_size)]
    runs = threshold_runs(classes, group_size)
    digits = [digits_of(t) for t in steps]

    def bits(block: int) -> int:
        blocks = sum(d * -(-size // block) for d, size in zip(digits, runs, strict=True))
        return blocks * (2 * block + 16)

    block = min(BLOCKS, key=bits)
    weights, channels, scales, factors, ends, start = [], [], [], [], [], 0
    for run, (size, count) in enumerate(zip(runs, digits, strict=True)):
        part = slice(start, start + size)
        padding, blocks = -size % block, -(-size // block)
        channel = torch.nn.functional.pad(order[part].int(), (0, padding), value=-1)
        for place, digit in enumerate(balanced_digits(levels[:, part], count)):
            weights.append(_pack_digit(torch.nn.functional.pad(digit, (0, padding)), block))
            channels.append(channel)
            scales += [threshold[:, run]] * blocks
            factors += [3**place / 2] * blocks
        ends.append(len(factors) - 1)
        start += size
    return PackedTernary(
        torch.cat(weights, 1),
        torch.stack(scales, 1),
        torch.tensor(factors, dtype=torch.float32, device=levels.device),
        torch.nn.functional.pad(torch.cat(channels), (0, -len(factors) % STRIDE * block), value=-1),
        tuple(ends),
        levels.shape[1],
    )


def packed_linear(x: Tensor, packed: PackedTernary, bias: Tensor | None, name: str = "") -> Tensor:
    """`y = x W^T + bias` in Triton, in the dtype of x; exact products, float32 sums.

    Args:
        x: float `[.., K]`.
        packed: The weight.
        bias: float32 `[N]` or None.
        name: Layer name for messages.
    """
    from snnllm.kernels.ternary.operators import ternary_linear  # needs Triton

    check_input(x, packed.channels, name)
    rows = x.float() if x.dtype == torch.float64 else x
    rows = rows.reshape(-1, packed.channels)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y: Tensor = ternary_linear(rows, *packed.tensors, bias)
    return y.to(x.dtype).view(*x.shape[:-1], len(packed.weight))


class CountedTernary(NamedTuple):
    """A packed ternary weight whose inputs are spikes.

    Attributes:
        packed: The weight.
        channel_group: Group of every channel, uint8 `[K]`.
        clip: Factors on the ranges, float32 `[G]`.
        encoder: How inputs are encoded.
        segment: Segment that ends with a block in a group, -1 for none, int32 `[G, B']`, B' a
            multiple of `STRIDE`.
        segments: How many segments.
    """

    packed: PackedTernary
    channel_group: Tensor
    clip: Tensor
    encoder: EncoderSpec
    segment: Tensor
    segments: int


def count_with(
    packed: PackedTernary, encoder: EncoderSpec, segments: Sequence[Segment]
) -> CountedTernary:
    """Prepare a packed weight for spiking inputs.

    Args:
        packed: The weight; its runs are the weight groups of the segments.
        encoder: How inputs are encoded, at most 16 groups (`exact_in_float`).
        segments: Those of the linear (`spec.segments_of`).
    """
    device = packed.weight.device
    blocks = -(-len(packed.factor) // STRIDE) * STRIDE
    table = torch.full((len(encoder.sizes), blocks), -1, dtype=torch.int32)
    for index, segment in enumerate(segments):
        table[segment.act_group, packed.ends[segment.weight_group]] = index
    return CountedTernary(
        packed,
        encoder.channel_group.to(device),
        encoder.clip_factors.to(device),
        encoder,
        table.to(device),
        len(segments),
    )


def counted_linear(
    x: Tensor, weight: CountedTernary, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`y = x W^T + bias` of encoded x in Triton, or its accumulators: the integers of the reference.

    Args:
        x: float `[.., K]`.
        weight: The weight and the encoder.
        bias: float32 `[N]` or None.
        dtype: Of the output; int32 for the accumulators.

    Returns:
        `[.., N]`, or int32 `[S, M, N]`, M the number of rows.
    """
    from snnllm.kernels.ternary.operators import ternary_counts  # needs Triton

    encoder, packed = weight.encoder, weight.packed
    check_input(x, packed.channels, encoder.name)
    rows = (x.float() if x.dtype == torch.float64 else x).reshape(-1, packed.channels)
    encoded = backends.encode(
        rows, weight.channel_group, encoder.capacities, weight.clip, encoder.shared
    )
    kind = torch.float32 if dtype == torch.float64 else dtype
    y: Tensor = ternary_counts(
        *encoded,
        weight.channel_group,
        *packed.tensors,
        weight.segment,
        bias,
        weight.segments,
        kind,
    )
    return y if dtype == torch.int32 else y.to(dtype).view(*x.shape[:-1], len(packed.weight))


def _pack_digit(digit: Tensor, block: int) -> Tensor:
    """Digits int16 `[N, P]` of whole blocks as uint8 `[N, P / 4]`."""
    planes = (digit & 3).to(torch.uint8).view(len(digit), -1, 4, block // 4)
    packed = planes[:, :, 0].clone()
    for plane in range(1, 4):
        packed |= planes[:, :, plane] << (2 * plane)
    return packed.flatten(1)
