"""What a conversion needs, estimated before it starts: time, memory, disk; and what goes to disk for it."""

from __future__ import annotations

import ctypes
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import LlamaConfig

from snnllm.config import FLOAT_BITS, SpikeConfig
from snnllm.pipelines import Pipeline
from snnllm.pipelines.report import peak_mib
from snnllm.sources import Source

_SHARD = 1 << 30
_STREAMS = {
    Pipeline.RTN: (2, 0),
    Pipeline.ROTATED: (4, 2),
    Pipeline.GPTQ: (4, 2),
    Pipeline.OMNIQUANT: (3, 0),
}
"""Activations of all windows that a pipeline keeps: of the hidden size, of the intermediate size."""
_M_MMAP_THRESHOLD, _MMAP_BYTES = -3, 128 << 10
_PASSES = {Pipeline.RTN: 2, Pipeline.ROTATED: 10, Pipeline.GPTQ: 8, Pipeline.OMNIQUANT: 8}


def return_freed_memory() -> None:
    """Have glibc give memory back as soon as it is freed, in this process; elsewhere nothing happens.

    By itself it raises the size from which an allocation is returned, to tens of MiB: what a conversion frees
    stays in pieces, and the process takes up to twice what is in use.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _MMAP_BYTES)


@dataclass(frozen=True)
class Estimate:
    """What a conversion will need, before it is started.

    Attributes:
        seconds: Estimated wall time on this machine.
        memory_mib: Estimated peak resident memory, MiB.
        disk_mib: Estimated size of the checkpoint, MiB; as much again is used while it is made.
        activations_mib: Activations of all windows, MiB; in `memory_mib` unless they go to a file.
        spills: Whether the activations go to a file.
    """

    seconds: float
    memory_mib: float
    disk_mib: float
    activations_mib: float
    spills: bool


@dataclass(frozen=True)
class Plan:
    """Where the activations of a conversion are kept.

    Attributes:
        memory_mib: Estimated peak resident memory with that, MiB.
        activations_mib: Activations of all windows, MiB.
        spills: Whether they go to a file.
    """

    memory_mib: float
    activations_mib: float
    spills: bool


def plan(
    source: Source,
    spike: SpikeConfig,
    shape: Sequence[int],
    pipeline: Pipeline | str,
    max_memory_mib: float | None = None,
) -> Plan:
    """Decide whether the activations stay in memory.

    Args:
        source: The dense model.
        spike: The spiking configuration.
        shape: `(windows, tokens of a window)`.
        pipeline: What converts.
        max_memory_mib: What may be used, MiB; None for everything.

    Raises:
        ValueError: It is too little even with the activations in a file.
    """
    hidden, inner = _STREAMS[Pipeline(pipeline)]
    c = source.config
    tokens = shape[0] * shape[1]
    kept = 4 * tokens * (hidden * c.hidden_size + inner * c.intermediate_size) / 2**20
    fixed = peak_mib() + _fixed_bytes(source, spike, shape[1], Pipeline(pipeline)) / 2**20
    if max_memory_mib is None:
        return Plan(fixed + kept, kept, False)
    disk = _disk_bytes(source, spike)  # a shard is no larger than what there is to write
    fixed += (min(shard_bytes(max_memory_mib), disk) - min(_SHARD, disk)) / 2**20
    if fixed > max_memory_mib:
        raise ValueError(
            f"max_memory is {max_memory_mib:.0f} MiB, but about {fixed:.0f} MiB are needed for the "
            "process, one block and one batch, with all other activations in a file; allow more or "
            "use shorter windows."
        )
    spills = fixed + kept > max_memory_mib
    return Plan(fixed if spills else fixed + kept, kept, spills)


def shard_bytes(max_memory_mib: float | None) -> int:
    """Size at which a shard is written: an eighth of the memory at most."""
    return _SHARD if max_memory_mib is None else min(_SHARD, int(max_memory_mib * 2**17))


def _block_weights(config: LlamaConfig) -> int:
    hidden, inner = int(config.hidden_size), int(config.intermediate_size)
    dim = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    heads = dim * (config.num_attention_heads + config.num_key_value_heads)
    return int(2 * hidden * heads + 3 * hidden * inner)


def _disk_bytes(source: Source, spike: SpikeConfig) -> float:
    """Converted blocks in a checkpoint, bytes."""
    element = source.tensor("model.norm.weight").element_size()
    bits: float = spike.weight_bits if spike.weight_bits != FLOAT_BITS else 8 * element
    if (
        spike.mean_steps is not None
    ):  # digits of base 2 T + 1, a float16 threshold a group, an index
        bits = (
            1.05 * math.log2(2 * spike.mean_steps + 1) + 16 / (spike.weight_group_size or 128) + 0.1
        )
    return float(_block_weights(source.config) * bits / 8 * source.config.num_hidden_layers)


def _table_bytes(source: Source, pipeline: Pipeline, bits: int = FLOAT_BITS) -> float:
    """Embedding and head, bytes: as the source has them, or in 8 bits."""
    c = source.config
    tables = 1 if c.tie_word_embeddings and pipeline is Pipeline.RTN else 2  # others may untie it
    row = c.hidden_size * source.tensor("model.norm.weight").element_size()
    if bits != FLOAT_BITS:
        row = c.hidden_size + 4  # a float32 scale
    return float(c.vocab_size * row * tables)


def _fixed_bytes(source: Source, spike: SpikeConfig, window: int, pipeline: Pipeline) -> float:
    """What does not depend on the number of windows: blocks, moments, one batch, tables, a shard."""
    c = source.config
    weights = _block_weights(c)
    moments = 3 * c.hidden_size**2 + c.intermediate_size**2
    trained = pipeline is Pipeline.OMNIQUANT
    copies = 9 if trained else 4  # weight, gradient, two moments, rounded, ranges
    scores = c.num_attention_heads * window**2 * (6 if trained else 3)
    row = window * (12 * c.hidden_size + 8 * c.intermediate_size) * (3 if trained else 1)
    shard = min(_SHARD, _disk_bytes(source, spike))
    tables = _table_bytes(source, pipeline)
    return float(4 * (copies * weights + moments + scores + row) + tables + shard)


def estimate(
    source: Source,
    spike: SpikeConfig,
    windows: int,
    window: int,
    pipeline: Pipeline | str = Pipeline.RTN,
    epochs: int = 0,
    max_memory_mib: float | None = None,
) -> Estimate:
    """Estimate time, memory and disk of `convert` from shapes and a short timing of a matmul.

    Passes over every block (two for `rtn`, ten for `rotated` and eight for `gptq`, which round the
    weights several times besides, eight for `omniquant` and three an epoch), the second moments of
    its inputs, and float attention; measured against a float32 matmul on this machine. Expect a
    factor of two.
    """
    pipeline = Pipeline(pipeline)
    c, weights = source.config, _block_weights(source.config)
    hidden, tokens = c.hidden_size, windows * window
    moments = 3 * hidden**2 + c.intermediate_size**2
    attention = 6 * hidden * window
    passes = _PASSES[pipeline] + 3 * epochs
    rounding = 12 * weights * hidden if pipeline in (Pipeline.ROTATED, Pipeline.GPTQ) else 0
    forward = tokens * (passes * weights + moments + (min(passes, 4) / 2 + epochs) * attention)
    flops = (forward + rounding) * c.num_hidden_layers * 2
    rate = _matmul_rate(hidden)
    wanted = plan(source, spike, (windows, window), pipeline, max_memory_mib)
    disk = (
        _disk_bytes(source, spike) + _table_bytes(source, pipeline, spike.embedding_bits)
    ) / 2**20
    return Estimate(flops / rate, wanted.memory_mib, disk, wanted.activations_mib, wanted.spills)


@cache
def _matmul_rate(hidden: int) -> float:
    """Operations a second of a float32 matmul on this CPU: the best of a few, measured once."""
    probe, square = torch.randn(512, hidden), torch.randn(hidden, hidden)
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        probe @ square
        seconds.append(time.perf_counter() - start)
    return 2.0 * 512 * hidden * hidden / min(seconds)
