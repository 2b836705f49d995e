"""What a collapsed integer linear is: its encoder, weight levels and segments of the K axis.

The specifications hold plain tensors and say nothing about how they are executed; a backend turns a
`LinearSpec` into its own prepared form once (packing, layout) and runs that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from neurons.encoder import Encoding
from neurons.modes import ValueRange, check_commensurate
from snnllm.config import MAX_GROUPS as MAX_GROUPS
from snnllm.kernels.spec_checks import check_linear

COUNT_MAX = 2**15 - 1
ALL_GROUPS = 2**MAX_GROUPS - 1
"""Every group of a layer is active (`Backend.accumulate_counts`)."""


class Segment(NamedTuple):
    """A maximal run of the encoded K axis with one activation group and one weight group.

    Attributes:
        start: first encoded position.
        stop: one past the last encoded position.
        act_group: activation (saliency) group g, selects threshold, zero point and capacity.
        weight_group: weight group j, selects the column of `scale` and `zero`.
    """

    start: int
    stop: int
    act_group: int
    weight_group: int


def segments_of(sizes: tuple[int, ...], weight_group: Tensor | None = None) -> tuple[Segment, ...]:
    """Return the maximal runs of the encoded K axis, in order.

    Args:
        sizes: channels of every activation group, in encoded order.
        weight_group: int [K], weight group of every *encoded* position; None for one group.

    Returns:
        Segments that cover 0..K-1 without gaps; empty groups have no segment.
    """
    act = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    weight = torch.zeros_like(act) if weight_group is None else weight_group.long().cpu()
    if weight.shape != act.shape:
        raise ValueError(
            f"weight_group has shape {tuple(weight.shape)}, but the groups hold {len(act)} "
            "channels; give one weight group per encoded position"
        )
    if len(act) == 0:
        return ()
    change = (act[1:] != act[:-1]) | (weight[1:] != weight[:-1])
    bounds = [0, *(torch.nonzero(change).flatten() + 1).tolist(), len(act)]
    return tuple(
        Segment(start, stop, int(act[start]), int(weight[start]))
        for start, stop in pairwise(bounds)
    )


@dataclass(frozen=True, eq=False)
class EncoderSpec:
    """How one operand row becomes spike counts (method.md, section 2).

    Attributes:
        order: int64 [K], original channel of every encoded position (channels sorted by group,
            stable); None when the encoded order is the original one.
        sizes: channels of every activation group; their sum is K.
        capacities: largest spike count of every group, `T_g * (L - 1)`.
        shared: True when all groups share the range of the whole row.
        name: layer name for error messages.
        clip: factors on the range of every group, float32 in (0, 1]; None for the full range.
        commensurate: True when the thresholds of a row are multiples of one unit
            (`neurons.thresholds.commensurate`).

    Raises:
        ValueError: sizes, capacities, order or ranges do not fit together.
    """

    order: Tensor | None
    sizes: tuple[int, ...]
    capacities: tuple[int, ...]
    shared: bool = False
    name: str = ""
    clip: tuple[float, ...] | None = None
    commensurate: bool = False

    def __post_init__(self) -> None:
        """Check that the groups, the capacities and the order fit together."""
        if len(self.sizes) == 0 or len(self.sizes) != len(self.capacities):
            raise ValueError(
                f"{self.name}: expected a size and a capacity for each of one or more groups, "
                f"got sizes={self.sizes} and capacities={self.capacities}"
            )
        if self.clip is not None and len(self.clip) != len(self.sizes):
            raise ValueError(f"{self.name}: clip={self.clip} must hold a factor for each group")
        if len(self.sizes) > MAX_GROUPS:
            raise ValueError(
                f"{self.name}: expected at most {MAX_GROUPS} channel groups, got {len(self.sizes)}; "
                "give more channels the same steps"
            )
        if min(self.sizes) < 0 or sum(self.sizes) == 0:
            raise ValueError(f"{self.name}: sizes={self.sizes} must be >= 0 and hold a channel")
        if min(self.capacities) < 1 or max(self.capacities) > COUNT_MAX:
            raise ValueError(
                f"{self.name}: capacities={self.capacities} must be in 1..{COUNT_MAX}; "
                "use fewer steps or bits"
            )
        if self.shared and self.commensurate:
            raise ValueError(
                f"{self.name}: shared and commensurate exclude each other: a shared range is one "
                "for all groups, commensurate thresholds come from a range of each"
            )
        if self.commensurate:
            check_commensurate(self.capacities, self.name or "encoder")
        if self.order is not None:
            self._check_order(self.order)

    def _check_order(self, order: Tensor) -> None:
        expected = torch.arange(self.channels, device=order.device)
        if order.shape != expected.shape or not torch.equal(order.long().sort().values, expected):
            raise ValueError(
                f"{self.name}: order must be a permutation of the {self.channels} channels, "
                f"got shape {tuple(order.shape)}"
            )

    @property
    def channels(self) -> int:
        """K, the number of channels of a row."""
        return sum(self.sizes)

    @property
    def value_range(self) -> ValueRange:
        """Over which channels a range is taken, and how thresholds follow from it."""
        if self.commensurate:
            return ValueRange.COMMENSURATE
        return ValueRange.SHARED if self.shared else ValueRange.SPLIT

    @property
    def range_mode(self) -> int:
        """What kernels know the range by: 0 split, 1 shared, 2 commensurate."""
        return self.value_range.code

    @property
    def clip_factors(self) -> Tensor:
        """Return the factors on the range of every group, float32 [G]."""
        return torch.tensor(self.clip or (1.0,) * len(self.sizes), dtype=torch.float32)

    def is_like(self, other: EncoderSpec) -> bool:
        """Return whether both give every row the same counts, in the same order."""
        mine = (self.sizes, self.capacities, self.range_mode)
        return (
            mine == (other.sizes, other.capacities, other.range_mode)
            and torch.equal(self._original_channels, other._original_channels)
            and torch.equal(self.clip_factors, other.clip_factors)
        )

    @property
    def _original_channels(self) -> Tensor:
        return torch.arange(self.channels) if self.order is None else self.order.cpu()

    @cached_property
    def channel_group(self) -> Tensor:
        """Return the group of every *original* channel, uint8 [K]."""
        group = torch.repeat_interleave(
            torch.arange(len(self.sizes), dtype=torch.uint8), torch.tensor(self.sizes)
        )
        if self.order is None:
            return group
        return torch.empty_like(group).scatter_(0, self.order.cpu().long(), group)


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """A linear on spike counts: `y = sum_seg (s * A_seg) * sw_seg + bias` (method.md, section 3).

    With commensurate thresholds, s is the unit u of the row in every segment and A_seg counts units:
    `A_seg = m_g sum_k (q - z)(w - zw)`. Where there is one weight group, too, the segments are
    merged: `y = (u * sum_seg A_seg) * sw + bias`, with an int32 sum.

    Attributes:
        encoder: encoder of the input rows.
        levels: int8 [N, K] weight levels in encoded order, within the range of `weight_bits`.
        scale: float32 [N, J] weight scales, one column per weight group.
        zero: int32 [N, J] weight zero points; the real weight is `scale * (levels - zero)`.
        bias: float32 [N] or None.
        segments: maximal runs of K with one activation group and one weight group.
        weight_bits: bits of a weight level, 1..8.

    Raises:
        ValueError: shapes, ranges or segments do not fit, or an int32 accumulator could overflow.
    """

    encoder: EncoderSpec
    levels: Tensor
    scale: Tensor
    zero: Tensor
    bias: Tensor | None
    segments: tuple[Segment, ...]
    weight_bits: int

    def __post_init__(self) -> None:
        """Check everything a backend relies on, so that no backend has to."""
        check_linear(self)

    @property
    def out_features(self) -> int:
        """N, the number of outputs."""
        return self.levels.shape[0]

    @property
    def in_features(self) -> int:
        """K, the number of input channels."""
        return self.levels.shape[1]

    @property
    def merged(self) -> bool:
        """Whether the accumulators of all segments are summed as integers and scaled once."""
        one_scale = self.scale.shape[1] == 1
        return self.encoder.commensurate and one_scale and len(self.segments) > 1


def concatenate(specs: Sequence[LinearSpec]) -> LinearSpec:
    """Return one linear with the outputs of several that share an encoder, in order.

    Raises:
        ValueError: their encoders, segments, weight bits or biases are not alike.
    """
    first = specs[0]
    biased = [spec.bias for spec in specs if spec.bias is not None]
    alike = all(
        first.encoder.is_like(spec.encoder)
        and (spec.segments, spec.weight_bits) == (first.segments, first.weight_bits)
        and spec.scale.shape[1] == first.scale.shape[1]
        for spec in specs
    )
    if not alike or len(biased) not in (0, len(specs)):
        names = ", ".join(spec.encoder.name for spec in specs)
        raise ValueError(
            f"{names}: only linears with the same encoder, segments and weight bits, and all or none "
            "of them with a bias, can share an encoding; run them one by one"
        )
    return dataclasses.replace(
        first,
        levels=torch.cat([spec.levels for spec in specs]),
        scale=torch.cat([spec.scale for spec in specs]),
        zero=torch.cat([spec.zero for spec in specs]),
        bias=torch.cat(biased) if biased else None,
    )


class PreparedLinear:
    """Base of what `Backend.prepare` returns: opaque, only valid for the backend that made it."""

    name: str
    in_features: int
    out_features: int


class Backend(Protocol):
    """An execution of the collapsed view; all backends give the same bits.

    Attributes:
        name: what `get_backend` knows it by.
        packs_weights: whether `prepare` makes a packed copy of the weight, after which the codes that
            it came from need no room on the device.
    """

    name: str
    packs_weights: bool

    def available(self) -> str | None:
        """Return None when the backend can run here, else the reason why not."""

    def prepare(self, spec: LinearSpec) -> PreparedLinear:
        """Pack the weight once per layer."""

    def encode(self, x: Tensor, spec: EncoderSpec) -> Encoding:
        """Encode x [.., K]: counts in original channel order, parameters [.., G]."""

    def accumulate(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        """Return the centred accumulators of x [.., K]: int32 [S, M, N], M the number of rows."""

    def accumulate_counts(
        self, count: Tensor, zero_point: Tensor, prepared: PreparedLinear, active: int = ALL_GROUPS
    ) -> Tensor:
        """Return the centred accumulators of given counts: int32 [S, M, N].

        Args:
            count: uint8 or int16 [M, K] in original channel order, within the capacities.
            zero_point: int32 [M, G]; zeros for the spikes of a later step.
            prepared: the layer.
            active: bit g is set when group g may have counts; the segments of the others are zero.
        """

    def linear(self, x: Tensor, prepared: PreparedLinear, offset: Tensor | None = None) -> Tensor:
        """Return y [.., N] in x.dtype of x [.., K], less an offset if one is given (float32 [K])."""

    def int_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b^T` of int8 a [B, M, K] and b [B, N, K]: int32 [B, M, N], exact."""


def without_offset(x: Tensor, offset: Tensor | None) -> Tensor:
    """Return x [.., K], or float32 without an offset [K], as every encoder takes it off."""
    return x if offset is None else x.float() - offset


def check_input(x: Tensor, channels: int, name: str) -> None:
    """Raise when x is not a float tensor [.., channels]."""
    if x.dim() == 0 or x.shape[-1] != channels:
        raise ValueError(
            f"{name}: expected an input of {channels} channels, got {tuple(x.shape)}; "
            "the last axis must be the channels"
        )
    if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(
            f"{name}: expected float16, bfloat16, float32 or float64, got {x.dtype}; convert the input"
        )


def check_counts(count: Tensor, zero_point: Tensor, prepared: PreparedLinear) -> None:
    """Raise when counts and zero points are not integers [M, K] and int32 [M, G]."""
    if count.dtype not in (torch.uint8, torch.int16) or zero_point.dtype != torch.int32:
        raise TypeError(
            f"{prepared.name}: expected uint8 or int16 counts and int32 zero points, got "
            f"{count.dtype} and {zero_point.dtype}"
        )
    if count.dim() != 2 or count.shape[1] != prepared.in_features:
        raise ValueError(
            f"{prepared.name}: expected counts [M, {prepared.in_features}], got "
            f"{tuple(count.shape)}"
        )


def check_bmm(a: Tensor, b: Tensor) -> None:
    """Raise when a and b are not int8 [B, M, K] and [B, N, K]."""
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise TypeError(f"int_bmm: expected two int8 tensors, got {a.dtype} and {b.dtype}")
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[2]:
        raise ValueError(
            f"int_bmm: expected a [B, M, K] and b [B, N, K], got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )


def non_finite_error(name: str) -> ValueError:
    """Build the error of an input with NaN or infinity; it names the layer."""
    return ValueError(
        f"{name or 'encoder'}: the input holds NaN or infinity; spikes cannot encode it, "
        "look for the first layer that produces it"
    )
