"""Shapes of well-known LLaMAs; importing them loads no torch."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SHAPES", "Shape"]


class Shape(NamedTuple):
    """Sizes of a LLaMA: hidden, intermediate, heads, KV heads, blocks, vocabulary."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    blocks: int
    vocabulary: int = 32000


SHAPES = {
    "smollm2": Shape(576, 1536, 9, 3, 30, 49152),
    "1B": Shape(2048, 8192, 32, 8, 16, 128256),
    "7B": Shape(4096, 11008, 32, 32, 32),
    "8B": Shape(4096, 14336, 32, 8, 32, 128256),
    "13B": Shape(5120, 13824, 40, 40, 40),
    "70B": Shape(8192, 28672, 64, 8, 80),
}
"""LLaMA 2 7B, 13B and 70B, LLaMA 3.2 1B, LLaMA 3.1 8B, and SmolLM2-135M."""
