"""Encoding of few rows in CUDA C++ on Hopper, gated and rotated, or normalised: where it serves, its launch.

The integers are those of `snnllm.kernels.triton.swiglu` and `snnllm.kernels.triton.norm`, whose kernels run wherever
these cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from torch import Tensor

from neurons.backends.device import EARLY_ROWS
from snnllm.hadamard import RADIX, rotation_blocks
from snnllm.kernels.cuda import gated_source, normed_source
from snnllm.kernels.cuda.driver import Launch, processors, without
from snnllm.kernels.cuda.primitives import OUTPUTS

_MOST_CLUSTER = 8
_MOST_THREADS = 512
_WARP = 32
_MOST_CHANNELS = 8192  # channels: a thread holds 4 of every 1024
_VECTOR = 4
_LAYOUT = ("START0", "STOP0", "MANY0", "FIRST0", "START1", "STOP1", "MANY1", "FIRST1")


def gated_unsuitable(
    gate: Tensor, up: Tensor, sizes: Sequence[int], runs: Sequence[int], offset: Tensor | None
) -> str | None:
    """Return None where the kernel for gated rows serves, else the reason why not.

    Args:
        gate: `[M, K]`, stride 1 along K.
        up: Likewise.
        sizes: Channels of the groups of the rotation.
        runs: Layout of the groups (`neurons.backends.triton_encode_tiles.runs_of`).
        offset: float32 `[K]` or None.
    """
    reason = without(gate.device)
    if reason is not None:
        return reason
    if not _aligned(tuple(sizes), tuple(runs)):
        return "one or two groups of neighbours in Hadamard blocks at multiples of their sizes, from 16, only"
    if not _in_vectors(gate, up, offset):
        return "rows in fours only"
    if gate.shape[1] > RADIX * _MOST_THREADS * _MOST_CLUSTER:
        return f"up to {RADIX * _MOST_THREADS * _MOST_CLUSTER} channels only"
    if _MOST_CLUSTER * len(gate) > processors(gate.device):
        return "more rows than the device has clusters at a time: a block of threads for each is enough"
    return None


class NormedRows(NamedTuple):
    """Rows whose norm is encoded by `normed_source`.

    Attributes:
        x: `[M, K]`, stride 1 along K.
        added: Likewise, added to x first; or None.
        gain: Of the norm, `[K]` in the dtype of x; or None.
        eps: Added to the mean of the squares.
        offset: Taken off, float32 `[K]`; or None.
        capacities: float32 `[G]`.
        clip: float32 `[G]`.
        runs: Layout of the groups (`neurons.backends.triton_encode_tiles.runs_of`).
        range_mode: Of the groups: 0 own ranges, 1 one for all, 2 own ones with commensurate thresholds.
    """

    x: Tensor
    added: Tensor | None
    gain: Tensor | None
    eps: float
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
        rows, channels = self.x.shape
        if channels > _MOST_CHANNELS or rows > EARLY_ROWS:
            return f"up to {_MOST_CHANNELS} channels and {EARLY_ROWS} rows only"
        operands = (self.x, self.added, self.gain, self.offset)
        if any(t is not None and t.dtype != self.x.dtype for t in operands[:3]):
            return "one dtype only"
        return groups_unsuitable(self.runs, channels, *operands)


def groups_unsuitable(
    runs: Sequence[int] | None, channels: int, *operands: Tensor | None
) -> str | None:
    """Return None where rows hold one or two groups of neighbours in fours, else the reason why not.

    Args:
        runs: Layout of the groups (`neurons.backends.triton_encode_tiles.runs_of`).
        channels: K.
        operands: Rows `[M, K]`, or `[K]`.
    """
    if (
        runs is None
        or len(runs) not in (4, 8)
        or min(runs[3::4]) < 0
        or sum(runs[2::4]) != channels
    ):
        return "one or two groups of neighbours only"
    if any(size % _VECTOR for size in runs) or not _in_vectors(*operands):
        return "groups and rows in fours only"
    return None


def _in_vectors(*operands: Tensor | None) -> bool:
    """Whether rows can be read four neighbours at a time."""
    for x in operands:
        if x is None:
            continue
        step = _VECTOR * x.element_size()
        if x.data_ptr() % step or (x.dim() == 2 and x.stride(0) % _VECTOR):
            return False
    return True


@lru_cache(maxsize=1024)
def _aligned(sizes: tuple[int, ...], runs: tuple[int, ...]) -> bool:
    blocks = rotation_blocks(sizes)
    starts = [0, *accumulate(blocks)]
    return (
        len(runs) in (4, 8)
        and tuple(runs[2::4]) == sizes
        and tuple(runs[3::4]) == (0, *accumulate(sizes))[: len(sizes)]
        and all(p >= RADIX and at % p == 0 for p, at in zip(blocks, starts, strict=False))
    )


def gated_launch(
    gate: Tensor,
    up: Tensor,
    layout: tuple[Tensor | None, Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    runs: Sequence[int],
    range_mode: int,
) -> Launch:
    """The launch for operands of which `gated_unsuitable` says nothing.

    Args:
        gate: As in `gated_unsuitable`.
        up: Likewise.
        layout: Offset float32 `[K]` or None, capacities and clip factors float32 `[G]`.
        outputs: Counts uint8 `[M, P]`, thresholds, zero points, sums of counts `[M, G]`.
        runs: As in `gated_unsuitable`.
        range_mode: As `NormedRows` has it.
    """
    rows, channels = gate.shape
    warps = -(-channels // (RADIX * _WARP))
    cluster = min(_MOST_CLUSTER, 1 << (warps - 1).bit_length())
    threads = _WARP * -(-warps // cluster)
    macros = {
        **encoding_macros(gate, layout[0], runs, range_mode),
        "CLUSTER": cluster,
        "THREADS": threads,
    }
    numbers = (gate.stride(0), up.stride(0), channels, outputs[0].shape[1], *both_runs(runs))
    return Launch(
        *(gated_source.SOURCE, "encode_gated", macros, rows * cluster, threads),
        gated_source.shared_bytes(threads),
        (gate, up, *layout, *outputs, *numbers),
    )


def normed_launch(rows: NormedRows, outputs: tuple[Tensor, ...]) -> Launch:
    """The launch for rows that are not `unsuitable`.

    Args:
        rows: What is encoded.
        outputs: The sum of x and what is added `[M, K]`, written if something is; then as in `gated_launch`.
    """
    (many, channels), runs = rows.x.shape, rows.runs or ()
    macros = {
        **encoding_macros(rows.x, rows.offset, runs, rows.range_mode),
        **layout_macros(channels, outputs[1].shape[1], runs),
        "ADDED": int(rows.added is not None),
        "GAIN": int(rows.gain is not None),
    }
    operands = (rows.x, rows.added, rows.gain, rows.offset, rows.capacities, rows.clip)
    strides = (rows.x.stride(0), 0 if rows.added is None else rows.added.stride(0))
    return Launch(
        *(normed_source.SOURCE, "encode_normed", macros, many, normed_source.THREADS),
        normed_source.SHARED_BYTES,
        (*operands, *outputs, float(rows.eps), *strides),
    )


def encoding_macros(
    x: Tensor, offset: Tensor | None, runs: Sequence[int], range_mode: int
) -> dict[str, int]:
    """Macros of `encode_source.ENCODING`."""
    return {
        "GROUPS": len(runs) // 4,
        "RANGE_MODE": range_mode,
        "OFFSET": int(offset is not None),
        "OUT": OUTPUTS[x.dtype],
    }


def layout_macros(channels: int, positions: int, runs: Sequence[int]) -> dict[str, int]:
    """Macros of `encode_source.LAYOUT`."""
    known = dict(zip(_LAYOUT, both_runs(runs), strict=True))
    return {"CHANNELS": channels, "POSITIONS": positions, **known}


def both_runs(runs: Sequence[int]) -> tuple[int, ...]:
    """The layout of two groups, the second one empty if there is one."""
    return (*runs, *(0,) * (8 - len(runs)))
