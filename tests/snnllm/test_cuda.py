"""On a GPU: the views agree, and the integers are those of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from snnllm.attention import SpikingLlamaAttention, spiking_attention
from snnllm.attention_products import query_key_accumulators
from snnllm.config import SpikeConfig
from snnllm.conversion import convert
from snnllm.execution import View, set_view, use_view
from snnllm.gptq import gptq
from snnllm.kernels.exact import exact_matmul
from snnllm.linear import SpikingLinear
from snnllm.modeling import load
from snnllm.pipelines.rotated import RotatedOptions, rotated_config
from snnllm.random_model import Shape, llama_config, random_spiking
from snnllm.recording import padded_length
from snnllm.weights import dequantize

pytestmark = pytest.mark.gpu


def inputs(rows: int, channels: int = 64) -> Tensor:
    x = torch.randn(rows, channels, generator=torch.Generator().manual_seed(0)) * 3
    x[..., 0] *= 30
    return x


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("weight_bits", [2, 4, 8])
@pytest.mark.parametrize(("bits", "steps"), [(4, (1, 2)), (8, (1,)), (6, (1, 2, 4))])
def test_linears_have_the_integers_of_the_cpu(
    make_linear: Callable[..., SpikingLinear],
    rows: int,
    weight_bits: int,
    bits: int,
    steps: tuple[int, ...],
) -> None:
    module = make_linear(64, 24, bits=bits, steps=steps, weight_bits=weight_bits, group_size=16)
    x = inputs(rows)
    expected = module.accumulators(x)
    module.cuda()
    outputs = []
    for view in View:
        set_view(module, view)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert torch.equal(module.accumulators(x.cuda()).cpu(), expected), view
        outputs.append(module(x.cuda()))
    assert all(torch.equal(y, outputs[0]) for y in outputs)


@pytest.mark.parametrize("largest", [1, 255, 4000])
def test_exact_matmul(largest: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-largest, largest + 1, (3, 4, 65), generator=generator)
    b = torch.randint(-largest, largest + 1, (3, 65, 6), generator=generator)
    assert torch.equal(exact_matmul(a.cuda(), b.cuda(), largest**2 * 65).cpu().long(), a @ b)


def test_query_key_products_have_the_integers_of_the_cpu(tiny_checkpoint: Path) -> None:
    attention: Any = load(tiny_checkpoint).model.layers[0].self_attn
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randn(1, 4, 5, 8, generator=generator),
        torch.randn(1, 2, 7, 8, generator=generator),
    )
    expected = query_key_accumulators(
        attention, attention.q_encoder.encode(query), attention.k_encoder.encode(key)
    )
    attention.cuda()
    for view in View:
        set_view(attention, view)
        q = attention.run_encoder(attention.q_encoder, query.cuda())
        k = attention.run_encoder(attention.k_encoder, key.cuda())
        for ours, theirs in zip(query_key_accumulators(attention, q, k), expected, strict=True):
            assert torch.equal(ours.cpu(), theirs), view


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_equal_in_all_views(
    tiny_checkpoint: Path, token_ids: Tensor, dtype: torch.dtype
) -> None:
    model: Any = load(tiny_checkpoint, dtype).to("cuda")
    logits = {}
    for view in View:
        with use_view(model, view):
            logits[view] = model(token_ids[:2].cuda()).logits
    assert torch.equal(logits[View.UNROLLED], logits[View.COLLAPSED])
    assert torch.equal(logits[View.BINARY], logits[View.COLLAPSED])


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(9, 3, 64), (8, 8, 128), (8, 1, 80)])
@pytest.mark.parametrize("lengths", [(1, 700), (2, 130), (300, 700)])
@pytest.mark.parametrize("steps", [2, 4])
def test_attention_kernels_at_the_sizes_of_models(
    tolerance: Any,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    lengths: tuple[int, int],
    steps: int,
) -> None:
    (heads, kv_heads, dim), (tokens, keys) = shape, lengths
    config = LlamaConfig(
        hidden_size=heads * dim, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    spike = SpikeConfig(kv_salient_steps=steps, query_groups=steps == 4)
    attention: Any = SpikingLlamaAttention(config, 0, spike).eval()
    generator = torch.Generator().manual_seed(0)
    groups = (torch.rand(2, kv_heads, dim, generator=generator) < 0.1).to(torch.uint8)
    attention.set_channel_groups(groups[0], groups[1])
    sizes = ((heads, tokens), (kv_heads, keys), (kv_heads, keys))
    x = [torch.randn(2, *size, dim, generator=generator).to(dtype) for size in sizes]
    stored = attention._encode_key_value(x[1], x[2])
    used = keys - 100  # the last slots are empty
    seen = torch.ones(2, 1, tokens, keys, dtype=torch.bool).tril(used - tokens)
    seen[0, ..., :70] = False  # padding
    attention.cuda()
    query, mask = x[0].cuda(), seen.cuda()
    payloads = attention._encode_key_value(x[1].cuda(), x[2].cuda())
    for ours, theirs in zip(payloads, stored, strict=True):
        assert torch.equal(ours.cpu(), theirs)
    out, probability = spiking_attention(attention, query, *payloads, mask, dim**-0.5)
    assert probability is None
    attention._kernels = None
    expected = spiking_attention(attention, query, *payloads, mask, dim**-0.5)[0]
    bound = tolerance.two_terms if dtype == torch.float32 else tolerance.half_precision
    visible = mask.any(-1)[:, 0]
    difference = (out.float() - expected.float())[visible].abs().max()
    assert difference <= bound * x[2].float().abs().max()
    assert not out[~visible].any()


@pytest.mark.parametrize("pipeline", ["rtn", "rotated"])
def test_a_model_on_the_gpu_is_converted_there(
    make_llama: Callable[..., Any], token_ids: Tensor, tmp_path: Path, pipeline: str
) -> None:
    spike = SpikeConfig(salient_ratio=0.25)
    model, windows = make_llama().cuda(), token_ids[:2].cuda()
    convert(model, tmp_path / "out", spike, windows, pipeline=pipeline, device="cuda")
    assert torch.isfinite(load(tmp_path / "out").to("cuda")(windows).logits).all()


@torch.no_grad()
@pytest.mark.parametrize(("batch", "padding"), [(1, 0), (2, 5)])
@pytest.mark.parametrize("attention", ["float", "encoded", "encoded, on torch"])
def test_recorded_prefills_make_the_tokens_of_transformers(
    attention: str, batch: int, padding: int
) -> None:
    attention, *on_torch = attention.split(", ")
    spike = rotated_config(SpikeConfig.preset("W4A4T2", attention=attention), RotatedOptions())
    shape, device = Shape(256, 512, 4, 2, 2, 128), torch.device("cuda")
    model: Any = random_spiking(llama_config(shape, 1024), spike, device, torch.float32)
    model.generation_config.eos_token_id = None  # which token a random model makes is chance
    if on_torch:
        for block in model.model.layers:
            block.self_attn._kernels = None
    generator = torch.Generator().manual_seed(0)
    options: Any = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for tokens in (12, 100, 128, 31, 129, 250, 300, 12):
        ids = torch.randint(3, 128, (batch, tokens), generator=generator).cuda()
        mask = torch.ones_like(ids)
        mask[1:, :padding] = 0
        given = {"input_ids": ids, "attention_mask": mask, "cache_implementation": "static"}
        expected = model.generate(**given, **options, disable_compile=True)
        for _ in range(3):
            assert torch.equal(model.generate(**given, **options), expected), tokens
        prompts = model._steps._buffers.prompts[padded_length(tokens)]
        assert prompts.recording is not None
        lengths = [int(x.cumulative_length) for x in model._steps._buffers.layers]
        assert lengths == [tokens + options["max_new_tokens"] - 1] * 2


def test_gptq_is_as_good_in_one_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 200, generator=generator)
    x = torch.randn(600, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    moment = x.T @ x / len(x)
    groups = (150, 50)
    losses = []
    for device in ("cpu", "cuda"):
        error = dequantize(gptq(weight.to(device), moment.to(device), 4, groups), groups).cpu()
        error -= weight
        losses.append(float(((error @ moment) * error).sum()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
