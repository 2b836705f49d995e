"""SiLU * up (+ online rotation) + encode in one Triton kernel: what runs before down_proj.

A program takes rows one after the other. It computes a row into a scratch row of its own, which
stays in the cache, and encodes it from there: HBM sees gate, up and the counts once. With a rotation
(:class:`snnllm.transforms.OnlineRotation`), blocks of p channels go through butterflies in registers
and are then mixed by the left factor.

From the product on, the bits are those of torch: the rotation has a defined order of operations, the
encoder, too. The exponential inside SiLU is the device's own, so the product may differ from torch's
in its last bit; :func:`silu_mul` is the same arithmetic alone, for the views that do not fuse.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
from torch import Tensor

from neurons.backends.device import on
from neurons.backends.triton_encode import (
    EncodedRows,
    check_layout,
    check_rows,
    outputs,
    padded,
    shape_of_programs,
)
from snnllm.kernels.swiglu_rows_triton import process_rows, silu_mul_kernel
from snnllm.transforms import LEFT_ALIGNMENT, RotationTables, power_of_two_factor

__all__ = ["rotate", "silu_mul", "silu_mul_encode"]

_PROGRAMS, _ROTATING = 4, 3  # on a multiprocessor, and with the registers that butterflies need
_FEW_ROWS = 256
_ELEMENTS = 1024


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
    product: Tensor = torch.ops.snnllm.silu_mul(gate.detach(), up.detach())
    return product


def rotate(x: Tensor, rotation: RotationTables) -> Tensor:
    """Rotate rows: the bits of :meth:`snnllm.transforms.OnlineRotation.forward`, without gradients.

    Args:
        x: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        rotation: of one or two groups.

    Returns:
        float32 ``[M, K]``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, a stride or the number of groups does not fit.
    """
    check_rows(x)
    _check_rotation(rotation, x.shape[1])
    rotated: Tensor = torch.ops.snnllm.rotate(
        x.detach(), rotation.order, rotation.signs, rotation.left, list(rotation.sizes)
    )
    return rotated


def silu_mul_encode(
    gate: Tensor,
    up: Tensor,
    rotation: RotationTables | None,
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    shared: bool,
    offset: Tensor | None = None,
) -> EncodedRows:
    """Encode ``silu(gate) * up``, rotated if asked, in one kernel.

    As :func:`silu_mul`, :func:`rotate` and :func:`neurons.backends.triton_encode.encode_rows` after
    each other, bit for bit. Carries no gradient. Nothing is checked on the device: a row with NaN or
    infinity has thresholds that are not finite.

    Args:
        gate: ``[M, K]``, float32, bfloat16 or float16, stride 1 along K.
        up: as gate.
        rotation: of one or two groups; None: none.
        order: channel, after the rotation, of every encoded position, int32 ``[P]``, -1 at padding.
            None: the channels as they are.
        segments: ``(start, stop, group)`` of runs of encoded positions, int32 ``[S, 3]``.
        capacities: qmax of each group, float32 ``[G]``.
        clip: factors on the range of each group, float32 ``[G]``.
        shared: one range for all groups.
        offset: float32 ``[K]`` in the order after the rotation, taken off. None: none.

    Returns:
        Counts, thresholds, zero points and the sum of the counts of every segment.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape, a stride or the number of groups does not fit.
    """
    _check(gate, up)
    check_layout(order, segments, capacities, clip, offset, gate.shape[1])
    if rotation is not None:
        _check_rotation(rotation, gate.shape[1])
    parts = (None, None, None, []) if rotation is None else (*rotation[:3], list(rotation.sizes))
    positions = padded(gate.shape[1]) if order is None else order.shape[0]
    return EncodedRows(
        *torch.ops.snnllm.silu_mul_encode(
            *(gate.detach(), up.detach(), *parts, order, segments, capacities, clip),
            *(shared, offset, positions),
        )
    )


def _check(gate: Tensor, up: Tensor) -> None:
    check_rows(gate)
    check_rows(up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise ValueError(
            f"gate and up must be alike, got {gate.dtype} {tuple(gate.shape)} and {up.dtype} "
            f"{tuple(up.shape)}."
        )


def _check_rotation(rotation: RotationTables, channels: int) -> None:
    if not 1 <= len(rotation.sizes) <= 2 or sum(rotation.sizes) != channels:
        raise ValueError(
            f"the rotation must have one or two groups of {channels} channels together, got "
            f"{rotation.sizes}."
        )
    blocks = [size // power_of_two_factor(size) for size in rotation.sizes]
    factors = sum(m * (m + -m % LEFT_ALIGNMENT) for m in blocks)
    expected = {
        "order": (rotation.order, torch.int32, channels),
        "signs": (rotation.signs, torch.int8, channels),
        "left": (rotation.left, torch.float32, factors),
    }
    for name, (tensor, dtype, size) in expected.items():
        if tensor.dtype != dtype or tuple(tensor.shape) != (size,):
            raise ValueError(
                f"{name} of the rotation must be {dtype} [{size}], got {tensor.dtype} "
                f"{tuple(tensor.shape)}; use OnlineRotation.tables()."
            )


@torch.library.custom_op("snnllm::silu_mul", mutates_args=())
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


@torch.library.custom_op("snnllm::rotate", mutates_args=())
def _rotate_op(x: Tensor, order: Tensor, signs: Tensor, left: Tensor, sizes: list[int]) -> Tensor:
    """Arguments of :func:`rotate`."""
    rotated = x.new_empty(x.shape, dtype=torch.float32)
    if x.shape[0]:
        unused = (x, x, x, x, x, x, x, x, x)
        _launch(x, x, rotated, (order, signs, left), sizes, unused, 0, 1, 1, False, False, False)
    return rotated


@_rotate_op.register_fake
def _(x: Tensor, order: Tensor, signs: Tensor, left: Tensor, sizes: list[int]) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@torch.library.custom_op("snnllm::silu_mul_encode", mutates_args=())
def _silu_mul_encode_op(
    gate: Tensor,
    up: Tensor,
    rotation_order: Tensor | None,
    signs: Tensor | None,
    left: Tensor | None,
    sizes: list[int],
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    shared: bool,
    offset: Tensor | None,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments of :func:`silu_mul_encode`; no sizes: no rotation."""
    groups, runs = capacities.shape[0], segments.shape[0]
    count, threshold, zero_point, count_sum = outputs(gate, positions, groups, runs)
    if gate.shape[0]:
        encoding = (
            *(gate if order is None else order, segments, capacities, clip),
            *(gate if offset is None else offset, count, threshold, zero_point, count_sum),
        )
        tables = (rotation_order, signs, left)
        _launch(
            *(gate, up, None, tables, sizes, encoding, positions, runs, groups, shared),
            *(order is not None, offset is not None),
        )
    return count, threshold, zero_point, count_sum


@_silu_mul_encode_op.register_fake
def _(
    gate: Tensor,
    up: Tensor,
    rotation_order: Tensor | None,
    signs: Tensor | None,
    left: Tensor | None,
    sizes: list[int],
    order: Tensor | None,
    segments: Tensor,
    capacities: Tensor,
    clip: Tensor,
    shared: bool,
    offset: Tensor | None,
    positions: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    encoded = outputs(gate, positions, capacities.shape[0], segments.shape[0])
    count, threshold, zero_point, count_sum = encoded
    return count, threshold, zero_point, count_sum


def _launch(
    gate: Tensor,
    up: Tensor,
    rotated: Tensor | None,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None],
    sizes: list[int],
    encoding: tuple[Tensor, ...],
    positions: int,
    segments: int,
    groups: int,
    shared: bool,
    gather: bool,
    has_offset: bool,
) -> None:
    rows, channels = gate.shape
    per_processor = _ROTATING if sizes else _PROGRAMS
    programs = min(rows, per_processor * _multiprocessors(gate.device))
    width = padded(channels)
    scratch = gate.new_empty((2, programs, width), dtype=torch.float32)
    powers = [power_of_two_factor(size) for size in sizes] + [1, 1]
    blocks = [size // p for size, p in zip(sizes, powers, strict=False)] + [0, 0]
    # One block goes straight to the row; mixed blocks wait in the first scratch row.
    block, _ = shape_of_programs(rows, max(positions, 64))
    warps = 16 if rows < _FEW_ROWS else 8  # few rows: more threads for each
    launch: Any = process_rows[(programs,)]
    with on(gate.device):
        launch(
            *(gate, up, scratch, scratch if rotated is None else rotated),
            *(gate if table is None else table for table in tables),
            *encoding,
            *(rows, gate.stride(0), up.stride(0), channels, width, positions, segments, groups),
            P0=powers[0],
            M0=blocks[0],
            P1=powers[1],
            M1=blocks[1],
            TILE=256 * warps,
            ROTATED=bool(sizes),
            ENCODE=rotated is None,
            SHARED=shared,
            GATHER=gather,
            HAS_OFFSET=has_offset,
            SEGMENTS=triton.next_power_of_2(segments),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=False,
        )


def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
