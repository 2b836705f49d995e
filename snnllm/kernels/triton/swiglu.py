"""SiLU * up (+ online rotation) + encode in one Triton kernel: what runs before down_proj.

A program keeps its row in registers: gate and up are read once and the counts written once. The
rotation (:class:`snnllm.hadamard.OnlineRotation`) is butterflies in registers, with one exchange
through shared memory. A layout that the kernel does not know (`runs`), or whose groups do not end
where blocks of the rotation end, goes through memory: product and rotation in one kernel, the
encoder in another.

From the product on, the bits are those of torch: the rotation has a defined order of operations, the
encoder, too. Exponential and reciprocal inside SiLU are the device's own, so the product may differ
from torch's in its last bit; :func:`silu_mul` is the same arithmetic alone, for the views that do not
fuse.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
import triton
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, on
from neurons.backends.operator import operator
from neurons.backends.triton_encode import (
    EncodedRows,
    check_layout,
    check_rows,
    encode_rows,
    known_runs,
    mode_for,
    outputs,
    padded,
)
from neurons.backends.triton_encode_tiles import MOST_POSITIONS, registers, tiles_of
from snnllm.hadamard import RADIX, rotation_blocks
from snnllm.kernels.cuda import encode as cuda_encode
from snnllm.kernels.triton.rotation import rotate_kernel
from snnllm.kernels.triton.swiglu_rows import (
    rotate_and_encode_kernel,
    silu_mul_encode_kernel,
    silu_mul_kernel,
)

__all__ = ["rotate", "silu_mul", "silu_mul_encode"]

_ELEMENTS = 1024
_MOST_GROUPS = 2
_FEW_ROWS = 64
_TILE = 32 * RADIX
"""Channels of a warp in a tile that is rotated."""
_REGISTERS = {1: 40, 2: 64}
"""Of a thread with one or two tiles where rows are many; with more tiles it needs what it needs."""


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, rounded to the dtype after SiLU and after the product, as LLaMA's MLP.

    Carries no gradient.

    Args:
        gate: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        up: as gate.

    Returns:
        ``[M, K]`` in the dtype of gate; the bits that :func:`silu_mul_encode` encodes.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or a stride does not fit.
    """
    _check(gate, up)
    product: Tensor = _silu_mul_op(gate.detach(), up.detach())
    return product


def rotate(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rotate rows: the bits of :meth:`snnllm.hadamard.OnlineRotation.forward`, without gradients.

    Args:
        x: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        sizes: channels of the groups of the rotation.

    Returns:
        float32 ``[M, K]``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or a stride does not fit.
    """
    check_rows(x)
    _check_sizes(sizes, x.shape[1])
    rotated: Tensor = _rotate_op(x.detach(), list(sizes))
    return rotated


def silu_mul_encode(
    gate: Tensor,
    up: Tensor,
    rotation: Sequence[int] | None,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None = None,
    runs: Sequence[int] | None = None,
) -> EncodedRows:
    """Encode ``silu(gate) * up``, rotated if asked.

    As :func:`silu_mul`, :func:`rotate` and :func:`neurons.backends.triton_encode.encode_rows` after
    each other, bit for bit. Carries no gradient. Nothing is checked on the device: a row with NaN or
    infinity has thresholds that are not finite.

    Args:
        gate: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        up: as gate.
        rotation: sizes of the groups of an :class:`snnllm.hadamard.OnlineRotation`; None: none.
        order: channel, after the rotation, of every encoded position, int32 ``[P]``, -1 at padding.
            None: the channels as they are.
        segments: ``(start, stop, group)`` of runs of encoded positions, int32 ``[S, 3]``.
        capacities: qmax of each group, float32 ``[G]``.
        clip: factors on the range of each group, float32 ``[G]``.
        range_mode: as :func:`neurons.backends.triton_encode.encode_rows` takes it.
        offset: float32 ``[K]`` in the order after the rotation, taken off. None: none.
        runs: as :func:`neurons.backends.triton_encode.encode_rows` takes them: one kernel then, if
            there is no rotation or one whose blocks do not straddle one or two groups. Without them
            the product goes through memory.

    Returns:
        Counts, thresholds, zero points and the sum of the counts of every segment.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or a stride does not fit.
    """
    _check(gate, up)
    channels = gate.shape[1]
    check_layout(order, segments, capacities, clip, offset, channels)
    if rotation is not None:
        _check_sizes(rotation, channels)
    positions = padded(channels) if order is None else order.shape[0]
    mode = mode_for(range_mode, capacities)
    return EncodedRows(
        *_silu_mul_encode_op(
            *(gate.detach(), up.detach(), [] if rotation is None else list(rotation), order),
            *(segments, capacities, clip, mode, offset, positions),
            known_runs(runs, order, segments, capacities, channels),
        )
    )


@lru_cache(maxsize=1024)
def pieces_of(sizes: tuple[int, ...], most: int) -> tuple[int, ...]:
    """Neighbouring blocks of one size in a rotation, which a kernel takes tile by tile.

    Args:
        sizes: Channels of the groups of the rotation.
        most: Channels of a tile at most.

    Returns:
        Five numbers for each piece: its first channel, how many, the size of the blocks, the
        channels of a tile, and how many of them are neighbours in a thread behind the rotation.
    """
    pieces, first = [], 0
    for p, same in groupby(rotation_blocks(sizes)):
        many = p * len(list(same))
        tile = max(p, min(most, triton.next_power_of_2(many)))
        pieces += [first, many, p, tile, p // RADIX if p > RADIX else p]
        first += many
    return tuple(pieces)


def _rotating_warps(rows: int, channels: int) -> int:
    """Warps for a row: one tile where rows are few, or with 8 warps; up to three otherwise."""
    wide: int = triton.next_power_of_2(triton.cdiv(channels, _TILE))
    if rows <= _FEW_ROWS:
        return min(32, wide)
    narrow: int = triton.next_power_of_2(triton.cdiv(channels, 3 * _TILE))
    return min(16, max(narrow, min(8, wide)))


@lru_cache(maxsize=1024)
def _fuses(sizes: tuple[int, ...], runs: tuple[int, ...]) -> bool:
    """Whether the groups of a layout are channels in order, and end where blocks end."""
    if len(runs) // 4 > _MOST_GROUPS or sum(sizes) > MOST_POSITIONS:
        return False
    ends, first = {0}, 0
    for p in rotation_blocks(sizes):
        first += p
        ends.add(first)
    begins, many = runs[3::4], runs[2::4]
    whole = all(b in ends and b + m in ends for b, m in zip(begins, many, strict=True))
    return whole and sum(many) == first


def _check(gate: Tensor, up: Tensor) -> None:
    check_rows(gate)
    check_rows(up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike, got {gate.dtype} {tuple(gate.shape)} and {up.dtype} "
            f"{tuple(up.shape)}."
        )


def _check_sizes(sizes: Sequence[int], channels: int) -> None:
    if any(size < 1 for size in sizes) or sum(sizes) != channels:
        raise ValueError(
            f"the groups of the rotation must have {channels} channels together, got {tuple(sizes)}; "
            "use OnlineRotation.sizes."
        )


@operator("snnllm::silu_mul")
def _silu_mul_op(gate: Tensor, up: Tensor) -> Tensor:
    """Arguments of :func:`silu_mul`."""
    product = gate.new_empty(gate.shape)
    if product.numel():
        rows, channels = gate.shape
        launch: Any = silu_mul_kernel[(rows, triton.cdiv(channels, _ELEMENTS))]
        with on(gate.device):
            launch(
                *(gate, up, product, gate.stride(0), up.stride(0), channels),
                BLOCK=_ELEMENTS,
                enable_fp_fusion=False,
            )
    return product


@_silu_mul_op.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@operator("snnllm::rotate")
def _rotate_op(x: Tensor, sizes: list[int]) -> Tensor:
    """Arguments of :func:`rotate`."""
    rotated = x.new_empty(x.shape, dtype=torch.float32)
    if x.shape[0]:
        warps = _rotating_warps(*x.shape)
        launch: Any = rotate_kernel[(x.shape[0],)]
        with on(x.device):
            launch(
                *(x, rotated, x.stride(0), x.shape[1]),
                PIECES=pieces_of(tuple(sizes), _TILE * warps),
                num_warps=warps,
                enable_fp_fusion=False,
            )
    return rotated


@_rotate_op.register_fake
def _(x: Tensor, sizes: list[int]) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@operator("snnllm::silu_mul_encode")
def _silu_mul_encode_op(
    gate: Tensor,
    up: Tensor,
    sizes: list[int],
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    positions: int,
    runs: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of :func:`silu_mul_encode`; no sizes: no rotation."""
    groups = capacities.shape[0]
    encoded = outputs(gate, positions, groups, segments.shape[0])
    count, threshold, zero_point, count_sum = encoded
    if not gate.shape[0]:
        return count, threshold, zero_point, count_sum
    if runs is None or (sizes and not _fuses(tuple(sizes), tuple(runs))):
        row = silu_mul(gate, up)
        row = rotate(row, sizes) if sizes else row
        encoded = encode_rows(row, order, segments, capacities, clip, range_mode, offset, runs)
        count, threshold, zero_point, count_sum = encoded
        return count, threshold, zero_point, count_sum
    if sizes and cuda_encode.gated_unsuitable(gate, up, sizes, runs, offset) is None:
        layout = (offset, capacities, clip)
        cuda_encode.gated_launch(gate, up, layout, encoded, runs, range_mode)(gate.device)
        return count, threshold, zero_point, count_sum
    taken = gate if offset is None else offset
    options = {
        "RUNS": tuple(runs),
        "GROUPS": groups,
        "RANGE_MODE": range_mode,
        "HAS_OFFSET": offset is not None,
        "EARLY": gate.shape[0] <= EARLY_ROWS and early_launch(gate.device),
    }
    with on(gate.device):
        if sizes:
            _launch_rotating(gate, up, sizes, (capacities, clip, taken, *encoded), options)
        else:
            operands = (gate if order is None else order, capacities, clip, taken, *encoded)
            _launch(gate, up, operands, options)
    return count, threshold, zero_point, count_sum


@_silu_mul_encode_op.register_fake
def _(
    gate: Tensor,
    up: Tensor,
    sizes: list[int],
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    range_mode: int,
    offset: Tensor | None,
    positions: int,
    runs: list[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    encoded = outputs(gate, positions, capacities.shape[0], segments.shape[0])
    count, threshold, zero_point, count_sum = encoded
    return count, threshold, zero_point, count_sum


def _launch_rotating(
    gate: Tensor, up: Tensor, sizes: list[int], layout: tuple[Tensor, ...], options: dict[str, Any]
) -> None:
    rows, channels = gate.shape
    warps = _rotating_warps(rows, channels)
    tiles = triton.cdiv(channels, _TILE * warps)
    bounded = rows > _FEW_ROWS and gate.element_size() == 2 and tiles in _REGISTERS
    launch: Any = rotate_and_encode_kernel[(rows,)]
    launch(
        *(gate, up, *layout, gate.stride(0), up.stride(0), layout[3].shape[1]),
        PIECES=pieces_of(tuple(sizes), _TILE * warps),
        **options,
        **({"maxnreg": _REGISTERS[tiles]} if bounded else {}),
        num_warps=warps,
        enable_fp_fusion=False,
    )


def _launch(gate: Tensor, up: Tensor, layout: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    rows, positions = gate.shape[0], layout[4].shape[1]
    gather = min(options["RUNS"][3::4]) < 0
    tile, warps = tiles_of(rows, positions, gather)
    launch: Any = silu_mul_encode_kernel[(rows,)]
    launch(
        *(gate, up, *layout, gate.stride(0), up.stride(0), positions),
        GATHER=gather,
        TILE=tile,
        **options,
        num_warps=warps,
        enable_fp_fusion=False,
        **registers(rows, warps),
    )
