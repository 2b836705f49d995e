"""The collapsed linear on a GPU as an operator of torch: kernel, launch, shapes for the compiler.

The kernels in CUDA C++ where they serve (`cuda.linear.unsuitable`), else those in Triton.
"""
# No `from __future__ import annotations`: torch reads the annotations of operators as types.

from typing import Any

import torch
import triton
from torch import Tensor

from neurons.backends.device import EARLY_ROWS, early_launch, interpreted, on
from neurons.backends.operator import operator
from snnllm.kernels.cuda import linear as cuda_linear
from snnllm.kernels.triton.dot import dot_product
from snnllm.kernels.triton.linear import matmul


def choose_config(rows: int, columns: int) -> tuple[int, ...]:
    """Tile sizes for a product of M rows and N columns.

    Returns:
        `(0, BN, KW, warps)` for the dp4a kernel, KW the words of weights of a step; or
        `(BM, BN, warps, stages, registers)` for tensor cores, registers 0 for no limit.
    """
    if rows <= 4:
        return (0, 4, 256, 2) if columns <= 4096 else (0, 8, 64, 4)
    if rows <= 16:
        return (16, 32, 2, 6, 0)
    if rows <= 32:
        return (32, 64, 4, 4, 0)
    if rows <= 256:
        return (64, 128, 4, 3, 168)
    return (64, 128, 4, 4, 0)


@operator("snnllm::encoded_linear")
def encoded_linear(
    count: Tensor,
    threshold: Tensor,
    zero_point: Tensor,
    count_sum: Tensor,
    weight: Tensor,
    segments: Tensor,
    scale: Tensor,
    weight_zero: Tensor,
    row_sum: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    merged: bool = False,
) -> Tensor:
    """`y` of encoded rows, plus a residual if one is given, or their centred accumulators.

    Few rows start while the kernel in front still runs, to prefetch weights (programmatic dependent
    launch, compute capability 9.0).

    Args:
        count: uint8 `[M, P]` in padded encoded order.
        threshold: float32 `[M, G]`.
        zero_point: int32 `[M, G]`.
        count_sum: Sums of the counts per segment, int32 `[M, S]`.
        weight: Packed codes, uint8 `[N, P * bits / 8]`; signed levels if `bits` is 8.
        segments: The segment table, int32 `[S, 4]` (`linear.WORDS`).
        scale: float32 `[N, J]`.
        weight_zero: Zero points of the codes, int32 `[N, J]`.
        row_sum: `sum_k u - zu K` per segment, int32 `[N, S]`.
        shift: `128 sum_k u` per segment, int32 `[N, S]`, if counts may exceed int8, in which these
            kernels multiply them less 128; or None.
        bias: float32 `[N]` or None.
        bits: 2, 4 or 8.
        dtype: Of the output; int32 for the accumulators.
        residual: Added to the outputs once they are rounded, as torch adds it: `[M, N]` of the dtype,
            contiguous; or None.
        merged: The thresholds of all groups are equal, and J = 1: an output is made of one sum.

    Returns:
        `[M, N]`, or int32 `[S, M, N]`.

    Raises:
        ValueError: The residual is not like the outputs.
    """
    (rows, width), columns = count.shape, len(weight)
    out = _output(count, weight, segments, dtype)
    if residual is not None:
        _check_residual(residual, out)
    if out.numel() == 0:
        return out
    starts_early = rows <= EARLY_ROWS and early_launch(count.device)
    parameters = (threshold, zero_point, count_sum, segments, scale, weight_zero, row_sum)
    sizes = (threshold.shape[1], scale.shape[1])
    if cuda_linear.unsuitable(count.device, columns, bits, len(segments)) is None:
        with on(count.device):
            launched = (count, weight, (*parameters, bias, residual), out, *sizes, starts_early)
            cuda_linear.launch(*launched, merged=merged)
        return out
    count = (count if shift is None else count ^ 128).view(torch.int8)
    config = choose_config(rows, columns)
    arguments = (
        *parameters,
        *(count if shift is None else shift, threshold if bias is None else bias),
        *(out if residual is None else residual, out),
        *(rows, columns, width, *sizes, segments.shape[0]),
    )
    flags: dict[str, Any] = {
        "BITS": bits,
        "SHIFT": shift is not None,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None,
        "ACCUMULATORS": dtype == torch.int32,
        "MERGED": merged and dtype != torch.int32,
        "enable_fp_fusion": False,
    }
    with on(count.device):
        kernel: Any
        if config[0] == 0:
            _, bn, words, warps = config
            kernel = dot_product[(triton.cdiv(columns, bn), rows)]
            kernel(
                *(count.view(torch.int32), weight.view(torch.int32), *arguments),
                **_early_flags(starts_early),
                ASM=not interpreted(),
                BN=bn,
                KW=words,
                num_warps=warps,
                **flags,
            )
            return out
        bm, bn, warps, stages, registers = config
        flags |= {"num_warps": warps, "num_stages": stages}
        if registers:
            flags["maxnreg"] = registers
        kernel = matmul[(triton.cdiv(rows, bm) * triton.cdiv(columns, bn),)]
        kernel(
            *(count, weight, *arguments),
            **_early_flags(starts_early),
            UNPACK=None if interpreted() else _unpacking(bits),
            UNROLL=segments.shape[0] if segments.shape[0] <= 2 else 0,
            BM=bm,
            BN=bn,
            **flags,
        )
    return out


@encoded_linear.register_fake
def _(
    count: Tensor,
    threshold: Tensor,
    zero_point: Tensor,
    count_sum: Tensor,
    weight: Tensor,
    segments: Tensor,
    scale: Tensor,
    weight_zero: Tensor,
    row_sum: Tensor,
    shift: Tensor | None,
    bias: Tensor | None,
    bits: int,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    merged: bool = False,
) -> Tensor:
    return _output(count, weight, segments, dtype)


def _output(count: Tensor, weight: Tensor, segments: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (count.shape[0], weight.shape[0])
    if dtype == torch.int32:
        return count.new_empty((segments.shape[0], *shape), dtype=dtype)
    return count.new_empty(shape, dtype=dtype)


def _check_residual(residual: Tensor, out: Tensor) -> None:
    """Refuse what cannot be added to the outputs where they are."""
    alike = residual.shape == out.shape and residual.dtype == out.dtype
    if not alike or out.dtype == torch.int32 or not residual.is_contiguous():
        raise ValueError(
            f"a residual must be contiguous and like the outputs, {tuple(out.shape)} of {out.dtype} (not "
            f"accumulators), got {tuple(residual.shape)} of {residual.dtype}, strides {residual.stride()}"
        )


def _unpacking(bits: int) -> tuple[str, ...]:
    """PTX that takes one plane of codes out of four packed bytes, for every plane."""
    mask = f"0x{((1 << bits) - 1) * 0x01010101:08X}"
    return tuple(
        f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; and.b32 $0, t, {mask}; }}"
        for shift in range(0, 8, bits)
    )


def _early_flags(starts_early: bool) -> dict[str, bool]:
    return {"EARLY": True, "launch_pdl": True} if starts_early else {"EARLY": False}
