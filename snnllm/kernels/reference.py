"""Reference backend: the collapsed linear in plain torch operations, on any device.

The int32 accumulators are exact by construction. On CUDA they come from `torch._int_mm`
(int8 x int8 -> int32). On the CPU that operator is exact too, but without VNNI it is a scalar loop
(17 times slower than a float matmul), so there the integers are multiplied as floats: a float
matmul is exact, in any order of summation, while every partial sum fits the mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from neurons.encoder import Encoding
from neurons.functional import gif_count
from neurons.thresholds import parameters
from snnllm.kernels.epilogue import in_units, kernel_threshold, scale_and_sum
from snnllm.kernels.exact import exact_dtype, exact_matmul
from snnllm.kernels.spec import (
    ALL_GROUPS,
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    Segment,
    check_bmm,
    check_counts,
    check_input,
    non_finite_error,
    without_offset,
)

_INT_MM_ROWS = 32  # torch._int_mm on CUDA wants more than 16 rows
_INT_MM_MULTIPLE = 8


class OperandKind(StrEnum):
    """How the integers of a segment are multiplied."""

    INT8 = "int8"  # by torch._int_mm; counts beyond 255 are multiplied as floats all the same
    FLOAT = "float"  # by a float matmul that is exact


class _Operand(NamedTuple):
    """The weight of one segment.

    Attributes:
        weight: int8 levels [N, K_seg] for `torch._int_mm`, else the centred levels `w - zw`
            [K_seg, N] in a float type that keeps the sums exact.
        bound: largest sum of |products| of a float weight.
    """

    weight: Tensor
    bound: int


@dataclass(frozen=True, eq=False)
class ReferenceLinear(PreparedLinear):
    """A linear prepared for the reference backend.

    Attributes:
        spec: the linear.
        operands: the weight of every segment.
    """

    name: str
    in_features: int
    out_features: int
    spec: LinearSpec
    operands: tuple[_Operand, ...]


class ReferenceBackend:
    """Collapsed execution with torch operations; exact, and the judge of the other backends.

    Args:
        kind: how integers are multiplied; None for what is fastest on the device of the weight.
    """

    name = "reference"
    packs_weights = False

    def __init__(self, kind: OperandKind | None = None) -> None:
        self._kind = kind

    def available(self) -> str | None:
        """Return None: torch is always there."""
        return None

    def prepare(self, spec: LinearSpec) -> ReferenceLinear:
        """Choose exact operands for every segment."""
        kind = self._kind
        if kind is None:
            kind = OperandKind.INT8 if spec.levels.is_cuda else OperandKind.FLOAT
        operands = tuple(_operand(spec, segment, kind) for segment in spec.segments)
        name = spec.encoder.name
        return ReferenceLinear(name, spec.in_features, spec.out_features, spec, operands)

    def encode(self, x: Tensor, spec: EncoderSpec) -> Encoding:
        """Encode x [.., K]: counts in original channel order, parameters [.., G]."""
        check_input(x, spec.channels, spec.name)
        rows = encode_rows(x.reshape(-1, spec.channels), spec)
        dtype = torch.uint8 if max(spec.capacities) <= 255 else torch.int16
        count = rows.count.to(dtype)
        if spec.order is not None:
            original = torch.empty_like(count)
            original[:, spec.order.to(x.device)] = count
            count = original
        shape = (*x.shape[:-1], len(spec.sizes))
        return Encoding(
            count.reshape(x.shape),
            rows.threshold.reshape(shape),
            rows.zero_point.reshape(shape),
            None if rows.multiple is None else rows.multiple.reshape(shape),
        )

    def accumulate(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        """Return the centred accumulators of x [.., K]: int32 [S, M, N], M the number of rows."""
        return _accumulate(x, _reference(prepared))[1]

    def accumulate_counts(
        self, count: Tensor, zero_point: Tensor, prepared: PreparedLinear, active: int = ALL_GROUPS
    ) -> Tensor:
        """Return the centred accumulators of given counts [M, K]: int32 [S, M, N]."""
        layer = _reference(prepared)
        check_counts(count, zero_point, layer)
        order = layer.spec.encoder.order
        if order is not None:
            count = count.index_select(1, order.to(count.device))
        return _segment_sums(count.float(), zero_point, layer, active)

    def linear(self, x: Tensor, prepared: PreparedLinear, offset: Tensor | None = None) -> Tensor:
        """Return y [.., N] of x [.., K] in x.dtype, by the scaling that all views share."""
        layer = _reference(prepared)
        spec = layer.spec
        rows, accumulators = _accumulate(without_offset(x, offset), layer)
        y = scale_and_sum(accumulators, kernel_threshold(rows), spec)
        return y.to(x.dtype).reshape(*x.shape[:-1], spec.out_features)

    def int_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b^T` of int8 a [B, M, K] and b [B, N, K]: int32 [B, M, N], exact."""
        check_bmm(a, b)
        return exact_matmul(a, b.transpose(1, 2), a.shape[2] * 128 * 128)


def encode_rows(x: Tensor, spec: EncoderSpec) -> Encoding:
    """Encode the rows of x (method.md, section 2): float32 counts [M, K], in encoded order.

    The equations are those of `neurons.encoder`, whose parameters these are.

    Args:
        x: [M, K] float, original channel order.
        spec: groups, capacities and range.

    Raises:
        ValueError: x holds NaN or infinity.
    """
    x = x.float()
    group = spec.channel_group.to(x.device)
    clip = None if spec.clip is None else spec.clip_factors.to(x.device)
    found = parameters(x, group, spec.capacities, spec.value_range, clip)
    # NaN and infinity reach the threshold of their row.
    if not torch.compiler.is_compiling() and not bool(torch.isfinite(found.threshold).all()):
        raise non_finite_error(spec.name)
    if spec.order is not None:
        order = spec.order.to(x.device)
        x, group = x.index_select(1, order), group.index_select(0, order)
    group = group.long()
    capacity = torch.tensor(spec.capacities, dtype=torch.float32, device=x.device)
    charge = x / found.threshold.index_select(1, group)
    bias = (found.zero_point.float() + 0.5).index_select(1, group)
    return Encoding(gif_count(charge, bias, capacity[group]), *found)


def _accumulate(x: Tensor, layer: ReferenceLinear) -> tuple[Encoding, Tensor]:
    """Return the encoded rows of x [.., K] and their centred accumulators, int32 [S, M, N]."""
    spec = layer.spec
    check_input(x, spec.in_features, spec.encoder.name)
    rows = encode_rows(x.reshape(-1, spec.in_features), spec.encoder)
    sums = _segment_sums(rows.count, rows.zero_point, layer)
    return rows, in_units(sums, rows.multiple, spec)


def _segment_sums(
    counts: Tensor, zero_points: Tensor, layer: ReferenceLinear, active: int = ALL_GROUPS
) -> Tensor:
    """Centred accumulators of float counts [M, K] in encoded order, int32 [S, M, N]."""
    spec, sums = layer.spec, []
    for segment, (weight, bound) in zip(spec.segments, layer.operands, strict=True):
        if not active >> segment.act_group & 1:
            shape = (len(counts), spec.out_features)
            sums.append(torch.zeros(shape, dtype=torch.int32, device=counts.device))
            continue
        count = counts[:, segment.start : segment.stop]
        zero_point = zero_points[:, segment.act_group, None]
        if weight.dtype == torch.int8:
            zero = spec.zero[:, segment.weight_group]
            sums.append(_int_mm_accumulator(count, zero_point, weight, zero))
        else:
            sums.append(exact_matmul(count - zero_point, weight, bound))
    return torch.stack(sums)


def _operand(spec: LinearSpec, segment: Segment, kind: OperandKind) -> _Operand:
    """Return the weight of one segment in the form that `_accumulate` multiplies."""
    start, stop, act_group, weight_group = segment
    level, capacity = spec.levels[:, start:stop], spec.encoder.capacities[act_group]
    if kind is OperandKind.INT8 and capacity <= 255:
        return _Operand(level, 0)
    centred = level.int() - spec.zero[:, weight_group, None]
    reach = int(centred.abs().max()) if centred.numel() else 0
    bound = capacity * reach * (stop - start)
    return _Operand(centred.t().to(exact_dtype(bound, level.device)).contiguous(), bound)


def _int_mm_accumulator(count: Tensor, zero_point: Tensor, level: Tensor, zero: Tensor) -> Tensor:
    """Return the centred accumulator through `torch._int_mm`.

    Counts reach 255, so they are shifted by 128 into int8, which the zero point takes back:
    `A = P @ w - zw * rowsum(P) + (128 - z) * (rowsum(w) - zw * K)` with P = q - 128.
    """
    shifted = (count - 128).to(torch.int8)
    level_sum = level.sum(1, dtype=torch.int32) - zero * level.shape[1]
    count_sum = shifted.sum(1, dtype=torch.int32)[:, None]
    return int_mm(shifted, level) - zero * count_sum + (128 - zero_point) * level_sum


def int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b^T` of int8 a [M, K] and b [N, K] as int32 [M, N], for any M, N and K.

    `torch._int_mm` on CUDA wants M > 16 and K, N divisible by 8; zeros fill the rest.
    """
    (m, k), n = a.shape, b.shape[0]
    rows = max(-m % _INT_MM_MULTIPLE, _INT_MM_ROWS - m)
    columns, depth = -n % _INT_MM_MULTIPLE, -k % _INT_MM_MULTIPLE
    product: Tensor = torch._int_mm(
        pad(a, (0, depth, 0, rows)), pad(b, (0, depth, 0, columns)).contiguous().t()
    )
    return product[:m, :n]


def _reference(prepared: PreparedLinear) -> ReferenceLinear:
    if not isinstance(prepared, ReferenceLinear):
        raise TypeError(
            f"{prepared.name}: prepared by another backend ({type(prepared).__name__}); "
            "prepare it again with this backend"
        )
    return prepared
