"""Triton backend: encoding and the integer linear as two kernels on a GPU of compute capability 8.0+.

The integers and the outputs are those of the reference backend, bit for bit. One difference: a launch
does not wait for the device, so NaN or infinity in the input raises nothing here; it makes the row's
outputs NaN or infinite.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neurons import backends
from neurons.backends.device import interpreted
from neurons.backends.spec import DTYPES
from neurons.encoder import Encoding
from snnllm.kernels.exact import exact_matmul
from snnllm.kernels.reference import ReferenceBackend
from snnllm.kernels.spec import (
    ALL_GROUPS,
    EncoderSpec,
    LinearSpec,
    PreparedLinear,
    Segment,
    check_bmm,
    check_counts,
    check_input,
)

if TYPE_CHECKING:
    from neurons.backends.triton_encode import EncodedRows

_INT8_MAX = 127
_BYTE_MAX = 255
_LEAST_CAPABILITY = (8, 0)
BLOCK = 128
"""Positions of a block of packed weights (`linear.BLOCK`); segments are padded to it."""


@dataclass(frozen=True, eq=False)
class EncodePlan:
    """An encoder spec on a device, its segments padded to whole blocks.

    Attributes:
        spec: the encoder.
        order: original channel of every padded position, -1 for padding, int32 `[P]`.
        table: (start, stop, group) of every segment, in positions.
        segments: the same on the device, int32 `[S, 3]`.
        capacities: float32 `[G]`.
        clip: float32 `[G]`.
        runs: what the host knows of the layout (`triton_encode_tiles.runs_of`).
    """

    spec: EncoderSpec
    order: Tensor
    table: tuple[tuple[int, int, int], ...]
    segments: Tensor
    capacities: Tensor
    clip: Tensor
    runs: list[int] | None


@dataclass(frozen=True, eq=False)
class TritonLinear(PreparedLinear):
    """A linear prepared for the Triton backend.

    Attributes:
        plan: how its input is encoded.
        arguments: weight, segment table, scale, zero, row sums, shift and bias, as
            `operators.encoded_linear` takes them.
        bits: 2, 4 or 8, the width of a packed code.
        merged: `LinearSpec.merged`.
    """

    name: str
    in_features: int
    out_features: int
    plan: EncodePlan
    arguments: tuple[Any, ...]
    bits: int
    merged: bool


class TritonBackend:
    """Collapsed execution on a GPU; bit for bit equal to the reference backend."""

    name = "triton"
    packs_weights = True

    def available(self) -> str | None:
        """Return None when Triton and a GPU that it can use are here, else the reason why not."""
        if find_spec("triton") is None:
            return "the package triton is not installed (pip install 'snnllm[triton]')"
        if interpreted():
            return None
        if not torch.cuda.is_available() or torch.version.hip is not None:
            return "there is no CUDA device"
        capability = torch.cuda.get_device_capability()
        if capability < _LEAST_CAPABILITY:
            return f"compute capability {capability} is below {_LEAST_CAPABILITY}"
        return None

    def prepare(self, spec: LinearSpec) -> TritonLinear:
        """Pack the weight and precompute what the epilogue needs, once per layer."""
        plan, starts = _plan(spec.encoder, spec.segments, spec.levels.device)
        charges = spec.encoder.commensurate and len(spec.encoder.sizes) > 1
        shifted = charges or max(spec.encoder.capacities) > _INT8_MAX
        bits = next(width for width in (2, 4, 8) if spec.weight_bits <= width)
        offset = 0 if bits == 8 else 1 << (bits - 1)
        width = len(plan.order)
        codes = torch.zeros(spec.out_features, width, dtype=torch.int16, device=plan.order.device)
        sums = []
        for segment, start in zip(spec.segments, starts, strict=True):
            part = spec.levels[:, segment.start : segment.stop].to(torch.int16) + offset
            codes[:, start : start + part.shape[1]] = part
            sums.append(part.sum(1, dtype=torch.int32))
        code_sum = torch.stack(sums, 1)
        length = torch.tensor([s.stop - s.start for s in spec.segments], device=code_sum.device)
        zero = spec.zero + offset
        of_segment = torch.tensor([s.weight_group for s in spec.segments], device=zero.device)
        row_sum = code_sum - zero.index_select(1, of_segment) * length.int()
        table = torch.cat([plan.segments, of_segment.int()[:, None]], 1).contiguous()
        arguments = (
            pack_blocks(codes, bits),
            table,
            spec.scale.contiguous(),
            zero.contiguous(),
            row_sum.contiguous(),
            (code_sum * 128).contiguous() if shifted else None,
            spec.bias,
        )
        name = spec.encoder.name
        return TritonLinear(
            name, spec.in_features, spec.out_features, plan, arguments, bits, spec.merged
        )

    def encode(self, x: Tensor, spec: EncoderSpec) -> Encoding:
        """Encode x [.., K]: counts in original channel order, parameters [.., G]."""
        if spec.commensurate:
            return ReferenceBackend().encode(x, spec)
        check_input(x, spec.channels, spec.name)
        return Encoding(
            *backends.encode(
                x,
                spec.channel_group.to(x.device),
                spec.capacities,
                spec.clip_factors.to(x.device),
                spec.shared,
            )
        )

    def accumulate(self, x: Tensor, prepared: PreparedLinear) -> Tensor:
        """Return the centred accumulators of x [.., K]: int32 [S, M, N], M the number of rows."""
        layer = _triton(prepared)
        return multiply(encode_plan(_rows(x, layer), layer.plan), layer, torch.int32)

    def accumulate_counts(
        self, count: Tensor, zero_point: Tensor, prepared: PreparedLinear, active: int = ALL_GROUPS
    ) -> Tensor:
        """Return the centred accumulators of given counts [M, K]: int32 [S, M, N]."""
        layer = _triton(prepared)
        check_counts(count, zero_point, layer)
        if count.dtype != torch.uint8:
            _check_bytes(layer)
        plan = layer.plan
        real = (plan.order >= 0).to(count.dtype)
        padded = (count.index_select(1, plan.order.clamp(min=0)) * real).to(torch.uint8)
        parts = [padded[:, start:stop].sum(1, dtype=torch.int32) for start, stop, _ in plan.table]
        sums = torch.stack(parts, 1)
        threshold = torch.ones(zero_point.shape, device=count.device)
        out = multiply((padded, threshold, zero_point.contiguous(), sums), layer, torch.int32)
        for index, (_, _, group) in enumerate(plan.table):
            if not active >> group & 1:
                out[index] = 0
        return out

    def linear(self, x: Tensor, prepared: PreparedLinear, offset: Tensor | None = None) -> Tensor:
        """Return y [.., N] in x.dtype of x [.., K], less an offset that the encoder takes off."""
        layer = _triton(prepared)
        rows = _rows(x, layer)
        y = multiply(encode_plan(rows, layer.plan, offset), layer, rows.dtype)
        return y.view(*x.shape[:-1], layer.out_features).to(x.dtype)

    def int_bmm(self, a: Tensor, b: Tensor) -> Tensor:
        """Return `a @ b^T` of int8 a [B, M, K] and b [B, N, K]: int32 [B, M, N], exact."""
        check_bmm(a, b)
        return exact_matmul(a, b.transpose(1, 2), a.shape[2] * 128 * 128)


def pack_blocks(codes: Tensor, bits: int) -> Tensor:
    """Pack codes as `triton_linear` reads them.

    Args:
        codes: int16 `[N, P]`, P a multiple of `BLOCK`; unsigned below 8 bits, else signed.
        bits: 2, 4 or 8.

    Returns:
        uint8 `[N, P * bits / 8]`; byte j of a block holds the positions j, j + 16 bits, ... of it,
        from the low bits on.
    """
    if bits == 8:
        return codes.to(torch.int8).view(torch.uint8).contiguous()
    rows, planes = len(codes), 8 // bits
    blocks = codes.view(rows, -1, planes, BLOCK // planes)
    packed = torch.zeros_like(blocks[:, :, 0])
    for plane in range(planes):
        packed |= blocks[:, :, plane] << (bits * plane)
    return packed.reshape(rows, -1).to(torch.uint8)


def _plan(
    spec: EncoderSpec, segments: tuple[Segment, ...], device: torch.device
) -> tuple[EncodePlan, list[int]]:
    """The padded layout of an encoder, and where each segment starts in it."""
    from neurons.backends.triton_encode_tiles import runs_of  # needs Triton

    lengths = [-(-(s.stop - s.start) // BLOCK) * BLOCK for s in segments]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    order = torch.full((starts[-1],), -1, dtype=torch.int32)
    original = torch.arange(spec.channels) if spec.order is None else spec.order.cpu()
    for segment, start in zip(segments, starts, strict=False):
        part = original[segment.start : segment.stop]
        order[start : start + len(part)] = part.int()
    table = tuple((a, b, s.act_group) for s, (a, b) in zip(segments, pairwise(starts), strict=True))
    rows = torch.tensor(table, dtype=torch.int32)
    plan = EncodePlan(
        spec,
        order.to(device),
        table,
        rows.to(device),
        torch.tensor(spec.capacities, dtype=torch.float32).to(device),
        spec.clip_factors.to(device),
        runs_of(order, rows, len(spec.capacities), spec.channels),
    )
    return plan, starts[:-1]


def encode_plan(x: Tensor, plan: EncodePlan, offset: Tensor | None = None) -> EncodedRows:
    """Encode rows `[M, K]`, less an offset float32 `[K]`, into counts in padded encoded order."""
    from neurons.backends import triton_encode as rows  # needs Triton

    layout = (plan.order, plan.segments, plan.capacities, plan.clip)
    mode = rows.mode_for(plan.spec.range_mode, plan.capacities)
    if plan.runs is None:
        return rows.encode_rows(x, *layout, mode, offset)
    from snnllm.kernels.triton.plain import encode_plain_rows

    rows.check_rows(x)
    rows.check_layout(*layout, offset, x.shape[1])
    return rows.EncodedRows(*encode_plain_rows(x.detach(), *layout, mode, offset, plan.runs))


def multiply(
    encoded: EncodedRows | tuple[Tensor, Tensor, Tensor, Tensor],
    layer: TritonLinear,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> Tensor:
    """Outputs `[M, N]`, plus a residual of their shape and dtype, or int32 accumulators `[S, M, N]`."""
    from snnllm.kernels.triton.operators import encoded_linear  # needs Triton

    count, *parameters = encoded
    arguments = (*parameters, *layer.arguments, layer.bits, dtype, residual)
    out: Tensor = encoded_linear(count, *arguments, layer.merged)
    return out


def _rows(x: Tensor, layer: TritonLinear) -> Tensor:
    """Rows `[M, K]` as the encoder reads them, of an input that the layer can take."""
    check_input(x, layer.in_features, layer.name)
    _check_bytes(layer)
    rows = x.reshape(-1, layer.in_features)
    if rows.dtype not in DTYPES:
        rows = rows.float()
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check_bytes(layer: TritonLinear) -> None:
    """Refuse counts that do not fit the operand; the spikes of a step may (`accumulate_counts`)."""
    if max(layer.plan.spec.capacities) > _BYTE_MAX:
        raise ValueError(
            f"{layer.name}: counts beyond {_BYTE_MAX} do not fit the 8-bit operand of the triton backend; "
            "use fewer bits or steps, the unrolled view, or backend='reference'"
        )


def _triton(prepared: PreparedLinear) -> TritonLinear:
    if not isinstance(prepared, TritonLinear):
        raise TypeError(
            f"{prepared.name}: prepared by another backend ({type(prepared).__name__}); "
            "prepare it again with this backend"
        )
    return prepared
