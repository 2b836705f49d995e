"""Encoding of rows as they are in CUDA C++ on Hopper: where it serves, its launch.

The integers are those of `neurons.backends.triton_encode.encode_rows`, whose kernels run wherever this one cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from neurons.backends.device import EARLY_ROWS
from snnllm.kernels.cuda import plain_source
from snnllm.kernels.cuda.driver import Launch, processors, without
from snnllm.kernels.cuda.encode import encoding_macros, groups_unsuitable, layout_macros

_MOST_CHANNELS = 16384
_WARP = 32
_VECTOR = 4
_WIDE = 8
_WIDEST = 16
_ALIGNMENT = 16  # bytes of a load of a wide vector
_HELD = 48  # words of a row in a thread, at most, where rows are many
_OTHERS = 40  # registers of a thread besides
_LEAST = 56  # registers of a thread
_REGISTERS = 65536  # of a multiprocessor
_RESIDENT = 2048  # threads of a multiprocessor
_AT_A_TIME = 1024  # of them, with the registers that a thread needs where rows are few
_FEW_THREADS = 512  # of a row, at most


class Shape(NamedTuple):
    """Shape of the kernel.

    Attributes:
        threads: Of a block, which has a row; a power of two from 32 on.
        resident: Blocks of a multiprocessor for which registers suffice, at least.
        rehearsing: Where rows are not few, how many first blocks go through their work twice (few rows: all do).
    """

    threads: int
    resident: int
    rehearsing: int = 0


class PlainRows(NamedTuple):
    """Rows that are encoded by `plain_source`.

    Attributes:
        x: `[M, K]`, stride 1 along K.
        offset: Taken off, float32 `[K]`; or None.
        capacities: float32 `[G]`.
        clip: float32 `[G]`.
        runs: Layout of the groups (`neurons.backends.triton_encode_tiles.runs_of`).
        range_mode: Of the groups: 0 own ranges, 1 one for all, 2 own ones with commensurate thresholds.
    """

    x: Tensor
    offset: Tensor | None
    capacities: Tensor
    clip: Tensor
    runs: Sequence[int] | None
    range_mode: int

    def unsuitable(self) -> str | None:
        """Return None where the kernel serves these rows, else the reason why not."""
        reason = without(self.x.device)
        if reason is not None:
            return reason
        channels = self.x.shape[1]
        if channels > _MOST_CHANNELS:
            return f"up to {_MOST_CHANNELS} channels only"
        return groups_unsuitable(self.runs, channels, self.x, self.offset)


_BESIDE = Shape(256, 5)
"""With 48 registers a thread, for which tiles of up to three warpgroups leave room (`tiles_source`)."""
_BESIDE_ROWS = 512  # up to which there are such tiles
_LIGHT = 8  # words of a row in a thread that need no more


def choose_shape(rows: int, channels: int, size: int, multiprocessors: int, shifted: bool) -> Shape:
    """The shape for rows `[M, K]` whose elements have `size` bytes.

    Args:
        rows: M.
        channels: K.
        size: Bytes of an element.
        multiprocessors: Of the device.
        shifted: An offset is taken off.
    """
    vectors, words = -(-channels // _WIDE), _WIDE * size // 4
    threads = _WARP
    while -(-vectors // threads) * words > _HELD:
        threads *= 2
    # Few rows: as many threads for each as fill the device, with two vectors or more each.
    device = multiprocessors * _AT_A_TIME
    while 2 * threads <= min(vectors // 2, _FEW_THREADS) and 2 * rows * threads <= device:
        threads *= 2
    held = -(-vectors // threads) * words
    if rows > EARLY_ROWS and threads == _BESIDE.threads and held <= _LIGHT and not shifted:
        return _BESIDE._replace(rehearsing=multiprocessors if rows <= _BESIDE_ROWS else 0)
    registers = max(_LEAST, -(-(held + _OTHERS + 4 * size) // 8) * 8)  # an offset comes in floats
    resident = min(32, _RESIDENT // threads, max(1, _REGISTERS // (registers * threads)))
    return Shape(threads, resident)


def plain_launch(
    rows: PlainRows, outputs: tuple[Tensor, ...], shape: Shape | None = None
) -> Launch:
    """The launch for rows that are not `unsuitable`.

    Args:
        rows: What is encoded, one row at least.
        outputs: Counts uint8 `[M, P]`, thresholds, zero points, sums of counts `[M, G]`.
        shape: Of the kernel; None: the one of `choose_shape`.
    """
    (many, channels), runs = rows.x.shape, rows.runs or ()
    if shape is None:
        multiprocessors, shifted = processors(rows.x.device), rows.offset is not None
        shape = choose_shape(many, channels, rows.x.element_size(), multiprocessors, shifted)
    macros = {
        **encoding_macros(rows.x, rows.offset, runs, rows.range_mode),
        **layout_macros(channels, outputs[0].shape[1], runs),
        "ROW_THREADS": shape.threads,
        "RESIDENT": shape.resident,
        "VECTOR": _vector(rows, shape.threads),
        "FEW": int(many <= EARLY_ROWS),
        "REHEARSING": EARLY_ROWS if many <= EARLY_ROWS else shape.rehearsing,
    }
    operands = (rows.x, rows.offset, rows.capacities, rows.clip)
    return Launch(
        *(plain_source.SOURCE, "encode_plain", macros, many, shape.threads),
        plain_source.SHARED_BYTES,
        (*operands, *outputs, rows.x.stride(0)),
    )


def _vector(rows: PlainRows, threads: int) -> int:
    """Neighbouring channels of a thread: 16, if these are all it has of two groups, or 8; 4 if loads are small."""
    x, offset, runs = rows.x, rows.offset, rows.runs or ()

    def in_steps_of(size: int) -> bool:
        return all(start % size == 0 for start in runs)

    aligned = x.data_ptr() % _ALIGNMENT == 0 and x.stride(0) * x.element_size() % _ALIGNMENT == 0
    if not aligned or (offset is not None and offset.data_ptr() % _ALIGNMENT):
        return _VECTOR
    if len(runs) == 8 and x.shape[1] == _WIDEST * threads and in_steps_of(_WIDEST):
        return _WIDEST
    return _WIDE if in_steps_of(_WIDE) else _VECTOR
