"""Reference backend: the collapsed linear in plain torch operations, on any device.

The int32 accumulators are exact by construction. On CUDA they come from `torch._int_mm`
(int8 x int8 -> int32). On the CPU that operator is exact too, but without VNNI it is a scalar loop
(17 times slower than a float matmul), so there the integers are multiplied as floats: a float matmul
is exact, in any order of summation, while every partial sum fits the mantissa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from snnllm.kernels.spec import (
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    Segment,
    check_bmm,
    check_input,
    non_finite_error,
)

if TYPE_CHECKING:
    from neurons.encoder import Encoding

THRESHOLD_MIN = 1e-5
_FLOAT32_EXACT = 2**24
_FLOAT64_EXACT = 2**53
_INT_MM_ROWS = 32  # torch._int_mm on CUDA wants more than 16 rows
_INT_MM_MULTIPLE = 8


@dataclass(frozen=True, eq=False)
class ReferenceLinear(PreparedLinear):
    """A linear prepared for the reference backend; it keeps the levels as int8."""

    spec: LinearSpec
    name: str
    in_features: int
    out_features: int


@dataclass(frozen=True)
class _Rows:
    """Encoded rows: counts [M, K] in encoded order, thresholds and zero points [M, G]; float32."""

    count: Tensor
    threshold: Tensor
    zero_point: Tensor


class ReferenceBackend:
    """Collapsed execution with torch operations; exact, and the judge of the other backends."""

    name = "reference"

    def available(self) -> str | None:
        """Return None: torch is always there."""
        return None

    def prepare(self, spec: LinearSpec) -> ReferenceLinear:
        """Wrap the specification; nothing is packed."""
        return ReferenceLinear(spec, spec.encoder.name, spec.in_features, spec.out_features)

    def encode(self, x: Tensor, spec: EncoderSpec) -> Encoding:
        """Encode x [.., K]: counts in original channel order, thresholds and zero points [.., G]."""
        from neurons.encoder import Encoding

        check_input(x, spec.channels, spec.name)
        rows = encode_rows(x.reshape(-1, spec.channels), spec)
        dtype = torch.uint8 if max(spec.capacities) <= 255 else torch.int16
        count = rows.count.to(dtype)
        if spec.order is not None:
            original = torch.empty_like(count)
            original[:, spec.order.to(x.device)] = count
            count = original
        lead, groups = x.shape[:-1], len(spec.sizes)
        return Encoding(
            count.reshape(x.shape),
            rows.threshold.reshape(*lead, groups),
            rows.zero_point.int().reshape(*lead, groups),
        )

    def accumulate(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        """Return the centred accumulators of x [.., K]: int32 [S, M, N], M the number of rows."""
        spec = _reference(prepared).spec
        check_input(x, spec.in_features, spec.encoder.name)
        rows = encode_rows(x.reshape(-1, spec.in_features), spec.encoder)
        return torch.stack([_segment_accumulator(rows, spec, segment) for segment in spec.segments])

    def linear(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        """Return `y = sum_seg (s * A_seg) * sw_seg + bias` of x [.., K], in x.dtype.

        The products and sums are separate float32 operations in this order, so that every backend
        rounds alike.
        """
        spec = _reference(prepared).spec
        check_input(x, spec.in_features, spec.encoder.name)
        rows = encode_rows(x.reshape(-1, spec.in_features), spec.encoder)
        total: Tensor | None = None
        for segment in spec.segments:
            accumulator = _segment_accumulator(rows, spec, segment).float()
            threshold = rows.threshold[:, segment.act_group, None]
            term = (threshold * accumulator) * spec.scale[:, segment.weight_group]
            total = term if total is None else total + term
        assert total is not None  # a specification has at least one channel
        if spec.bias is not None:
            total = total + spec.bias
        return total.to(x.dtype).reshape(*x.shape[:-1], spec.out_features)

    def int_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b^T` of int8 a [B, M, K] and b [B, N, K]: int32 [B, M, N], exact."""
        check_bmm(a, b)
        dtype = _exact_dtype(a.shape[2] * 128 * 128, a.device)
        return torch.matmul(a.to(dtype), b.to(dtype).transpose(1, 2)).to(torch.int32)


def encode_rows(x: Tensor, spec: EncoderSpec) -> _Rows:
    """Encode the rows of x (method.md, section 2), in encoded order.

    Equation, in float32 with IEEE division and no fused multiply-add:

        s = max((hi - lo) / capacity, 1e-5),  z = clip(round(-lo / s), 0, capacity)
        q = clip(floor(x / s + (z + 1/2)), 0, capacity)

    Args:
        x: [M, K] float, original channel order.
        spec: groups, capacities and range.

    Raises:
        ValueError: x holds NaN or infinity.
    """
    x = x.float()
    if not bool(torch.isfinite(x).all()):
        raise non_finite_error(spec.name)
    if spec.order is not None:
        x = x[:, spec.order.to(x.device)]
    ranges = x if spec.shared else None
    counts, thresholds, zero_points = [], [], []
    for group, capacity in zip(x.split(spec.sizes, dim=1), spec.capacities, strict=True):
        low, high = _range(group if ranges is None else ranges)
        threshold = ((high - low) / capacity).clamp(min=THRESHOLD_MIN)
        zero_point = torch.round(-low / threshold).clamp(0, capacity)
        count = torch.floor(group / threshold + (zero_point + 0.5)).clamp(0, capacity)
        counts.append(count)
        thresholds.append(threshold)
        zero_points.append(zero_point)
    return _Rows(torch.cat(counts, 1), torch.cat(thresholds, 1), torch.cat(zero_points, 1))


def _range(group: Tensor) -> tuple[Tensor, Tensor]:
    """Return min(0, min x) and max(0, max x) of every row, [M, 1]; zero for an empty group."""
    if group.shape[1] == 0:
        zero = group.new_zeros(group.shape[0], 1)
        return zero, zero
    return group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)


def _segment_accumulator(rows: _Rows, spec: LinearSpec, segment: Segment) -> Tensor:
    """Return `A = sum_k (q - z) (w - zw)` of one segment, int32 [M, N], exact."""
    start, stop, act_group, weight_group = segment
    count = rows.count[:, start:stop]
    zero_point = rows.zero_point[:, act_group, None]
    level = spec.levels[:, start:stop]
    zero = spec.zero[:, weight_group, None]
    capacity = spec.encoder.capacities[act_group]
    if count.is_cuda and capacity <= 255:
        return _int_mm_accumulator(count, zero_point, level, zero)
    reach = int((level.int() - zero).abs().max()) if level.numel() else 0
    dtype = _exact_dtype(capacity * reach * (stop - start), count.device)
    centred = (level.to(dtype) - zero.to(dtype)).t()
    return torch.matmul((count - zero_point).to(dtype), centred).to(torch.int32)


def _int_mm_accumulator(count: Tensor, zero_point: Tensor, level: Tensor, zero: Tensor) -> Tensor:
    """Return the centred accumulator through `torch._int_mm`.

    Counts reach 255, so they are shifted by 128 into int8, which the zero point takes back:
    `A = P @ w - zw * rowsum(P) + (128 - z) * (rowsum(w) - zw * K)` with P = q - 128.
    """
    shifted = (count - 128).to(torch.int8)
    offset = 128 - zero_point.int()
    level_sum = level.sum(1, dtype=torch.int32) - zero[:, 0] * level.shape[1]
    count_sum = shifted.sum(1, dtype=torch.int32)[:, None]
    return int_mm(shifted, level) - zero[:, 0] * count_sum + offset * level_sum


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


def _exact_dtype(bound: int, device: torch.device) -> torch.dtype:
    """Return the cheapest float type in which sums up to `bound` are exact.

    float32 counts only while torch does not lower its matmul to bfloat16 or TF32.
    """
    full = torch.get_float32_matmul_precision() == "highest"
    if bound <= _FLOAT32_EXACT and full and device.type == "cpu":
        return torch.float32
    if bound > _FLOAT64_EXACT:
        raise ValueError(f"an accumulator can reach {bound}, beyond what float64 holds exactly")
    return torch.float64


def _reference(prepared: PreparedLinear) -> ReferenceLinear:
    if not isinstance(prepared, ReferenceLinear):
        raise TypeError(
            f"{prepared.name}: prepared by another backend ({type(prepared).__name__}); "
            "prepare it again with this backend"
        )
    return prepared
