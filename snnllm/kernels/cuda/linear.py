"""The collapsed linear in CUDA C++ on Hopper (compute capability 9.0): which kernel, and its launch.

The layout of the weights, the algebra and the outputs are those of `snnllm.kernels.triton.linear`,
whose kernels run wherever these cannot: other devices, other widths of weights, no compiler.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from snnllm.kernels.cuda import rows_source as cuda_rows_source
from snnllm.kernels.cuda import tiles_source as cuda_tiles_source
from snnllm.kernels.cuda.driver import Kernel, load, processors, tensor_map, without
from snnllm.kernels.cuda.primitives import OUTPUTS

_FEW_ROWS = 32


class Rows(NamedTuple):
    """Shape of the kernel for few rows (`rows_source`).

    Attributes:
        strips: sixteens of outputs of a block of threads.
        stages: of the rings.
        resident: blocks of threads of a multiprocessor.
    """

    strips: int
    stages: int
    resident: int


class Tiles(NamedTuple):
    """Shape of the kernel for many rows (`tiles_source`).

    Attributes:
        bm: rows of a tile.
        bn: outputs of a tile.
        workers: warpgroups that multiply.
        stages: of the ring.
        kept: sums of the second segment that a thread keeps in registers.
        split: tiles of this shape that are one of the raster.
    """

    bm: int
    bn: int
    workers: int
    stages: int
    kept: int
    split: int = 1

    def shared_bytes(self, segments: int, merged: int) -> int:
        """Shared memory of a block of threads."""
        return cuda_tiles_source.shared_bytes(*self[:5], segments, merged)


_LARGE = Tiles(128, 256, 2, 4, 52)
_HALF = Tiles(128, 128, 2, 6, 64, split=2)
"""Half a large tile, for the last ones where they fill at most half the device."""


def unsuitable(device: torch.device, columns: int, bits: int, segments: int) -> str | None:
    """Return None where the kernels serve a linear, else the reason why not.

    Args:
        device: Of the operands.
        columns: N.
        bits: Of a packed code.
        segments: S.
    """
    if bits != 4 or segments > 2 or columns % 8:
        return (
            "4-bit weights, one or two segments and outputs in eights only, "
            f"not {bits} bits, {segments} segments, {columns} outputs"
        )
    return without(device)


def choose_shape(rows: int, columns: int, processors: int) -> Rows | Tiles:
    """Kernel and tile sizes for M rows and N columns on so many multiprocessors.

    Measured on an H100; for one row, up to 32 rows of few columns, and 64 and 256 rows, on an H200.
    """
    if rows <= _FEW_ROWS:
        if columns <= 32 * processors:  # a block of threads has a multiprocessor of its own
            return Rows(2, 6 if rows <= 8 else 4 if rows <= 16 else 3, 1)
        if rows == 1:
            return Rows(4, 2, 2)
        return Rows(2, 3, 2) if rows <= 8 else Rows(2, 2, 3 if rows <= 16 else 2)
    if rows <= 512:

        def tiles(bm: int, bn: int) -> int:
            return -(-rows // bm) * -(-columns // bn)

        # Few tiles: the smallest that fill the multiprocessors once, of one warpgroup, or three. Rings of the smallest
        # are so long that a multiprocessor has one block: the next linear's is to wait elsewhere than in its way.
        if tiles(64, 64) <= processors:
            return Tiles(64, 64, 1, 10, 32)
        if tiles(128, 64) <= processors:
            return Tiles(128, 64, 1, 8, 32)
        if processors // 2 < tiles(128, 192) <= processors:
            return Tiles(128, 192, 3, 4, 0)
        return Tiles(64, 128, 2, 8, 32)
    return _LARGE


def launch(
    count: Tensor,
    weight: Tensor,
    parameters: tuple[Tensor | None, ...],
    out: Tensor,
    groups: int,
    weight_groups: int,
    early: bool,
    merged: bool = False,
) -> None:
    """Launch on the current device.

    Args:
        count: Counts, uint8 `[M, P]` in padded encoded order.
        weight: Likewise.
        parameters: Threshold, zero point, sum of counts, segments, scale, zero of weights, row sums, bias
            and residual; the last two may be None.
        out: `[M, N]`, or int32 `[S, M, N]` for the accumulators.
        groups: G.
        weight_groups: J.
        early: May start before the kernel in front ends; many rows always may.
        merged: The thresholds of all groups are equal, and J = 1: the outputs are made of one sum.
    """
    (rows, width), columns = count.shape, len(weight)
    *others, row_sum, bias, residual = parameters
    assert row_sum is not None
    if residual is not None and residual.data_ptr() % 16:  # read 16 bytes at a time
        parameters = (*others, row_sum, bias, residual.clone())
    segments = row_sum.shape[1]
    multiprocessors = processors(count.device)
    merged = merged and segments == 2 and out.dtype != torch.int32
    shape = choose_shape(rows, columns, multiprocessors)
    macros = {
        "SEGMENTS": segments,
        "MERGED": int(merged),
        "BIAS": int(bias is not None),
        "RESIDUAL": int(residual is not None),
        "OUT": OUTPUTS[out.dtype],
    }
    sizes: tuple[Any, ...] = (rows, columns, width, groups, weight_groups)
    if isinstance(shape, Rows):
        kernel = _rows_kernel(shape, rows, tuple(macros.items()), count.device)
        boxes = tensor_map(weight, 16 * shape.strips, 64)
        arguments = (count, weight, boxes, *parameters, out, *sizes)
        kernel(-(-columns // (16 * shape.strips)), arguments, early)
        return
    macros["JOINT"] = int(weight_groups == 1)
    operands, sizes = (count, weight), (out, *sizes)
    tiles = -(-rows // shape.bm) * -(-columns // shape.bn)
    whole = whole_tiles(tiles, multiprocessors) if shape == _LARGE else tiles
    _launch_tiles(shape, macros, operands, parameters, sizes, (0, whole))
    if whole < tiles:
        _launch_tiles(_HALF, macros, operands, parameters, sizes, (whole, tiles))


def whole_tiles(tiles: int, processors: int) -> int:
    """How many of some large tiles are made whole: the last ones are halved if they fill at most half the device."""
    rest = tiles % processors
    return tiles - rest if tiles > processors and 2 * rest <= processors else tiles


def _launch_tiles(
    shape: Tiles,
    macros: dict[str, int],
    operands: tuple[Tensor, Tensor],
    parameters: tuple[Tensor | None, ...],
    out_and_sizes: tuple[Any, ...],
    tiles: tuple[int, int],
) -> None:
    """Launch for a range of tiles of the raster, of which a shape with split = 2 makes two each.

    It may start early, and waits itself: what comes behind waits for it only.
    """
    count, weight = operands
    kernel = _tiles_kernel(shape, tuple(macros.items()), count.device)
    out = out_and_sizes[0]
    maps = [tensor_map(count, shape.bm, 128), tensor_map(weight, shape.bn, 64)]
    # Outputs of 16 bits are stored in boxes of 16 rows of a warp; others are not.
    boxes = out.element_size() == 2
    maps.append(tensor_map(out, 16, shape.bn // shape.workers // 2) if boxes else maps[0])
    first, last = (shape.split * i for i in tiles)
    rest = (*maps, *parameters, *out_and_sizes, 2048 // shape.bm, first, last)
    kernel(min(last - first, processors(count.device)), rest, True)


def _rows_kernel(
    shape: Rows, rows: int, macros: tuple[tuple[str, int], ...], device: torch.device
) -> Kernel:
    eights = 1 << (-(-rows // 8) - 1).bit_length()
    own = ("ROWS8", eights), *_macros(shape)
    known = dict(macros)
    element = (4 if known["OUT"] == OUTPUTS[torch.float32] else 2) * known["RESIDUAL"]
    sizes = (eights, shape.strips, shape.stages, known["SEGMENTS"], known["MERGED"])
    shared = cuda_rows_source.shared_bytes(*sizes, element)
    return load(
        *(cuda_rows_source.SOURCE, macros + own, "linear_rows"),
        *(cuda_rows_source.ROW_THREADS, shared, device),
    )


def _macros(shape: Rows | Tiles) -> tuple[tuple[str, int], ...]:
    return tuple((name.upper(), int(value)) for name, value in shape._asdict().items())


@cache
def _tiles_kernel(
    shape: Tiles, macros: tuple[tuple[str, int], ...], device: torch.device
) -> Kernel:
    known = dict(macros)
    shared = shape.shared_bytes(known["SEGMENTS"], known["MERGED"])
    return load(
        *(cuda_tiles_source.SOURCE, macros + _macros(shape), "linear_tiles"),
        *(128 + 128 * shape.workers, shared, device),
    )
