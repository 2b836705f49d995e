"""Encoding of few gated and rotated rows in CUDA C++ on Hopper: where it serves, its launch.

The integers are those of `snnllm.kernels.triton.swiglu`, whose kernel has a whole row in one block of threads and runs
wherever this cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from torch import Tensor

from snnllm.hadamard import RADIX, rotation_blocks
from snnllm.kernels.cuda import encode_source
from snnllm.kernels.cuda.driver import Launch, processors, without
from snnllm.kernels.cuda.primitives import OUTPUTS

_MOST_CLUSTER = 8
_MOST_THREADS = 512
_WARP = 32


def unsuitable(
    gate: Tensor, up: Tensor, sizes: Sequence[int], runs: Sequence[int], offset: Tensor | None
) -> str | None:
    """Return None where the kernel serves, else the reason why not.

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
    step = 16 // gate.element_size()
    starts = [x.data_ptr() for x in (gate, up, offset) if x is not None]
    if any(at % 16 for at in starts) or any(x.stride(0) % step for x in (gate, up)):
        return "rows at multiples of 16 bytes only"
    if gate.shape[1] > RADIX * _MOST_THREADS * _MOST_CLUSTER:
        return f"up to {RADIX * _MOST_THREADS * _MOST_CLUSTER} channels only"
    if _MOST_CLUSTER * len(gate) > processors(gate.device):
        return "more rows than the device has clusters at a time: a block of threads for each is enough"
    return None


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


def planned(
    gate: Tensor,
    up: Tensor,
    layout: tuple[Tensor | None, Tensor, Tensor],
    outputs: tuple[Tensor, ...],
    runs: Sequence[int],
    shared: bool,
) -> Launch:
    """The launch for operands of which `unsuitable` says nothing.

    Args:
        gate: As in `unsuitable`.
        up: Likewise.
        layout: Offset float32 `[K]` or None, capacities and clip factors float32 `[G]`.
        outputs: Counts uint8 `[M, P]`, thresholds, zero points, sums of counts `[M, G]`.
        runs: As in `unsuitable`.
        shared: One range for both groups.
    """
    (rows, channels), offset = gate.shape, layout[0]
    warps = -(-channels // (RADIX * _WARP))
    cluster = min(_MOST_CLUSTER, 1 << (warps - 1).bit_length())
    threads = _WARP * -(-warps // cluster)
    macros = {
        "CLUSTER": cluster,
        "THREADS": threads,
        "GROUPS": len(runs) // 4,
        "ONE_RANGE": int(shared),
        "OFFSET": int(offset is not None),
        "OUT": OUTPUTS[gate.dtype],
    }
    numbers = (
        gate.stride(0),
        up.stride(0),
        channels,
        outputs[0].shape[1],
        *runs,
        *(0,) * (8 - len(runs)),
    )
    return Launch(
        *(encode_source.SOURCE, "encode_gated", macros, rows * cluster, threads),
        encode_source.shared_bytes(threads),
        (gate, up, *layout, *outputs, *numbers),
    )
