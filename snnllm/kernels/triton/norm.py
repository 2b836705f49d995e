"""(Residual add +) RMSNorm (+ encode) in one Triton kernel, a program for each row.

The row is read once from HBM: once for its squares, and again from the cache for the range and for
the counts of every channel group. The arithmetic is that of :func:`snnllm.norm.rms_norm` and of
:mod:`neurons.encoder`, so that the fused kernel, the norm alone followed by an encoder, and torch on
a CPU give the same bits.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, on
from neurons.backends.operator import operator
from neurons.backends.triton_encode import (
    check_layout,
    check_rows,
    known_runs,
    mode_for,
    outputs,
    padded,
    shape_of_programs,
)
from neurons.backends.triton_encode_row import encode_row, normalized, rounded
from neurons.backends.triton_encode_tiles import encode_tiles, tiles_of
from snnllm.kernels.cuda import encode as cuda_encode
from snnllm.norm import LANES, check_gain

__all__ = ["NormEncoded", "rms_norm", "rms_norm_encode"]


class NormEncoded(NamedTuple):
    """What :func:`rms_norm_encode` returns.

    Attributes:
        count: uint8 ``[M, P]``, as `EncodedRows` has it.
        threshold: float32 ``[M, G]``, likewise.
        zero_point: int32 ``[M, G]``, likewise.
        count_sum: int32 ``[M, S]``, likewise.
        residual: the new residual stream ``[M, K]`` in the dtype of x; x itself without a residual.
        row: the normalised rows ``[M, K]`` in the dtype of x, empty unless asked for.
    """

    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    threshold: Tensor
    zero_point: Tensor
    count_sum: Tensor
    residual: Tensor
    row: Tensor


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalise rows in one kernel: the bits of :func:`snnllm.norm.rms_norm`, without gradients.

    Args:
        x: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        weight: gains ``[K]`` in the dtype of x; None: none.
        eps: added to the mean of the squares.
        residual: ``[M, K]`` in the dtype of x, added to x first (rounded to the dtype). None: none.

    Returns:
        The normalised rows ``[M, K]`` and the new residual stream, x itself without a residual.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or a stride does not fit.
    """
    _check(x, residual, weight)
    row, stream = _rms_norm_op(x.detach(), residual, weight, eps)
    return row, x if residual is None else stream


def rms_norm_encode(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None = None,
    with_row: bool = False,
    runs: Sequence[int] | None = None,
) -> NormEncoded:
    """Add the residual, normalise and encode in one kernel.

    As :func:`rms_norm` followed by :func:`neurons.backends.triton_encode.encode_rows`, bit for bit.
    Carries no gradient. Nothing is checked on the device: a row with NaN or infinity has thresholds
    that are not finite.

    Args:
        x: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        residual: ``[M, K]`` in the dtype of x, added to x first. None: none.
        weight: gains ``[K]`` in the dtype of x; None: none.
        eps: added to the mean of the squares.
        order: original channel of every encoded position, int32 ``[P]``, -1 at padding. None: the
            original order.
        segments: ``(start, stop, group)`` of runs of encoded positions, int32 ``[S, 3]``.
        capacities: qmax of each group, float32 ``[G]``.
        clip: factors on the range of each group, float32 ``[G]``.
        range_mode: as :func:`neurons.backends.triton_encode.encode_rows` takes it.
        offset: float32 ``[K]`` in original channel order, taken off the normalised row. None: none.
        with_row: also return the normalised rows.
        runs: as :func:`neurons.backends.triton_encode.encode_rows` takes them, for a faster kernel.

    Returns:
        The encoding, the new residual stream and the rows if asked for.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or a stride does not fit.
    """
    _check(x, residual, weight)
    check_layout(order, segments, capacities, clip, offset, x.shape[1])
    positions = padded(x.shape[1]) if order is None else order.shape[0]
    encoded = NormEncoded(
        *_rms_norm_encode_op(
            *(x.detach(), residual, weight, eps, order, segments, capacities, clip),
            *(mode_for(range_mode, capacities), offset, with_row, positions),
            known_runs(runs, order, segments, capacities, x.shape[1]),
        )
    )
    return encoded._replace(residual=x) if residual is None else encoded


def _check(x: Tensor, residual: Tensor | None, weight: Tensor | None) -> None:
    check_rows(x)
    check_gain(x, weight)
    if residual is None:
        return
    check_rows(residual)
    if residual.dtype != x.dtype or residual.shape != x.shape:
        raise ValueError(
            f"residual must be {x.dtype} {tuple(x.shape)} as x is, got {residual.dtype} "
            f"{tuple(residual.shape)}."
        )


@operator("snnllm::rms_norm")
def _rms_norm_op(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Arguments of :func:`rms_norm`; the residual stream is empty without a residual."""
    row, stream = _rows(x, True), _rows(x, residual is not None)
    if x.shape[0]:
        unused = (x, x, x, x, x, x, x, x, x)
        _launch(x, residual, weight, eps, stream, row, unused, 0, 1, 1, 0, 1024, 4)
    return row, stream


@_rms_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _rows(x, True), _rows(x, residual is not None)


@operator("snnllm::rms_norm_encode")
def _rms_norm_encode_op(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    with_row: bool,
    positions: int,
    runs: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments of :func:`rms_norm_encode`; the residual stream is empty without a residual."""
    groups, many = capacities.shape[0], segments.shape[0]
    count, threshold, zero_point, count_sum = outputs(x, positions, groups, many)
    row, stream = _rows(x, with_row), _rows(x, residual is not None)
    rows = cuda_encode.NormedRows(
        *(x, residual, weight, eps, offset, capacities, clip, runs, range_mode)
    )
    if x.shape[0] and not with_row and rows.unsuitable() is None:
        written = (stream, count, threshold, zero_point, count_sum)
        cuda_encode.normed_launch(rows, written)(x.device)
    elif x.shape[0]:
        gather = order is not None
        block, warps = shape_of_programs(x.shape[0], positions)
        if runs:
            gather = min(runs[3::4]) < 0
            block, warps = tiles_of(x.shape[0], positions, gather)
        encoding = (
            *(x if order is None else order, segments, capacities, clip),
            *(x if offset is None else offset, count, threshold, zero_point, count_sum),
        )
        _launch(
            *(x, residual, weight, eps, stream, row, encoding, positions, many, groups, range_mode),
            *(block, warps, True, gather, offset is not None, tuple(runs or ())),
        )
    return count, threshold, zero_point, count_sum, stream, row


@_rms_norm_encode_op.register_fake
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    with_row: bool,
    positions: int,
    runs: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    encoded = outputs(x, positions, capacities.shape[0], segments.shape[0])
    count, threshold, zero_point, count_sum = encoded
    return (
        *(count, threshold, zero_point, count_sum),
        *(_rows(x, residual is not None), _rows(x, with_row)),
    )


def _rows(x: Tensor, wanted: bool) -> Tensor:
    return x.new_empty(x.shape if wanted else 0)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    stream: Tensor,
    row: Tensor,
    encoding: tuple[Tensor, ...],
    positions: int,
    segments: int,
    groups: int,
    range_mode: int,
    block: int,
    warps: int,
    encode: bool = False,
    gather: bool = False,
    has_offset: bool = False,
    runs: tuple[int, ...] = (),
) -> None:
    lanes = min(LANES, triton.next_power_of_2(x.shape[1]))
    launch: Any = _norm[(x.shape[0],)]
    early = x.shape[0] <= EARLY_ROWS and early_launch(x.device)
    with on(x.device):
        launch(
            *(x, x if residual is None else residual, x if weight is None else weight),
            *(stream, row, *encoding),
            *(x.stride(0), x.stride(0) if residual is None else residual.stride(0)),
            *(x.shape[1], positions, segments, groups, float(eps)),
            HAS_RESIDUAL=residual is not None,
            HAS_GAIN=weight is not None,
            STORE_ROW=row.numel() > 0,
            ENCODE=encode,
            RANGE_MODE=range_mode,
            GATHER=gather,
            HAS_OFFSET=has_offset,
            RUNS=runs,
            EARLY=early,
            SEGMENTS=triton.next_power_of_2(segments),
            LANES=lanes,
            LEVELS=lanes.bit_length() - 1,
            CHUNKS=triton.cdiv(x.shape[1], lanes),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x_ptr,
    residual_ptr,
    gain_ptr,
    stream_ptr,
    row_ptr,
    order_ptr,
    segment_ptr,
    capacity_ptr,
    clip_ptr,
    offset_ptr,
    count_ptr,
    threshold_ptr,
    zero_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    channels,
    positions,
    segments,
    groups,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    STORE_ROW: tl.constexpr,
    ENCODE: tl.constexpr,
    RANGE_MODE: tl.constexpr,
    GATHER: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    RUNS: tl.constexpr,
    EARLY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    LEVELS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    residual_ptr += row * residual_stride
    lane = tl.arange(0, LANES)
    squares = tl.zeros([LANES], tl.float32)
    for chunk in tl.static_range(CHUNKS):
        channel = chunk * LANES + lane
        inside = channel < channels
        x = tl.load(x_ptr + channel, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            added = tl.load(residual_ptr + channel, mask=inside, other=0.0).to(tl.float32)
            x = rounded(x.to(tl.float32) + added, x.dtype)
            tl.store(stream_ptr + row * channels + channel, x, mask=inside)
        squares += x.to(tl.float32) * x.to(tl.float32)
    # In neighbours, whatever the layout: a sum of two has one order.
    for _ in tl.static_range(LEVELS):
        squares = tl.sum(tl.reshape(squares, [squares.shape[0] // 2, 2]), 1)
    variance = tl.div_rn(tl.sum(squares, 0), tl.zeros([], tl.float32) + channels)
    scale = tl.div_rn(tl.full([], 1.0, tl.float32), tl.sqrt_rn(variance + eps))
    if HAS_RESIDUAL:
        # What follows reads the sums of other threads, which wrote them above.
        tl.debug_barrier()
        x_ptr = stream_ptr + row * channels
    if STORE_ROW:
        for chunk in tl.static_range(CHUNKS):
            channel = chunk * LANES + lane
            inside = channel < channels
            x = tl.load(x_ptr + channel, mask=inside, other=0.0)
            gain = x
            if HAS_GAIN:
                gain = tl.load(gain_ptr + channel, mask=inside, other=0.0)
            y = normalized(x, gain, scale, HAS_GAIN)
            tl.store(row_ptr + row * channels + channel, y, mask=inside)
    if len(RUNS) > 0:
        encode_tiles(
            *(x_ptr, gain_ptr, scale, order_ptr, capacity_ptr, clip_ptr, offset_ptr),
            *(count_ptr + row * positions, threshold_ptr + row * groups, zero_ptr + row * groups),
            *(sum_ptr + row * groups, RUNS, len(RUNS) // 4, RANGE_MODE, GATHER, HAS_OFFSET),
            *(True, HAS_GAIN, False, BLOCK),
        )
    elif ENCODE:
        encode_row(
            x_ptr,
            gain_ptr,
            scale,
            order_ptr,
            segment_ptr,
            capacity_ptr,
            clip_ptr,
            offset_ptr,
            count_ptr + row * positions,
            threshold_ptr + row * groups,
            zero_ptr + row * groups,
            sum_ptr + row * segments,
            channels,
            positions,
            segments,
            groups,
            RANGE_MODE,
            GATHER,
            HAS_OFFSET,
            True,
            HAS_GAIN,
            SEGMENTS,
            BLOCK,
        )
