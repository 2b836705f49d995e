"""The model card of a converted checkpoint: what it is, how it was made, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from snnllm.checkpoint import read_manifest
from snnllm.config import FLOAT_BITS, SpikeConfig

_TEMPLATE = """---
library_name: transformers
tags:
- spiking-neural-network
- spikellm
- quantized
base_model: {source}
---

# {source} as a spiking LLaMA ({label})

Converted with snnllm, an implementation of SpikeLLM
(arXiv 2407.04752). The linears{attention} compute with spikes of generalised integrate-and-fire
neurons: {bits}-bit spikes, {steps}. Weights: {weights}.{tables}

```python
import snnllm.modeling                          # registers the architecture
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```

It runs in three equal views (`snnllm.use_view`): `binary`, `unrolled` over time steps, and
`collapsed` integer execution. Without the package it does not load, on purpose.

## Measured

{measured}

## How it was made

| | |
|---|---|
{provenance}
"""


def write_card(folder: Path, spike: SpikeConfig, measured: Mapping[str, Any]) -> None:
    """Write `README.md` of a checkpoint.

    Args:
        folder: A finished checkpoint; its manifest gives the provenance.
        spike: The configuration.
        measured: Name -> value, as it is to be printed; "nothing yet" is written if empty.
    """
    provenance = dict(read_manifest(folder).get("provenance", {}))
    source = str(provenance.get("source", "a dense LLaMA"))
    rows = [f"| {name} | {value} |" for name, value in measured.items()]
    table = "\n".join(["| what | value |", "|---|---|", *rows]) if rows else "Nothing yet."
    salient = (
        f"{spike.salient_ratio:.0%} salient channels with T = {spike.salient_steps} steps"
        if spike.salient_ratio > 0
        else "one step for every channel"
    )
    text = _TEMPLATE.format(
        source=Path(source).name,
        label=spike.label,
        folder=folder.name,
        attention=" and the attention operands Q, K, V" if spike.encodes_attention else "",
        bits=spike.activation_bits,
        steps=salient,
        weights=_weights(spike),
        tables=_tables(spike),
        measured=table,
        provenance="\n".join(f"| {k} | {_flat(v)} |" for k, v in provenance.items()),
    )
    (folder / "README.md").write_text(text)


def _weights(spike: SpikeConfig) -> str:
    if spike.weight_bits == 16:
        return "float"
    size = spike.weight_group_size
    if spike.mean_steps is not None:
        share = (
            "of an output channel" if size is None else f"per {size} columns of an output channel"
        )
        return (
            f"ternary spike trains of {spike.mean_steps:g} steps on average, one threshold for the "
            f"columns with the same steps, {share}"
        )
    per = "per output channel" if size is None else f"per group of {size} inputs"
    return f"{spike.weight_bits}-bit integer levels, one scale {per}"


def _tables(spike: SpikeConfig) -> str:
    if spike.embedding_bits == FLOAT_BITS:
        return ""
    return f"\nEmbedding and head: {spike.embedding_bits}-bit integer levels, one scale per token."


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
