"""The published values: complete, shipped, and given for the models that they belong to."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from snnllm.paper.published import published_values, recognise
from snnllm.paper.recipes import Training
from snnllm.paper.report import published_lines
from snnllm.paper.tables import TABLES


def shape(**changes: Any) -> LlamaConfig:
    values = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "name", "expected"),
    [
        ({}, "llama-7b", "LLaMA-1-7B"),
        ({"max_position_embeddings": 4096}, "somewhere", "LLaMA-2-7B"),
        ({}, "meta/Llama-2-7b-hf", "LLaMA-2-7B"),
        (
            {
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
                "num_key_value_heads": 40,
            },
            "x",
            "LLaMA-1-13B",
        ),
        ({"vocab_size": 32016}, "codellama", None),
        ({"hidden_size": 2048}, "llama-2", None),
    ],
)
def test_models_are_recognised_by_shape_and_name(changes, name, expected):
    assert recognise(shape(**changes), name) == expected


def test_published_values_are_complete_and_ship_with_the_package():
    values = published_values()
    assert all(p.source and p.value > 0 for p in values)
    assert {p.metric for p in values} == {"wikitext2", "c4", "tasks"}
    (anchor,) = {
        p.value
        for p in values
        if (p.model, p.bits, p.method, p.metric) == ("LLaMA-1-7B", "W4A4", "OmniQuant", "wikitext2")
    }
    assert anchor == 11.26
    known = {r.published for r in TABLES["main"](Training()).rows} | {"PB-LLM", "SpikeLLM ternary"}
    assert {p.method for p in values} <= known
    assert any("14.16" in line and "T = 4" in line for line in published_lines("LLaMA-2-7B"))
