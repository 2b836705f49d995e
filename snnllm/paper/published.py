"""The values that the paper and its baselines report, for the models that they report them on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

from transformers import LlamaConfig

__all__ = ["Published", "published_values", "recognise"]

_SHAPES = {
    (4096, 11008, 32, 32): "7B",
    (5120, 13824, 40, 40): "13B",
    (8192, 28672, 80, 8): "70B",
}
"""(hidden, intermediate, layers, KV heads) of LLaMA 1 and 2; 7B and 13B are equal in both."""


@dataclass(frozen=True)
class Published:
    """A reported value.

    Attributes:
        model: Such as `LLaMA-2-7B`.
        bits: Precision, such as `W4A4`; `FP` for the dense model.
        method: Such as `SpikeLLM T=2`.
        metric: `wikitext2` or `c4` (perplexity, windows of 2048), or `tasks` (mean of six, per cent).
        value: The value.
        table: Table of the paper, as far as it is known.
        source: Where the value is from.
    """

    model: str
    bits: str
    method: str
    metric: str
    value: float
    table: str | None
    source: str


@cache
def published_values() -> tuple[Published, ...]:
    """All reported values that this package knows (`published.json`)."""
    text = resources.files("snnllm.paper").joinpath("published.json").read_text(encoding="utf-8")
    return tuple(Published(**value) for value in json.loads(text)["values"])


def recognise(config: LlamaConfig, name: str) -> str | None:
    """Which of the reported models this is.

    LLaMA 1 and 2 of 7B and 13B differ in the length of their context (2048, 4096) only, which some
    conversions state wrongly, so a name that says `llama-2` counts, too.

    Args:
        config: Of the dense model.
        name: Its folder or hub id.

    Returns:
        Such as `LLaMA-2-7B`; None for any other model.
    """
    shape = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_key_value_heads,
    )
    size = _SHAPES.get(shape)
    if size is None or config.vocab_size != 32000:
        return None
    plain = name.lower().replace("-", "").replace("_", "")
    second = size == "70B" or "llama2" in plain or config.max_position_embeddings >= 4096
    return f"LLaMA-{2 if second else 1}-{size}"
